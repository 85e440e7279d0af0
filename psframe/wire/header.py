"""The header of every message, and what a receiver accepts in it."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from psframe.errors import MessageError
from psframe.events import (
    RELEASE_COPY,
    RELEASE_HOLD,
    Answer,
    Finished,
    FromWorker,
    Lease,
    Lost,
    Record,
    ShardSaved,
    Withheld,
)
from psframe.store import buffer_count

__all__ = [
    "BIT2",
    "BIT3",
    "BIT4",
    "COUNT_MAX",
    "DELIVERY_BITS",
    "Delivery",
    "Event",
    "FIELDS",
    "Fields",
    "HEADER",
    "HEADER_BYTES",
    "Kind",
    "LEAD_ANSWER",
    "LEAD_PUSH",
    "Limits",
    "Link",
    "MAGIC",
    "MEMBER",
    "SCALED_MEMBER",
    "RELEASE_BITS",
    "ReadBuffer",
    "WriteBuffer",
    "bad",
    "bad_count",
    "bad_flags",
    "bad_length",
    "bad_worker",
    "lead_of",
    "payload_limit",
]

MAGIC = b"PSF1"
HEADER = struct.Struct("<4sBBHiiqqqdqqq")
HEADER_BYTES = HEADER.size
assert HEADER_BYTES == 72
FIELDS = (
    "magic kind flags reason worker slot seq version staleness norm payload_bytes aux log"
).split()

# The same bytes with the first four fields as one number, so that they are judged at once; an
# answer has no norm, and its bits must all be 0.
LEAD_PUSH, LEAD_ANSWER = struct.Struct("<Qiiqqqdqqq"), struct.Struct("<Qiiqqqqqqq")


def lead_of(kind: int, flags: int) -> int:
    """Give that number for a message without a reason."""
    number: int = LEAD_PUSH.unpack(HEADER.pack(MAGIC, kind, flags, *(0,) * 10))[0]
    return number


DELIVERY_BITS = 3  # of flags
BIT2, BIT3, BIT4 = 4, 8, 16  # the flags of a kind's own
RELEASE_BITS = RELEASE_HOLD | RELEASE_COPY
MEMBER, SCALED_MEMBER = struct.Struct("<iq"), struct.Struct("<iqd")  # of a Decision

# Counts fit a signed 64-bit integer with room for the sum or the difference of two.
COUNT_MAX = 2**62
# Above the longest Log, 4 + 64 (2 + 256 + 16) bytes; a failure's texts are 15 KiB at most.
_PAYLOAD_BYTES_MIN = 18 << 10

Event = FromWorker | Answer | Lease | Record | Withheld | Lost | ShardSaved | Finished
WriteBuffer = bytearray | memoryview
ReadBuffer = bytes | WriteBuffer
Fields = tuple[Any, ...]  # of a header, as FIELDS names them


class Kind(enum.IntEnum):
    """What a message is. `Sent`, `Saved` and the host's events never leave their process."""

    PUSH = 1
    PULL = 2
    LEASE_REQUEST = 3
    REPORT = 4
    LOG = 5
    STOP = 6
    LEAVE = 7
    ANSWER = 8
    LEASE = 9
    DECISION = 10
    GONE = 11
    PIN = 12
    END = 13
    WITHHELD = 14
    LOST = 15
    FINISHED = 16
    GIVE_BACK = 17
    SPANS = 18
    RANDOM_STATE = 19
    MARK = 20
    SHARD_SAVED = 21
    FORGET = 22


class Delivery(enum.IntEnum):
    """How the array that a message speaks of arrives."""

    IN_PLACE = 0  # it does not: it lies in memory that both sides share
    INLINE = 1  # `payload_bytes` bytes after the header, in the same message
    RANGE = 2  # `payload_bytes` bytes in transfers of their own
    STREAMED = 3  # it is being written to shared memory, and a word there says how far


class Link(enum.Enum):
    """Who sends to whom; it decides which kinds are legal."""

    WORKER_TO_LEADER = "worker to leader"
    WORKER_TO_FOLLOWER = "worker to follower"
    SERVER_TO_WORKER = "server to worker"
    LEADER_TO_FOLLOWER = "leader to follower"
    FOLLOWER_TO_LEADER = "follower to leader"


_LEGAL: Mapping[Link, str] = {
    Link.WORKER_TO_LEADER: (
        "PUSH PULL LEASE_REQUEST GIVE_BACK REPORT RANDOM_STATE LOG SPANS STOP LEAVE"
    ),
    Link.WORKER_TO_FOLLOWER: "PUSH PULL LEAVE",  # all else is the leader's business
    Link.SERVER_TO_WORKER: "ANSWER LEASE",
    Link.LEADER_TO_FOLLOWER: "DECISION FORGET GONE PIN MARK END",
    Link.FOLLOWER_TO_LEADER: "WITHHELD LOST SHARD_SAVED FINISHED SPANS",
}


