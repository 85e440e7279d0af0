"""Messages over a socket: whole, in order, bounded, to the last one before the end."""

from __future__ import annotations

import random
import socket

import pytest

from psframe.errors import MessageError
from psframe.transports.frames import Frames


def pair(bytes_max: int = 1 << 20) -> tuple[Frames, Frames]:
    one, other = socket.socketpair()
    return Frames(one, bytes_max), Frames(other, bytes_max)


@pytest.mark.parametrize("seed", range(5))
def test_messages_arrive_whole_and_in_order_however_the_socket_cuts_them(seed: int) -> None:
    rng = random.Random(seed)
    sent = [rng.randbytes(rng.choice([0, 1, 64, 5000, 400_000])) for _ in range(60)]
    ours, theirs = pair()
    for message in sent:
        ours.send(message)
    received = []
    while len(received) < len(sent):
        ours.flush()
        message = theirs.take()
        if message is not None:
            received.append(bytes(message))
    assert received == sent
    assert theirs.take() is None
    assert not theirs.ended
    ours.close()
    theirs.close()


def test_what_was_sent_before_the_end_is_taken_before_it() -> None:
    ours, theirs = pair()
    ours.send(b"the last")
    ours.close()
    assert not theirs.ended
    assert theirs.take() == b"the last"
    assert theirs.take() is None
    assert theirs.ended
    theirs.close()


def test_half_a_message_before_the_end_is_none() -> None:
    one, other = socket.socketpair()
    theirs = Frames(other, 100)
    one.send(b"\x04\x00\x00\x00abc")
    one.close()
    assert theirs.take() is None
    assert theirs.ended
    theirs.close()


def test_who_has_closed_its_end_is_sent_nothing_and_that_is_no_error() -> None:
    ours, theirs = pair()
    theirs.close()
    ours.send(b"anybody?")
    assert ours.flush()
    assert ours.take() is None
    assert ours.ended
    ours.close()


def test_a_message_that_is_too_long_is_refused_before_it_is_there() -> None:
    one, other = socket.socketpair()
    theirs = Frames(other, 100)
    one.send(b"\x65\x00\x00\x00")
    with pytest.raises(MessageError, match="a message of 101 bytes is longer than any of ours"):
        theirs.take()
    one.close()
    theirs.close()


def test_waiting_ends_when_something_comes_or_the_time_is_over() -> None:
    ours, theirs = pair()
    theirs.wait(0.0)
    assert theirs.take() is None
    ours.send(b"x")
    theirs.wait(60.0)
    assert theirs.take() == b"x"
    ours.close()
    theirs.close()
