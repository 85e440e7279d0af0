"""Different rules for different parameters, and the rule for what is averaged and not trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import numpy as np

from psframe.layout import Layout
from psframe.optim import formulas
from psframe.optim.base import Optimizer
from psframe.optim.checks import as_float
from psframe.optim.updater import Updater, load_slot

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
        self._parts: list[tuple[Updater, slice]] = []
        for rule, b, e in runs:
            part = slice(b - begin, e - begin)
            make_set = partial(self._make_set, rule.slots, part)
            self._parts.append((Updater(rule, layout, b, e, make_set), part))
        # The same in every shard, whatever rules it has.
        slots = {name for each in layout.names for name in grouped.rule_of(each).slots}
        self.slot_names: tuple[str, ...] = tuple(sorted(slots))

    def _make_set(self, names: tuple[str, ...], part: slice, xp: Any, k: int) -> tuple[Any, ...]:
        """Give one rule its part of set `k` of the slots."""
        if k not in self._sets:
            self._sets[k] = {name: xp.zeros(self.size, self._dtype) for name in self.slot_names}
        return tuple(self._sets[k][name][part] for name in names)

    @property
    def slots(self) -> dict[str, Any]:
        """The slots by name, as they are now; as `Updater`."""
        current = next((u.current_set for u, _ in self._parts if u.slot_names), 0)
        return self._sets.get(current, {}).copy()

    def mark(self) -> None:
        """Let nobody write the present `slots` until `unmark`; as `Updater`."""
        for updater, _ in self._parts:
            updater.mark()

    def unmark(self) -> None:
        """Let the marked slots be written again; as `Updater`."""
        for updater, _ in self._parts:
            updater.unmark()

    def load(self, params: Any, fill: Callable[[str, Any], None]) -> None:
        """Give the slots the values that an updater with as many updates had; as `Updater`."""
        self.prepare(params)
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
        if not self._parts and not self._sets:
            self.prepare(params)
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
        if not self._parts:  # an empty shard: nobody else makes them
            self._make_set((), slice(0), np, 0)
        for updater, part in self._parts:
            updater.prepare(params[part])
