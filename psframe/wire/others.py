"""Reads the kinds that are not hot: each is a row of a table and what is its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import copysign
from operator import itemgetter
from typing import Any

from psframe.events import (
    NOBODY,
    Decision,
    End,
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
    RandomState,
    Reason,
    Report,
    ShardSaved,
    Spans,
    Stop,
    Withheld,
)
from psframe.wire.header import (
    BIT2,
    BIT3,
    BIT4,
    COUNT_MAX,
    FIELDS,
    HEADER_BYTES,
    Event,
    Fields,
    Kind,
    Limits,
    Link,
    ReadBuffer,
    bad,
    bad_count,
    bad_flags,
    bad_length,
    bad_worker,
)
from psframe.wire.payloads import (
    SUM,
    SUM_AND_COUNT,
    TIME_MAX_S,
    read_entry,
    read_failure,
    read_members,
    read_numbers,
    read_spans,
    read_sums,
    read_task,
)

__all__ = ["OTHER_KINDS", "read_other"]

_REASONS = tuple(Reason)
_LEASE_KINDS = tuple(LeaseKind)
# What the leader decides; a push is STOPPED or LOST without a decision.
_DECIDED = frozenset(_REASONS) - {Reason.STOPPED, Reason.LOST}

_Reader = Callable[[Fields, memoryview, Limits], Event]


@dataclass(frozen=True, slots=True)
class _Rule:
    """A kind: how the rest of it is read, the flags it has, the fields it leaves zero."""

    read: _Reader
    flags: int
    has_worker: bool
    unused: Callable[[Fields], Any]
    zeros: tuple[int, ...]


def _rule(read: _Reader, used: str = "", flags: int = 0) -> _Rule:
    named = {"magic", "kind", "flags", *used.split()}
    unused = [index for index, name in enumerate(FIELDS) if name not in named]
    return _Rule(read, flags, "worker" in named, itemgetter(*unused), (0,) * len(unused))


def read_other(fields: Fields, buffer: ReadBuffer, n_bytes: int, limits: Limits) -> Event:
    """Read a message of one of these kinds.

    Args:
        fields: its header.
        buffer, n_bytes, limits: as for `decode`.
    """
    rule, n_payload = _RULES[fields[1]], fields[10]
    if fields[2] & ~rule.flags:
        raise bad_flags(fields, rule.flags)
    if rule.unused(fields) != rule.zeros or copysign(1.0, fields[9]) < 0.0:
        raise bad(fields, "what this kind does not use", rule.unused(fields), "0")
    if rule.has_worker and not limits.worker_min <= fields[4] <= limits.worker_max:
        raise bad_worker(fields, limits)
    if not 0 <= fields[6] <= COUNT_MAX:
        raise bad_count(fields, "seq", fields[6])
    if not 0 <= n_payload <= limits.payload_bytes_max:
        raise bad(fields, "payload_bytes", n_payload, f"0 to {limits.payload_bytes_max}")
    if n_bytes != HEADER_BYTES + n_payload:
        raise bad_length(fields, n_bytes, n_payload)
    payload = memoryview(buffer)[HEADER_BYTES:n_bytes]
    return rule.read(fields, payload, limits)


def _read_lease_request(fields: Fields, payload: memoryview, limits: Limits) -> LeaseRequest:
    plan, spec = read_task(fields, payload)
    return LeaseRequest(fields[4], fields[6], plan, spec, fields[2] != 0)


def _read_report(fields: Fields, payload: memoryview, limits: Limits) -> Report:
    sums = read_sums(fields, payload, SUM)
    return Report(fields[4], {name: total for name, (total,) in sums.items()})


def _read_log(fields: Fields, payload: memoryview, limits: Limits) -> Log:
    sums = read_sums(fields, payload, SUM_AND_COUNT)
    for _, count in sums.values():
        if not 1 <= count <= COUNT_MAX:
            raise bad(fields, "a count", count, f"1 to {COUNT_MAX}")
    return Log(fields[4], {name: (total, count) for name, (total, count) in sums.items()})


def _read_spans(fields: Fields, payload: memoryview, limits: Limits) -> Spans:
    if not 0 <= fields[9] <= TIME_MAX_S:
        raise bad(fields, "the clock", fields[9], f"0 to {TIME_MAX_S} seconds")
    spans = read_spans(fields, payload)
    if limits.link is not Link.FOLLOWER_TO_LEADER:
        if fields[5]:
            raise bad(fields, "server", fields[5], "0 from a worker")
        return Spans(fields[4], fields[9], spans)
    if fields[4]:
        raise bad(fields, "worker", fields[4], "0 from a server")
    return Spans(NOBODY, fields[9], spans, _follower(fields, limits))


def _read_pin(fields: Fields, payload: memoryview, limits: Limits) -> Pin:
    if fields[2] == BIT2 | BIT3:
        raise bad(fields, "flags", f"{fields[2]:#x}", "on or keep, not both")
    return Pin(fields[2] == BIT2, fields[2] == BIT3)


def _read_leave(fields: Fields, payload: memoryview, limits: Limits) -> Leave:
    if fields[2]:
        return Leave(fields[4], read_failure(fields, payload))
    if payload:
        raise bad(fields, "payload_bytes", len(payload), "0 without a failure")
    return Leave(fields[4])


def _read_lease(fields: Fields, payload: memoryview, limits: Limits) -> Lease:
    kind, block = fields[3], (fields[7], fields[8], fields[11])
    if kind >= len(_LEASE_KINDS):
        raise bad(fields, "lease kind", kind, f"0 to {len(_LEASE_KINDS) - 1}")
    epoch, begin, end = block
    if kind > LeaseKind.EVALUATE:
        if epoch or begin or end:
            raise bad(fields, "(epoch, begin, end)", block, "0 without a block")
    elif not (0 <= epoch <= COUNT_MAX and 0 <= begin < end <= COUNT_MAX):
        raise bad(fields, "(epoch, begin, end)", block, f"begin < end, all 0 to {COUNT_MAX}")
    log = fields[12]
    if not 0 <= log <= COUNT_MAX:
        raise bad_count(fields, "log", log)
    return Lease(fields[4], fields[6], _LEASE_KINDS[kind], epoch, begin, end, log)


def _read_decision(fields: Fields, payload: memoryview, limits: Limits) -> Decision:
    reason, flags = fields[3], fields[2]
    if reason not in _DECIDED:
        raise bad(fields, "reason", reason, f"one of {sorted(map(int, _DECIDED))}")
    is_round, step = bool(flags & BIT2), not flags & BIT3
    members, scales = read_members(fields, payload, limits, scaled=bool(flags & BIT4))
    if not members and (flags & BIT4 or not step):
        raise bad(fields, "the count of members", 0, "at least 1 that is scaled or only gathered")
    return Decision(members, _REASONS[reason], is_round, step, scales)


def _read_withheld(fields: Fields, payload: memoryview, limits: Limits) -> Withheld:
    in_a_row = fields[11]
    if not 0 <= in_a_row <= COUNT_MAX:
        raise bad_count(fields, "in_a_row", in_a_row)
    return Withheld(_follower(fields, limits), fields[4], fields[6], in_a_row)


def _read_random_state(fields: Fields, payload: memoryview, limits: Limits) -> RandomState:
    return RandomState(fields[4], fields[6], read_numbers(fields, payload))


def _read_shard_saved(fields: Fields, payload: memoryview, limits: Limits) -> ShardSaved:
    return ShardSaved(_follower(fields, limits), fields[6], read_entry(fields, payload))


def _follower(fields: Fields, limits: Limits) -> int:
    """Check which follower it comes from."""
    server: int = fields[5]
    low, high = (1, limits.servers - 1) if limits.server is None else (limits.server,) * 2
    if not low <= server <= high:
        raise bad(fields, "server", server, f"{low} to {high}")
    return server


_RULES: Mapping[int, _Rule] = {
    Kind.LEASE_REQUEST: _rule(_read_lease_request, "worker seq payload_bytes", flags=BIT2),
    Kind.GIVE_BACK: _rule(
        lambda fields, payload, limits: GiveBack(fields[4], fields[6]), "worker seq"
    ),
    Kind.SPANS: _rule(_read_spans, "worker slot norm payload_bytes"),
    Kind.REPORT: _rule(_read_report, "worker payload_bytes"),
    Kind.RANDOM_STATE: _rule(_read_random_state, "worker seq payload_bytes"),
    Kind.LOG: _rule(_read_log, "worker payload_bytes"),
    Kind.STOP: _rule(lambda fields, payload, limits: Stop(fields[4]), "worker"),
    Kind.LEAVE: _rule(_read_leave, "worker payload_bytes", flags=BIT2),
    Kind.LEASE: _rule(_read_lease, "worker seq reason version staleness aux log"),
    Kind.DECISION: _rule(_read_decision, "reason payload_bytes", flags=BIT2 | BIT3 | BIT4),
    Kind.FORGET: _rule(lambda fields, payload, limits: Forget(fields[4]), "worker"),
    Kind.GONE: _rule(lambda fields, payload, limits: Gone(fields[4]), "worker"),
    Kind.PIN: _rule(_read_pin, flags=BIT2 | BIT3),
    Kind.MARK: _rule(lambda fields, payload, limits: Mark(fields[6]), "seq"),
    Kind.END: _rule(lambda fields, payload, limits: End(fields[2] != 0), flags=BIT2),
    Kind.WITHHELD: _rule(_read_withheld, "worker seq slot aux"),
    Kind.LOST: _rule(lambda fields, payload, limits: Lost(fields[4]), "worker"),
    Kind.SHARD_SAVED: _rule(_read_shard_saved, "slot seq payload_bytes"),
    Kind.FINISHED: _rule(
        lambda fields, payload, limits: Finished(_follower(fields, limits)), "slot"
    ),
}
OTHER_KINDS = frozenset(_RULES)
