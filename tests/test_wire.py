"""The bytes of every message, and what becomes of bytes that are none."""

import math
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psframe.consistency import BSP, SSP, Async
from psframe.errors import MessageError
from psframe.events import (
    ALL_REQUESTS,
    COPIED,
    Answer,
    Decision,
    End,
    Failure,
    Finished,
    Forget,
    GiveBack,
    Gone,
    Lease,
    LeaseKind,
    LeaseRequest,
    Leave,
    Log,
    Lost,
    Mark,
    Pin,
    Pull,
    Push,
    RandomState,
    Reason,
    Report,
    Sent,
    ShardSaved,
    Spans,
    Stop,
    TaskSpec,
    Withheld,
)
from psframe.leader import Leader
from psframe.server import ServerMemory
from psframe.store import HeapBuffers, Store, buffer_count
from psframe.wire import (
    HEADER_BYTES,
    NAME_BYTES_MAX,
    NAMES_MAX,
    Delivery,
    Kind,
    Limits,
    Link,
    decode,
    encode,
    encode_into,
    payload_limit,
)

WORKERS, SERVERS, SHARD_BYTES = 5, 3, 24
LIMITS = {link: Limits(link, WORKERS, SERVERS, SHARD_BYTES, SHARD_BYTES) for link in Link}
TO_LEADER, TO_WORKER = Link.WORKER_TO_LEADER, Link.SERVER_TO_WORKER
TO_FOLLOWER, FROM_FOLLOWER = Link.LEADER_TO_FOLLOWER, Link.FOLLOWER_TO_LEADER
IN_PLACE, INLINE, RANGE, STREAMED = Delivery


def header(*fields) -> bytes:
    """The log, the last field, may be left out: it is 0 then."""
    log = () if len(fields) == 12 else (0,)
    return struct.pack("<4sBBHiiqqqdqqq", b"PSF1", *fields, *log)


