"""The payloads that are not arrays: tasks, sums by name, texts, members of a decision."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from psframe.events import Decision, Failure, LeaseRequest, SpanKind, Spans, TaskSpec
from psframe.wire.header import COUNT_MAX, MEMBER, SCALED_MEMBER, Fields, Limits, bad, bad_count

__all__ = [
    "NAMES_MAX",
    "NAME_BYTES_MAX",
    "SPANS_MAX",
    "SUM",
    "SUM_AND_COUNT",
    "TIME_MAX_S",
    "pack_entry",
    "pack_failure",
    "pack_members",
    "pack_numbers",
    "pack_spans",
    "pack_sums",
    "pack_task",
    "read_entry",
    "read_failure",
    "read_members",
    "read_numbers",
    "read_spans",
    "read_sums",
    "read_task",
]

NAMES_MAX = 64  # in one Report or Log
NAME_BYTES_MAX = 256  # of each, in UTF-8
SUM, SUM_AND_COUNT = struct.Struct("<d"), struct.Struct("<dq")

_U16, _U32 = struct.Struct("<H"), struct.Struct("<I")
_TASK = struct.Struct("<7q")
_NUMBERS = struct.Struct("<16s16sBI")
_SPAN = struct.Struct("<Bdd")
SPANS_MAX = 512  # in one message: 8.5 KiB
TIME_MAX_S = 1e12
_TASK_RANGES = (
    ("plan", 0, COUNT_MAX),
    ("n_samples", 1, COUNT_MAX),
    ("batch_size", 1, COUNT_MAX),
    ("epochs", 0, COUNT_MAX),
    ("shuffle", 0, 1),
    ("eval_samples", 0, COUNT_MAX),
    ("eval_batch_size", 1, COUNT_MAX),
)
# Of the texts of a failure: its type, the head of its message, the tail of its traceback.
_ENTRY_BYTES_MAX = 4 << 10
_TYPE_BYTES_MAX, _MESSAGE_BYTES_MAX, _TRACEBACK_BYTES_MAX = 256, 4 << 10, 11 << 10


# ---- tasks -------------------------------------------------------------------------------


def pack_task(event: LeaseRequest) -> bytes:
    """Pack plan and task.

    Raises:
        ValueError: a number is out of its range.
    """
    spec = event.spec
    sizes = spec.n_samples, spec.batch_size, spec.epochs
    task = (event.plan, *sizes, int(spec.shuffle), spec.eval_samples, spec.eval_batch_size)
    wrong = _wrong_in_task(task)
    if wrong is not None:
        name, value, expected = wrong
        raise ValueError(f"leases: {name} is {value}, expected {expected}")
    return _TASK.pack(*task)


def read_task(fields: Fields, payload: memoryview) -> tuple[int, TaskSpec]:
    """Read plan and task."""
    if len(payload) != _TASK.size:
        raise bad(fields, "payload_bytes", len(payload), str(_TASK.size))
    task = _TASK.unpack(payload)
    wrong = _wrong_in_task(task)
    if wrong is not None:
        raise bad(fields, *wrong)
    plan, n_samples, batch_size, epochs, shuffle, eval_samples, eval_batch_size = task
    return plan, TaskSpec(
        n_samples, batch_size, epochs, shuffle == 1, eval_samples, eval_batch_size
    )


def _wrong_in_task(task: tuple[int, ...]) -> tuple[str, int, str] | None:
    for value, (name, low, high) in zip(task, _TASK_RANGES, strict=True):
        if not low <= value <= high:
            return name, value, f"{low} to {high}"
    return None


# ---- sums by name ------------------------------------------------------------------------


def pack_sums(sums: Mapping[str, tuple[Any, ...]], numbers: struct.Struct) -> bytes:
    """Pack the numbers of each name.

    Raises:
        ValueError: too many names, or too long a name.
    """
    if len(sums) > NAMES_MAX:
        raise ValueError(f"expected at most {NAMES_MAX} names in one message, got {len(sums)}")
    parts = [_U32.pack(len(sums))]
    for name, values in sums.items():
        text = name.encode()
        if len(text) > NAME_BYTES_MAX:
            raise ValueError(
                f"expected names of at most {NAME_BYTES_MAX} bytes, got {len(text)}: {name[:40]!r}"
            )
        parts += (_U16.pack(len(text)), text, numbers.pack(*values))
    return b"".join(parts)


def read_sums(
    fields: Fields, payload: memoryview, numbers: struct.Struct
) -> dict[str, tuple[Any, ...]]:
    """Read the numbers of each name."""
    at = _U32.size
    if len(payload) < at:
        raise bad(fields, "payload_bytes", len(payload), f"at least {at}")
    (count,) = _U32.unpack_from(payload)
    if count > NAMES_MAX:
        raise bad(fields, "the count of names", count, f"at most {NAMES_MAX}")
    sums: dict[str, tuple[Any, ...]] = {}
    for _ in range(count):
        name, at = _read_text(fields, payload, at, NAME_BYTES_MAX)
        if name in sums:
            raise bad(fields, "a name", f"{name!r} again", "each name once")
        if at + numbers.size > len(payload):
            raise bad(fields, "payload_bytes", len(payload), f"at least {at + numbers.size}")
        sums[name] = numbers.unpack_from(payload, at)
        at += numbers.size
    if at != len(payload):
        raise bad(fields, "payload_bytes", len(payload), str(at))
    return sums


# ---- spans -------------------------------------------------------------------------------


def pack_spans(event: Spans) -> bytes:
    """Pack the spans of a timeline.

    Raises:
        ValueError: there are too many.
    """
    if len(event.spans) > SPANS_MAX:
        raise ValueError(f"expected at most {SPANS_MAX} spans, got {len(event.spans)}")
    return b"".join([_SPAN.pack(*span) for span in event.spans])


def read_spans(fields: Fields, payload: memoryview) -> list[tuple[int, float, float]]:
    """Read the spans of a timeline."""
    size = _SPAN.size
    if len(payload) % size or len(payload) > size * SPANS_MAX:
        most = size * SPANS_MAX
        raise bad(fields, "payload_bytes", len(payload), f"a multiple of {size} up to {most}")
    spans = list(_SPAN.iter_unpack(payload))
    for kind, begin, end in spans:
        if kind >= len(SpanKind):
            raise bad(fields, "a span's kind", kind, f"0 to {len(SpanKind) - 1}")
        if not 0 <= begin <= end <= TIME_MAX_S:
            raise bad(fields, "a span", (begin, end), f"0 <= begin <= end <= {TIME_MAX_S}")
    return spans


# ---- texts -------------------------------------------------------------------------------


def pack_failure(failure: Failure) -> bytes:
    """Pack the texts of a failure, cut to their limits and never inside a character."""
    texts = (
        _utf8(failure.type[:_TYPE_BYTES_MAX])[:_TYPE_BYTES_MAX],
        _utf8(failure.message[:_MESSAGE_BYTES_MAX])[:_MESSAGE_BYTES_MAX],
        _utf8(failure.traceback[-_TRACEBACK_BYTES_MAX:])[-_TRACEBACK_BYTES_MAX:],
    )
    # Only the characters that were cut in two are invalid.
    whole = [text.decode("utf-8", "ignore").encode() for text in texts]
    return b"".join(_U16.pack(len(text)) + text for text in whole)


def read_failure(fields: Fields, payload: memoryview) -> Failure:
    """Read the texts of a failure."""
    kind, at = _read_text(fields, payload, 0, _TYPE_BYTES_MAX)
    message, at = _read_text(fields, payload, at, _MESSAGE_BYTES_MAX)
    traceback, at = _read_text(fields, payload, at, _TRACEBACK_BYTES_MAX)
    if at != len(payload):
        raise bad(fields, "payload_bytes", len(payload), str(at))
    return Failure(kind, message, traceback)


def _utf8(text: str) -> bytes:
    # A lone surrogate has no UTF-8, and must not keep a failure from being told.
    return text.encode("utf-8", "backslashreplace")


def _read_text(fields: Fields, payload: memoryview, at: int, bytes_max: int) -> tuple[str, int]:
    begin = at + _U16.size
    if begin > len(payload):
        raise bad(fields, "payload_bytes", len(payload), f"at least {begin}")
    (length,) = _U16.unpack_from(payload, at)
    end = begin + length
    if length > bytes_max or end > len(payload):
        most = min(bytes_max, len(payload) - begin)
        raise bad(fields, "the length of a text", length, f"at most {most}")
    try:
        return str(payload[begin:end], "utf-8"), end
    except UnicodeDecodeError as error:
        raise bad(fields, "a text", error.reason, "UTF-8") from None


def pack_entry(entry: str) -> bytes:
    """Pack what a driver has to tell another.

    Raises:
        ValueError: it is too long.
    """
    text = entry.encode()
    if len(text) > _ENTRY_BYTES_MAX:
        raise ValueError(f"expected an entry of at most {_ENTRY_BYTES_MAX} bytes, got {len(text)}")
    return text


def read_entry(fields: Fields, payload: memoryview) -> str:
    """Read what a driver has to tell another."""
    if len(payload) > _ENTRY_BYTES_MAX:
        raise bad(fields, "payload_bytes", len(payload), f"at most {_ENTRY_BYTES_MAX}")
    try:
        return str(payload, "utf-8")
    except UnicodeDecodeError as error:
        raise bad(fields, "a text", error.reason, "UTF-8") from None


# ---- random numbers ----------------------------------------------------------------------


def pack_numbers(numbers: tuple[int, int, int, int]) -> bytes:
    """Pack the state of a PCG64."""
    state, increment, has_half, half = numbers
    wide = state.to_bytes(16, "little"), increment.to_bytes(16, "little")
    return _NUMBERS.pack(*wide, has_half, half)


def read_numbers(fields: Fields, payload: memoryview) -> tuple[int, int, int, int]:
    """Read the state of a PCG64."""
    if len(payload) != _NUMBERS.size:
        raise bad(fields, "payload_bytes", len(payload), str(_NUMBERS.size))
    state, increment, has_half, half = _NUMBERS.unpack(payload)
    if has_half > 1:
        raise bad(fields, "has_uint32", has_half, "0 or 1")
    if not increment[0] & 1:
        raise bad(fields, "the increment", "even", "an odd one")
    return int.from_bytes(state, "little"), int.from_bytes(increment, "little"), has_half, half


# ---- members -----------------------------------------------------------------------------


def pack_members(event: Decision) -> bytes:
    """Pack the (worker, seq) pairs of a decision, with the factors on their gradients if any."""
    if not event.scales:
        return b"".join([MEMBER.pack(worker, seq) for worker, seq in event.members])
    scaled = zip(event.members, event.scales, strict=True)
    return b"".join([SCALED_MEMBER.pack(worker, seq, scale) for (worker, seq), scale in scaled])


def read_members(
    fields: Fields, payload: memoryview, limits: Limits, *, scaled: bool
) -> tuple[list[tuple[int, int]], list[float]]:
    """Read the (worker, seq) pairs of a decision, in worker order, and their factors if any."""
    record = SCALED_MEMBER if scaled else MEMBER
    size, longest = record.size, record.size * limits.workers
    if len(payload) % size or len(payload) > longest:
        raise bad(fields, "payload_bytes", len(payload), f"a multiple of {size} up to {longest}")
    members: list[tuple[int, int]] = []
    scales: list[float] = []
    least = 0
    for worker, seq, *scale in record.iter_unpack(payload):
        if not least <= worker < limits.workers:
            raise bad(fields, "a member", worker, f"{least} to {limits.workers - 1}")
        if not 0 <= seq <= COUNT_MAX:
            raise bad_count(fields, "a member's seq", seq)
        if scaled and not 0.0 <= scale[0] < math.inf:
            raise bad(fields, "a member's factor", scale[0], "a finite number of 0 or more")
        least = worker + 1
        members.append((worker, seq))
        scales += scale
    return members, scales
