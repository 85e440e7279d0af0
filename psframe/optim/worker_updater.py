"""Applies an optimizer that has a slot for every worker to one shard of the parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from psframe.layout import Array, Layout
from psframe.optim.updater import Updater, _slot_arrays, load_slot

if TYPE_CHECKING:
    from psframe.optim.base import Optimizer

__all__ = ["SLOT", "WorkerUpdater", "worker_of"]

SLOT = "momentum"
_NAME = re.compile(rf"{SLOT}\.(0|[1-9][0-9]{{0,17}})")
_PLACES = 32  # at which arrays begin in their pages, one line after the other; then again


def worker_of(name: str) -> int | None:
    """Tell whose slot has that name: 3 for "momentum.3"; None if it is no such name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


class WorkerUpdater(Updater):
    """The state of a rule with a slot for every worker, for the shard [begin, end).

    As `Updater`, but `select` says before each update, or before its `begin`, whose gradient it is.

    A worker's slot is made at its first update that is not refused. An update reads it (or zeros)
    and writes a spare array, and if all is finite the two change places. Marked arrays that are
    replaced are spared until `unmark`. Arrays have numbers, in the order in which they are made:
    two updaters that are treated alike have the same slots in arrays of the same numbers.

    Args:
        optimizer, layout, begin, end: as for `Updater`.
        make: (module, number) -> gives array number 0, 1, ..., zeros; its own memory if None.
    """

    per_worker: ClassVar[bool] = True

    def __init__(
        self,
        optimizer: Optimizer,
        layout: Layout,
        begin: int,
        end: int,
        make: Callable[[Any, int], Any] | None = None,
    ) -> None:
        super().__init__(optimizer, layout, begin, end, lambda xp, k: (self._arrays[self._new()],))
        self._make = self._allocate if make is None else make
        self._arrays: list[Any] = []
        self._of: dict[int, int] = {}  # the number of each worker's slot
        self._blank: int | None = 0  # an array of zeros, for a worker that has no slot
        self._spare = 1  # what the next update writes
        self._free: list[int] = []
        self._held: frozenset[int] | None = None  # marked
        self._replaced: list[int] = []  # marked, but nobody's slot any more
        self._selected: int | None = None
        # The worker that the arrays of the next update are of, and the one that is read.
        self._taken: int | None = None
        self._old = 0

    @property
    def slot_names(self) -> tuple[str, ...]:
        """The names of the slots that are there; see `accepts` for those that may be."""
        return tuple(self.numbers)

    @property
    def slots(self) -> dict[str, Any]:
        """The slots by name, of the workers that have one; as `Updater`."""
        return {name: self._arrays[number] for name, number in self.numbers.items()}

    @property
    def numbers(self) -> dict[str, int]:
        """The numbers of the arrays that the slots are in, by their names."""
        return {f"{SLOT}.{worker}": self._of[worker] for worker in sorted(self._of)}

    def accepts(self, names: Collection[str]) -> bool:
        """Tell whether these may be the names of slots that were marked after an update."""
        return bool(names) and all(worker_of(name) is not None for name in names)

    def select(self, worker: int) -> None:
        """Have the updates that begin from now on be of that worker's gradients."""
        assert worker >= 0, f"worker {worker}"
        self._selected = worker

    def take(self, params: Any) -> None:
        """Put the arrays in place for an update of the worker that is selected."""
        if self._kernel is None:
            self.prepare(params)
        worker = self._selected
        assert worker is not None, "no worker has been selected"
        if worker == self._taken:
            return
        old = self._of.get(worker)
        if old is None:
            if self._blank is None:
                self._blank = self._new()
            old = self._blank
        self._taken, self._old = worker, old
        self._pair((self._arrays[old],), (self._arrays[self._spare],))

    def update(self, step: int, params: Any, grad: Any, out: Any, scale: float = 1.0) -> bool:
        """Write the parameters after update number `step` to `out`, or refuse; as `Updater`."""
        self.take(params)
        if not super().update(step, params, grad, out, scale):
            return False
        self._keep_written()
        return True

    def begin(self, step: int, params: Any, scale: float = 1.0) -> None:
        """Begin an update that is made in parts; as `Updater`."""
        self.take(params)
        super().begin(step, params, scale)

    def finish(self) -> None:
        """Make the parts of an update its new state; as `Updater`."""
        super().finish()
        self._keep_written()

    def _keep_written(self) -> None:
        """Make what an update has written the worker's slot."""
        worker, old = self._taken, self._old
        assert worker is not None, "an update has begun"
        if old == self._blank:
            self._blank = None
        self._of[worker] = self._spare
        (self._replaced if self._held and old in self._held else self._free).append(old)
        self._spare = self._free.pop() if self._free else self._new()
        self._taken = None

    def mark(self) -> None:
        """Let nobody write the present `slots` until `unmark`; as `Updater`."""
        assert self._held is None, "there is a mark already"
        self._held = frozenset(self._of.values())

    def unmark(self) -> None:
        """Let the marked slots be written again; as `Updater`."""
        assert self._held is not None, "there is no mark"
        self._held = None
        self._free += self._replaced
        self._replaced = []

    def adopt(self, params: Any, workers: Iterable[int]) -> None:
        """Give each of these workers a slot, of zeros, unless it has one.

        Shards may differ in who has one: of a worker's first push, some may have refused or missed
        their part. It changes no update.

        Args:
            params: parameters of the shard, as for `update`.
            workers: which.
        """
        self.prepare(params)
        for worker in workers:
            if worker in self._of:
                continue
            if worker == self._taken:  # the update under way reads the zeros as its slot
                self._of[worker], self._blank = self._old, None
            else:
                self._of[worker] = self._new()

    def load(
        self,
        params: Any,
        fill: Callable[[str, Any], None],
        names: Collection[str] | None = None,
    ) -> None:
        """Give the slots the values that an updater with as many updates had; as `Updater`.

        Args:
            params, fill: as for `Updater`.
            names: of the slots that were marked, such as `accepts` accepts. They must be given:
                which workers have slots is not known otherwise.

        Raises:
            ValueError: they are not given, or `accepts` does not accept them; nothing has changed.
        """
        if names is None or not self.accepts(names):
            raise ValueError(
                f"slots are {names if names is None else sorted(names)}, expected '{SLOT}.0' and"
                " the like, one for each worker that has pushed"
            )
        self.adopt(params, sorted(w for w in map(worker_of, names) if w is not None))
        for name in names:
            load_slot(name, self._arrays[self.numbers[name]], fill)

    def _new(self) -> int:
        """Make one more array and give its number."""
        number = len(self._arrays)
        self._arrays.append(self._make(self._xp, number))
        return number

    def _allocate(self, xp: Any, number: int) -> Array:
        (array,) = _slot_arrays(xp, 1, self.size, self.dtype, before=number % _PLACES)
        return array  # type: ignore[no-any-return]
