"""What a thread's passes through a model share: kernels, products, and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from psframe.models.cuda.gemm import Gemm
from psframe.models.cuda.kernels import Kernels
from psframe.models.cuda.memory import Memory, Readout, Upload

__all__ = ["Run"]


class Run:
    """One thread's means for passes of one kind; no pass but the first of its size allocates.

    Args:
        xp: cupy.
        precision: see `psframe.models.Sequential`.
        training: whether gradients will be asked for.

    Attributes:
        bias: of the last layer, if it is to be added where the loss is computed.
    """

    def __init__(self, xp: Any, precision: str, *, training: bool) -> None:
        self.xp = xp
        self.memory = Memory()
        self.memory.training = training
        self.kernels = Kernels(xp, precision, self.memory)
        self.gemm = Gemm(xp, precision, self.kernels.state, scaled=self.kernels.scaled)
        self.bias: Any = None
        self._sums = xp.empty(2, np.float32)
        self._readout = Readout(xp, 2)
        self._uploads: dict[tuple[int, int], Upload] = {}
        self._weights: dict[tuple[int, str], Any] = {}
        self._shapes: dict[Any, Any] = {}
        self._spans: dict[Any, int] = {}

    @property
    def casts(self) -> bool:
        """Whether values are stored as another type than float32."""
        return self.kernels.dtype != np.float32

    def array(self, owner: Any, role: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """Give memory with undefined values, the owner's for this role until the next call."""
        return self.memory.array(owner, role, shape, dtype, self.xp)

    def stored(self, owner: Any, role: str, shape: tuple[int, ...]) -> Any:
        """Give memory of the storage type."""
        return self.array(owner, role, shape, self.kernels.dtype)

    def float32(self, owner: Any, role: str, shape: tuple[int, ...]) -> Any:
        """Give memory of float32."""
        return self.array(owner, role, shape, np.float32)

    def save(self, owner: Any, role: str, value: Any) -> Any:
        """Keep what the backward pass needs of the forward pass."""
        return self.memory.save(owner, role, value)

    def saved(self, owner: Any, role: str) -> Any:
        """Give what `save` kept."""
        return self.memory.saved(owner, role)

    def shaped(self, array: Any, shape: tuple[int, ...]) -> Any:
        """Give a contiguous array another shape."""
        return array if array.shape == shape else array.reshape(shape)

    def upload(self, owner: Any, mask: Any) -> Any:
        """Send a mask to the device, as bytes."""
        key = id(owner), mask.size
        if key not in self._uploads:
            self._uploads[key] = Upload(self.xp, mask.size, np.uint8)
        return self._uploads[key].copy(mask)

    # ---- weights

    def cast_weights(self, steps: Sequence[Any], parts: Sequence[Any]) -> None:
        """Take the parameters of this pass, and store copies of those that products need.

        Parameters that lie together, as a worker's do, are stored by one kernel.
        """
        wanted = [
            ((step.number, name), parts[step.number][name]) for step in steps for name in step.cast
        ]
        if not self.casts or not wanted:
            self._weights = dict(wanted)
            return
        first, span = self._span(parts)
        if not span:
            for key, array in wanted:
                copy = self.stored(self, f"weights {key}", array.shape)
                self._weights[key] = self.kernels.cast(array, copy)
            return
        flat = self.stored(self, "weights", (span,))
        self.kernels.cast_span(first, flat)
        for key, array in wanted:
            self._weights[key] = self._view(flat, (array.data.ptr - first) // 4, array.shape)

    def _span(self, parts: Sequence[Any]) -> tuple[int, int]:
        """Give where parameters begin and how many they are, 0 if there are gaps between them."""
        spans = [(a.data.ptr, a.size) for part in parts for a in part.values()]
        first = min(begin for begin, _ in spans)
        key = tuple((begin - first, size) for begin, size in spans)
        if key not in self._spans:
            self._spans = {key: _covered(key)}  # a worker's parameters always lie alike
        return first, self._spans[key]

    def weight(self, step: Any, name: str) -> Any:
        """Give a parameter as products need it."""
        return self._weights[step.number, name]

    def _view(self, flat: Any, begin: int, shape: tuple[int, ...]) -> Any:
        key = begin, shape
        kept = self._shapes.get(key)
        if kept is None or kept[0] is not flat:
            kept = flat, flat[begin : begin + math.prod(shape)].reshape(shape)
            self._shapes[key] = kept
        return kept[1]

    # ---- types

    def as_stored(self, x: Any, owner: Any, *, gradient: bool = False) -> Any:
        """Give values contiguous and as the storage type."""
        if x.dtype == self.kernels.dtype and x.flags.c_contiguous:
            return x
        x = self._contiguous(x, owner, gradient)
        if not self.casts:
            return x
        cast = self.kernels.cast_gradient if gradient else self.kernels.cast
        return cast(x, self.stored(owner, f"stored {gradient}", x.shape))

    def as_float32(self, x: Any, owner: Any, *, gradient: bool = False) -> Any:
        """Give values contiguous and as float32."""
        if x.dtype == np.float32:
            return self._contiguous(x, owner, gradient)
        return self.kernels.uncast(x, self.float32(owner, f"uncast {gradient}", x.shape))

    def _contiguous(self, x: Any, owner: Any, gradient: bool) -> Any:
        if x.flags.c_contiguous:
            return x
        copy = self.float32(owner, f"contiguous {gradient}", x.shape)
        copy[...] = x
        return copy

    # ---- the loss

    def loss(self, logits: Any, y: Any, g: Any) -> Any:
        """Compute the mean cross-entropy and its scaled gradient `g`; the loss is on its way."""
        losses, _ = self.kernels.cross_entropy(logits, self.bias, y, g=g)
        self.kernels.two_sums(losses, None, self._sums, 1 / len(y))
        return self._readout.copy(self._sums)

    def sums(self, logits: Any, y: Any) -> tuple[float, float]:
        """Sum cross-entropy and correct predictions over a batch, and wait for them."""
        losses, hits = self.kernels.cross_entropy(logits, self.bias, y, hits=True)
        self.kernels.two_sums(losses, hits, self._sums, 1.0)
        loss, correct = self._readout.wait(self._sums)
        return loss, correct


def _covered(spans: tuple[tuple[int, int], ...]) -> int:
    """Count the float32 values of arrays that follow one another from 0 on; 0 if there is a gap."""
    end = 0
    for begin, size in sorted(spans):
        if begin != 4 * end:
            return 0
        end += size
    return end
