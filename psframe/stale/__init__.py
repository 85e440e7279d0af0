"""Rules against staleness: what becomes of a gradient that was computed on older parameters.

Which rule to use:

* `Accept()`: apply it as it is; right for few workers of equal speed, and what all are compared to.
* `Inverse()`: divide it by its staleness; where staleness differs much and nothing is to be tuned.
* `DelayAdaptive(threshold)`: as `Inverse`, but leave in peace what is within the threshold; where
  only a few workers are slow.
* `Drop(threshold)`: forget what is staler; where slow workers' gradients do more harm than good.
* `Clip(norm)`: bound its norm; where some gradients are too long, stale or not.
* `DelayCompensation(lam)`: correct it to first order for how far the parameters have moved; where
  all gradients are about equally stale, so that scaling them would only slow learning down.
* `GapAware()`: scale it by how far the parameters have moved; where staleness itself says little,
  such as with learning rates that change.
* `chain(a, b)`: several of them.

A rule of one's own is a frozen dataclass of numbers. All ranks compare its text (`repr`), so that
everything on which it depends must be a field.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Root(Rule):
...     power: float = 0.5
...
...     def factor(self, push: Stale) -> float | None:
...         return (1 + push.staleness) ** -self.power
>>> Root().factor(Stale(worker=0, workers=4, staleness=3, norm=float("nan")))
0.5

`factor` is asked on server 0 alone, for the gradients of all shards, and knows what stands in a
push's header. What needs the numbers themselves is a `Correction`: a rule's `correction` makes the
state of one for each shard, and its `correct` is given each gradient that is to be applied. The
factor then multiplies what it has made of it.
"""

from psframe.stale.chaining import Chain, chain
from psframe.stale.corrections import DelayCompensation, GapAware
from psframe.stale.factors import Accept, Clip, DelayAdaptive, Drop, Inverse
from psframe.stale.rule import Correction, Rule, Stale, as_rule, checked_factor

__all__ = [
    "Accept",
    "Chain",
    "Clip",
    "Correction",
    "DelayAdaptive",
    "DelayCompensation",
    "Drop",
    "GapAware",
    "Inverse",
    "Rule",
    "Stale",
    "as_rule",
    "chain",
    "checked_factor",
]