# Event, link, and the bytes: kind flags reason worker slot seq version staleness norm payload aux
# log.
PLAIN = [
    (
        Push(4, 7, 1, 5, True, 1.5, True, 2, 258),
        TO_LEADER,
        bytes.fromhex(
            "50534631 01 0c 0000 04000000 01000000 0700000000000000 0500000000000000"
            "0000000000000000 000000000000f83f 0000000000000000 0200000000000000"
            "0201000000000000"
        ),
    ),
    (
        Push(0, 0, 0, 0, False, math.inf, False, 0),
        TO_LEADER,
        header(1, 0, 0, 0, 0, 0, 0, 0, math.inf, 0, 0),
    ),
    (Pull(3, 8, True, 3), TO_LEADER, header(2, 4, 0, 3, 0, 8, 0, 0, 0.0, 0, 3)),
    (Pull(3, 8, False, 0, 9), TO_LEADER, header(2, 0, 0, 3, 0, 8, 0, 0, 0.0, 0, 0, 9)),
    (
        LeaseRequest(2, 9, 1, TaskSpec(100, 32, 3, True, 50, 16)),
        TO_LEADER,
        header(3, 0, 0, 2, 0, 9, 0, 0, 0.0, 56, 0) + struct.pack("<7q", 1, 100, 32, 3, 1, 50, 16),
    ),
    (
        LeaseRequest(2, 9, 0, TaskSpec(1, 1, 0, False), True),
        TO_LEADER,
        header(3, 4, 0, 2, 0, 9, 0, 0, 0.0, 56, 0) + struct.pack("<7q", 0, 1, 1, 0, 0, 0, 1),
    ),
    (GiveBack(2, 9), TO_LEADER, header(17, 0, 0, 2, 0, 9, 0, 0, 0.0, 0, 0)),
    (
        Report(1, {"loss": 2.5, "µ": -1.0}),
        TO_LEADER,
        header(4, 0, 0, 1, 0, 0, 0, 0, 0.0, 30, 0)
        + struct.pack("<IH4sdH2sd", 2, 4, b"loss", 2.5, 2, b"\xc2\xb5", -1.0),
    ),
    (
        Log(1, {"lr": (0.5, 3)}),
        TO_LEADER,
        header(5, 0, 0, 1, 0, 0, 0, 0, 0.0, 24, 0) + struct.pack("<IH2sdq", 1, 2, b"lr", 0.5, 3),
    ),
    (
        Spans(1, 2.5, [(7, 1.0, 2.0), (0, 0.0, 0.0)]),
        TO_LEADER,
        header(18, 0, 0, 1, 0, 0, 0, 0, 2.5, 34, 0) + struct.pack("<BddBdd", 7, 1, 2, 0, 0, 0),
    ),
    (
        Spans(-1, 2.5, [(7, 1.0, 2.0)], 2),
        FROM_FOLLOWER,
        header(18, 0, 0, 0, 2, 0, 0, 0, 2.5, 17, 0) + struct.pack("<Bdd", 7, 1, 2),
    ),
    (
        RandomState(1, 9, (2**128 - 2, 2**64 + 1, 1, 5)),
        TO_LEADER,
        header(19, 0, 0, 1, 0, 9, 0, 0, 0.0, 37, 0)
        + bytes.fromhex("fe ffffffffffffffffffffffffffffff 0100000000000000 0100000000000000")
        + struct.pack("<BI", 1, 5),
    ),
    (Stop(4), TO_LEADER, header(6, 0, 0, 4, 0, 0, 0, 0, 0.0, 0, 0)),
    (Leave(4), TO_LEADER, header(7, 0, 0, 4, 0, 0, 0, 0, 0.0, 0, 0)),
    (
        Leave(4, Failure("E", "é!", "at 1")),
        TO_LEADER,
        header(7, 4, 0, 4, 0, 0, 0, 0, 0.0, 14, 0)
        + struct.pack("<H1sH3sH4s", 1, b"E", 3, b"\xc3\xa9!", 4, b"at 1"),
    ),
    (
        Answer(2, 7, False, True, Reason.NONE, 11, 3, 6, 12, 13),
        TO_WORKER,
        header(8, 8, 0, 2, 6, 7, 12, 3, 0.0, 0, 11, 13),
    ),
    (
        Answer(2, 7, False, False, Reason.BAD_VERSION, 11, -3, COPIED, 12),
        TO_WORKER,
        header(8, 0, 3, 2, -2, 7, 12, -3, 0.0, 0, 11),
    ),
    (
        Answer(2, ALL_REQUESTS, True, False, Reason.LOST),
        TO_WORKER,
        header(8, 4, 6, 2, -1, -1, 0, 0, 0.0, 0, 0),
    ),
    (
        Lease(2, 9, LeaseKind.EVALUATE, 1, 32, 64, 5),
        TO_WORKER,
        header(9, 0, 1, 2, 0, 9, 1, 32, 0.0, 0, 64, 5),
    ),
    (Lease(2, 9, LeaseKind.CONFLICT), TO_WORKER, header(9, 0, 4, 2, 0, 9, 0, 0, 0.0, 0, 0)),
    (
        Decision([(1, 7), (4, 2)], Reason.NON_FINITE_UPDATE, round=True),
        TO_FOLLOWER,
        header(10, 4, 2, 0, 0, 0, 0, 0, 0.0, 24, 0) + struct.pack("<iqiq", 1, 7, 4, 2),
    ),
    (
        Decision([(3, 6)]),
        TO_FOLLOWER,
        header(10, 0, 0, 0, 0, 0, 0, 0, 0.0, 12, 0) + struct.pack("<iq", 3, 6),
    ),
    (Decision([], round=True), TO_FOLLOWER, header(10, 4, 0, 0, 0, 0, 0, 0, 0.0, 0, 0)),
    (
        Decision([(1, 7), (4, 2)], step=False, scales=[0.5, 1.0]),
        TO_FOLLOWER,
        header(10, 24, 0, 0, 0, 0, 0, 0, 0.0, 40, 0) + struct.pack("<iqdiqd", 1, 7, 0.5, 4, 2, 1.0),
    ),
    (Forget(3), TO_FOLLOWER, header(22, 0, 0, 3, 0, 0, 0, 0, 0.0, 0, 0)),
    (Gone(3), TO_FOLLOWER, header(11, 0, 0, 3, 0, 0, 0, 0, 0.0, 0, 0)),
    (Pin(True), TO_FOLLOWER, header(12, 4, 0, 0, 0, 0, 0, 0, 0.0, 0, 0)),
    (Pin(False), TO_FOLLOWER, header(12, 0, 0, 0, 0, 0, 0, 0, 0.0, 0, 0)),
    (Pin(False, True), TO_FOLLOWER, header(12, 8, 0, 0, 0, 0, 0, 0, 0.0, 0, 0)),
    (End(True), TO_FOLLOWER, header(13, 4, 0, 0, 0, 0, 0, 0, 0.0, 0, 0)),
    (Mark(7), TO_FOLLOWER, header(20, 0, 0, 0, 0, 7, 0, 0, 0.0, 0, 0)),
    (End(), TO_FOLLOWER, header(13, 0, 0, 0, 0, 0, 0, 0, 0.0, 0, 0)),
    (Withheld(2, 4, 7, 3), FROM_FOLLOWER, header(14, 0, 0, 4, 2, 7, 0, 0, 0.0, 0, 3)),
    (Lost(3), FROM_FOLLOWER, header(15, 0, 0, 3, 0, 0, 0, 0, 0.0, 0, 0)),
    (
        ShardSaved(2, 7, '{"é": 1}'),
        FROM_FOLLOWER,
        header(21, 0, 0, 0, 2, 7, 0, 0, 0.0, 9, 0) + '{"é": 1}'.encode(),
    ),
    (Finished(2), FROM_FOLLOWER, header(16, 0, 0, 0, 2, 0, 0, 0, 0.0, 0, 0)),
]
ARRAY = bytes(range(SHARD_BYTES))
# The same with an array: the delivery is in the two lowest bits of flags.
WITH_ARRAY = [
    (
        Push(4, 7, 1, 5, True, 1.5, False, 0),
        TO_LEADER,
        INLINE,
        header(1, 5, 0, 4, 1, 7, 5, 0, 1.5, 24, 0) + ARRAY,
    ),
    (
        Push(4, 7, 1, 5, True, 1.5, False, 0),
        TO_LEADER,
        RANGE,
        header(1, 6, 0, 4, 1, 7, 5, 0, 1.5, 24, 0),
    ),
    (
        Answer(2, 7, buffer=6, version=12),
        TO_WORKER,
        INLINE,
        header(8, 1, 0, 2, 6, 7, 12, 0, 0.0, 24, 0) + ARRAY,
    ),
    (
        Answer(2, 7, buffer=6, version=12),
        TO_WORKER,
        RANGE,
        header(8, 2, 0, 2, 6, 7, 12, 0, 0.0, 24, 0),
    ),
]
MESSAGES = [(event, link, IN_PLACE, data) for event, link, data in PLAIN] + WITH_ARRAY
VALID = [pytest.param(link, data, id=f"{e}"[:40]) for e, link, _, data in MESSAGES]