_HOT = {
    Link.WORKER_TO_LEADER: Kind.PUSH,
    Link.WORKER_TO_FOLLOWER: Kind.PUSH,
    Link.SERVER_TO_WORKER: Kind.ANSWER,
}


def payload_limit(workers: int) -> int:
    """Bound the bytes of every payload that is not an array, for W workers."""
    return max(_PAYLOAD_BYTES_MIN, SCALED_MEMBER.size * workers)


def _plain_pushes(
    deliveries: frozenset[Delivery], shard_bytes: int
) -> Iterator[tuple[int, tuple[bool, int]]]:
    for delivery, n_bytes in ((Delivery.IN_PLACE, 0), (Delivery.STREAMED, shard_bytes)):
        if delivery in deliveries:
            yield lead_of(Kind.PUSH, delivery | BIT2 | BIT3), (delivery != 0, n_bytes)


def _hot_pushes(
    deliveries: frozenset[Delivery], shard_bytes: int
) -> Iterator[tuple[int, tuple[bool, bool, bool, int]]]:
    for delivery, n_bytes in ((Delivery.IN_PLACE, 0), (Delivery.STREAMED, shard_bytes)):
        for finite, want in ((f, w) for f in (False, True) for w in (False, True)):
            if delivery in deliveries:
                flags = delivery | BIT2 * finite | BIT3 * want
                yield lead_of(Kind.PUSH, flags), (finite, want, delivery != 0, n_bytes)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver accepts on one link.

    Attributes:
        link: who sends to whom.
        workers, servers: W and S.
        shard_bytes: the only legal `payload_bytes` of an array that is not coded.
        inline_bytes_max: an INLINE array may not be longer.
        worker: the only worker that messages may name, if the link is one worker's.
        server: the only server that they may name, if it is known who sends.
        deliveries: the legal ways for an array to arrive.
        coded_bytes_max: the most of one that is coded, as all gradients are then and parameters
            may be; None if none are.
    """

    link: Link
    workers: int
    servers: int = 1
    shard_bytes: int = 0
    inline_bytes_max: int = 0
    worker: int | None = None
    server: int | None = None
    deliveries: frozenset[Delivery] = frozenset(Delivery)
    coded_bytes_max: int | None = None
    # What follows from these, computed once and not for every message.
    kinds: frozenset[Kind] = field(init=False, repr=False, compare=False)
    worker_min: int = field(init=False, repr=False, compare=False)
    worker_max: int = field(init=False, repr=False, compare=False)
    in_place: bool = field(init=False, repr=False, compare=False)
    hot: int = field(init=False, repr=False, compare=False)  # the kind that is read first, or 0
    # By the first bytes of a push that stays here: finite, want_params, arriving, payload_bytes.
    pushes: Mapping[int, tuple[bool, bool, bool, int]] = field(
        init=False, repr=False, compare=False
    )
    # By the first bytes of a plain push_pull (see `wire.plain`): arriving, payload_bytes.
    plain: Mapping[int, tuple[bool, int]] = field(init=False, repr=False, compare=False)
    buffers: int = field(init=False, repr=False, compare=False)
    payload_bytes_max: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "kinds", frozenset(Kind[name] for name in _LEGAL[self.link].split()))
        put(self, "worker_min", 0 if self.worker is None else self.worker)
        put(self, "worker_max", self.workers - 1 if self.worker is None else self.worker)
        put(self, "in_place", Delivery.IN_PLACE in self.deliveries)
        put(self, "pushes", dict(_hot_pushes(self.deliveries, self.shard_bytes)))
        put(self, "plain", dict(_plain_pushes(self.deliveries, self.shard_bytes)))
        put(self, "hot", int(_HOT.get(self.link, 0)) if self.in_place else 0)
        put(self, "buffers", buffer_count(self.workers))
        put(self, "payload_bytes_max", payload_limit(self.workers))


def bad(fields: Fields, what: str, got: object, expected: str) -> MessageError:
    """Make the error that says what is wrong with a message."""
    return MessageError(f"{Kind(fields[1]).name} message: {what} is {got}, expected {expected}")


def bad_count(fields: Fields, what: str, got: int) -> MessageError:
    """Make the error of a count that is negative or too large."""
    return bad(fields, what, got, f"0 to {COUNT_MAX}")


def bad_worker(fields: Fields, limits: Limits) -> MessageError:
    """Make the error of a worker that is not there, or not who the link belongs to."""
    low, high = limits.worker_min, limits.worker_max
    return bad(fields, "worker", fields[4], f"{low}" if low == high else f"{low} to {high}")


def bad_flags(fields: Fields, legal: int) -> MessageError:
    """Make the error of flags that the kind does not have."""
    return bad(fields, "flags", f"{fields[2]:#x}", f"no bits but {legal:#x}")


def bad_length(fields: Fields, n_bytes: int, payload_bytes: int) -> MessageError:
    """Make the error of a message that is longer or shorter than it says."""
    return bad(fields, "length", n_bytes, f"{HEADER_BYTES} + {payload_bytes}")
