"""The parameters that workers have read, for rules that compare them with the present ones.

They are kept when a worker is given them, not when its gradient arrives: then they are long
overwritten. What is kept is a hold on a snapshot that is there anyway: none is copied, and two a
worker at most are kept from being written, of which one it usually holds itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from psframe.device_store import DeviceStore
from psframe.layout import Array
from psframe.stale import Correction
from psframe.stale.on_device import DeviceCorrection
from psframe.store import Store

__all__ = ["Correcting", "DeviceCorrecting", "HostCorrecting"]

# A worker computes on the parameters that it has while it fetches the next ones.
_READS_MAX = 2


class Correcting(ABC):
    """Corrects the stale gradients of one shard, which it compares with what workers have read.

    Args:
        store: the shard's snapshots.
        workers: W.
        reads: whether it needs what workers have read.

    Attributes:
        on_host: whether it reads gradients and parameters on the host.
    """

    on_host: bool

    def __init__(self, store: Store, workers: int, reads: bool) -> None:
        self._store = store
        self._keeps = reads
        # By worker, the versions that it may be computing on, and the buffers with them.
        self._reads: list[list[tuple[int, int]]] = [[] for _ in range(workers)]

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
        index = self._store.hold(self.on_host) if copied is None else self._store.hold_again(copied)
        assert index is not None, "there are two buffers a worker"
        reads.append((self._store.version, index))

    def forget(self, worker: int) -> None:
        """Let go what is kept for a worker."""
        reads = self._reads[worker]
        while reads:
            self._store.release(reads.pop()[1])

    @abstractmethod
    def correct(self, worker: int, version: int, grad: Array) -> Array:
        """Give the gradient that is to be applied, perhaps `grad`; then say what comes of it.

        Args:
            worker: whose.
            version: that it was computed on. If that is not kept, for the worker has never asked
                for it, the gradient counts as computed on the present parameters.
            grad: only read.
        """

    @abstractmethod
    def settled(self, *, good: bool) -> None:
        """Say whether an update with what was corrected last has been published."""

    def _read(self, worker: int, version: int) -> int | None:
        """Find the buffer with what a worker had read; let go what is older."""
        reads = self._reads[worker]
        while reads and reads[0][0] < version:
            self._store.release(reads.pop(0)[1])
        return reads[0][1] if reads and reads[0][0] == version else None


class HostCorrecting(Correcting):
    """Corrects the gradients of a shard in the host's memory.

    Args:
        store, workers, reads: as for `Correcting`.
        correction: the rule's.
        unscaled: the runs [begin, end) of the shard that are no gradients, but observations to be
            averaged: they stay as they are.
    """

    on_host = True

    def __init__(
        self,
        store: Store,
        correction: Correction,
        workers: int,
        reads: bool,
        unscaled: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(store, workers, reads)
        self._correction = correction
        self._unscaled = unscaled
        self._out: Array | None = None
        self._before: Array | None = None

    def correct(self, worker: int, version: int, grad: Array) -> Array:
        """Give the gradient that is to be applied, perhaps `grad`; see `Correcting`."""
        index = self._read(worker, version)
        params = read = self._store.params
        if index is not None:
            read = self._store.buffer(index)
        if self._out is None:
            self._out = grad.copy()
        corrected = self._correction.correct(worker, grad, params, read, self._out)
        if corrected is not grad and corrected is not self._out:
            raise RuntimeError(
                f"stale: {type(self._correction).__name__}.correct gave {_kind(corrected)} of its"
                " own, expected `grad`, or `out` with what is to be applied written to it"
            )
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


class DeviceCorrecting(Correcting):
    """Corrects the stale gradients of a shard on a device, in the kernel that applies them.

    Args:
        store: the shard's snapshots.
        correction: the rule's, in its form for a device.
        workers, reads: as for `Correcting`. What the store does not scale stays as it is.
    """

    on_host = False

    def __init__(
        self, store: DeviceStore, correction: DeviceCorrection, workers: int, reads: bool
    ) -> None:
        super().__init__(store, workers, reads)
        self._device_store = store
        self._device_correction = correction
        self._applied_to: Any = None

    def correct(self, worker: int, version: int, grad: Array) -> Array:
        """Have the gradient corrected when it is applied; then say what comes of it.

        Args:
            worker, version: as for `Correcting`.
            grad: given back.
        """
        store, index = self._device_store, self._read(worker, version)
        with store.card as card:
            params = read = store.device_params()
            if index is not None and index != store.current:
                read = store.device_params(index)
            store.stage(*self._device_correction.stages(card, worker, params, read))
        self._applied_to = params
        return grad

    def settled(self, *, good: bool) -> None:
        """Say whether an update with what was corrected last has been published."""
        before, self._applied_to = self._applied_to, None
        store = self._device_store
        with store.card as card:
            if good and before is not None:
                self._device_correction.applied(card, before, store.device_params())
            else:
                self._device_correction.rejected()


def _kind(value: object) -> str:
    """Say what a user's correction has given."""
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ if dtype is None else f"an array of {dtype}"