def encoded(event, delivery: Delivery, payload_bytes: int, array: bytes = ARRAY) -> bytes:
    """The whole message, as a transport would send it."""
    if delivery is IN_PLACE:
        payload_bytes = 0
    return encode(event, delivery, payload_bytes) + (array if delivery is INLINE else b"")


def read(data: bytes, limits: Limits):
    return decode(data, len(data), limits)


def refuse(data: bytes, limits: Limits, text: str) -> None:
    with pytest.raises(MessageError, match=text):
        read(data, limits)


# ---- exact bytes, and there and back ----


@pytest.mark.parametrize(("event", "link", "delivery", "data"), MESSAGES)
def test_the_bytes_of_a_message_are_these(event, link, delivery, data) -> None:
    n_payload = SHARD_BYTES if delivery else 0
    assert encoded(event, delivery, n_payload) == data
    assert read(data, LIMITS[link])[:2] == (event, delivery)
    assert read(data, LIMITS[link])[2] == int.from_bytes(data[48:56], "little")


@pytest.mark.parametrize(("event", "link", "delivery", "data"), MESSAGES)
@pytest.mark.parametrize("memory", ["bytearray", "memoryview", "ndarray"])
def test_encode_into_writes_nothing_behind_the_message(event, link, delivery, data, memory) -> None:
    room = bytearray(b"\xee" * (HEADER_BYTES + payload_limit(WORKERS)))
    views = {"bytearray": room, "memoryview": memoryview(room)}
    view = views.get(memory, np.frombuffer(room, np.uint8))
    length = encode_into(event, view, delivery, SHARD_BYTES if delivery else 0)
    assert length == len(data)
    written = HEADER_BYTES if delivery else length  # the array is the caller's
    assert room[:written] == data[:written]
    assert set(room[written:]) == {0xEE}
    if delivery is IN_PLACE:
        assert decode(view, length, LIMITS[link])[0] == event


def test_every_kind_is_tried() -> None:
    assert {data[4] for *_, data in MESSAGES} == set(map(int, Kind))


