"""How often a run makes checkpoints, as users say it."""

from __future__ import annotations

import re

import numpy as np

__all__ = ["parse_cadence"]

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")
_EXPECTED = 'expected a number of updates, such as 1000, or a time, such as "30s", "5min" or "2h"'
_UPDATES_MAX = 2**62


def parse_cadence(value: object, name: str = "checkpoint_every") -> tuple[int | None, float | None]:
    """Read how often: (updates, seconds), of which one is None.

    Args:
        value: an integer, or a text: of an integer, or a number with s, min or h behind it.
        name: for errors.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, str)):
        raise TypeError(f"{name}: {_EXPECTED}, got {value!r}")
    if isinstance(value, str):
        text = value.strip()
        time = _TIME.fullmatch(text)
        if time is not None:
            seconds = float(time[1]) * _SECONDS[time[2]]
            if not 0 < seconds < float("inf"):
                raise ValueError(f"{name}: expected more than 0 seconds, got {value!r}")
            return None, seconds
        if not re.fullmatch(r"\d{1,20}", text):
            raise ValueError(f"{name}: {_EXPECTED}, got {value!r}")
        value = int(text)
    if not 1 <= value <= _UPDATES_MAX:
        raise ValueError(f"{name}: expected 1 to {_UPDATES_MAX} updates, got {value}")
    return int(value), None
