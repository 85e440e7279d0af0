"""Take JSON apart without trusting it: exact keys, exact types, bounded numbers.

Pure; every function raises CheckpointError with what was expected, what was found, and where.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

from psframe.errors import CheckpointError

__all__ = ["fields_of", "integer", "parse_json", "sha256_text", "wrong"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


def wrong(where: str, expected: str, found: object) -> NoReturn:
    """Raise that something else was expected."""
    raise CheckpointError(f"{where}: expected {expected}, got {reprlib.repr(found)}")


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON; what goes wrong in it, its depth and its digits included, is ours."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is no JSON: {reprlib.repr(str(error))}") from error


def fields_of(found: object, types: Mapping[str, type], where: str) -> dict[str, Any]:
    """Check that an object has these fields and no others, each of exactly its type."""
    if not isinstance(found, dict) or found.keys() != types.keys():
        got = sorted(map(str, found)) if isinstance(found, dict) else found
        wrong(where, f"an object of {', '.join(types)}", got)
    for name, kind in types.items():
        if type(found[name]) is not kind:
            wrong(f"{where}: {name}", kind.__name__, found[name])
    return found


def integer(found: object, least: int, most: int, where: str) -> int:
    """Check that a number is an integer in [least, most]; True and 1.0 are none."""
    if type(found) is not int or not least <= found <= most:
        wrong(where, f"an integer from {least} to {most}", found)
    return found


def sha256_text(found: object, where: str) -> str:
    """Check that a text may be a sha256 in hexadecimal digits."""
    if not isinstance(found, str) or not _SHA256.fullmatch(found):
        wrong(where, "64 hexadecimal digits", found)
    return found