COUNTS = st.one_of(st.integers(0, 3), st.just(2**62), st.integers(0, 2**62))
POSITIVE = st.one_of(st.integers(1, 3), st.just(2**62), st.integers(1, 2**62))
WORKER = st.integers(0, WORKERS - 1)
RELEASES = st.integers(0, 3)
FLOATS = st.floats()
NAMES = st.text(st.characters(codec="utf-8"), max_size=NAME_BYTES_MAX // 4)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
TASKS = st.builds(TaskSpec, POSITIVE, POSITIVE, COUNTS, st.booleans(), COUNTS, POSITIVE)
FAILURES = st.none() | st.builds(Failure, TEXTS, TEXTS, TEXTS)
PUSHES = st.builds(
    Push,
    WORKER,
    COUNTS,
    st.integers(0, 1),
    COUNTS,
    st.booleans(),
    st.floats(min_value=0.0),
    st.booleans(),
    RELEASES,
    COUNTS,
)
BUFFERS = st.integers(-2, buffer_count(WORKERS) - 1)
APPLIED = st.builds(
    Answer,
    WORKER,
    COUNTS,
    st.just(False),
    st.just(True),
    st.just(Reason.NONE),
    COUNTS,
    COUNTS,
    log=COUNTS,
)
REFUSED = st.builds(
    Answer,
    WORKER,
    COUNTS | st.just(ALL_REQUESTS),
    st.just(True),
    st.just(False),
    st.sampled_from(Reason).filter(bool),
    COUNTS,
    st.integers(-(2**62), 2**62),
)
PARAMS = st.builds(Answer, WORKER, COUNTS, buffer=BUFFERS.filter(lambda b: b != -1), version=COUNTS)
RANGES = st.lists(COUNTS, min_size=2, max_size=2, unique=True).map(sorted)
BLOCKS = st.builds(
    lambda worker, seq, kind, epoch, block, log: Lease(worker, seq, kind, epoch, *block, log),
    WORKER,
    COUNTS,
    st.sampled_from((LeaseKind.TRAIN, LeaseKind.EVALUATE)),
    COUNTS,
    RANGES,
    COUNTS,
)
DECIDED = st.sampled_from([r for r in Reason if r < Reason.STOPPED or r is Reason.STALE])
MEMBERS = st.dictionaries(WORKER, COUNTS).map(lambda members: sorted(members.items()))
NUMBERS = st.tuples(
    st.integers(0, 2**128 - 1),
    st.integers(0, 2**127 - 1).map(lambda i: 2 * i + 1),
    st.integers(0, 1),
    st.integers(0, 2**32 - 1),
)
TIMES = st.floats(0, 1e12).map(abs)
SPANS = st.lists(
    st.tuples(st.integers(0, 7), TIMES, TIMES).map(lambda s: (s[0], *sorted(s[1:]))), max_size=5
)


def scaled(members: list[tuple[int, int]]) -> st.SearchStrategy[Decision]:
    factors = st.lists(st.floats(0, 1e300), min_size=len(members), max_size=len(members))
    return st.builds(
        Decision, st.just(members), DECIDED, st.booleans(), st.booleans(), factors | st.just([])
    )


EVENTS = {
    TO_LEADER: st.one_of(
        PUSHES,
        st.builds(Pull, WORKER, COUNTS, st.booleans(), RELEASES, COUNTS),
        st.builds(LeaseRequest, WORKER, COUNTS, COUNTS, TASKS, st.booleans()),
        st.builds(GiveBack, WORKER, COUNTS),
        st.builds(Report, WORKER, st.dictionaries(NAMES, FLOATS, max_size=5)),
        st.builds(Log, WORKER, st.dictionaries(NAMES, st.tuples(FLOATS, POSITIVE), max_size=5)),
        st.builds(Spans, WORKER, TIMES, SPANS),
        st.builds(RandomState, WORKER, COUNTS, NUMBERS),
        st.builds(Stop, WORKER),
        st.builds(Leave, WORKER, FAILURES),
    ),
    TO_WORKER: st.one_of(APPLIED, REFUSED, PARAMS, BLOCKS),
    TO_FOLLOWER: st.one_of(
        st.builds(Decision, MEMBERS.filter(bool), DECIDED, st.booleans()),
        st.builds(Decision, MEMBERS, DECIDED, st.booleans()),
        MEMBERS.filter(bool).flatmap(scaled),
        st.builds(Gone, WORKER),
        st.builds(Forget, WORKER),
        st.builds(Pin, st.booleans()),
        st.builds(Mark, COUNTS),
    ),
    FROM_FOLLOWER: st.one_of(
        st.builds(Withheld, st.integers(1, SERVERS - 1), WORKER, COUNTS, COUNTS),
        st.builds(ShardSaved, st.integers(1, SERVERS - 1), COUNTS, TEXTS),
        st.builds(Finished, st.integers(1, SERVERS - 1)),
    ),
}


@pytest.mark.parametrize("link", EVENTS)
@given(data=st.data())
def test_every_event_comes_back(link: Link, data) -> None:
    event = data.draw(EVENTS[link])
    deliveries = [IN_PLACE]
    if isinstance(event, Push) or (isinstance(event, Answer) and event.buffer >= 0):
        deliveries = [IN_PLACE, INLINE, RANGE, *[STREAMED] * isinstance(event, Push)]
    for delivery in deliveries:
        if isinstance(event, Push):
            event.arriving = delivery is STREAMED
        message = encoded(event, delivery, SHARD_BYTES)
        again, got, n_payload = read(message, LIMITS[link])
        assert type(again) is type(event)
        assert got is delivery
        assert encoded(again, got, n_payload) == message  # NaN differs from NaN, bytes do not
        if "nan" not in repr(event):
            assert again == event


# ---- bytes that are no message ----


@pytest.mark.parametrize(("link", "data"), VALID)
def test_a_message_cut_short_or_too_long_is_refused(link: Link, data: bytes) -> None:
    for length in range(len(data)):
        refuse(data[:length], LIMITS[link], "expected")
        with pytest.raises(MessageError):
            decode(data, length, LIMITS[link])
    refuse(data + b"\0", LIMITS[link], "expected")
    with pytest.raises(MessageError, match="expected 72 to"):
        decode(data, len(data) + 1, LIMITS[link])


def mutations(data: bytes, values: range | None = None) -> Iterator[bytes]:
    """Every message that differs in one byte (or, without `values`, in one bit)."""
    for at, byte in enumerate(data):
        for value in values or [byte ^ (1 << bit) for bit in range(8)]:
            if value != byte:
                yield data[:at] + bytes([value]) + data[at + 1 :]


@pytest.mark.parametrize(("link", "data"), VALID)
def test_a_mutated_message_is_refused_or_is_another_message(link: Link, data: bytes) -> None:
    survivors = 0
    for mutated in mutations(data, range(256)):
        try:
            event, delivery, n_payload = read(mutated, LIMITS[link])
        except MessageError:
            continue
        survivors += 1
        array = mutated[HEADER_BYTES:]
        assert encoded(event, delivery, n_payload, array) == mutated
    assert survivors < 255 * len(data) * 0.7


@pytest.mark.parametrize("link", Link)
@given(data=st.binary(max_size=300))
def test_random_bytes_are_refused(link: Link, data: bytes) -> None:
    refuse(data, LIMITS[link], "expected")


@pytest.mark.parametrize("link", Link)
@given(
    kind=st.sampled_from(Kind),
    head=st.binary(min_size=67, max_size=67),
    rest=st.binary(),
    d=st.data(),
)
def test_what_begins_like_a_message_is_refused_or_is_one(link, kind, head, rest, d) -> None:
    zeros = d.draw(st.sets(st.integers(0, 66)))
    head = bytes(0 if i in zeros else byte for i, byte in enumerate(head))
    head = head[:43] + len(rest).to_bytes(8, "little") + head[51:]
    data = b"PSF1" + bytes([kind]) + head + rest
    try:
        event, delivery, n_payload = read(data, LIMITS[link])
    except MessageError:
        return
    assert encoded(event, delivery, n_payload, rest) == data


@pytest.mark.parametrize(("link", "data"), VALID)
@pytest.mark.parametrize("announced", [2**62, 2**63 - 1, -1, 2**31])
def test_an_announced_payload_is_not_allocated(link: Link, data: bytes, announced: int) -> None:
    data = data[:48] + struct.pack("<q", announced) + data[56:]
    limits = LIMITS[link]
    refuse(data, limits, "expected")
    tracemalloc.start()
    try:
        refuse(data, limits, "expected")
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("link", "data"), VALID)
def test_a_message_on_the_wrong_link_is_refused(link: Link, data: bytes) -> None:
    followers = (Kind.PUSH, Kind.PULL, Kind.LEAVE)
    for other in set(Link) - {link}:
        if other is Link.WORKER_TO_FOLLOWER and data[4] in followers:
            assert read(data, LIMITS[other]) == read(data, LIMITS[link])
        elif data[4] == Kind.SPANS and {link, other} == {TO_LEADER, FROM_FOLLOWER}:
            refuse(data, LIMITS[other], "expected 0 from a")
        else:
            refuse(data, LIMITS[other], rf"{other.value} has kind {data[4]}, expected")


