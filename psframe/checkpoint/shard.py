"""A shard's file: a safetensors header, and the shard's flat arrays one after the other.

    8 bytes       length of the header, little-endian
    header        JSON, padded with spaces to a multiple of 8
    the arrays    little-endian numbers, the wide dtypes first and then by name, without gaps

The header follows from the shard's entry in the manifest, to the byte. So a reader parses none: it
compares, and knows where every array begins. Pure.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from psframe.checkpoint.fields import fields_of, integer, sha256_text, wrong
from psframe.checkpoint.names import SHARDS_MAX, shard_name

__all__ = ["Shard", "check_arrays", "file_bytes", "header_of", "offsets_of"]

# P, and what follows from it: 2^60 elements are more than any machine has.
_ELEMENTS_MAX = 1 << 60
# Parameters, averages, an optimizer's slots, perhaps one a worker. And what their names may be.
_ARRAYS_MAX = 4096
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\-]{0,63}")
_DTYPES = {"float32": "F32", "float64": "F64"}
_FORMAT = "psframe-shard-1"


@dataclass(frozen=True)
class Shard:
    """A shard's file, as the manifest has it and as `write_shard` returns it.

    Attributes:
        index, count: which of how many.
        begin, end: the range of the flat vector, [begin, end).
        bytes: the file's size.
        sha256: the file's, in hexadecimal digits.
        arrays: names to "float32" or "float64"; each has end - begin elements.
    """

    index: int
    count: int
    begin: int
    end: int
    bytes: int
    sha256: str
    arrays: Mapping[str, str]

    @property
    def file(self) -> str:
        """The file's name."""
        return shard_name(self.index, self.count)

    def fields(self) -> dict[str, Any]:
        """Give what JSON can carry, for `Shard.parse` to take."""
        return {"file": self.file, **asdict(self), "arrays": dict(self.arrays)}

    @classmethod
    def parse(cls, found: object, version: int, where: str = "shard") -> Shard:
        """Take what `fields` gave, from a file or another process, and check all of it.

        Args:
            found: parsed JSON.
            version: the run's, which the file's header has.
            where: for the message.

        Raises:
            CheckpointError: it is not what `fields` gives, or its size is not what it must be.
        """
        types: dict[str, type] = {"file": str, "sha256": str, "arrays": dict}
        types |= dict.fromkeys(("index", "count", "begin", "end", "bytes"), int)
        fields = fields_of(found, types, where)
        count = integer(fields["count"], 1, SHARDS_MAX, f"{where}: count")
        index = integer(fields["index"], 0, count - 1, f"{where}: index")
        end = integer(fields["end"], 0, _ELEMENTS_MAX, f"{where}: end")
        begin = integer(fields["begin"], 0, end, f"{where}: begin")
        sha256 = sha256_text(fields["sha256"], f"{where}: sha256")
        arrays = check_arrays(fields["arrays"], f"{where}: arrays")
        expected = file_bytes(arrays, version, begin, end)
        if fields["bytes"] != expected:
            wrong(f"{where}: bytes", str(expected), fields["bytes"])
        if fields["file"] != shard_name(index, count):
            wrong(f"{where}: file", shard_name(index, count), fields["file"])
        return cls(index, count, begin, end, expected, sha256, arrays)


def check_arrays(found: Mapping[Any, Any], where: str) -> dict[str, str]:
    """Check names and dtypes of arrays.

    Raises:
        CheckpointError: there are none or too many, or one has another name or dtype.
    """
    if not 1 <= len(found) <= _ARRAYS_MAX:
        wrong(where, f"1 to {_ARRAYS_MAX} arrays", len(found))
    for name, dtype in found.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            wrong(where, f"names of letters, digits, '_', '.' and '-' ({_NAME.pattern})", name)
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            wrong(f"{where}: {name}", "float32 or float64", dtype)
    return dict(found)


def header_of(arrays: Mapping[str, str], version: int, begin: int, end: int) -> bytes:
    """Make the beginning of a shard's file, its length included."""
    metadata = {"format": _FORMAT, "version": version, "begin": begin, "end": end}
    header: dict[str, Any] = {"__metadata__": {k: str(v) for k, v in metadata.items()}}
    offset = 0
    for name in _in_order(arrays):
        size = (end - begin) * np.dtype(arrays[name]).itemsize
        header[name] = {
            "dtype": _DTYPES[arrays[name]],
            "shape": [end - begin],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def offsets_of(arrays: Mapping[str, str], version: int, begin: int, end: int) -> dict[str, int]:
    """Tell at which byte of the file each array begins, in the order of the file."""
    offset = len(header_of(arrays, version, begin, end))
    offsets = {}
    for name in _in_order(arrays):
        offsets[name] = offset
        offset += (end - begin) * np.dtype(arrays[name]).itemsize
    return offsets


def file_bytes(arrays: Mapping[str, str], version: int, begin: int, end: int) -> int:
    """Tell the size of a shard's file."""
    width = sum(np.dtype(dtype).itemsize for dtype in arrays.values())
    return len(header_of(arrays, version, begin, end)) + (end - begin) * width


def _in_order(arrays: Mapping[str, str]) -> list[str]:
    return sorted(arrays, key=lambda name: (-np.dtype(arrays[name]).itemsize, name))
