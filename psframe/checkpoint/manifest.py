"""The manifest: what a checkpoint consists of. It is written last, and commits the checkpoint.

    {"format": "psframe-checkpoint", "format_version": 1, "psframe": "0.1.0", "version": 123,
     "time_s": 1767225600.0,
     "layout": {"names": ["w"], "shapes": [[64, 10]], "dtype": "float32", "sha256": "..."},
     "shards": [{"file": "shard-0-of-1.safetensors", "index": 0, "count": 1, "begin": 0, "end": 640,
                 "bytes": 7952, "sha256": "...", "arrays": {"params": "float32", ...}}],
     "state": {"file": "state.json", "bytes": 2, "sha256": "..."},
     "sha256": "..."}

The last field is the sha256 of the text before it, closed by a brace. It is compared before
anything is parsed, and finds what is damaged. All that is parsed is checked none the less: a text
with a fitting sum may come from another program. Pure, but for the installed version's name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psframe.checkpoint.fields import fields_of, integer, parse_json, sha256_text, wrong
from psframe.checkpoint.names import MANIFEST, SHARDS_MAX, STATE, VERSION_MAX
from psframe.checkpoint.shard import Shard
from psframe.errors import CheckpointError
from psframe.layout import Layout

__all__ = [
    "MANIFEST_BYTES_MAX",
    "STATE_BYTES_MAX",
    "Manifest",
    "NewerFormat",
    "check_layout",
]

# A hundred bytes a tensor and 400 a shard: tens of thousands of both.
MANIFEST_BYTES_MAX = 16 << 20
# Leases of an epoch, clocks of all workers, states of generators.
STATE_BYTES_MAX = 64 << 20

_FORMAT, _FORMAT_VERSION = "psframe-checkpoint", 1
_END = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n')
_END_BYTES = len(',"sha256":""}\n') + 64
_DIMENSIONS_MAX = 64  # NumPy's
_ELEMENTS_MAX = 1 << 60
_PROGRAM_MAX = 100


class NewerFormat(CheckpointError):
    """A later psframe has written it: it is not damaged, and older ones do not stand for it."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        version: the run's.
        layout: of the parameters.
        shards: in order; they tile [0, layout.size).
        state_bytes, state_sha256: of state.json.
        program: the version of psframe that wrote it.
        time_s: when, in seconds since 1970.
    """

    version: int
    layout: Layout
    shards: tuple[Shard, ...]
    state_bytes: int
    state_sha256: str
    program: str
    time_s: float

    @property
    def digest(self) -> str:
        """The manifest's own sha256: equal for equal checkpoints only."""
        return hashlib.sha256(self._body()).hexdigest()

    def encode(self) -> bytes:
        """Make the file's content.

        Raises:
            CheckpointError: it would be larger than a reader takes.
        """
        body = self._body()
        end = b',"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode("ascii")
        if len(body) + len(end) > MANIFEST_BYTES_MAX:
            raise CheckpointError(
                f"{MANIFEST} would have {len(body)} bytes, more than the {MANIFEST_BYTES_MAX} "
                "allowed: too many parameters by name"
            )
        return body[:-1] + end

    def _body(self) -> bytes:
        fields = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "psframe": self.program,
            "version": self.version,
            "time_s": self.time_s,
            "layout": _layout_fields(self.layout),
            "shards": [shard.fields() for shard in self.shards],
            "state": {"file": STATE, "bytes": self.state_bytes, "sha256": self.state_sha256},
        }
        return json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii")

    @classmethod
    def parse(cls, data: bytes, version: int) -> Manifest:
        """Take what `encode` made, and check all of it.

        Args:
            data: the file's content.
            version: what the folder's name says.

        Raises:
            CheckpointError: it is not what `encode` makes.
        """
        end = _END.fullmatch(data[-_END_BYTES:])
        body = data[:-_END_BYTES] + b"}"
        if end is None or hashlib.sha256(body).hexdigest().encode("ascii") != end[1]:
            raise CheckpointError(f"{MANIFEST} is damaged: its sha256 is not that of its content")
        found = parse_json(body, MANIFEST)
        _check_format(found)
        types: dict[str, type] = {
            "format": str,
            "format_version": int,
            "psframe": str,
            "version": int,
            "time_s": float,
            "layout": dict,
            "shards": list,
            "state": dict,
        }
        fields = fields_of(found, types, MANIFEST)
        if fields["version"] != version:
            wrong(f"{MANIFEST}: version", f"{version}, as the folder says", fields["version"])
        integer(version, 0, VERSION_MAX, f"{MANIFEST}: version")
        if not math.isfinite(fields["time_s"]):
            wrong(f"{MANIFEST}: time_s", "a finite number", fields["time_s"])
        if len(fields["psframe"]) > _PROGRAM_MAX or not fields["psframe"].isprintable():
            wrong(f"{MANIFEST}: psframe", "a version", fields["psframe"])
        layout = _parse_layout(fields["layout"], f"{MANIFEST}: layout")
        shards = _parse_shards(fields["shards"], version)
        _check_shards(shards, layout)
        size, sha256 = _parse_state(fields["state"], f"{MANIFEST}: state")
        return cls(version, layout, shards, size, sha256, fields["psframe"], fields["time_s"])