PUSH = [1, 12, 0, 4, 1, 7, 5, 0, 1.5, 0, 2, 3]
PULL = [2, 0, 0, 4, 0, 7, 0, 0, 0.0, 0, 2, 3]
ANSWER = [8, 8, 0, 2, 6, 7, 12, 3, 0.0, 0, 11, 3]
LEASE = [9, 0, 1, 2, 0, 9, 1, 32, 0.0, 0, 64, 3]
STOP = [6, 0, 0, 4, 0, 0, 0, 0, 0.0, 0, 0, 0]
(FLAGS, REASON, WHO, SLOT, SEQ, VERSION, STALENESS, NORM, PAYLOAD, AUX, LOG) = range(1, 12)


@pytest.mark.parametrize(
    ("fields", "change", "text"),
    [
        (PUSH, {WHO: 5}, "worker is 5, expected 0 to 4"),
        (PUSH, {WHO: -1}, "worker is -1, expected 0 to 4"),
        (PUSH, {SLOT: 2}, "slot is 2, expected 0 or 1"),
        (PUSH, {SLOT: -1}, "slot is -1, expected 0 or 1"),
        (PUSH, {SEQ: -1}, "seq is -1"),
        (PUSH, {SEQ: 2**62 + 1}, "seq is 4611686018427387905"),
        (PUSH, {VERSION: -1}, "version is -1"),
        (PUSH, {NORM: -1.0}, "norm is -1.0, expected 0 or more"),
        (PUSH, {NORM: -1.0, FLAGS: 0}, "norm is -1.0, expected 0 or more"),
        (PUSH, {NORM: math.nan}, "norm is nan, expected 0 or more"),
        (PUSH, {AUX: 4}, "release is 4, expected 0 to 3"),
        (PUSH, {REASON: 1}, "reason"),
        (PUSH, {STALENESS: 1}, "staleness"),
        (PUSH, {FLAGS: 28}, "flags is 0x1c, expected no bits but 0xf"),
        (PUSH, {FLAGS: 15}, "payload_bytes is 0, expected 24"),
        (ANSWER, {FLAGS: 11, PAYLOAD: 24}, "delivery is 3, expected no STREAMED"),
        (PUSH, {PAYLOAD: 24}, "payload_bytes is 24, expected 0"),
        (PUSH, {FLAGS: 14, PAYLOAD: 23}, "payload_bytes is 23, expected 24"),
        (PUSH, {FLAGS: 13, PAYLOAD: 24}, r"length is 72, expected 72 \+ 24"),
        (PUSH, {LOG: -1}, "log is -1, expected 0 to"),
        (PUSH, {LOG: 2**62 + 1}, "log is 4611686018427387905"),
        (PULL, {LOG: -1}, "log is -1"),
        (PULL, {LOG: 2**62 + 1}, "log is 4611686018427387905"),
        (STOP, {LOG: 1}, "does not use"),
        (ANSWER, {REASON: 8}, "reason is 8, expected 0 to 7"),
        (ANSWER, {REASON: 1}, "reason is 1, expected 0 to 7, and 0 if applied"),
        (ANSWER, {STALENESS: -1}, "staleness is -1"),
        (ANSWER, {FLAGS: 0}, "staleness, push_version"),
        (ANSWER, {AUX: -1}, "push_version is -1"),
        (ANSWER, {SEQ: -1}, "seq is -1"),
        (ANSWER, {SEQ: -2, FLAGS: 12}, "seq is -2"),
        (ANSWER, {FLAGS: 12}, "buffer is 6, expected -2 to 14, -1 if stopped"),
        (ANSWER, {SLOT: 15}, "buffer is 15, expected -2 to 14"),
        (ANSWER, {SLOT: -3}, "buffer is -3, expected -2 to 14"),
        (ANSWER, {SLOT: -1}, "buffer is -1, expected one, since parameters are announced"),
        (ANSWER, {SLOT: -2, FLAGS: 10, PAYLOAD: 24}, "the array has been copied"),
        (ANSWER, {VERSION: -1}, "version is -1"),
        (ANSWER, {NORM: -0.0}, "norm is -0.0, expected 0"),
        (ANSWER, {LOG: -1}, "log is -1"),
        (ANSWER, {LOG: 2**62 + 1}, "log is 4611686018427387905"),
        (LEASE, {LOG: -1}, "log is -1"),
        (LEASE, {LOG: 2**62 + 1}, "log is 4611686018427387905"),
        (LEASE, {REASON: 6}, "lease kind is 6, expected 0 to 5"),
        (LEASE, {STALENESS: 64}, "begin, end"),
        (LEASE, {STALENESS: -1}, "begin, end"),
        (LEASE, {VERSION: -1}, "begin, end"),
        (LEASE, {REASON: 2}, "0 without a block"),
        (LEASE, {NORM: -0.0}, "does not use"),
        (LEASE, {SLOT: 1}, "does not use"),
        (LEASE, {FLAGS: 1}, "flags is 0x1"),
    ],
)
def test_a_wrong_field_is_named(fields: list, change: dict, text: str) -> None:
    link = TO_WORKER if fields in (ANSWER, LEASE) else TO_LEADER
    read(header(*fields), LIMITS[link])
    refuse(header(*(change.get(i, value) for i, value in enumerate(fields))), LIMITS[link], text)


