"""How far workers' random numbers have got: what each had drawn when it made its last push."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from psframe.state import WORKERS_MAX, Fields

__all__ = ["Draws", "Numbers", "read_draws"]

# The state of a PCG64, as `RandomState` has it.
Numbers = tuple[int, int, int, int]
IsHandled = Callable[[int, int], bool]

_HEX_DIGITS = 32  # of 128 bits


class Draws:
    """The states of workers' random numbers, each as of the last push that has been handled.

    Its methods are given a function (worker, seq) -> whether that push has been handled.
    """

    def __init__(self) -> None:
        self._states: dict[int, Numbers] = {}
        self._next: dict[int, tuple[int, Numbers]] = {}  # told for a push that is perhaps to come

    def tell(self, worker: int, seq: int, numbers: Numbers, is_handled: IsHandled) -> None:
        """Note the state that goes with a push which comes next."""
        self.settle(worker, is_handled)
        self._next[worker] = seq, numbers

    def settle(self, worker: int, is_handled: IsHandled) -> None:
        """Decide now what becomes of what was told last: its push is handled, or never will be."""
        told = self._next.pop(worker, None)
        if told is not None and is_handled(worker, told[0]):
            self._states[worker] = told[1]

    def state(self, is_handled: IsHandled) -> list[list[Any]]:
        """Give what a checkpoint is to have of it."""
        handled = {w: n for w, (seq, n) in self._next.items() if is_handled(w, seq)}
        states = sorted({**self._states, **handled}.items())
        return [
            [worker, f"{state:0{_HEX_DIGITS}x}", f"{increment:0{_HEX_DIGITS}x}", has_half, half]
            for worker, (state, increment, has_half, half) in states
        ]

    def restore(self, states: Mapping[int, Numbers]) -> None:
        """Go on from what `read_draws` has read."""
        self._states = dict(states)


def read_draws(fields: Fields) -> dict[int, Numbers]:
    """Read the random states, by worker.

    Args:
        fields: a leader's state.

    Raises:
        ValueError: a field is wrong.
    """
    draws: dict[int, Numbers] = {}
    for row in fields.items("random", WORKERS_MAX):
        if not isinstance(row, list) or len(row) != 5:
            raise fields.bad("random", "a list of lists of 5")
        names = "worker", "state", "increment", "has_uint32", "uinteger"
        one = Fields(dict(zip(names, row, strict=True)), f"{fields.where}.random")
        worker = one.count("worker", WORKERS_MAX)
        if worker in draws:
            raise one.bad("worker", "each worker once")
        increment = _wide(one, "increment")
        if not increment & 1:
            raise one.bad("increment", "an odd number")
        halves = one.count("has_uint32", 1), one.count("uinteger", 2**32 - 1)
        draws[worker] = (_wide(one, "state"), increment, *halves)
    return draws


def _wide(fields: Fields, name: str) -> int:
    text = fields.text(name, _HEX_DIGITS)
    if len(text) != _HEX_DIGITS or not set(text) <= set("0123456789abcdef"):
        raise fields.bad(name, f"{_HEX_DIGITS} hexadecimal digits")
    return int(text, 16)
