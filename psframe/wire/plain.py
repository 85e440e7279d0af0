"""The plain push_pull and its answer: most messages, read and written without making events.

A push_pull is plain if its gradient lies in the slot, finite, or is being written there, and it
gives back the one snapshot that its worker had; its answer, if the push was applied and the
parameters are read in place. Their bytes are those that `encode` writes, and what is not plain is
left to `decode`.
"""

from __future__ import annotations

from psframe.events import RELEASE_HOLD
from psframe.wire.header import (
    BIT2,
    BIT3,
    HEADER_BYTES,
    LEAD_ANSWER,
    LEAD_PUSH,
    Delivery,
    Kind,
    Limits,
    ReadBuffer,
    WriteBuffer,
    lead_of,
)

__all__ = ["read_plain_answer", "read_plain_push", "write_plain_answer", "write_plain_push"]

_unpack, _pack_push = LEAD_PUSH.unpack_from, LEAD_PUSH.pack_into
_unpack_answer, _pack_answer = LEAD_ANSWER.unpack_from, LEAD_ANSWER.pack_into
_PUSH, _ANSWER = lead_of(Kind.PUSH, BIT2 | BIT3), lead_of(Kind.ANSWER, BIT3)
_STREAMED = lead_of(Kind.PUSH, Delivery.STREAMED | BIT2 | BIT3)


def write_plain_push(
    buffer: WriteBuffer, worker: int, seq: int, slot: int, version: int, arriving_bytes: int = 0
) -> None:
    """Write a plain push_pull to a buffer of HEADER_BYTES.

    `arriving_bytes` is the gradient's length if it is still being written, else 0.
    """
    lead = _STREAMED if arriving_bytes else _PUSH
    _pack_push(buffer, 0, lead, worker, slot, seq, version, 0, 0.0, arriving_bytes, RELEASE_HOLD, 0)


def read_plain_push(
    buffer: ReadBuffer, n_bytes: int, limits: Limits
) -> tuple[int, int, int, int, bool] | None:
    """Read (worker, seq, slot, version, arriving) of a plain push_pull; None of anything else."""
    if n_bytes != HEADER_BYTES:
        return None
    lead, worker, slot, seq, version, staleness, norm, n_payload, release, log = _unpack(buffer)
    known = limits.plain.get(lead)
    if (
        known is None
        or release != RELEASE_HOLD
        or not limits.worker_min <= worker <= limits.worker_max
        or slot >> 1
        or (seq | version) >> 62  # negative, or more than a count may be
        or staleness
        or norm != 0.0
        or n_payload != known[1]
        or log
    ):
        return None
    return worker, seq, slot, version, known[0]


def write_plain_answer(
    buffer: WriteBuffer, worker: int, seq: int, staleness: int, index: int, version: int
) -> None:
    """Write a plain answer to a buffer of HEADER_BYTES: `version` is the one after the push."""
    _pack_answer(buffer, 0, _ANSWER, worker, index, seq, version, staleness, 0, 0, version, 0)


def read_plain_answer(
    buffer: ReadBuffer, n_bytes: int, seq: int, limits: Limits
) -> tuple[int, int, int] | None:
    """Read (staleness, buffer, version) of the plain answer to request `seq`; else None."""
    if n_bytes != HEADER_BYTES:
        return None
    lead, worker, index, its_seq, version, staleness, norm, n_payload, pushed, log = _unpack_answer(
        buffer
    )
    if (
        lead != _ANSWER
        or its_seq != seq
        or worker != limits.worker_min
        or pushed != version
        or not 0 <= index < limits.buffers
        or (version | staleness) >> 62
        or norm
        or n_payload
        or log
        or not limits.in_place
    ):
        return None
    return staleness, index, version