def test_the_norm_of_a_gradient_that_is_not_finite_may_be_nan() -> None:
    fields = [math.nan if i == NORM else 8 if i == FLAGS else v for i, v in enumerate(PUSH)]
    event = read(header(*fields), LIMITS[TO_LEADER])[0]
    assert isinstance(event, Push)
    assert math.isnan(event.norm)
    assert not event.finite


def sums(*named: tuple[bytes, int], count: int | None = None) -> bytes:
    body = struct.pack("<I", len(named) if count is None else count)
    return body + b"".join(struct.pack("<H", n) + name + b"\0" * 8 for name, n in named)


@pytest.mark.parametrize(
    ("kind", "flags", "payload", "text"),
    [
        (3, 0, struct.pack("<7q", 0, 0, 1, 1, 0, 0, 1), "n_samples is 0, expected 1 to"),
        (3, 0, struct.pack("<7q", 0, 1, 0, 1, 0, 0, 1), "batch_size is 0"),
        (3, 0, struct.pack("<7q", 0, 1, 1, -1, 0, 0, 1), "epochs is -1"),
        (3, 0, struct.pack("<7q", 0, 1, 1, 1, 2, 0, 1), "shuffle is 2, expected 0 to 1"),
        (3, 0, struct.pack("<7q", 0, 1, 1, 1, 0, -1, 1), "eval_samples is -1"),
        (3, 0, struct.pack("<7q", 0, 1, 1, 1, 0, 0, 0), "eval_batch_size is 0"),
        (3, 0, struct.pack("<7q", 0, 2**62 + 1, 1, 1, 0, 0, 1), "n_samples is"),
        (3, 0, struct.pack("<7q", -1, 1, 1, 1, 0, 0, 1), "plan is -1"),
        (3, 0, struct.pack("<6q", 0, 1, 1, 1, 0, 0), "payload_bytes is 48, expected 56"),
        (4, 0, b"", "payload_bytes is 0, expected at least 4"),
        (4, 0, sums(count=NAMES_MAX + 1), "names is 65, expected at most 64"),
        (4, 0, sums((b"a", 1), count=2), "payload_bytes is 15, expected at least 17"),
        (4, 0, sums((b"a", 1), (b"a", 1)), "'a' again"),
        (4, 0, sums((b"a" * 257, 257)), "text is 257, expected at most 256"),
        (4, 0, sums((b"a", 10)), "text is 10, expected at most 9"),
        (4, 0, sums((b"a", 2)), "payload_bytes is 15, expected at least 16"),
        (4, 0, sums((b"a", 1)) + b"\0", "payload_bytes is 16, expected 15"),
        (4, 0, sums((b"\xff", 1)), "expected UTF-8"),
        (4, 0, sums((b"\xed\xa0\x80", 3)), "expected UTF-8"),
        (5, 0, sums((b"a", 1)) + b"\0" * 8, "a count is 0, expected 1 to"),
        (5, 0, sums((b"a", 1)) + b"\xff" * 8, "a count is -1, expected 1 to"),
        (7, 0, b"\0" * 6, "payload_bytes is 6, expected 0 without a failure"),
        (7, 4, b"", "payload_bytes is 0, expected at least 2"),
        (7, 4, b"\0" * 7, "payload_bytes is 7, expected 6"),
        (7, 4, struct.pack("<H257sHH", 257, b"", 0, 0), "text is 257, expected at most 256"),
        (10, 8, b"", "count of members is 0, expected at least 1 that is scaled or only gathered"),
        (10, 16, b"", "count of members is 0"),
        (10, 16, struct.pack("<iqd", 1, 0, -0.5), "factor is -0.5, expected a finite number"),
        (10, 16, struct.pack("<iqd", 1, 0, float("nan")), "factor is nan"),
        (10, 16, struct.pack("<iqd", 1, 0, float("inf")), "factor is inf"),
        (10, 16, b"\0" * 12, "payload_bytes is 12, expected a multiple of 20 up to 100"),
        (10, 4, b"\0" * 13, "payload_bytes is 13, expected a multiple of 12 up to 60"),
        (10, 4, b"\0" * 72, "payload_bytes is 72, expected a multiple of 12 up to 60"),
        (10, 4, struct.pack("<iqiq", 1, 0, 1, 0), "member is 1, expected 2 to 4"),
        (10, 4, struct.pack("<iq", 5, 0), "member is 5, expected 0 to 4"),
        (10, 4, struct.pack("<iq", 0, -1), "member's seq is -1"),
    ],
)
def test_a_wrong_payload_is_named(kind: int, flags: int, payload: bytes, text: str) -> None:
    link = TO_FOLLOWER if kind == 10 else TO_LEADER
    data = header(kind, flags, 0, 0, 0, 0, 0, 0, 0.0, len(payload), 0) + payload
    refuse(data, LIMITS[link], text)


@pytest.mark.parametrize("reason", [Reason.STOPPED, Reason.LOST, 8])
def test_nobody_decides_that_a_push_was_lost(reason: int) -> None:
    refuse(header(10, 4, reason, 0, 0, 0, 0, 0, 0.0, 0, 0), LIMITS[TO_FOLLOWER], "reason is")


def test_a_payload_is_no_longer_than_its_limit() -> None:
    limit = payload_limit(WORKERS)
    data = header(4, 0, 0, 0, 0, 0, 0, 0, 0.0, limit + 1, 0) + b"\0" * (limit + 1)
    refuse(data, LIMITS[TO_LEADER], f"payload_bytes is {limit + 1}, expected 0 to {limit}")


# ---- limits of a link ----


