"""Applies an optimizer to one shard of the parameters, all of an update or nothing of it.

The parameters are read from one buffer and written to another, and so is every slot (momentum,
second moment): each has two buffers, the kernel reads the one and writes the other, and only an
update whose every result is finite makes them change places. A refused one leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from psframe.layout import Array, Layout
from psframe.optim.formulas import SCALARS_MAX

if TYPE_CHECKING:
    from psframe.optim.base import Optimizer

__all__ = ["Updater", "decay_runs"]

_LINE_BYTES = 64
_STAGGER_BYTES = 4096 + _LINE_BYTES  # a page and a line


class _Kernel(Protocol):
    """Applies a rule to [begin, end) of its arrays; true if something it wrote is not finite."""

    def __call__(
        self, begin: int, end: int, params: Any, grad: Any, out: Any, scalars: Array, *slots: Any
    ) -> bool: ...


def decay_runs(
    layout: Layout, begin: int, end: int, no_decay: tuple[str, ...]
) -> tuple[tuple[int, int, bool], ...]:
    """Cut the shard [begin, end) into the longest runs with or without weight decay.

    Returns:
        (b, e, decays) in order, b and e counted from the beginning of the shard; together they
        cover it. An empty shard has none.
    """
    runs: list[tuple[int, int, bool]] = []
    for name, offset, size in zip(layout.names, layout.offsets, layout.sizes, strict=True):
        b, e = max(offset, begin) - begin, min(offset + size, end) - begin
        if b >= e:
            continue
        decays = not any(fnmatchcase(name, pattern) for pattern in no_decay)
        if runs and runs[-1][2] == decays:
            b = runs.pop()[0]
        runs.append((b, e, decays))
    return tuple(runs)


def _slot_pairs(xp: Any, count: int, size: int, dtype: np.dtype[Any]) -> list[tuple[Any, Any]]:
    """Allocate two arrays of zeros for each slot, all in one block.

    Each begins at a cache line, and at another place in its page than the array before it: where
    all streams of a large update share their low address bits it is slower by a tenth.
    """
    line = _LINE_BYTES // dtype.itemsize
    stride = -(-size // line) * line + _STAGGER_BYTES // dtype.itemsize
    block = xp.zeros(2 * count * stride + line, dtype)
    address = block.ctypes.data if xp is np else block.data.ptr
    first = -address % _LINE_BYTES // dtype.itemsize
    begins = [first + k * stride for k in range(2 * count)]
    arrays = [block[begin : begin + size] for begin in begins]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


class Updater:
    """The state of an optimizer for the shard [begin, end), and the way to change it.

    Kernels are compiled and slots allocated at the first update, on the device of its arrays.
    Not thread-safe.
    """

    def __init__(self, optimizer: Optimizer, layout: Layout, begin: int, end: int) -> None:
        if not 0 <= begin <= end <= layout.size:
            raise ValueError(
                f"updater: got the shard [{begin}, {end}), expected it within [0, {layout.size})"
            )
        optimizer.check_dtype(layout.dtype)
        self.optimizer = optimizer
        self.size = end - begin
        self.dtype = layout.dtype
        no_decay = optimizer.no_decay if optimizer.weight_decay else ()
        self._runs = decay_runs(layout, begin, end, no_decay)
        self._mixed = not all(decays for _, _, decays in self._runs)
        self._names = optimizer.slots
        self._whole = len(self._runs) == 1 and not self._mixed
        self._kernel: _Kernel | None = None
        self._follow: Callable[..., tuple[int, bool]] | None = None
        # The arrays (old, new) of each slot in turn, as the kernel takes them; [0] for the next
        # update, [1] for the one after it.
        self._pairs: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
        self._scalars_for: tuple[int, float, float] | None = None
        # Whether the scalars depend on the gradient's scale alone, and the one they are for.
        self._constant = isinstance(optimizer.lr, float) and not optimizer.counts_steps
        self._scale: float | None = None
        self._decayed: Array = np.zeros(SCALARS_MAX, self.dtype)
        self._plain = self._decayed.copy() if self._mixed else self._decayed

    @property
    def slots(self) -> dict[str, Any]:
        """The slots by name, as they are now: arrays not to be written, good until the next update.

        Empty before the first update.
        """
        return dict(zip(self._names, self._pairs[0][::2], strict=False))

    def update(self, step: int, params: Any, grad: Any, out: Any, scale: float = 1.0) -> bool:
        """Write the parameters after update number `step` to `out`, or refuse.

        Args:
            step: 0 for the first update; the learning rate is lr(step).
            params: parameters of the shard, contiguous, only read.
            grad: their gradient, only read.
            out: where the new parameters go; overlaps neither of the two.
            scale: the gradient is multiplied by it first (see `clip_scale`).

        Returns:
            True, or False if a new parameter or slot is not finite; then the state is as before
            and `out` holds garbage.

        Raises:
            TypeError, ValueError: the learning rate's schedule gave something else than a finite
                number >= 0. The state is as before.
        """
        if scale != self._scale:
            self.begin(step, params, scale)
        if self._whole:  # as `extend`, in one call less
            size = self.size
            assert len(params) == len(grad) == len(out) == size, "arrays of another shard"
            assert self._kernel is not None, "an update has begun"
            if self._kernel(0, size, params, grad, out, self._decayed, *self._pairs[0]):
                return False
        elif not self.extend(params, grad, out, 0, self.size):
            return False
        if self._names:
            self._pairs = self._pairs[::-1]
        return True

    def begin(self, step: int, params: Any, scale: float = 1.0) -> None:
        """Begin an update that is made in parts; what an earlier one has begun is forgotten.

        Raises:
            TypeError, ValueError: as `update`.
        """
        if self._kernel is None:
            self.prepare(params)
        self._set_scalars(step, scale)
        self._scale = scale if self._constant else None

    def extend(self, params: Any, grad: Any, out: Any, begin: int, end: int) -> bool:
        """Write [begin, end) of the new parameters; False if some result is not finite.

        Args:
            params, grad, out: as for `update`.
            begin, end: within [0, size); in any order and cut as one likes the parts of an update
                give the same bits.
        """
        kernel, pair, size = self._kernel, self._pairs[0], self.size
        assert len(params) == len(grad) == len(out) == size, "arrays of another shard"
        assert kernel is not None, "an update has begun"
        if self._whole:
            return not kernel(begin, end, params, grad, out, self._decayed, *pair)
        bad = False
        for first, last, decays in self._runs:
            b, e = max(begin, first), min(end, last)
            if b < e:
                scalars = self._decayed if decays else self._plain
                bad |= kernel(b, e, params, grad, out, scalars, *pair)
        return not bad

    def follow(
        self, params: Any, grad: Any, out: Any, begin: int, limit: int, words: Array
    ) -> tuple[int, bool]:
        """Write the new parameters from `begin` on, behind who is still writing the gradient.

        Waits a little for more of it, but never long.

        Args:
            params, grad, out: as for `update`, on the host.
            begin: how many are written.
            limit: write no more than so many, may be beyond the size.
            words: int64; the first says how many elements of the gradient are there.

        Returns:
            How many are written now, and whether all that were added are finite.
        """
        if not self._whole:
            end = min(int(words[0]), self.size, limit)
            if end <= begin:
                return begin, True
            return end, self.extend(params, grad, out, begin, end)
        assert len(params) == len(grad) == len(out) == self.size, "arrays of another shard"
        if self._follow is None:
            from psframe.optim.cpu import compile_follow

            rule, scalars = self.optimizer.formula, self.optimizer.scalar_count
            self._follow = compile_follow(rule, len(self._names), scalars, self.dtype)
        arrays = (params, grad, out, self._decayed, *self._pairs[0])
        end, bad = self._follow(words, begin, min(limit, self.size), arrays)
        return end, not bad

    def finish(self) -> None:
        """Make the parts of an update, which cover the shard and are all finite, its new state."""
        self._pairs = self._pairs[::-1]

    def prepare(self, params: Any) -> None:
        """Compile the kernel and allocate the slots for arrays such as `params`, once.

        The first update does it too; a server does it before it lets anybody wait for it.
        """
        if self._kernel is not None:
            return
        rule, count, scalars = self.optimizer.formula, len(self._names), self.optimizer.scalar_count
        xp: Any
        if type(params).__module__.partition(".")[0] == "cupy":
            import cupy

            from psframe.optim.cuda import compile_kernel

            xp, kernel = cupy, compile_kernel(rule, count, scalars, self.dtype)
        else:
            from psframe.optim.cpu import compile_loop

            xp, kernel = np, compile_loop(rule, count, scalars, self.dtype)
        slots = _slot_pairs(xp, len(self._names), self.size, self.dtype)
        self._pairs = (
            tuple(array for old, new in slots for array in (old, new)),
            tuple(array for old, new in slots for array in (new, old)),
        )
        self._kernel = kernel

    def _set_scalars(self, step: int, scale: float) -> None:
        """Compute the rule's scalars in float64 and round them to the arrays' dtype."""
        optimizer = self.optimizer
        lr = optimizer.learning_rate(step)
        key = (step if optimizer.counts_steps else 0, lr, scale)
        if key == self._scalars_for:
            return
        self._scalars_for = None
        values = optimizer.scalars(step, lr, scale, optimizer.weight_decay)
        with np.errstate(over="ignore"):  # what overflows here makes the update refused
            self._decayed[: len(values)] = values
            if self._mixed:
                self._plain[: len(values)] = optimizer.scalars(step, lr, scale, 0.0)
        self._scalars_for = key
