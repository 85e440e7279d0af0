"""Several rules one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from psframe.layout import Array, Layout
from psframe.stale.on_device import DeviceChain, as_device_correction
from psframe.stale.rule import Correction, Rule, Stale, as_rule, checked_factor

__all__ = ["Chain", "chain"]


@dataclass(frozen=True, repr=False)
class Chain(Rule):
    """Several rules one after the other; `chain` makes it."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("chain: expected at least one rule, got none")
        rules = tuple(as_rule(rule) for rule in self.rules)
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "needs_norm", any(rule.needs_norm for rule in rules))
        object.__setattr__(self, "needs_read", any(rule.needs_read for rule in rules))

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.rules))})"

    def factor(self, push: Stale) -> float | None:
        """Multiply the factors; each rule sees the norm as those before it have scaled it."""
        product = 1.0
        for rule in self.rules:
            factor = checked_factor(rule, replace(push, norm=push.norm * product))
            if factor is None:
                return None
            product *= factor
        return product

    def correction(self, layout: Layout, begin: int, end: int, workers: int) -> Correction | None:
        """Make the corrections of all that have one."""
        made = [rule.correction(layout, begin, end, workers) for rule in self.rules]
        corrections = [one for one in made if one is not None]
        if len(corrections) > 1:
            return _Corrections(corrections, end - begin, layout.dtype)
        return corrections[0] if corrections else None


def chain(*rules: Rule) -> Chain:
    """Put rules one after the other.

    Corrections are made in the order of the rules, of the gradient as pushed; each is given what
    the one before it has made. The result is multiplied by the product of all factors. If one drops
    the gradient, it is dropped.

    Memory: that of the rules, but for the corrected gradient, which is one for all; P elements more
    if two of them correct, 2 P if more do.

    Raises:
        TypeError: something is no rule.
        ValueError: there is none.

    >>> from psframe.stale import Clip, Drop, Inverse
    >>> both = chain(Drop(8), Inverse(), Clip(1.0))
    >>> both.factor(Stale(worker=0, workers=4, staleness=4, norm=8.0))
    0.125
    """
    return Chain(rules)


class _Corrections:
    """Two or more corrections one after the other, with arrays of their own between them."""

    def __init__(self, made: Sequence[Correction], size: int, dtype: np.dtype[Any]) -> None:
        self._corrections = made
        self._between = [np.empty(size, dtype) for _ in range(min(2, len(made) - 1))]

    def on_device(self) -> DeviceChain | None:
        parts = [as_device_correction(one) for one in self._corrections]
        return DeviceChain([p for p in parts if p is not None]) if all(parts) else None

    def correct(self, worker: int, grad: Array, params: Array, read: Array, out: Array) -> Array:
        *first, last = self._corrections
        now = grad
        for correction in first:
            target = self._between[-1 if now is self._between[0] else 0]
            now = correction.correct(worker, now, params, read, target)
        done = last.correct(worker, now, params, read, out)
        if done is grad or done is out:
            return done
        np.copyto(out, done)  # the last one has left what those before it have made
        return out

    def applied(self, before: Array, after: Array) -> None:
        for correction in self._corrections:
            correction.applied(before, after)

    def rejected(self) -> None:
        for correction in self._corrections:
            correction.rejected()