def test_a_worker_speaks_for_itself_only() -> None:
    limits = Limits(TO_LEADER, WORKERS, worker=3)
    assert read(encode(Stop(3)), limits)[0] == Stop(3)
    for event in (Stop(2), Pull(2, 0, False, 0), Push(2, 0, 0, 0, True, 0.0, False, 0)):
        refuse(encode(event), limits, "worker is 2, expected 3")
    refuse(encode(Answer(2, 0)), Limits(TO_WORKER, WORKERS, worker=3), "worker is 2, expected 3")


def test_a_follower_speaks_for_itself_only() -> None:
    limits = Limits(FROM_FOLLOWER, WORKERS, SERVERS, server=2)
    assert read(encode(Withheld(2, 0, 0, 0)), limits)[0] == Withheld(2, 0, 0, 0)
    refuse(encode(Withheld(1, 0, 0, 0)), limits, "server is 1, expected 2")
    assert read(encode(Finished(2)), limits)[0] == Finished(2)
    refuse(encode(Finished(1)), limits, "server is 1, expected 2")
    for server in (0, SERVERS, -1):
        for event in (Withheld(server, 0, 0, 0), Finished(server)):
            refuse(encode(event), LIMITS[FROM_FOLLOWER], "expected 1 to 2")


@pytest.mark.parametrize("legal", Delivery)
def test_an_array_arrives_only_as_the_link_allows(legal: Delivery) -> None:
    push = Push(0, 0, 0, 0, True, 0.0, False, 0)
    answer = Answer(0, 0, buffer=0, version=0)
    for link, event in ((TO_LEADER, push), (TO_WORKER, answer)):
        limits = Limits(
            link, WORKERS, SERVERS, SHARD_BYTES, SHARD_BYTES, deliveries=frozenset({legal})
        )
        for delivery in Delivery:
            message = encoded(event, delivery, SHARD_BYTES)
            push.arriving = delivery is STREAMED
            if delivery is STREAMED and event is answer:
                refuse(message, limits, "delivery is 3, expected")
            elif delivery is legal:
                assert read(message, limits) == (event, legal, SHARD_BYTES if legal else 0)
            else:
                refuse(message, limits, f"delivery is {int(delivery)}, expected {int(legal)}")
    # An answer without parameters has no array.
    nothing = Answer(0, 0, True)
    limits = Limits(TO_WORKER, WORKERS, deliveries=frozenset({legal}))
    assert read(encode(nothing), limits) == (nothing, IN_PLACE, 0)


def test_a_long_array_is_not_inline() -> None:
    limits = Limits(TO_LEADER, WORKERS, SERVERS, SHARD_BYTES, SHARD_BYTES - 1)
    push = Push(0, 0, 0, 0, True, 0.0, False, 0)
    refuse(encoded(push, INLINE, SHARD_BYTES), limits, "inline bytes is 24, expected at most 23")
    assert read(encoded(push, RANGE, SHARD_BYTES), limits)[1] is RANGE


# ---- what the encoder makes of what does not fit ----


def test_the_longest_payloads_fit() -> None:
    names = [f"{i:02}" + "é" * 127 for i in range(NAMES_MAX)]
    assert {len(name.encode()) for name in names} == {NAME_BYTES_MAX}
    log = Log(0, dict.fromkeys(names, (1.0, 1)))
    failure = Failure("T" * 1000, "m" * 10_000, "t" * 20_000)
    for event in (log, Report(0, dict.fromkeys(names, 1.0)), Leave(0, failure)):
        data = encode(event)
        assert len(data) <= HEADER_BYTES + payload_limit(1)
        read(data, LIMITS[TO_LEADER])
    many = 10_000
    members = [(worker, 2**62) for worker in range(many)]
    decision = Decision(members, round=True, scales=[0.1] * many)
    data = encode(decision)
    assert len(data) == HEADER_BYTES + payload_limit(many)
    assert read(data, Limits(TO_FOLLOWER, many, 2))[0] == decision


def test_too_many_or_too_long_names_are_the_caller_s_error() -> None:
    with pytest.raises(ValueError, match="at most 64 names in one message, got 65"):
        encode(Log(0, {str(i): (1.0, 1) for i in range(NAMES_MAX + 1)}))
    with pytest.raises(ValueError, match="names of at most 256 bytes, got 258"):
        encode(Report(0, {"é" * 129: 1.0}))


def test_a_task_that_no_message_carries_is_the_caller_s_error() -> None:
    with pytest.raises(ValueError, match="leases: n_samples is 0, expected 1 to"):
        encode(LeaseRequest(0, 0, 0, TaskSpec(0, 1, 1, False)))
    with pytest.raises(ValueError, match="leases: epochs is 9223372036854775808"):
        encode(LeaseRequest(0, 0, 0, TaskSpec(1, 1, 2**63, False)))


def test_a_failure_is_cut_between_characters() -> None:
    failure = Failure("é" * 200, "x" + "é" * 4000, "é" * 9000 + "x")
    event = read(encode(Leave(1, failure)), LIMITS[TO_LEADER])[0]
    assert isinstance(event, Leave)
    assert event.failure is not None
    assert event.failure.type == "é" * 128
    assert event.failure.message == "x" + "é" * 2047
    assert event.failure.traceback == "é" * 5631 + "x"


def test_a_failure_with_a_lone_surrogate_is_told() -> None:
    event = read(encode(Leave(1, Failure("E", "\udc80!", ""))), LIMITS[TO_LEADER])[0]
    assert event == Leave(1, Failure("E", "\\udc80!", ""))


@pytest.mark.parametrize("event", [Stop(0), Answer(0, 0), Answer(0, 0, buffer=COPIED)])
def test_only_a_push_or_parameters_have_an_array(event) -> None:
    with pytest.raises(AssertionError):
        encode(event, INLINE, SHARD_BYTES)


