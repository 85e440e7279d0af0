"""The parameters that workers have read, for rules that compare them with the present ones.

They are kept when a worker is given them, not when its gradient arrives: then they are long
overwritten. What is kept is a hold on a snapshot that is there anyway: none is copied, and two a
worker at most are kept from being written, of which one it usually holds itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from psframe.layout import Array
from psframe.stale import Correction
from psframe.store import Store

__all__ = ["Correcting"]

# A worker computes on the parameters that it has while it fetches the next ones.
_READS_MAX = 2


class Correcting:
    """Corrects the stale gradients of one shard.

    Args:
        store: the shard's snapshots.
        correction: the rule's.
        workers: W.
        reads: whether it needs what workers have read.
        unscaled: the runs [begin, end) of the shard that are no gradients, but observations to be
            averaged: they stay as they are.
    """

    def __init__(
        self,
        store: Store,
        correction: Correction,
        workers: int,
        reads: bool,
        unscaled: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._store = store
        self._correction = correction
        self._unscaled = unscaled
        self._keeps = reads
        # By worker, the versions that it may be computing on, and the buffers with them.
        self._reads: list[list[tuple[int, int]]] = [[] for _ in range(workers)]
        self._out: Array | None = None
        self._before: Array | None = None

    def granted(self, worker: int, *, alone: bool, copied: int | None = None) -> None:
        """Keep the present parameters, which the worker is given.

        Args:
            worker: whose.
            alone: whether it computes on no earlier ones any more.
            copied: the buffer with what the worker decodes of them, if a codec has changed them.
        """
        if not self._keeps:
            return
        reads = self._reads[worker]
        if alone:
            self.forget(worker)
        while len(reads) >= _READS_MAX:
            self._store.release(reads.pop(0)[1])
        index = self._store.hold() if copied is None else self._store.hold_again(copied)
        assert index is not None, "there are two buffers a worker"
        reads.append((self._store.version, index))

    def correct(self, worker: int, version: int, grad: Array) -> Array:
        """Give the gradient that is to be applied, perhaps `grad`; then say what comes of it.

        Args:
            worker: whose.
            version: that it was computed on. If that is not kept, for the worker has never asked
                for it, the gradient counts as computed on the present parameters.
            grad: only read.
        """
        store, reads = self._store, self._reads[worker]
        while reads and reads[0][0] < version:
            store.release(reads.pop(0)[1])
        params = read = store.params
        if reads and reads[0][0] == version:
            read = store.buffer(reads[0][1])
        if self._out is None:
            self._out = grad.copy()
        corrected = self._correction.correct(worker, grad, params, read, self._out)
        if corrected is not grad:
            for begin, end in self._unscaled:
                corrected[begin:end] = grad[begin:end]
        self._before = params
        return corrected

    def settled(self, *, good: bool) -> None:
        """Say whether an update with what was corrected last has been published."""
        before, self._before = self._before, None
        if good and before is not None:
            self._correction.applied(before, self._store.params)
        else:
            self._correction.rejected()

    def forget(self, worker: int) -> None:
        """Let go what is kept for a worker."""
        reads = self._reads[worker]
        while reads:
            self._store.release(reads.pop()[1])
