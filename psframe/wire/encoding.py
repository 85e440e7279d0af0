"""Events into messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from psframe.events import (
    Answer,
    Decision,
    End,
    Finished,
    Forget,
    GiveBack,
    Gone,
    Lease,
    LeaseRequest,
    Leave,
    Log,
    Lost,
    Mark,
    Pin,
    Pull,
    Push,
    RandomState,
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
    HEADER,
    HEADER_BYTES,
    MAGIC,
    Delivery,
    Event,
    Kind,
    WriteBuffer,
)
from psframe.wire.payloads import (
    SUM,
    SUM_AND_COUNT,
    pack_entry,
    pack_failure,
    pack_members,
    pack_numbers,
    pack_spans,
    pack_sums,
    pack_task,
)

__all__ = ["encode", "encode_into"]

_pack = HEADER.pack
_pack_into = HEADER.pack_into
# Plain integers: looking up the member of an enum costs as much as packing five fields.
_PUSH, _PULL, _ANSWER = int(Kind.PUSH), int(Kind.PULL), int(Kind.ANSWER)
_IN_PLACE = Delivery.IN_PLACE


def encode_into(
    event: Event,
    buffer: WriteBuffer,
    delivery: Delivery = _IN_PLACE,
    payload_bytes: int = 0,
) -> int:
    """Write the header, and the payload unless it is an array, to the start of a buffer.

    Args:
        event: what to say.
        buffer: writable memory of `HEADER_BYTES + payload_limit(W)` bytes, written.
        delivery: how the array of a Push or of an Answer with parameters goes.
        payload_bytes: the array's length unless it stays in place.

    Returns:
        The message's length in bytes. That of an INLINE message includes the array, which the
        caller writes at `buffer[HEADER_BYTES:]`.

    Raises:
        ValueError: more or longer names or larger numbers than a message can carry; nothing
            has been written.
    """
    if isinstance(event, Push):
        _encode_push(event, buffer, delivery, payload_bytes)
        return HEADER_BYTES + payload_bytes if delivery == 1 else HEADER_BYTES
    if isinstance(event, Answer):
        _encode_answer(event, buffer, delivery, payload_bytes)
        return HEADER_BYTES + payload_bytes if delivery == 1 else HEADER_BYTES
    assert not delivery, f"{type(event).__name__} has no array"
    message = _WHOLE[type(event)](event)
    memoryview(buffer)[: len(message)] = message
    return len(message)


def encode(event: Event, delivery: Delivery = _IN_PLACE, payload_bytes: int = 0) -> bytes:
    """Give what `encode_into` writes; the caller appends the array of an INLINE message."""
    if isinstance(event, (Push, Answer)):
        header = bytearray(HEADER_BYTES)
        encode_into(event, header, delivery, payload_bytes)
        return bytes(header)
    assert not delivery, f"{type(event).__name__} has no array"
    return _WHOLE[type(event)](event)


# ---- the hot ones ------------------------------------------------------------------------


def _encode_push(event: Push, buffer: WriteBuffer, delivery: int, payload_bytes: int) -> None:
    _pack_into(
        buffer,
        0,
        MAGIC,
        _PUSH,
        delivery + (4 if event.finite else 0) + (8 if event.want_params else 0),
        0,
        event.worker,
        event.slot,
        event.seq,
        event.version,
        0,
        event.norm,
        payload_bytes,
        event.release,
        event.log,
    )


def _encode_answer(event: Answer, buffer: WriteBuffer, delivery: int, payload_bytes: int) -> None:
    assert not delivery or event.buffer >= 0, "the answer has no parameters to send"
    _pack_into(
        buffer,
        0,
        MAGIC,
        _ANSWER,
        delivery
        + (4 if event.stopped else 0)
        + (8 if event.applied else 0)
        + (16 if delivery and event.coded is not None else 0),
        event.reason,
        event.worker,
        event.buffer,
        event.seq,
        event.version,
        event.staleness,
        0.0,
        payload_bytes,
        event.push_version,
        event.log,
    )


def _encode_pull(event: Pull) -> bytes:
    numbers = (event.worker, 0, event.seq, 0, 0, 0.0, 0, event.release, event.log)
    return _pack(MAGIC, _PULL, 4 if event.pinned else 0, 0, *numbers)


# ---- the others, in whole messages -------------------------------------------------------


def _message(
    kind: Kind,
    worker: int = 0,
    seq: int = 0,
    *,
    flags: int = 0,
    reason: int = 0,
    slot: int = 0,
    version: int = 0,
    staleness: int = 0,
    norm: float = 0.0,
    aux: int = 0,
    log: int = 0,
    payload: bytes = b"",
) -> bytes:
    numbers = (flags, reason, worker, slot, seq, version, staleness, norm, len(payload), aux, log)
    return _pack(MAGIC, kind, *numbers) + payload


def _encode_lease_request(event: LeaseRequest) -> bytes:
    flags = BIT2 if event.ahead else 0
    payload = pack_task(event)
    return _message(Kind.LEASE_REQUEST, event.worker, event.seq, flags=flags, payload=payload)


def _encode_report(event: Report) -> bytes:
    sums = {name: (total,) for name, total in event.sums.items()}
    return _message(Kind.REPORT, event.worker, payload=pack_sums(sums, SUM))


def _encode_log(event: Log) -> bytes:
    return _message(Kind.LOG, event.worker, payload=pack_sums(event.sums, SUM_AND_COUNT))


def _encode_spans(event: Spans) -> bytes:
    worker, payload = max(event.worker, 0), pack_spans(event)
    return _message(Kind.SPANS, worker, slot=event.server, norm=event.now_s, payload=payload)


def _encode_leave(event: Leave) -> bytes:
    if event.failure is None:
        return _message(Kind.LEAVE, event.worker)
    return _message(Kind.LEAVE, event.worker, flags=BIT2, payload=pack_failure(event.failure))


def _encode_lease(event: Lease) -> bytes:
    return _message(
        Kind.LEASE,
        event.worker,
        event.seq,
        reason=event.kind,
        version=event.epoch,
        staleness=event.begin,
        aux=event.end,
        log=event.log,
    )


def _encode_decision(event: Decision) -> bytes:
    flags = BIT2 * event.round | BIT3 * (not event.step) | BIT4 * bool(event.scales)
    payload = pack_members(event)
    return _message(Kind.DECISION, flags=flags, reason=event.reason, payload=payload)


def _encode_random_state(event: RandomState) -> bytes:
    payload = pack_numbers(event.numbers)
    return _message(Kind.RANDOM_STATE, event.worker, event.seq, payload=payload)


def _encode_shard_saved(event: ShardSaved) -> bytes:
    number, payload = event.number, pack_entry(event.entry)
    return _message(Kind.SHARD_SAVED, slot=event.server, seq=number, payload=payload)


def _encode_withheld(event: Withheld) -> bytes:
    server, in_a_row = event.server, event.in_a_row
    return _message(Kind.WITHHELD, event.worker, event.seq, slot=server, aux=in_a_row)


_WHOLE: Mapping[type, Callable[[Any], bytes]] = {
    Pull: _encode_pull,
    LeaseRequest: _encode_lease_request,
    GiveBack: lambda event: _message(Kind.GIVE_BACK, event.worker, event.seq),
    Report: _encode_report,
    RandomState: _encode_random_state,
    Log: _encode_log,
    Spans: _encode_spans,
    Stop: lambda event: _message(Kind.STOP, event.worker),
    Leave: _encode_leave,
    Lease: _encode_lease,
    Decision: _encode_decision,
    Forget: lambda event: _message(Kind.FORGET, event.worker),
    Gone: lambda event: _message(Kind.GONE, event.worker),
    Pin: lambda event: _message(Kind.PIN, flags=BIT2 * event.on | BIT3 * event.keep),
    Mark: lambda event: _message(Kind.MARK, seq=event.number),
    End: lambda event: _message(Kind.END, flags=BIT2 * event.mark),
    Withheld: _encode_withheld,
    Lost: lambda event: _message(Kind.LOST, event.worker),
    ShardSaved: _encode_shard_saved,
    Finished: lambda event: _message(Kind.FINISHED, slot=event.server),
}
