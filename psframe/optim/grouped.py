"""Different rules for different parameters, and the rule for what is averaged and not trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import numpy as np

from psframe.layout import Layout
from psframe.optim import formulas
from psframe.optim.base import Optimizer
from psframe.optim.checks import as_float
from psframe.optim.per_worker import PerWorker
from psframe.optim.updater import Updater, load_slot
from psframe.optim.worker_updater import WorkerUpdater, worker_of

__all__ = ["Average", "Grouped", "GroupedUpdater"]


@dataclass(frozen=True, repr=False)
class Average(Optimizer):
    """Average what is pushed: w <- momentum w + (1 - momentum) g.

    For state that is observed and not trained, such as the running mean of batch normalisation
    (Ioffe and Szegedy 2015): in place of a gradient, workers push what their batch has shown. The
    observation itself is pushed, not its difference to the average that the worker had read: so
    the server averages into what it has now, the result is a convex combination however stale
    the push is, and with several workers there is one average over all of them. In BSP it is
    the round's mean that is averaged in.

    Neither learning rate, weight decay nor clipping touch it; see `Grouped` for how it is applied
    to some parameters.

    Args:
        momentum: weight of the past, in [0, 1).

    Raises:
        TypeError, ValueError: it is no number or outside its range.

    >>> Average(0.9)
    Average(momentum=0.9)
    """

    momentum: float = 0.9

    lr: ClassVar[float] = 1.0  # type: ignore[misc]  # the same for every instance
    weight_decay: ClassVar[float] = 0.0  # type: ignore[misc]
    no_decay: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc]

    def __post_init__(self) -> None:
        as_float(self, "momentum", least=0.0, below=1.0)

    @property
    def formula(self) -> Callable[..., Any]:
        return formulas.average

    @property
    def slots(self) -> tuple[str, ...]:
        return ()

    def averages(self, name: str) -> bool:
        return True

    def scalars(self, step: int, lr: float, scale: float, weight_decay: float) -> tuple[float, ...]:
        return (self.momentum, 1.0 - self.momentum)


@dataclass(frozen=True)
class Grouped:
    """Apply one rule to most parameters and others to some of them.

    All of an update or nothing of it is applied, whatever the rules.

    Args:
        rule: for parameters that no pattern matches.
        groups: patterns of names, as of a shell, to rules; the first that matches counts.

    Raises:
        TypeError: something is no rule of `psframe.optim`, or a pattern is no string.

    >>> from psframe.optim import SGD
    >>> rule = Grouped(SGD(0.1), {"*.mean": Average(0.9)})
    >>> type(rule.rule_of("bn1.mean")).__name__, type(rule.rule_of("conv1.w")).__name__
    ('Average', 'SGD')
    """

    rule: Optimizer
    groups: Mapping[str, Optimizer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.groups, Mapping):
            raise TypeError(
                f"Grouped: expected a mapping of patterns to rules, got {self.groups!r}"
            )
        for pattern in self.groups:
            if not isinstance(pattern, str):
                raise TypeError(f"Grouped: expected a pattern of names, got {pattern!r}")
        for rule in (self.rule, *self.groups.values()):
            if not isinstance(rule, Optimizer):
                raise TypeError(f"Grouped: expected a rule of psframe.optim, got {rule!r}")
        object.__setattr__(self, "groups", dict(self.groups))

    def rule_of(self, name: str) -> Optimizer:
        """Give the rule of the parameter of that name."""
        matching = (r for pattern, r in self.groups.items() if fnmatchcase(name, pattern))
        return next(matching, self.rule)

    def averages(self, name: str) -> bool:
        """Tell whether the parameter of that name is an average of what is pushed for it."""
        return self.rule_of(name).averages(name)

    def updater(self, layout: Layout, begin: int, end: int) -> GroupedUpdater:
        """Make the state for the shard [begin, end) of the flat vector.

        Raises:
            ValueError: as `Optimizer.updater`.
        """
        return GroupedUpdater(self, layout, begin, end)


class GroupedUpdater:
    """The state of a `Grouped` for one shard: an updater for each run of one rule.

    As `Updater`; not thread-safe. A slot is one array as long as the shard, of which a rule that
    has it uses its runs; the rest is never touched, and takes no memory.

    Where some rule has slots for every worker (`per_worker`, the same in every shard), so has this:
    it is then used as `WorkerUpdater`. All its updaters of such rules are treated alike, so that
    their arrays of one number are parts of one array.
    """

    def __init__(self, grouped: Grouped, layout: Layout, begin: int, end: int) -> None:
        self.size = end - begin
        self._dtype = layout.dtype
        # By number of the set: the slots of that set.
        self._sets: dict[int, dict[str, Any]] = {}
        runs: list[tuple[Optimizer, int, int]] = []
        for name, offset, size in zip(layout.names, layout.offsets, layout.sizes, strict=True):
            b, e = max(offset, begin), min(offset + size, end)
            if b >= e:
                continue
            rule = grouped.rule_of(name)
            if runs and runs[-1][0] is rule:
                b = runs.pop()[1]
            runs.append((rule, b, e))
        # The same in every shard, whatever rules it has.
        rules = [grouped.rule_of(name) for name in layout.names]
        slots = {slot for rule in rules if not isinstance(rule, PerWorker) for slot in rule.slots}
        self._shared_names = tuple(sorted(slots))
        of_workers = next((rule for rule in rules if isinstance(rule, PerWorker)), None)
        self.per_worker = of_workers is not None
        # What the slots of workers are in, by number. The first of their updaters is of no
        # elements: it is there in shards without such a rule, too, and knows who has a slot.
        self._arrays: list[Any] = []
        self._of_workers: list[tuple[WorkerUpdater, slice]] = []
        if of_workers is not None:
            self._add_of_workers(of_workers, layout, begin, begin, slice(0, 0))
        self._parts: list[tuple[Updater, slice]] = [*self._of_workers]
        for rule, b, e in runs:
            part = slice(b - begin, e - begin)
            if isinstance(rule, PerWorker):
                self._parts.append(self._add_of_workers(rule, layout, b, e, part))
            else:
                make_set = partial(self._make_set, rule.slots, part)
                self._parts.append((Updater(rule, layout, b, e, make_set), part))

    def _add_of_workers(
        self, rule: PerWorker, layout: Layout, begin: int, end: int, part: slice
    ) -> tuple[WorkerUpdater, slice]:
        updater = WorkerUpdater(rule, layout, begin, end, partial(self._make_array, part))
        self._of_workers.append((updater, part))
        return updater, part

    def _make_array(self, part: slice, xp: Any, number: int) -> Any:
        """Give one rule its part of the array of that number."""
        while len(self._arrays) <= number:
            self._arrays.append(xp.zeros(self.size, self._dtype))
        return self._arrays[number][part]

    def _make_set(self, names: tuple[str, ...], part: slice, xp: Any, k: int) -> tuple[Any, ...]:
        """Give one rule its part of set `k` of the slots."""
        if k not in self._sets:
            self._sets[k] = {name: xp.zeros(self.size, self._dtype) for name in self._shared_names}
        return tuple(self._sets[k][name][part] for name in names)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """The names of the slots; as `Updater` and, for slots of workers, `WorkerUpdater`."""
        return (*self._shared_names, *self._numbers)

    @property
    def _numbers(self) -> dict[str, int]:
        return self._of_workers[0][0].numbers if self._of_workers else {}

    @property
    def slots(self) -> dict[str, Any]:
        """The slots by name, as they are now; as `Updater`."""
        shared = (u for u, _ in self._parts if not isinstance(u, WorkerUpdater))
        current = next((u.current_set for u in shared if u.slot_names), 0)
        slots = self._sets.get(current, {}).copy()
        return slots | {name: self._arrays[number] for name, number in self._numbers.items()}

    def accepts(self, names: Collection[str]) -> bool:
        """Tell whether these may be the names of slots that were marked after an update."""
        others = set(names) - set(self._shared_names)
        if len(names) != len(self._shared_names) + len(others):
            return False  # a shared one is missing
        if not self.per_worker:
            return not others
        return bool(others) and all(worker_of(name) is not None for name in others)

    def select(self, worker: int) -> None:
        """Have the updates that begin from now on be of that worker's gradients."""
        for updater, _ in self._of_workers:
            updater.select(worker)

    def adopt(self, params: Any, workers: Iterable[int]) -> None:
        """Give each of these workers a slot, unless it has one; as `WorkerUpdater`."""
        workers = list(workers)
        for updater, part in self._of_workers:
            updater.adopt(params[part], workers)

    def mark(self) -> None:
        """Let nobody write the present `slots` until `unmark`; as `Updater`."""
        for updater, _ in self._parts:
            updater.mark()

    def unmark(self) -> None:
        """Let the marked slots be written again; as `Updater`."""
        for updater, _ in self._parts:
            updater.unmark()

    def load(
        self,
        params: Any,
        fill: Callable[[str, Any], None],
        names: Collection[str] | None = None,
    ) -> None:
        """Give the slots the values that an updater with as many updates had.

        As `Updater` and, if there are slots of workers, `WorkerUpdater`: that needs the names.
        """
        if self.per_worker and (names is None or not self.accepts(names)):
            raise ValueError(
                f"slots are {names if names is None else sorted(names)}, expected"
                f" {[*self._shared_names, 'momentum.0']} and the like, one for each worker that has"
                " pushed"
            )
        self.prepare(params)
        self.adopt(params, sorted(w for w in map(worker_of, names or ()) if w is not None))
        for name, slot in self.slots.items():
            load_slot(name, slot, fill)

    def update(self, step: int, params: Any, grad: Any, out: Any, scale: float = 1.0) -> bool:
        """Write the parameters after update number `step` to `out`, or refuse; as `Updater`."""
        self.begin(step, params, scale)
        if not self.extend(params, grad, out, 0, self.size):
            return False
        self.finish()
        return True

    def begin(self, step: int, params: Any, scale: float = 1.0) -> None:
        """Begin an update that is made in parts; as `Updater`."""
        if not self._sets:
            self.prepare(params)
        for of_worker, part in self._of_workers:  # all, before something can fail
            of_worker.take(params[part])
        for updater, part in self._parts:
            updater.begin(step, params[part], scale)

    def extend(self, params: Any, grad: Any, out: Any, begin: int, end: int) -> bool:
        """Write [begin, end) of the new parameters; as `Updater`."""
        for updater, part in self._parts:
            first = part.start
            b, e = max(begin, first), min(end, part.stop)
            if b < e and not updater.extend(
                params[part], grad[part], out[part], b - first, e - first
            ):
                return False
        return True

    def follow(
        self, params: Any, grad: Any, out: Any, begin: int, limit: int, words: Any
    ) -> tuple[int, bool]:
        """Write what of the gradient is there; as `Updater`, but without waiting for more."""
        end = min(int(words[0]), self.size, limit)
        if end <= begin:
            return begin, True
        return end, self.extend(params, grad, out, begin, end)

    def finish(self) -> None:
        """Make the parts of an update its new state; as `Updater`."""
        for updater, _ in self._parts:
            updater.finish()

    def prepare(self, params: Any) -> None:
        """Compile the kernels and allocate the slots; as `Updater`."""
        for updater, part in self._parts:
            updater.prepare(params[part])
        if not self._sets:  # a shard in which nobody uses them: nobody else makes them
            self._make_set((), slice(0), np, 0)
