"""A run's state as plain data: what goes into a checkpoint, and the checks of what comes out.

Every machine gives its own part, fit for JSON, and reads it again through `Fields`: the file it
comes from may have been touched by others, so each field is checked before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from psframe.layout import Array

__all__ = ["COUNT_MAX", "ITEMS_MAX", "WORKERS_MAX", "Arrays", "Fields", "Resume", "plain_number"]

COUNT_MAX = 2**62
# Of a list; a run that has more has other troubles, such as blocks of one sample each by millions.
ITEMS_MAX = 1 << 24
WORKERS_MAX = 1 << 20

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Arrays(Protocol):
    """The arrays of a checkpoint, each over the whole of the parameters.

    Attributes:
        names: "params"; "slot." and a name for each slot of the optimizer; "pinned" with an
            evaluation under way; "kept" if there is a best one.
    """

    @property
    def names(self) -> Collection[str]:
        """Their names."""

    def read(self, name: str, begin: int, end: int, out: Array) -> None:
        """Write the elements [begin, end) of one into `out`."""


@dataclass(frozen=True, slots=True)
class Resume:
    """What a run begins with that goes on from a checkpoint.

    Attributes:
        state: the leader's, as `Marked` had it.
        arrays: those of all shards, joined.
    """

    state: Mapping[str, Any]
    arrays: Arrays


def plain_number(number: float) -> float | str:
    """Give a number as JSON has it; what is not finite in words."""
    return number if math.isfinite(number) else str(number)


class Fields:
    """One object of plain data, whose fields are checked when they are read.

    Args:
        data: what should be an object.
        where: its name, for errors.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, data: object, where: str = "state") -> None:
        if not isinstance(data, Mapping):
            raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
        self._data = data
        self.where = where

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def bad(self, name: str, expected: str) -> ValueError:
        """Make the error of a field."""
        if name not in self._data:
            return ValueError(f"{self.where}: {name} is missing, expected {expected}")
        got = _shown(self._data[name])
        return ValueError(f"{self.where}: {name} is {got}, expected {expected}")

    def count(self, name: str, most: int = COUNT_MAX, least: int = 0) -> int:
        """Read an integer in [least, most]."""
        value = self._data.get(name)
        if not _is_count(value, least, most):
            raise self.bad(name, f"an integer from {least} to {most}")
        assert isinstance(value, int), "it has been checked"
        return value

    def count_or_none(self, name: str, most: int = COUNT_MAX) -> int | None:
        """Read an integer in [0, most], or null."""
        if name in self._data and self._data[name] is None:
            return None
        return self.count(name, most)

    def flag(self, name: str) -> bool:
        """Read true or false."""
        value = self._data.get(name)
        if not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def number(self, name: str) -> float:
        """Read a number that `plain_number` has written."""
        value = self._data.get(name)
        if isinstance(value, str) and value in _NOT_FINITE:
            return _NOT_FINITE[value]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.bad(name, "a number")
        if (isinstance(value, int) and abs(value) > COUNT_MAX) or not math.isfinite(value):
            raise self.bad(name, "a finite number, or one of " + ", ".join(_NOT_FINITE))
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """Read such a number, or null."""
        if name in self._data and self._data[name] is None:
            return None
        return self.number(name)

    def text(self, name: str, most: int) -> str:
        """Read a text of at most so many characters."""
        value = self._data.get(name)
        if not isinstance(value, str) or len(value) > most:
            raise self.bad(name, f"a text of at most {most} characters")
        return value

    def items(self, name: str, most: int = ITEMS_MAX) -> list[Any]:
        """Read a list of at most so many items."""
        value = self._data.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.bad(name, f"a list of at most {most}")
        return value

    def flags(self, name: str) -> list[bool]:
        """Read a list of true or false."""
        value = self.items(name)
        if not all(isinstance(item, bool) for item in value):
            raise self.bad(name, "a list of true or false")
        return value

    def counts(self, name: str, most: int = COUNT_MAX, items: int = ITEMS_MAX) -> list[int]:
        """Read a list of integers in [0, most]."""
        value = self.items(name, items)
        if not all(_is_count(item, 0, most) for item in value):
            raise self.bad(name, f"a list of integers from 0 to {most}")
        return value

    def rows(self, name: str, width: int, most: int = ITEMS_MAX) -> list[list[int]]:
        """Read a list of lists, each of `width` counts."""
        value = self.items(name, most)
        for row in value:
            if not isinstance(row, list) or len(row) != width:
                raise self.bad(name, f"a list of lists of {width}")
            if not all(_is_count(item, 0, COUNT_MAX) for item in row):
                raise self.bad(name, f"integers from 0 to {COUNT_MAX}")
        return value

    def pair(self, name: str) -> tuple[int, int]:
        """Read a list of two counts."""
        value = self.counts(name, items=2)
        if len(value) != 2:
            raise self.bad(name, "two integers")
        return value[0], value[1]

    def increasing(self, name: str, most: int) -> list[int]:
        """Read a list of integers in [0, most], each larger than the one before it."""
        value = self.counts(name, most)
        if any(a >= b for a, b in pairwise(value)):
            raise self.bad(name, "each larger than the one before it")
        return value

    def names(self, name: str) -> Mapping[str, Any]:
        """Read an object whose fields are not known beforehand."""
        value = self._data.get(name)
        if not isinstance(value, Mapping) or len(value) > ITEMS_MAX:
            raise self.bad(name, "an object")
        return value

    def part(self, name: str) -> Fields:
        """Read an object."""
        return Fields(self.names(name), f"{self.where}.{name}")

    def part_or_none(self, name: str) -> Fields | None:
        """Read an object, or null."""
        if name in self._data and self._data[name] is None:
            return None
        return self.part(name)

    def parts(self, name: str, most: int = ITEMS_MAX) -> list[Fields]:
        """Read a list of objects."""
        value = self.items(name, most)
        return [Fields(item, f"{self.where}.{name}[{k}]") for k, item in enumerate(value)]


def _shown(value: object) -> str:
    if isinstance(value, int) and abs(value) > 2**64:
        return f"an integer of {value.bit_length()} bits"  # its digits may be too many to print
    if isinstance(value, (list, Mapping)):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_count(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
