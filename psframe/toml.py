"""Read and write TOML: what Python reads only from 3.11 on and writes not at all."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["dumps", "load"]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"'}
_ESCAPES["\\"] = "\\\\"


def load(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ValueError: the file cannot be read or is not TOML; the message names file and place.
    """
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would keep us waiting
            raise ValueError(f"{path}: is no regular file")
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not a TOML file: it is not UTF-8 text") from error
    try:
        parsed: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply to be read") from None
    except ValueError as error:  # TOMLDecodeError is one; an integer may be too long for Python
        raise ValueError(f"{path}: is not a TOML file: {error}") from error
    return parsed


def dumps(config: Mapping[str, Any]) -> str:
    """Write a mapping as TOML 1.0 text.

    Values are strings, booleans, integers, floats, paths, NumPy scalars, lists or tuples of
    these, and mappings. A None is left out, TOML having no word for it.

    Raises:
        TypeError: a key is not a string, or a value is of another type.

    Example:
        >>> print(dumps({"lr": 0.1, "name": "a", "data": {"path": "x.npz"}}), end="")
        lr = 0.1
        name = "a"
        <BLANKLINE>
        [data]
        path = "x.npz"
    """
    lines: list[str] = []
    _table((), config, lines)
    return "".join(line + "\n" for line in lines)


def _table(path: tuple[str, ...], table: Mapping[str, Any], lines: list[str]) -> None:
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in table.items() if key not in inner and value is not None}
    if path:
        lines.extend([""] * bool(lines) + [f"[{'.'.join(path)}]"])
    lines.extend(f"{_key(key)} = {_value(value, key)}" for key, value in plain.items())
    for key, value in inner.items():
        _table((*path, _key(key)), value, lines)


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"config: expected keys that are strings, got {key!r}")
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    def escape(char: str) -> str:
        if char in _ESCAPES:
            return _ESCAPES[char]
        return f"\\u{ord(char):04x}" if ord(char) < 0x20 or ord(char) == 0x7F else char

    return '"' + "".join(map(escape, text)) + '"'


def _value(value: Any, where: str) -> str:
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        # '1.0', '1e+16', 'inf' and 'nan' are floats in TOML too, and read back equal.
        return repr(float(value))
    if isinstance(value, (str, Path)):
        return _string(str(value))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item, where) for item in value) + "]"
    if isinstance(value, Mapping):
        items = (f"{_key(k)} = {_value(v, where)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(items) + "}"
    raise TypeError(f"config: {where!r} is a {type(value).__name__}, which TOML cannot hold")
