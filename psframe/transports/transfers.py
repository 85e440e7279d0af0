"""Arrays on their way between ranks, in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from psframe.errors import MessageError
from psframe.transports.watch import Unwatched

__all__ = ["PIECE_BYTES", "Transfers"]

# What MPI may still read and write, though its run is over: of ranks that are lost, and not dead.
_kept: list[_Transfer] = []

# A transfer in pieces can be followed: while one is on its way, the one before is applied.
PIECE_BYTES = 4 << 20


class Transfers:
    """Arrays on their way in pieces, and what to do when each has arrived or left.

    Args:
        watch: is told of calls that fail.
    """

    def __init__(self, watch: Unwatched) -> None:
        self._watch = watch
        self._open: list[_Transfer] = []
        # Nothing follows from them any more, but until they complete, if ever they do, their
        # requests and buffers belong to MPI. A lost rank leaves a few.
        self._given_up: list[_Transfer] = []

    def add(
        self,
        requests: list[Any],
        then: Callable[[], None],
        each: Callable[[int], None] | None = None,
        *,
        peer: int,
        keep: Any = None,
    ) -> None:
        """Follow the requests of an array's pieces.

        Args:
            requests: in the order of the pieces.
            then: called once, when all are complete.
            each: called with how many bytes from the start are complete, when that has changed and
                they are not yet all.
            peer: the rank at the other end.
            keep: the array, which must not be freed before; the requests hold no reference to one
                on a device.
        """
        self._open.append(_Transfer(requests, then, each, peer, keep))

    def progress(self) -> bool:
        """Test them; True if any piece was complete.

        Raises:
            RankLost: the other end of one is lost, and the run cannot go on.
            MessageError: what has come of one is not what was announced; it is given up.
        """
        if not self._open:
            return False
        some = False
        done = []
        for transfer in self._open:
            if transfer.peer in self._watch.lost:
                continue
            before = transfer.complete
            if self._test(transfer):
                done.append(transfer)
            elif transfer.each is not None and transfer.complete > before:
                transfer.each(transfer.complete * PIECE_BYTES)
            some |= transfer.complete > before
        lost = self._watch.lost  # some perhaps only since they were tested
        if done or lost:
            self._given_up += [t for t in self._open if t not in done and t.peer in lost]
            self._open = [t for t in self._open if t not in done and t.peer not in lost]
        for transfer in done:
            if transfer.peer not in lost:
                transfer.then()
        return some or bool(done)

    def _test(self, transfer: _Transfer) -> bool:
        try:
            return transfer.test()
        except MessageError:  # what is still to come of it nobody waits for
            self._open.remove(transfer)
            self._given_up.append(transfer)
            raise
        except RuntimeError as error:  # MPI's
            self._watch.failed_with(transfer.peer, error)
            return False

    def close(self) -> None:
        """Forget them; what was given up stays, with its memory, unless its rank is dead."""
        dead = self._watch.faults.dead
        _kept.extend(transfer for transfer in self._given_up if transfer.peer not in dead)
        self._given_up.clear()

    @property
    def busy(self) -> bool:
        """Whether any is on its way."""
        return bool(self._open)


class _Transfer:
    """One array on its way.

    Attributes:
        then, each, peer, keep: as for `Transfers.add`.
        complete: how many pieces are, from the start.
    """

    def __init__(
        self,
        requests: list[Any],
        then: Callable[[], None],
        each: Callable[[int], None] | None,
        peer: int,
        keep: Any,
    ) -> None:
        self.keep = keep
        self.peer = peer
        self.then = then
        self.each = each
        self.complete = 0
        self._requests = requests

    def test(self) -> bool:
        """Test the pieces in their order; True if all are complete."""
        requests, complete = self._requests, self.complete
        while complete < len(requests) and requests[complete].Test():
            complete += 1
        self.complete = complete
        return complete == len(requests)
