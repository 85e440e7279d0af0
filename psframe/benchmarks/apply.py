"""The time of one update of each rule, beside this host's own rate for o = a + b.

An update that reads r arrays and writes w moves (r + w) elements a parameter. The yardstick moves
the same number of bytes out of place: two arrays read, one written. A ratio of 1 means that the
update goes at the speed of the memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from psframe import optim
from psframe.benchmarks.regime import round_trip_ns
from psframe.benchmarks.report import Spread, format_rows, parse_count
from psframe.errors import ArgumentError
from psframe.layout import Array, Layout

__all__ = ["RULES", "Apply"]

RULES: dict[str, optim.Optimizer] = {
    "sgd": optim.SGD(lr=0.01),
    "momentum": optim.SGD(lr=0.01, momentum=0.9),
    "nesterov": optim.SGD(lr=0.01, momentum=0.9, nesterov=True),
    "adagrad": optim.Adagrad(),
    "rmsprop": optim.RMSProp(),
    "adam": optim.Adam(),
    "adamw": optim.AdamW(),
}
_COLUMNS = {
    "optimizer": "",
    "params": ",d",
    "dtype": "",
    "seconds": ".3e",
    "seconds_range": ".3e",
    "gbytes_per_s": ".1f",
    "ratio": ".2f",
    "ratio_range": ".2f",
    "core_ns": ".0f",
}


@dataclass(frozen=True)
class Apply:
    """Seconds of one update, and its rate's ratio to o = a + b of as many bytes; one thread.

    Medians over the rounds, update and yardstick in turn, with the least and the most in
    `..._range`.
    """

    params: str = "16Mi"
    """parameters in the shard"""

    optimizers: tuple[str, ...] = tuple(RULES)
    """which rules"""

    dtype: Literal["float32", "float64"] = "float32"
    """of parameters and gradients"""

    rounds: int = 7
    """measurements of each rule"""

    json: bool = False
    """one JSON object a line instead of a table"""

    def main(self) -> int:
        """Measure and print; return the exit status.

        Raises:
            ArgumentError: an argument will not do.
        """
        try:
            size = parse_count(self.params)
        except ValueError as error:
            raise ArgumentError(f"--params: {error}") from error
        unknown = [name for name in self.optimizers if name not in RULES]
        if unknown or self.rounds < 1:
            raise ArgumentError(
                f"expected --optimizers among {', '.join(RULES)} and --rounds of 1 or more,"
                f" got {' '.join(self.optimizers)} and {self.rounds}"
            )
        rows = []
        for name in self.optimizers:
            rows.append(self._measure(name, size))
            if self.json:
                print(format_rows(rows[-1:], _COLUMNS, True), flush=True)
        if not self.json:
            print(format_rows(rows, _COLUMNS, False), flush=True)
        return 0

    def _measure(self, name: str, size: int) -> dict[str, Any]:
        update, streams = _make_update(RULES[name], size, np.dtype(self.dtype))
        add = _make_add(size * streams // 3, np.dtype(self.dtype))
        repeat = max(1, 2**20 // size)  # a small one is timed several times over
        update(2 * repeat)
        add(2 * repeat)
        seconds, ratios = [], []
        for _ in range(self.rounds):
            mine, other = update(repeat), add(repeat)
            seconds.append(mine)
            ratios.append(other / mine)
        spread, trip = Spread(seconds), round_trip_ns()
        moved = size * streams * np.dtype(self.dtype).itemsize
        return {
            "benchmark": "apply",
            "what": "apply",
            "optimizer": name,
            "params": size,
            "dtype": self.dtype,
            **spread.fields("seconds"),
            "gbytes_per_s": float(f"{moved / spread.median / 1e9:.4g}"),
            **Spread(ratios).fields("ratio"),
            "rounds": self.rounds,
            **({} if trip is None else {"core_ns": float(f"{trip:.3g}")}),
        }


def _make_update(
    rule: optim.Optimizer, size: int, dtype: np.dtype[Any]
) -> tuple[Callable[[int], float], int]:
    """Make a function that times one update, the mean of so many, and count its streams."""
    rng = np.random.default_rng(0)
    grad = rng.standard_normal(size, dtype)
    buffers = [rng.standard_normal(size, dtype), np.zeros(size, dtype)]
    updater = rule.updater(Layout.of({"w": grad}), 0, size)
    updater.prepare(grad)
    done = 0

    def update(count: int) -> float:
        nonlocal done
        begin = time.perf_counter()
        for _ in range(count):
            applied = updater.update(done, buffers[done & 1], grad, buffers[1 - (done & 1)])
            assert applied, "the results of small gradients are finite"
            done += 1
        return (time.perf_counter() - begin) / count

    # Parameters and gradient in, parameters out; each slot in and out.
    return update, 3 + 2 * len(rule.slots)


def _make_add(size: int, dtype: np.dtype[Any]) -> Callable[[int], float]:
    """Make a function that times o = a + b."""
    a: Array = np.ones(size, dtype)
    b: Array = np.ones(size, dtype)
    o: Array = np.zeros(size, dtype)

    def add(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            np.add(a, b, out=o)
        return (time.perf_counter() - begin) / count

    return add
