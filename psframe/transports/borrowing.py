"""Which ranks of one node open each other's GPU memory, and when it is given back.

A worker and a server that share memory, each on a GPU, lend each other what they exchange: the
worker its gradient slots, the server its snapshots. Handles go once, after the ranks have met. A
pair does so only if both could open all and have found there what is there; what any other
exchanges goes through the host.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from psframe.devices.opening import HANDLE_BYTES, NONCE_BYTES, Lent, Opened, check_reach
from psframe.devices.sharing import NO_GPU
from psframe.transports.patience import Patience
from psframe.transports.shared_memory import Segment

__all__ = ["CARD_LINE", "Borrowing", "lend_and_open"]

# In this line of a rank's segment a worker says of each of its slots whether the gradient is on its
# device, and whoever had opened others' memory that it has closed it, or never will.
CARD_LINE = 29
_CLOSED = 2
_HAS, _NEVER_WILL = 1, 2
# How long an owner waits for those who have still to close: they have left the run already.
_CLOSE_BOUND_S = 10.0
_TEXT_BYTES_MAX = 200
_NONE, _LENT, _FAILED = 0, 1, 2
_OFFER = struct.Struct(f"<BH{HANDLE_BYTES}s{NONCE_BYTES}s{_TEXT_BYTES_MAX}s")
_TEXT = struct.Struct(f"<H{_TEXT_BYTES_MAX}s")
_APART, _CLOSED_TO, _OPEN_TO = 0, 1, 2  # of one rank to another

_log = logging.getLogger("psframe")

# What others may still have open when its run is over: it stays to the end of the program.
_never_freed: list[Lent] = []


class Ranks(Protocol):
    """What is needed of the ranks; `psframe.transports.mpi.Mesh` is them.

    Attributes:
        rank: this process's place.
        names: of each place the rank, for messages.
    """

    rank: int
    names: tuple[int, ...]

    def all_gather(self, data: bytes, what: str) -> list[bytes]:
        """Gather equally many bytes of every rank, in rank order."""


@dataclass
class Borrowing:
    """The memory that this rank lends, and what it has opened.

    Attributes:
        lent: its own, which others have open; None if nobody has.
        opened: by rank, the others' with whom this one exchanges arrays so, who has something to
            lend.
        partners: those ranks, whether they have or not.
        own, theirs: this rank's memory on the host, and by rank that of the partners.
        lenders: of all ranks, those who lend something that others have open.
        failed: whether CUDA has refused to close something.
    """

    lent: Lent | None = None
    opened: dict[int, Opened] = field(default_factory=dict)
    partners: frozenset[int] = frozenset()
    own: Segment | None = None
    theirs: dict[int, Segment] = field(default_factory=dict)
    lenders: frozenset[int] = frozenset()
    failed: bool = False

    def close(self) -> None:
        """Close what is open, once no copy from it is under way, and tell its owners.

        After a kernel that has failed CUDA closes nothing any more, and they are told that.
        """
        for rank in tuple(self.opened):
            self.drop(rank)
        if self.own is not None:
            card_words(self.own)[_CLOSED] = _NEVER_WILL if self.failed else _HAS

    def drop(self, rank: int) -> None:
        """Close what one rank has lent, if it is open; no copy from it is under way."""
        opened = self.opened.pop(rank, None)
        if opened is None:
            return
        try:
            opened.close()
        except RuntimeError as error:  # CuPy's for CUDA's
            self.failed = True
            _log.warning("GPU memory that another rank has lent stays open: %s", error)

    def free(self, lost: Collection[int]) -> None:
        """Let go what this rank lends, when all have closed it.

        If one does not, or is lost and perhaps only stopped, it stays to the end of the program; so
        it does if CUDA fails on this rank, which would not free it.

        Args:
            lost: the ranks that are.
        """
        lent, self.lent = self.lent, None
        if lent is None:
            return
        if self.failed or not self.partners.isdisjoint(lost) or not self._all_have_closed():
            _never_freed.append(lent)

    def _all_have_closed(self) -> bool:
        """Wait until all have; False if one does not."""
        words = [card_words(segment) for segment in self.theirs.values()]
        patience = Patience(crowded=True)
        deadline = time.monotonic() + _CLOSE_BOUND_S
        while (said := {int(word[_CLOSED]) for word in words}) - {_HAS}:
            if _NEVER_WILL in said or (patience.wait() and time.monotonic() > deadline):
                return False
        return True


def card_words(segment: Segment) -> Any:
    """Give the int64 of a rank's line; they are 0 at first."""
    return np.frombuffer(segment.words(CARD_LINE), np.int64)


