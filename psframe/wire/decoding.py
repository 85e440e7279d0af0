"""Messages into events, each checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import copysign

from psframe.coding import CODED
from psframe.errors import MessageError
from psframe.events import (
    ALL_REQUESTS,
    COPIED,
    NO_BUFFER,
    Answer,
    Pull,
    Push,
    Reason,
)
from psframe.wire.header import (
    BIT4,
    COUNT_MAX,
    DELIVERY_BITS,
    HEADER,
    HEADER_BYTES,
    LEAD_ANSWER,
    LEAD_PUSH,
    MAGIC,
    RELEASE_BITS,
    Delivery,
    Event,
    Fields,
    Kind,
    Limits,
    ReadBuffer,
    bad,
    bad_count,
    bad_flags,
    bad_length,
    bad_worker,
    lead_of,
)
from psframe.wire.others import OTHER_KINDS, read_other

__all__ = ["Message", "decode"]

# The event, how its array arrives, and `payload_bytes` as the header has it.
Message = tuple[Event, Delivery, int]

_unpack_from = HEADER.unpack_from
_unpack_push, _unpack_answer = LEAD_PUSH.unpack_from, LEAD_ANSWER.unpack_from
# Not looked up in the enums for every message: that costs as much as unpacking a header.
_IN_PLACE, _STREAMED = Delivery.IN_PLACE, Delivery.STREAMED
_REASONS = tuple(Reason)
_NONE, _PUSH = Reason.NONE, int(Kind.PUSH)
_APPLIED = lead_of(Kind.ANSWER, 8)


def decode(buffer: ReadBuffer, n_bytes: int, limits: Limits) -> Message:
    """Read the message in the first `n_bytes` bytes of a buffer.

    Args:
        buffer: what was received; only read, and nothing in the result refers to it.
        n_bytes: length of the message; an INLINE array is `buffer[HEADER_BYTES:n_bytes]`.
        limits: what is legal on this link.

    Returns:
        The event, the delivery of its array, and `payload_bytes`.

    Raises:
        MessageError: it is not one whole legal message.
    """
    hot = limits.hot
    if hot and n_bytes == HEADER_BYTES <= len(buffer):
        message = _hot_push(buffer, limits) if hot == _PUSH else _hot_answer(buffer, limits)
        if message is not None:
            return message
    if not HEADER_BYTES <= n_bytes <= len(buffer):
        most = len(buffer)
        raise MessageError(f"message has {n_bytes} bytes, expected {HEADER_BYTES} to {most}")
    fields = _unpack_from(buffer)
    if fields[0] != MAGIC:
        raise MessageError(f"message begins with {fields[0]!r}, expected {MAGIC!r}")
    kind = fields[1]
    if kind not in limits.kinds:
        legal = ", ".join(f"{kind} ({kind.name})" for kind in sorted(limits.kinds))
        raise MessageError(f"message {limits.link.value} has kind {kind}, expected {legal}")
    return _DECODERS[kind](fields, buffer, n_bytes, limits)


# ---- the hot ones ------------------------------------------------------------------------


def _hot_push(buffer: ReadBuffer, limits: Limits) -> Message | None:
    """Read a push whose gradient stays here; None of anything else, and of whatever is wrong."""
    lead, worker, slot, seq, version, staleness, norm, n_payload, release, log = _unpack_push(
        buffer
    )
    known = limits.pushes.get(lead)
    # A count is too large, or negative, if any bit from the 62nd on is set.
    if known is None or slot >> 1 or (seq | version | log) >> 62 or staleness or release >> 2:
        return None
    finite, want_params, arriving, n_bytes = known
    if not (limits.worker_min <= worker <= limits.worker_max and norm >= 0.0):
        return None
    if n_payload != n_bytes:
        return None
    push = Push(worker, seq, slot, version, finite, norm, want_params, release, log, arriving)
    return push, _STREAMED if arriving else _IN_PLACE, n_payload


def _hot_answer(buffer: ReadBuffer, limits: Limits) -> Message | None:
    """Read an answer to an applied push with parameters in place; None as `_hot_push`."""
    lead, worker, index, seq, version, staleness, norm, n_payload, pushed, log = _unpack_answer(
        buffer
    )
    if lead != _APPLIED or (seq | version | staleness | pushed | log) >> 62 or n_payload or norm:
        return None
    if not (limits.worker_min <= worker <= limits.worker_max and 0 <= index < limits.buffers):
        return None
    answer = Answer(worker, seq, False, True, _NONE, pushed, staleness, index, version, log)
    return answer, _IN_PLACE, 0


def _decode_push(fields: Fields, buffer: ReadBuffer, n_bytes: int, limits: Limits) -> Message:
    _, _, flags, reason, worker, slot, seq, version, staleness, norm, n_payload, release, log = (
        fields
    )
    if flags > 15:
        raise bad_flags(fields, 15)
    if not limits.worker_min <= worker <= limits.worker_max:
        raise bad_worker(fields, limits)
    if not 0 <= slot <= 1:
        raise bad(fields, "slot", slot, "0 or 1")
    if not 0 <= seq <= COUNT_MAX:
        raise bad_count(fields, "seq", seq)
    if not 0 <= version <= COUNT_MAX:
        raise bad_count(fields, "version", version)
    if not 0 <= release <= RELEASE_BITS:
        raise bad(fields, "release", release, f"0 to {RELEASE_BITS}")
    if not norm >= 0.0 and (norm < 0.0 or flags & 4):
        raise bad(fields, "norm", norm, "0 or more, or NaN if the gradient is not finite")
    if not 0 <= log <= COUNT_MAX:
        raise bad_count(fields, "log", log)
    if reason or staleness:
        raise bad(fields, "(reason, staleness)", (reason, staleness), "0 both")
    if flags & 3 or n_payload or n_bytes != HEADER_BYTES or not limits.in_place:
        coded = limits.coded_bytes_max is not None
        delivery = _check_array(fields, n_bytes, limits, coded=coded)
    else:
        delivery = _IN_PLACE
    finite, want_params = flags & 4 != 0, flags & 8 != 0
    arriving = delivery is Delivery.STREAMED
    push = Push(worker, seq, slot, version, finite, norm, want_params, release, log, arriving)
    return push, delivery, n_payload


def _decode_pull(fields: Fields, buffer: ReadBuffer, n_bytes: int, limits: Limits) -> Message:
    _, _, flags, reason, worker, slot, seq, version, staleness, norm, n_payload, release, log = (
        fields
    )
    if flags & ~4:
        raise bad_flags(fields, 4)
    if not limits.worker_min <= worker <= limits.worker_max:
        raise bad_worker(fields, limits)
    if not 0 <= seq <= COUNT_MAX:
        raise bad_count(fields, "seq", seq)
    if not 0 <= release <= RELEASE_BITS:
        raise bad(fields, "release", release, f"0 to {RELEASE_BITS}")
    if not 0 <= log <= COUNT_MAX:
        raise bad_count(fields, "log", log)
    if reason or slot or version or staleness or n_payload or norm or copysign(1.0, norm) < 0.0:
        unused = (reason, slot, version, staleness, norm, n_payload)
        raise bad(fields, "what this kind does not use", unused, "0")
    if n_bytes != HEADER_BYTES:
        raise bad_length(fields, n_bytes, 0)
    return Pull(worker, seq, flags != 0, release, log), _IN_PLACE, 0


def _decode_answer(fields: Fields, buffer: ReadBuffer, n_bytes: int, limits: Limits) -> Message:
    _, _, flags, reason, worker, index, seq, version, staleness, norm, n_payload, pushed, log = (
        fields
    )
    coded = flags & BIT4 != 0
    legal = 15 if limits.coded_bytes_max is None else 31
    if flags > legal:
        raise bad_flags(fields, legal)
    if not limits.worker_min <= worker <= limits.worker_max:
        raise bad_worker(fields, limits)
    if norm or copysign(1.0, norm) < 0.0:
        raise bad(fields, "norm", norm, "0")
    stopped, applied = flags & 4 != 0, flags & 8 != 0
    if not 0 <= seq <= COUNT_MAX and not (stopped and seq == ALL_REQUESTS):
        raise bad(fields, "seq", seq, f"0 to {COUNT_MAX}, or {ALL_REQUESTS} if stopped")
    if not (applied and not reason and 0 <= staleness <= COUNT_MAX and 0 <= pushed <= COUNT_MAX):
        _check_no_update(fields, applied)
    if not 0 <= log <= COUNT_MAX:
        raise bad_count(fields, "log", log)
    if index == NO_BUFFER:
        if version or n_payload or flags & 19 or n_bytes != HEADER_BYTES:
            raise bad(fields, "buffer", index, "one, since parameters are announced")
        delivery = _IN_PLACE
    else:
        if stopped or not COPIED <= index < limits.buffers:
            raise bad(fields, "buffer", index, f"-2 to {limits.buffers - 1}, -1 if stopped")
        if not 0 <= version <= COUNT_MAX:
            raise bad_count(fields, "version", version)
        if flags & 19 or n_payload or n_bytes != HEADER_BYTES or not limits.in_place:
            delivery = _check_array(fields, n_bytes, limits, coded=coded)
        else:
            delivery = _IN_PLACE
    why = _REASONS[reason]
    answer = Answer(worker, seq, stopped, applied, why, pushed, staleness, index, version, log)
    if coded:
        answer.coded = CODED
    return answer, delivery, n_payload


def _check_no_update(fields: Fields, applied: bool) -> None:
    """Check the receipt of a push that was not applied, or of none."""
    reason, staleness, push_version = fields[3], fields[8], fields[11]
    if reason >= len(_REASONS) or (applied and reason):
        raise bad(fields, "reason", reason, f"0 to {len(_REASONS) - 1}, and 0 if applied")
    if not (applied or reason or not (staleness or push_version)):
        raise bad(fields, "(staleness, push_version)", (staleness, push_version), "0 both")
    if not 0 <= push_version <= COUNT_MAX:
        raise bad_count(fields, "push_version", push_version)
    # A refused push may claim a version from the future, and then it has a negative staleness.
    if not (0 if applied else -COUNT_MAX) <= staleness <= COUNT_MAX:
        raise bad(fields, "staleness", staleness, f"0 to {COUNT_MAX}, negative only if refused")


def _check_array(fields: Fields, n_bytes: int, limits: Limits, *, coded: bool) -> Delivery:
    """Check how the array of a Push or an Answer arrives, and how much of it."""
    bits, payload_bytes = fields[2] & DELIVERY_BITS, fields[10]
    if bits not in limits.deliveries:
        legal = " or ".join(f"{way} ({way.name})" for way in sorted(limits.deliveries))
        raise bad(fields, "delivery", bits, legal)
    delivery = Delivery(bits)
    if delivery is Delivery.STREAMED and fields[1] != Kind.PUSH:
        raise bad(fields, "delivery", bits, "no STREAMED: only gradients are")
    if delivery and fields[1] == Kind.ANSWER and fields[5] == COPIED:
        raise bad(fields, "delivery", bits, f"0: the array has been copied (buffer {COPIED})")
    if coded:
        most = limits.coded_bytes_max or 0
        if not delivery or delivery is Delivery.STREAMED:
            raise bad(fields, "delivery", bits, "1 (INLINE) or 2 (RANGE) of what is coded")
        if not 0 <= payload_bytes <= most:
            raise bad(fields, "payload_bytes", payload_bytes, f"0 to {most}")
    elif payload_bytes != (limits.shard_bytes if delivery else 0):
        expected = limits.shard_bytes if delivery else 0
        raise bad(fields, "payload_bytes", payload_bytes, str(expected))
    inline_bytes = payload_bytes if delivery is Delivery.INLINE else 0
    if inline_bytes > limits.inline_bytes_max:
        raise bad(fields, "inline bytes", inline_bytes, f"at most {limits.inline_bytes_max}")
    if n_bytes != HEADER_BYTES + inline_bytes:
        raise bad_length(fields, n_bytes, inline_bytes)
    return delivery


def _decode_other(fields: Fields, buffer: ReadBuffer, n_bytes: int, limits: Limits) -> Message:
    return read_other(fields, buffer, n_bytes, limits), _IN_PLACE, fields[10]


_DECODERS: Mapping[int, Callable[[Fields, ReadBuffer, int, Limits], Message]] = {
    **dict.fromkeys(OTHER_KINDS, _decode_other),
    Kind.PUSH: _decode_push,
    Kind.PULL: _decode_pull,
    Kind.ANSWER: _decode_answer,
}
