"""A store whose shard is on a device: gradients go there in pieces, versions come back when read.

The buffers, the holds and the versions are those of `psframe.store`. What differs is who computes,
and when the host has the bytes: see docs/decisions/0015-server-on-a-gpu.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from psframe.consistency import Batch
from psframe.layout import Array
from psframe.optim import formulas
from psframe.optim.cuda import Incoming, Stage, Staged, compile_kernel
from psframe.paired import BorrowedArray, Card, Paired
from psframe.store import STEP, Buffers, Fill, Marked, Store

__all__ = ["DeviceStore"]

_SHARE = Stage(formulas.share)
# Looks at a gradient that is being written, each of some tenths of a microsecond, before it is left
# to a later call.
_PATIENCE = 200


class DeviceStore(Store):
    """The snapshots of one shard on a device.

    Args:
        buffers: the host's memory; others read it by index.
        initial, rule, unscaled, batch: as for `Store`; the rule is one of `psframe.optim`.
        card: the device.
    """

    def __init__(
        self,
        buffers: Buffers,
        initial: Array,
        rule: Any,
        unscaled: Sequence[tuple[int, int]] = (),
        batch: Batch | None = None,
        *,
        card: Card,
    ) -> None:
        self._size, self._dtype = len(initial), initial.dtype
        self._card = card
        self._pairs = Paired(buffers, card, self._size, initial.dtype)
        super().__init__(self._pairs, initial, rule, unscaled, batch)
        self._staging: dict[
            str, Any
        ] = {}  # gradients on the device, by the dtype of their elements
        self._total: Any = None  # the sum of a round
        self._stages: tuple[Staged, ...] = ()  # what is done with the next gradient first
        # Of the update under way: the present parameters, where the new ones go, and whether they
        # are copied to the host behind the kernels.
        self._params: Any = None
        self._target: tuple[Any, Array] = (None, initial)
        self._eager = False
        self._cuts = self._cut(self._size)
        with card:
            rule.prepare(self._pairs.device(self.current))
            self._ignored = card.zeros(1, np.dtype(np.int32))
            card.settle()

    def _cut(self, size: int) -> list[tuple[int, int, bool]]:
        """Cut the shard into runs, each with or without stages: observations are not corrected."""
        cuts, at = list[tuple[int, int, bool]](), 0
        for begin, end in self._unscaled:
            cuts += [(at, begin, True), (begin, end, False)]
            at = end
        return [cut for cut in [*cuts, (at, size, True)] if cut[0] < cut[1]]

    # ---- what is where -----------------------------------------------------------------------

    @property
    def card(self) -> Card:
        """The device."""
        return self._card

    def device_params(self, index: int | None = None) -> Any:
        """Give a buffer on the device, the current one unless told; within the card's context."""
        return self._pairs.device(self.current if index is None else index)

    def stage(self, *stages: Staged) -> None:
        """Have these done with the next gradient, before the rule."""
        self._stages = stages

    def _to_fill(self, index: int) -> Array:
        return self._pairs.to_fill(index)

    def device_half(self, index: int) -> Any:
        """Give a buffer on the device, if its bytes are there, complete; else None."""
        return self._pairs.device_half(index)

    def hold(self, on_host: bool = True) -> int | None:
        """Hold the current buffer, with its bytes on the host or on the device; as `Store`."""
        index = super().hold()
        if index is not None:
            self._have(index, on_host)
        return index

    def hold_again(self, index: int, on_host: bool = True) -> int:
        """Take one more hold of a buffer that is held already; as `Store`."""
        self._have(index, on_host)
        return super().hold_again(index)

    def _have(self, index: int, on_host: bool) -> None:
        if on_host:
            self._pairs.bring(index)
        elif self._pairs.device_half(index) is None:  # it came from a checkpoint
            with self._card:
                self._pairs.device(index)

    def mark(self, workers: int = 0) -> Marked:
        """Keep the present version as it is; as `Store`."""
        with self._card:
            marked = super().mark(workers)
            self._card.settle()  # slots that were made for workers without one
            return marked

    def restore(self, version: int, names: Any, fill: Fill) -> None:
        """Go on from a version that was marked; as `Store`."""
        with self._card as card:
            super().restore(version, names, fill)
            self._pairs.device(self.current)
            card.settle()

    # ---- updates -----------------------------------------------------------------------------

    def update(self, grad: Array, scale: float = 1.0, worker: int = 0) -> bool:
        """Apply one gradient and publish the result as the next version; as `Store`."""
        self._begin(scale, worker)
        self.extend(grad, self._size)
        return self.commit()

    def replace(self, held: int, grad: Array) -> int:
        """Give one hold back, apply a gradient, and hold the result; as `Store`."""
        self.release(held)
        self._begin(1.0, 0)
        self.extend(grad, self._size)
        return self.commit_and_hold()

    def begin(self) -> None:
        """Begin the next update in parts; as `Store`."""
        self._begin(1.0, 0)

    def _begin(self, scale: float, worker: int) -> None:
        self.abandon()
        if self.per_worker:
            self._rule.select(worker)  # type: ignore[attr-defined]  # such rules have it
        assert self._free, "every buffer is held: two must stay free for updates"
        with self._card:
            self._params = self._pairs.device(self.current)
            self._rule.begin(self.version, self._params, scale)
            self._early = heapq.heappop(self._free)
            self._eager = self._pairs.was_asked_for(self.current)
            self._target = self._pairs.to_compute(self._early)
        self._done = 0

    def extend(self, grad: Array, end: int) -> None:
        """Apply [.., end) of the gradient, from where the last part ended; as `Store`.

        It is on the host, or on the device and complete so far, or in what a worker has lent. Its
        elements may be float16, or the bits of bfloat16 as uint16.
        """
        assert self._early is not None, "no update has begun"
        begin, alone = self._done, not self._done and end == self._size <= STEP
        if end <= begin:
            return
        here = _is_here(grad)
        with self._card as card:
            into: Any = grad if here else self._staged(grad.dtype)
            while begin < end:
                stop = min(end, begin + STEP)
                if not here:
                    card.send(grad[begin:stop], into[begin:stop], alone=alone)
                self._compute(into, begin, stop, alone=alone)
                begin = stop
        self._done = end

    def _staged(self, dtype: np.dtype[Any]) -> Any:
        into = self._staging.get(dtype.name)
        if into is None:
            into = self._staging[dtype.name] = self._card.empty(self._size, dtype)
            self._card.reuse()  # kernels may have still to use what its memory was before
        return into

    def _compute(self, grad: Any, begin: int, end: int, *, alone: bool = False) -> None:
        """Apply [begin, end) of a gradient that is on the device, or on its way there."""
        out, host = self._target
        plain: Any = Incoming(grad, self._card.bad)
        staged: Any = Incoming(grad, self._card.bad, self._stages)
        if not self._stages:
            self._rule.extend(self._params, plain, out, begin, end)
        else:
            for first, last, corrected in self._cuts:
                b, e = max(begin, first), min(end, last)
                if b < e:
                    self._rule.extend(self._params, staged if corrected else plain, out, b, e)
        if self._eager:
            self._card.fetch(out[begin:end], host[begin:end], alone=alone)

    def follow(self, grad: Array, words: Array) -> int:
        """Apply what words[0] says is there of the gradient, a step at most; as `Store`."""
        assert self._early is not None, "no update has begun"
        limit, tries = min(self._done + STEP, self._size), 0
        while self._done < limit and tries < _PATIENCE:
            end = min(int(words[0]), limit)
            tries = 0 if end > self._done else tries + 1
            self.extend(grad, end)
        return self._done

    def commit(self) -> bool:
        """Publish the update made in parts, once its verdict is known; as `Store`."""
        target = self._early
        assert target is not None, "no update has begun"
        assert self._done == self._size, "a part is missing"
        self._stages = ()
        with self._card as card:
            if not card.verdict():
                self.abandon()
                return False
            card.fetched()
            self._early = None
            self._rule.finish()
        self._pairs.computed(target, copied=self._eager)
        self._publish(target)
        return True

    def abandon(self) -> None:
        """Forget the update made in parts, if there is one; as `Store`."""
        if self._early is not None:
            with self._card as card:
                card.settle()  # nothing reads the gradient any more, nor writes the target
                card.clear()
        super().abandon()

    def is_finite(self, grad: Any) -> bool:
        """Say whether all of a gradient is finite; the host looks. As `Store`."""
        if not isinstance(grad, np.ndarray):
            host = np.empty(self._size, grad.dtype)
            with self._card as card:
                card.fetch(grad, host)
                card.fetched()
            grad = host
        return super().is_finite(grad)

    # ---- rounds ------------------------------------------------------------------------------

    def update_mean(self, grads: Sequence[Array], scales: Sequence[float]) -> bool:
        """Apply the mean of some gradients, summed in the order given; as `Store`."""
        if len(grads) == 1:
            return self.update(grads[0], scales[0])
        self.abandon()
        with self._card as card:
            if self._total is None:
                self._total = card.empty(self._size, self._dtype)
            for number, (grad, scale) in enumerate(zip(grads, scales, strict=True)):
                if number:
                    card.reuse()
                self._add(grad, scale, first=not number)
        self._begin(1.0, 0)
        with self._card:
            share = Staged(_SHARE, (float(len(grads)),))
            incoming: Any = Incoming(self._total, self._card.bad, (share,))
            out, host = self._target
            self._rule.extend(self._params, incoming, out, 0, self._size)
            if self._eager:
                self._card.fetch(out, host)
        self._done = self._size
        return self.commit()

    def _add(self, grad: Array, scale: float, *, first: bool) -> None:
        """Take a gradient into the sum of a round."""
        formula = formulas.first if first else formulas.add
        kernel = compile_kernel(formula, 0, 1, self._dtype)
        here, total = _is_here(grad), self._total
        into: Any = grad if here else self._staged(grad.dtype)
        for begin in range(0, self._size, STEP):
            end = min(self._size, begin + STEP)
            if not here:
                self._card.send(grad[begin:end], into[begin:end])
            # What is not finite in the sum is judged by the rule.
            incoming = Incoming(into, self._ignored)
            for b, e, scaled in self._cuts:
                b, e = max(b, begin), min(e, end)
                if b < e:
                    kernel(b, e, total, incoming, total, (scale if scaled else 1.0,))


def _is_here(grad: Any) -> bool:
    """Whether a gradient is on the device already, and this process's."""
    return not isinstance(grad, (np.ndarray, BorrowedArray))