def _check_shards(shards: Sequence[Shard], layout: Layout) -> None:
    """See that shards are all of one set, hold the same arrays, and tile [0, layout.size) in order.

    Raises:
        CheckpointError: they do not.
    """
    where = f"{MANIFEST}: shards"
    if not 1 <= len(shards) <= SHARDS_MAX:
        wrong(where, f"1 to {SHARDS_MAX}", len(shards))
    first = shards[0]
    for index, shard in enumerate(shards):
        if (shard.index, shard.count) != (index, len(shards)):
            wrong(f"{where}: {index}", f"shard {index} of {len(shards)}", shard.file)
        if shard.arrays != first.arrays:
            wrong(f"{where}: {index}: arrays", repr(first.arrays), shard.arrays)
    if first.arrays.get("params") != layout.dtype.name:
        wrong(f"{where}: arrays", f"'params' of {layout.dtype}", first.arrays)
    bounds = [0, *(shard.end for shard in shards)]
    for (begin, _), shard in zip(itertools.pairwise(bounds), shards, strict=True):
        if shard.begin != begin:
            wrong(f"{where}: {shard.index}: begin", str(begin), shard.begin)
    if bounds[-1] != layout.size:
        wrong(where, f"ranges up to {layout.size}, the number of parameters", bounds[-1])


def check_layout(found: Layout, expected: Layout) -> None:
    """See that a checkpoint's parameters are the model's.

    Raises:
        CheckpointError: they are not; it says what differs first.
    """
    where = "its parameters are not the model's"
    if found.dtype != expected.dtype:
        wrong(where, str(expected.dtype), found.dtype.name)
    if found.names != expected.names:
        pairs = itertools.zip_longest(expected.names, found.names)
        name, other = next((a, b) for a, b in pairs if a != b)
        wrong(where, f"{name!r} in the place" if name is not None else "no more names", other)
    for name, shape, other_shape in zip(expected.names, expected.shapes, found.shapes, strict=True):
        if shape != other_shape:
            wrong(where, f"{name!r} of shape {shape}", other_shape)


def _check_format(found: object) -> None:
    """Look at the format first, so that what a later psframe has written is called just that."""
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        wrong(MANIFEST, f"the format {_FORMAT}", found)
    number = integer(found.get("format_version"), 1, VERSION_MAX, f"{MANIFEST}: format_version")
    if number != _FORMAT_VERSION:
        raise NewerFormat(
            f"{MANIFEST} is of format version {number}, this psframe reads {_FORMAT_VERSION}; go on"
            " with the psframe that wrote it, or a later one"
        )


def _layout_fields(layout: Layout) -> dict[str, Any]:
    return {
        "names": list(layout.names),
        "shapes": [list(shape) for shape in layout.shapes],
        "dtype": layout.dtype.name,
        "sha256": hashlib.sha256(layout.describe().encode()).hexdigest(),
    }


def _parse_layout(found: dict[str, Any], where: str) -> Layout:
    types = {"names": list, "shapes": list, "dtype": str, "sha256": str}
    fields = fields_of(found, types, where)
    names, shapes = fields["names"], fields["shapes"]
    if not names or not all(isinstance(name, str) for name in names):
        wrong(f"{where}: names", "names", names)
    if len(set(names)) < len(names):
        wrong(f"{where}: names", "names that differ", names)
    if len(shapes) != len(names) or not all(isinstance(shape, list) for shape in shapes):
        wrong(f"{where}: shapes", f"{len(names)} shapes", shapes)
    if fields["dtype"] not in ("float32", "float64"):
        wrong(f"{where}: dtype", "float32 or float64", fields["dtype"])
    sizes = tuple(_elements(shape, f"{where}: shapes") for shape in shapes)
    ends = tuple(itertools.accumulate(sizes, initial=0))
    integer(ends[-1], 1, _ELEMENTS_MAX, f"{where}: elements")
    dtype = np.dtype(fields["dtype"])
    layout = Layout(tuple(names), tuple(map(tuple, shapes)), ends[:-1], sizes, ends[-1], dtype)
    if _layout_fields(layout)["sha256"] != fields["sha256"]:
        wrong(f"{where}: sha256", "that of the layout", fields["sha256"])
    return layout


def _elements(shape: list[Any], where: str) -> int:
    if len(shape) > _DIMENSIONS_MAX:
        wrong(where, f"at most {_DIMENSIONS_MAX} dimensions", shape)
    size = 1
    for n in shape:  # bounded at every step, lest 64 large numbers make a huge one
        size = min(size * integer(n, 0, _ELEMENTS_MAX, where), _ELEMENTS_MAX + 1)
    return size


def _parse_shards(found: list[Any], version: int) -> tuple[Shard, ...]:
    if len(found) > SHARDS_MAX:
        wrong(f"{MANIFEST}: shards", f"at most {SHARDS_MAX}", len(found))
    return tuple(
        Shard.parse(one, version, f"{MANIFEST}: shards: {index}") for index, one in enumerate(found)
    )


def _parse_state(found: dict[str, Any], where: str) -> tuple[int, str]:
    fields = fields_of(found, {"file": str, "bytes": int, "sha256": str}, where)
    if fields["file"] != STATE:
        wrong(f"{where}: file", STATE, fields["file"])
    size = integer(fields["bytes"], 2, STATE_BYTES_MAX, f"{where}: bytes")
    return size, sha256_text(fields["sha256"], f"{where}: sha256")
