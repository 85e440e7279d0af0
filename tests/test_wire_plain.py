"""Plain messages are those that `encode` writes, and nothing is one that `decode` does not take."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psframe.errors import MessageError
from psframe.events import COPIED, RELEASE_COPY, RELEASE_HOLD, Answer, Push, Reason
from psframe.wire import (
    HEADER_BYTES,
    Delivery,
    Limits,
    Link,
    decode,
    encode,
    read_plain_answer,
    read_plain_push,
    write_plain_answer,
    write_plain_push,
)

WORKERS, SHARD_BYTES = 5, 24
TO_LEADER = Limits(Link.WORKER_TO_LEADER, WORKERS, 1, SHARD_BYTES, SHARD_BYTES)
TO_WORKER = Limits(Link.SERVER_TO_WORKER, WORKERS, 1, SHARD_BYTES, SHARD_BYTES, worker=3, server=0)
DELIVERIES = {False: Delivery.IN_PLACE, True: Delivery.STREAMED}
COUNTS = st.integers(0, 2**62 - 1)


@given(st.integers(0, WORKERS - 1), COUNTS, st.integers(0, 1), COUNTS, st.booleans())
def test_a_plain_push_is_the_push(worker, seq, slot, version, arriving) -> None:
    buffer = bytearray(HEADER_BYTES)
    n_bytes = SHARD_BYTES if arriving else 0
    write_plain_push(buffer, worker, seq, slot, version, n_bytes)
    push = Push(worker, seq, slot, version, True, 0.0, True, RELEASE_HOLD, 0, arriving)
    assert bytes(buffer) == encode(push, DELIVERIES[arriving], n_bytes)
    plain = worker, seq, slot, version, arriving
    assert read_plain_push(buffer, HEADER_BYTES, TO_LEADER) == plain


@given(COUNTS, COUNTS, st.integers(0, WORKERS + 2), COUNTS)
def test_a_plain_answer_is_the_answer(seq, staleness, index, version) -> None:
    buffer = bytearray(HEADER_BYTES)
    write_plain_answer(buffer, 3, seq, staleness, index, version)
    answer = Answer(3, seq, False, True, Reason.NONE, version, staleness, index, version)
    assert bytes(buffer) == encode(answer)
    assert read_plain_answer(buffer, HEADER_BYTES, seq, TO_WORKER) == (staleness, index, version)
    assert read_plain_answer(buffer, HEADER_BYTES, seq + 1, TO_WORKER) is None


OTHERS = [
    (Push(1, 4, 0, 2, False, 0.0, True, RELEASE_HOLD), Delivery.IN_PLACE),
    (Push(1, 4, 0, 2, True, 1.0, True, RELEASE_HOLD), Delivery.IN_PLACE),
    (Push(1, 4, 0, 2, True, 0.0, False, RELEASE_HOLD), Delivery.IN_PLACE),
    (Push(1, 4, 0, 2, True, 0.0, True, 0), Delivery.IN_PLACE),
    (Push(1, 4, 0, 2, True, 0.0, True, RELEASE_COPY), Delivery.IN_PLACE),
    (Push(1, 4, 0, 2, True, 0.0, True, RELEASE_HOLD, 9), Delivery.IN_PLACE),
    (Push(1, 4, 0, 2, True, 0.0, False, RELEASE_HOLD, 0, True), Delivery.STREAMED),
    (Push(1, 4, 0, 2, True, 0.0, True, RELEASE_HOLD), Delivery.RANGE),
    (Answer(3, 4, True, False, Reason.STOPPED), Delivery.IN_PLACE),
    (Answer(3, 4, False, False, Reason.NON_FINITE, 2, 0, 1, 2), Delivery.IN_PLACE),
    (Answer(3, 4, False, True, Reason.NONE, 2, 0, COPIED, 2), Delivery.IN_PLACE),
    (Answer(3, 4, False, True, Reason.NONE, 2, 0, 1, 3), Delivery.IN_PLACE),
    (Answer(3, 4, False, True, Reason.NONE, 2, 0, 1, 2, 7), Delivery.IN_PLACE),
    (Answer(3, 4, buffer=1, version=2), Delivery.IN_PLACE),
]


@pytest.mark.parametrize(("event", "delivery"), OTHERS)
def test_what_is_not_plain_is_left(event, delivery) -> None:
    data = encode(event, delivery, SHARD_BYTES if delivery is not Delivery.IN_PLACE else 0)
    assert read_plain_push(data, HEADER_BYTES, TO_LEADER) is None
    assert read_plain_answer(data, HEADER_BYTES, 4, TO_WORKER) is None


def test_of_a_worker_that_shares_no_memory_nothing_is_plain() -> None:
    far = Limits(
        Link.WORKER_TO_LEADER, WORKERS, 1, SHARD_BYTES, deliveries=frozenset({Delivery.RANGE})
    )
    for n_bytes in (0, SHARD_BYTES):
        buffer = bytearray(HEADER_BYTES)
        write_plain_push(buffer, 1, 4, 0, 2, n_bytes)
        assert read_plain_push(buffer, HEADER_BYTES, far) is None


def test_another_length_is_not_plain() -> None:
    push, answer = bytearray(HEADER_BYTES + 1), bytearray(HEADER_BYTES + 1)
    write_plain_push(push, 1, 4, 0, 2)
    write_plain_answer(answer, 3, 4, 0, 1, 2)
    for n_bytes in (0, HEADER_BYTES - 1, HEADER_BYTES + 1):
        assert read_plain_push(push, n_bytes, TO_LEADER) is None
        assert read_plain_answer(answer, n_bytes, 4, TO_WORKER) is None


def test_what_is_taken_of_mutated_bytes_is_what_decode_takes() -> None:
    """Every byte of both messages, with every value; and random changes of several."""
    push, streamed, answer = (bytearray(HEADER_BYTES) for _ in range(3))
    write_plain_push(push, 1, 4, 0, 2)
    write_plain_push(streamed, 1, 4, 0, 2, SHARD_BYTES)
    write_plain_answer(answer, 3, 4, 1, 2, 9)
    rng = random.Random(5)
    taken = 0
    for data in (push, streamed, answer):
        mutated = [(at, value) for at in range(HEADER_BYTES) for value in range(256)]
        changes = [[one] for one in mutated]
        changes += [[rng.choice(mutated) for _ in range(rng.randrange(2, 5))] for _ in range(4000)]
        for change in changes:
            tried = bytearray(data)
            for at, value in change:
                tried[at] = value
            taken += _agrees(tried)
    assert taken > 1000  # versions, sequence numbers and the like may be anything


def _agrees(data: bytearray) -> bool:
    plain = read_plain_push(data, HEADER_BYTES, TO_LEADER)
    if plain is not None:
        event, _, _ = decode(data, HEADER_BYTES, TO_LEADER)
        worker, seq, slot, version, arriving = plain
        push = Push(worker, seq, slot, version, True, 0.0, True, RELEASE_HOLD, 0, arriving)
        assert event == push
    answer = read_plain_answer(data, HEADER_BYTES, 4, TO_WORKER)
    if answer is not None:
        event, _, _ = decode(data, HEADER_BYTES, TO_WORKER)
        staleness, index, version = answer
        assert event == Answer(3, 4, False, True, Reason.NONE, version, staleness, index, version)
    return plain is not None or answer is not None


def test_bytes_that_are_no_message_are_not_plain() -> None:
    data = bytearray(HEADER_BYTES)
    assert read_plain_push(data, HEADER_BYTES, TO_LEADER) is None
    assert read_plain_answer(data, HEADER_BYTES, 0, TO_WORKER) is None
    with pytest.raises(MessageError):
        decode(data, HEADER_BYTES, TO_LEADER)
