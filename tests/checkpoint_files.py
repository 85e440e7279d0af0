"""Small checkpoints to be written, damaged and read again, for the tests of psframe.checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from psframe.checkpoint import Manifest, Reader, Shard, commit, newest, write_shard
from psframe.layout import Array, Layout

__all__ = [
    "LAYOUT",
    "P",
    "STATE",
    "arrays_of",
    "contents",
    "no_descriptor_left",
    "open_newest",
    "rewrite_manifest",
    "same_as",
    "save",
    "seal",
    "write_shards",
]

# 54 elements: with two servers the shards are 32 and 22, and tensors lie across their ends.
LAYOUT = Layout.of(
    {"w1": np.zeros((4, 5), "f4"), "w2": np.zeros((5, 6), "f4"), "b": np.ones(4, "f4")}
)
P = LAYOUT.size
STATE = {"clocks": [3, 4], "random": {"state": 1 << 100}, "rate": 0.1}


def arrays_of(version: int) -> dict[str, Array]:
    """The flat arrays of a version: parameters, a slot, and what is kept wide."""
    rng = np.random.default_rng(version)
    return {
        "params": rng.random(P, np.float32),
        "slot.momentum": rng.random(P, np.float32),
        "kept": rng.random(P),
    }


def write_shards(
    folder: Path, version: int, servers: int = 2, seed: int | None = None
) -> list[Shard]:
    arrays = arrays_of(version if seed is None else seed)
    return [
        write_shard(
            folder,
            version,
            index,
            servers,
            {name: array[begin:end] for name, array in arrays.items()},
            begin=begin,
            end=end,
        )
        for index, (begin, end) in enumerate(LAYOUT.shards(servers))
    ]


def save(folder: Path, version: int, servers: int = 2, seed: int | None = None) -> Manifest:
    """Write and commit a checkpoint as `servers` servers do."""
    state = {**STATE, "version": version}
    return commit(folder, version, write_shards(folder, version, servers, seed), state, LAYOUT)


def open_newest(folder: Path) -> Reader:
    """Open the newest checkpoint, of which there must be one."""
    reader = newest(folder, LAYOUT)
    assert reader is not None
    return reader


def contents(reader: Reader) -> dict[str, Array]:
    """Read all arrays whole."""
    arrays = {name: np.empty(P, dtype) for name, dtype in reader.arrays.items()}
    for name, out in arrays.items():
        reader.read(name, 0, P, out)
    return arrays


def same_as(reader: Reader, version: int) -> bool:
    """Tell whether a checkpoint holds what `save` wrote for a version, to the bit."""
    found, wanted = contents(reader), arrays_of(version)
    return (
        reader.state == {**STATE, "version": version}
        and found.keys() == wanted.keys()
        and all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    )


def seal(body: bytes) -> bytes:
    """Make a manifest of a JSON object's text, with the sum that fits."""
    digest = hashlib.sha256(body).hexdigest().encode()
    return body[:-1] + b',"sha256":"' + digest + b'"}\n'


def rewrite_manifest(file: Path, **changed: Any) -> dict[str, Any]:
    """Change fields of a manifest and seal it; shards__0__begin is that of the first shard."""
    fields = json.loads(file.read_bytes())
    del fields["sha256"]
    for path, value in changed.items():
        *way, last = path.split("__")
        place: Any = fields
        for step in way:
            place = place[int(step) if isinstance(place, list) else step]
        place[int(last) if isinstance(place, list) else last] = value
    file.write_bytes(seal(json.dumps(fields, separators=(",", ":")).encode()))
    result: dict[str, Any] = fields
    return result


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """See that as many files are open afterwards as before."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before
