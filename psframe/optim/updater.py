"""Applies an optimizer to one shard of the parameters, all of an update or nothing of it.

The parameters are read from one buffer and written to another, and so is every slot (momentum,
second moment): each has two buffers, the kernel reads the one and writes the other, and only an
update whose every result is finite makes them change places. A refused one leaves no trace.

Slots that are marked, for a checkpoint, are not written until they are unmarked. If two more
updates come meanwhile, a third set of buffers takes their place; it is allocated then and kept.
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

__all__ = ["Updater", "decay_runs", "load_slot"]

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


def _slot_arrays(
    xp: Any, count: int, size: int, dtype: np.dtype[Any], before: int = 0
) -> tuple[Any, ...]:
    """Allocate arrays of zeros for slots, all in one block.

    Each begins at a cache line, and at another place in its page than the arrays before it (and
    than `before` of an earlier block): where all streams of a large update share their low address
    bits it is slower by a tenth.
    """
    line = _LINE_BYTES // dtype.itemsize
    stride = -(-size // line) * line + _STAGGER_BYTES // dtype.itemsize
    block = xp.zeros(count * stride + (1 + before) * line, dtype)
    address = block.ctypes.data if xp is np else block.data.ptr
    first = -address % _LINE_BYTES // dtype.itemsize + before * line
    begins = [first + k * stride for k in range(count)]
    return tuple(block[begin : begin + size] for begin in begins)


def _is_cupys(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "cupy"


def load_slot(name: str, slot: Any, fill: Callable[[str, Any], None]) -> None:
    """Fill a slot, by way of the host if it is not there; see `Updater.load`."""
    if not _is_cupys(slot):
        fill(name, slot)
        return
    import cupy

    host = np.empty(slot.shape, slot.dtype)
    fill(name, host)
    slot[...] = cupy.asarray(host)


# Gives set 0, 1 or 2 of the slots, for arrays of that module.
_MakeSet = Callable[[Any, int], tuple[Any, ...]]


class Updater:
    """The state of an optimizer for the shard [begin, end), and the way to change it.

    Kernels are compiled and slots allocated at the first update, on the device of its arrays.
    Not thread-safe.

    Args:
        optimizer, layout, begin, end: the rule, and the shard.
        make_set: gives the memory of the slots; its own if None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        layout: Layout,
        begin: int,
        end: int,
        make_set: _MakeSet | None = None,
    ) -> None:
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
        self._xp: Any = np
        self._make_set = make_set
        self._sets: list[tuple[Any, ...]] = []  # two, and the third once it is needed
        self._marked: tuple[Any, ...] | None = None  # one of them
        self._scalars_for: tuple[int, float, float] | None = None
        # Whether the scalars depend on the gradient's scale alone, and the one they are for.
        self._constant = isinstance(optimizer.lr, float) and not optimizer.counts_steps
        self._scale: float | None = None
        self._decayed: Array = np.zeros(SCALARS_MAX, self.dtype)
        self._plain = self._decayed.copy() if self._mixed else self._decayed

    @property
    def slot_names(self) -> tuple[str, ...]:
        """The names of the slots, whether they are there yet or not."""
        return self._names

    @property
    def current_set(self) -> int:
        """Which of its sets the slots are in, if it has slots; 0 before the first update."""
        now = self._pairs[0]
        return next((k for k, one in enumerate(self._sets) if one and one[0] is now[0]), 0)

    @property
    def slots(self) -> dict[str, Any]:
        """The slots by name, as they are now: arrays not to be written, good until the next update.

        Empty before the first update.
        """
        return dict(zip(self._names, self._pairs[0][::2], strict=False))

    def mark(self) -> None:
        """Let nobody write the present `slots` until `unmark`; updates go on beside them."""
        assert self._marked is None, "there is a mark already"
        self._marked = self._pairs[0][::2]
        self._scale = None  # the next update begins with `begin`, which minds the mark

    def unmark(self) -> None:
        """Let the marked slots be written again."""
        assert self._marked is not None, "there is no mark"
        self._marked = None

    def load(self, params: Any, fill: Callable[[str, Any], None]) -> None:
        """Give the slots the values that an updater with as many updates had.

        Args:
            params: parameters of the shard, as for `update`.
            fill: (name, array on the host) -> writes the slot of that name into the array.
        """
        self.prepare(params)
        for name, slot in self.slots.items():
            load_slot(name, slot, fill)

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
            if self._kernel(0, size, params, grad, out, self._decayed, *self._pairs[0]):  # type: ignore[misc]
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
        if self._marked:
            self._spare_marked()

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
        if _is_cupys(params):
            import cupy

            from psframe.optim.cuda import compile_kernel

            self._xp, kernel = cupy, compile_kernel(rule, count, scalars, self.dtype)
        else:
            from psframe.optim.cpu import compile_loop

            kernel = compile_loop(rule, count, scalars, self.dtype)
        if self._make_set is None:
            arrays = _slot_arrays(self._xp, 2 * len(self._names), self.size, self.dtype)
            self._sets = [arrays[::2], arrays[1::2]]
        else:
            self._sets = [self._make_set(self._xp, 0), self._make_set(self._xp, 1)]
        self._pair(*self._sets)
        self._kernel = kernel

    def _pair(self, old: tuple[Any, ...], new: tuple[Any, ...]) -> None:
        """Let the next update read the one set and write the other."""
        self._pairs = (
            tuple(array for pair in zip(old, new, strict=True) for array in pair),
            tuple(array for pair in zip(new, old, strict=True) for array in pair),
        )

    def _spare_marked(self) -> None:
        """Have the update that begins write another set than the marked one."""
        old, new = self._pairs[0][::2], self._pairs[0][1::2]
        assert self._marked, "slots are marked"
        if old[0] is self._marked[0]:
            self._scale = None  # the update after this one would write it
        elif new[0] is self._marked[0]:
            if len(self._sets) < 3:
                self._sets.append(self._third_set())
            third = next(s for s in self._sets if s[0] is not old[0] and s[0] is not new[0])
            self._pair(old, third)

    def _third_set(self) -> tuple[Any, ...]:
        if self._make_set is not None:
            return self._make_set(self._xp, 2)
        count = len(self._names)
        return _slot_arrays(self._xp, count, self.size, self.dtype, before=2 * count)

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
