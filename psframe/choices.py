"""How modes and rules for stale gradients are said on a command line and in a file of settings."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from psframe import codecs, stale
from psframe.batches import Buffered, Rennala, Ringleader
from psframe.consistency import BSP, SSP, Async, Mode
from psframe.errors import ArgumentError
from psframe.pacing import DynamicSSP, WarmStart

__all__ = ["ModeName", "make_mode", "mode_of", "parse_codec", "parse_stale"]

_Made = TypeVar("_Made")
ModeName = Literal["async", "ssp", "bsp", "dynamic-ssp", "rennala", "buffered", "ringleader"]

# With which modes a setting goes, and what it is if nobody says.
_GOES_WITH: Mapping[str, tuple[tuple[str, ...], int]] = {
    "staleness": (("ssp", "dynamic-ssp"), 3),
    "staleness_max": (("dynamic-ssp",), 12),
    "backup": (("bsp",), 0),
    "pushes": (("rennala", "buffered"), 4),
}
_WARM = ("async", "ssp", "dynamic-ssp")
_LIKENESS_MIN = 0.5  # of a name that is suggested; fp16 is 0.55 like float16


def mode_of(mode: str, given: Mapping[str, int | None]) -> dict[str, int | None]:
    """Fill in what goes with a mode and was not given.

    Args:
        mode: its name.
        given: staleness, staleness_max, backup and pushes; None where they were not given.

    Raises:
        ArgumentError: something was given that does not go with the mode.
    """
    found = dict(given)
    for name, (modes, usual) in _GOES_WITH.items():
        flag = "--" + name.replace("_", "-")
        if mode in modes:
            found[name] = usual if found[name] is None else found[name]
        elif found[name] is not None:
            raise ArgumentError(
                f"{flag} goes with --mode {' or '.join(modes)} only (the mode is {mode}); drop one"
                " of them"
            )
    return found


def make_mode(mode: str, given: Mapping[str, int | None], warm_start: int = 0) -> Mode:
    """Make a mode of its name and numbers.

    Raises:
        ArgumentError: they do not go together.
    """
    numbers = {name: value or 0 for name, value in mode_of(mode, given).items()}
    try:
        made = _make(mode, numbers)
    except ValueError as error:
        least, most = numbers["staleness"], numbers["staleness_max"]
        raise ArgumentError(
            f"--staleness-max: {most} is less than --staleness {least}; give a larger one"
        ) from error
    if not warm_start:
        return made
    if mode not in _WARM:
        raise ArgumentError(f"--warm-start goes with --mode {', '.join(_WARM)} only, not {mode}")
    return WarmStart(warm_start, made)


def _make(mode: str, numbers: Mapping[str, int]) -> Mode:
    if mode == "ssp":
        return SSP(numbers["staleness"])
    if mode == "bsp":
        return BSP(numbers["backup"])
    if mode == "dynamic-ssp":
        return DynamicSSP(numbers["staleness"], numbers["staleness_max"])
    if mode == "rennala":
        return Rennala(numbers["pushes"])
    if mode == "buffered":
        return Buffered(numbers["pushes"])
    return Ringleader() if mode == "ringleader" else Async()


# A rule's name on the command line: how it is made of the numbers after it, and what is expected.
_RULES: Mapping[str, tuple[Callable[..., stale.Rule], int, str]] = {
    "accept": (stale.Accept, 0, "accept"),
    "inverse": (stale.Inverse, 0, "inverse"),
    "delay-adaptive": (stale.DelayAdaptive, 1, "delay-adaptive=4"),
    "compensate": (stale.DelayCompensation, 1, "compensate=2.0"),
    "gap-aware": (stale.GapAware, 0, "gap-aware"),
    "drop": (stale.Drop, 1, "drop=16"),
    "clip": (stale.Clip, 1, "clip=1.0"),
}


def parse_stale(text: str, flag: str = "--stale") -> stale.Rule:
    """Make the rule that a text such as "drop=16+inverse" names.

    Raises:
        ArgumentError: it names none; the text says what is expected.
    """
    rules = [_parse_rule(part.strip(), text, flag) for part in text.split("+")]
    return rules[0] if len(rules) == 1 else stale.chain(*rules)


def _parse_rule(part: str, text: str, flag: str) -> stale.Rule:
    try:
        rule = _make_of(_RULES, part)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{flag}: {_in_short(error)}") from error
    if rule is None:
        examples = ", ".join(example for *_, example in _RULES.values())
        wanted = f"expected one of {examples}, or some of them with + between; got {text!r}"
        raise ArgumentError(f"{flag}: {_numbers_of(_RULES, part) or wanted + _hint(_RULES, part)}")
    return rule


def _make_of(known: Mapping[str, tuple[Callable[..., _Made], int, str]], text: str) -> _Made | None:
    """Make what a name and numbers say; None if there is no such name, or other numbers go with it.

    Raises:
        TypeError, ValueError: a number will not do.
    """
    name, _, rest = text.partition("=")
    words = rest.split(",") if rest else []
    if name not in known or len(words) != known[name][1]:
        return None
    try:
        numbers = [_number(word) for word in words]
    except ValueError:
        return None
    return known[name][0](*numbers)


def _numbers_of(known: Mapping[str, tuple[Any, int, str]], text: str) -> str:
    """Say what numbers go with a name; "" if there is no such name."""
    name = text.partition("=")[0]
    if name not in known:
        return ""
    _, count, example = known[name]
    wanted = f"needs a number, such as {example}" if count else "takes no number"
    return f"{name} {wanted}; got {text!r}"


def _hint(known: Mapping[str, tuple[Any, int, str]], text: str) -> str:
    """Name the nearest of the known names, with the number that was given or an example's."""
    name, equals, rest = text.partition("=")
    near = difflib.get_close_matches(name, known, n=1, cutoff=_LIKENESS_MIN)
    if not near:
        return ""
    _, count, example = known[near[0]]
    meant = f"{near[0]}={rest}" if count and equals else example
    return f"; did you mean {meant!r}?"


_CODECS: Mapping[str, tuple[Callable[..., codecs.Codec], int, str]] = {
    "float16": (codecs.Float16, 0, "float16"),
    "bfloat16": (codecs.BFloat16, 0, "bfloat16"),
    "topk": (codecs.TopK, 1, "topk=0.01"),
    "sign": (codecs.Sign, 0, "sign"),
    "qsgd": (codecs.QSGD, 1, "qsgd=127"),
    "powersgd": (codecs.PowerSGD, 1, "powersgd=4"),
}


def parse_codec(text: str, flag: str) -> codecs.Codec | None:
    """Make the codec that a text such as "topk=0.01" names; None of "none".

    Raises:
        ArgumentError: it names none; the text says what is expected.
    """
    if text == "none":
        return None
    try:
        codec = _make_of(_CODECS, text)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{flag}: {_in_short(error)}") from error
    if codec is None:
        examples = ", ".join(example for *_, example in _CODECS.values())
        wanted = f"expected none or one of {examples}; got {text!r}"
        raise ArgumentError(
            f"{flag}: {_numbers_of(_CODECS, text) or wanted + _hint(_CODECS, text)}"
        )
    return codec


def _in_short(error: Exception) -> str:
    """Leave out what a program is advised to pass."""
    return str(error).partition("; ")[0]


def _number(word: str) -> float:
    try:
        return int(word)
    except ValueError:
        return float(word)