def lend_and_open(
    mesh: Ranks,
    own: Segment | None,
    segments: dict[int, Segment],
    *,
    gpu: str | None,
    ids: Sequence[bytes],
    shape: Callable[[int], tuple[int, int]],
    dtype: Any,
    refused: str = "",
) -> Borrowing:
    """Lend this rank's memory to those who share its host memory, and open theirs; all call it.

    Args:
        mesh: the ranks.
        own, segments: this rank's memory on the host, and by rank that of those who share it.
        gpu: where this rank computes, such as "cuda:0"; None for the host.
        ids: of each rank, its GPU (`psframe.devices.identify`).
        shape: of each rank, count and length of the arrays that it lends; no count if it lends
            nothing.
        dtype: of the arrays.
        refused: why this rank is to lend nothing; "" if it may.
    """
    wanted = [rank for rank in sorted(segments) if gpu is not None and ids[rank] != NO_GPU]
    lent, offer = _lend(gpu, shape(mesh.rank), dtype, refused) if wanted else (None, _offer(_NONE))
    offers = mesh.all_gather(offer, "the GPU memory")
    opened, told = _open_all(
        mesh, wanted, lambda r: _open(str(gpu), ids[r], offers[r], shape(r), dtype)
    )
    everyone = mesh.all_gather(told, "who has opened it")
    both = {r for r in wanted if told[r] == everyone[r][mesh.rank] == _OPEN_TO}
    theirs = {rank: segments[rank] for rank in both}
    mine = Borrowing(lent, opened, frozenset(both), own, theirs)
    for rank in sorted(opened.keys() - both):
        mine.drop(rank)
    if mesh.rank == 0:
        _announce(everyone)
    if _failed(everyone):  # before what others have opened, and do not use, is freed
        mesh.all_gather(b"\0", "the GPU memory that nobody uses")
    mine.lenders = _lenders(offers, everyone)
    return mine if both else Borrowing(lenders=mine.lenders)


def _lend(
    gpu: str | None, shape: tuple[int, int], dtype: Any, refused: str
) -> tuple[Lent | None, bytes]:
    count, size = shape
    if gpu is None or not count:
        return None, _offer(_NONE)
    if refused:
        return None, _offer(_FAILED, text=refused)
    try:
        lent = Lent(gpu, count, size, dtype)
    except (RuntimeError, MemoryError) as error:  # CuPy's for CUDA's
        return None, _offer(_FAILED, text=str(error))
    return lent, _offer(_LENT, lent.handle, lent.nonce)


def _open_all(
    mesh: Ranks, wanted: Sequence[int], open_offer: Callable[[int], Opened | None]
) -> tuple[dict[int, Opened], bytes]:
    """Open what some ranks lend: give it by rank, and what the others are told of it."""
    opened: dict[int, Opened] = {}
    said, why = bytearray(len(mesh.names)), ""
    for rank in wanted:
        try:
            one = open_offer(rank)
        except (RuntimeError, MemoryError) as error:  # CuPy's for CUDA's
            said[rank] = _CLOSED_TO
            why = why or f"rank {mesh.names[rank]}'s from rank {mesh.names[mesh.rank]}: {error}"
            continue
        said[rank] = _OPEN_TO
        if one is not None:
            opened[rank] = one
    return opened, bytes(said) + _text(why)


def _open(
    gpu: str, other: bytes, offer: bytes, shape: tuple[int, int], dtype: Any
) -> Opened | None:
    """Open what a rank lends that is on the GPU `other`; None if that is nothing."""
    code, length, handle, nonce, text = _OFFER.unpack(offer)
    if code == _FAILED:
        raise RuntimeError(text[:length].decode("utf-8", "replace"))
    count, size = shape
    if not count:
        return None
    check_reach(gpu, other)
    opened = Opened(gpu, handle, size, dtype)
    opened.prove(count, nonce)
    return opened


def _offer(code: int, handle: bytes = b"", nonce: bytes = b"", text: str = "") -> bytes:
    data = text.encode("utf-8", "backslashreplace")[:_TEXT_BYTES_MAX]
    return _OFFER.pack(code, len(data), handle, nonce, data)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "backslashreplace")[:_TEXT_BYTES_MAX]
    return _TEXT.pack(len(data), data)


def _pairs(everyone: Sequence[bytes]) -> list[bool]:
    """Give of each pair that is on GPUs of one node whether both have opened the other's memory."""
    pairs = list[bool]()
    for rank, said in enumerate(everyone):
        for other in range(rank):
            both = said[other], everyone[other][rank]
            if both != (_APART, _APART):
                pairs.append(both == (_OPEN_TO, _OPEN_TO))
    return pairs


def _lenders(offers: Sequence[Any], everyone: Sequence[bytes]) -> frozenset[int]:
    """Find who has lent something, and keeps it since a pair of his uses it."""
    places = range(len(everyone))
    return frozenset(
        rank
        for rank in places
        if offers[rank][0] == _LENT
        and any(everyone[rank][other] == everyone[other][rank] == _OPEN_TO for other in places)
    )


def _failed(everyone: Sequence[bytes]) -> int:
    return _pairs(everyone).count(False)


def _announce(everyone: Sequence[bytes]) -> None:
    """Log one line of what has come of it, if anybody wanted it."""
    pairs, failed = len(_pairs(everyone)), _failed(everyone)
    if failed:
        texts = (_TEXT.unpack(one[len(everyone) :]) for one in everyone)
        reasons = [data[:length].decode("utf-8", "replace") for length, data in texts if length]
        _log.warning(
            "of %d pairs of a worker and a server on GPUs of one node, %d do not open each other's"
            " GPU memory (CUDA IPC), and exchange all through the host: %s",
            pairs,
            failed,
            reasons[0],
        )
    elif pairs:
        _log.info("workers and servers on GPUs of one node open each other's GPU memory (CUDA IPC)")