def test_what_stays_in_its_process_has_no_encoding() -> None:
    with pytest.raises(KeyError):
        encode(Sent(0))  # type: ignore[arg-type]


# ---- survivors in a leader ----


class Subtract:
    """params - scale * grad, refused if not finite."""

    def update(self, step, params, grad, out, scale=1.0) -> bool:
        with np.errstate(all="ignore"):
            np.subtract(params, scale * grad, out=out)
        return bool(np.isfinite(out).all())


TASK = TaskSpec(4, 2, 1, False, 4, 2)
MODES = [Async(), SSP(0), SSP(2), BSP(), BSP(1)]


def make_leader(mode, workers: int = 3) -> Leader:
    store = Store(
        HeapBuffers(buffer_count(workers), 4, np.dtype(np.float32)),
        np.zeros(4, np.float32),
        Subtract(),
    )
    ones, landing = np.ones(4, np.float32), np.zeros((workers, 4), np.float32)
    memory = ServerMemory(lambda w, s: ones, lambda w: landing[w], [True] * workers)
    return Leader(
        workers, store, mode.policy(workers), memory, servers=2, clip_norm=2.0, trace=True
    )


def check_ledger(leader: Leader) -> None:
    queued = sum(
        isinstance(event, Push) and event.receipt is None
        for inbox in leader._inbox
        for event in inbox
    )
    book = leader.ledger.ledger()
    settled = book.applied + book.refused + book.dropped + book.lost + book.stopped
    assert book.received == settled + queued


def tell(leader: Leader, data: bytes) -> None:
    """Decode and handle, as a server's loop does: a message that is refused changes nothing."""
    with suppress(MessageError):
        leader.handle(read(data, Limits(TO_LEADER, 3, 2))[0])
    check_ledger(leader)


SCRIPT = [
    encode(event)
    for event in (
        LeaseRequest(0, 0, 0, TASK),
        LeaseRequest(1, 0, 0, TASK),
        Pull(0, 1, False, 0),
        Push(0, 2, 0, 0, True, 4.0, True, 1),
        Push(1, 1, 1, 0, True, 1.0, False, 0),
        LeaseRequest(2, 0, 0, TASK),
        Push(2, 1, 1, 0, True, 1.0, True, 0),
        LeaseRequest(0, 3, 0, TASK, True),
        GiveBack(0, 3),
        LeaseRequest(0, 4, 0, TASK),
        Report(0, {"loss": 1.0}),
        Pull(1, 2, True, 0),
        LeaseRequest(1, 3, 0, TASK),
        Report(1, {"loss": 1.0}),
        Log(2, {"lr": (1.0, 1)}),
        Push(2, 2, 0, 1, True, 1.0, True, 1),
        Stop(2),
        Push(0, 4, 1, 1, False, 1.0, False, 0),
        Leave(1),
        Leave(0, Failure("E", "m", "t")),
    )
]


@pytest.mark.parametrize("mode", MODES, ids=repr)
def test_a_leader_survives_every_mutation(mode) -> None:
    for at in range(1, len(SCRIPT)):  # whoever opens the plan says what it is
        for mutated in mutations(SCRIPT[at]):
            try:
                event = read(mutated, Limits(TO_LEADER, 3, 2))[0]
            except MessageError:
                continue
            leader = make_leader(mode)
            for data in SCRIPT[:at]:
                tell(leader, data)
            with suppress(MessageError):
                leader.handle(event)
            for data in SCRIPT[at:]:
                tell(leader, data)
            for worker in range(3):
                leader.handle(Lost(worker))
            assert not leader.finished
            leader.handle(Finished(1))
            assert leader.finished
            check_ledger(leader)
            assert not any(leader._inbox)


SMALL = st.integers(0, 3)
STEPS = st.one_of(
    st.builds(
        Push,
        st.integers(0, 2),
        SMALL,
        st.integers(0, 1),
        SMALL,
        st.booleans(),
        st.sampled_from([0.0, 1.0, 1e300, math.inf]),
        st.booleans(),
        RELEASES,
        SMALL,
    ),
    st.builds(Pull, st.integers(0, 2), SMALL, st.booleans(), RELEASES, SMALL),
    st.builds(
        LeaseRequest, st.integers(0, 2), SMALL, st.integers(0, 1), st.just(TASK), st.booleans()
    ),
    st.builds(GiveBack, st.integers(0, 2), SMALL),
    st.builds(Report, st.integers(0, 2), st.just({"loss": 1.0})),
    st.builds(Stop, st.integers(0, 2)),
    st.builds(Leave, st.integers(0, 2), FAILURES),
    st.builds(Lost, st.integers(0, 2)),
)


@pytest.mark.parametrize("mode", MODES, ids=repr)
@given(steps=st.lists(STEPS, max_size=60))
def test_a_leader_survives_what_is_legal_in_any_order(mode, steps) -> None:
    leader = make_leader(mode)
    seqs = [0, 0, 0]
    for event in steps:
        leaving = any(isinstance(queued, Leave) for queued in leader._inbox[event.worker])
        if leaving and not isinstance(event, (Lost, Stop)):
            continue  # a worker's leave is the last that it asks
        if isinstance(event, (Push, Pull, LeaseRequest)):
            event.seq += seqs[event.worker]  # mostly, and not always, a new one
            seqs[event.worker] = event.seq
        if isinstance(event, Lost):
            leader.handle(event)
            check_ledger(leader)
        else:
            tell(leader, encode(event))
