"""Fuzz what is read of a checkpoint: the manifest, a shard's entry and header, the state.

    python -m pip install atheris
    PYTHONPATH=.:tests python tests/fuzz/checkpoint.py -max_total_time=60

Every sum is made to fit, so that what lies behind the sums is reached. Only CheckpointError may
come out, or the content that was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["psframe.checkpoint", "psframe.layout", "json"]):
    from checkpoint_files import LAYOUT, same_as, save, seal

    from psframe.checkpoint import Manifest, Shard, open_checkpoint
    from psframe.checkpoint.fields import parse_json
    from psframe.errors import CheckpointError

SHARD = "shard-0-of-2.safetensors"


def fuzz_manifest(data: bytes) -> None:
    manifest = Manifest.parse(seal(data), 5)
    assert Manifest.parse(manifest.encode(), 5) == manifest


def fuzz_entry(data: bytes) -> None:
    shard = Shard.parse(parse_json(data, "entry"), 5)
    assert Shard.parse(json.loads(json.dumps(shard.fields())), 5) == shard


class Files:
    """A checkpoint in memory's file system, one of whose files is replaced."""

    def __init__(self, folder: Path) -> None:
        save(folder, 5)
        self.folder = folder / "v000000005"
        self.whole = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.body = json.loads(self.whole["manifest.json"])
        del self.body["sha256"]

    def fuzz_file(self, name: str, data: bytes) -> None:
        entry = self.body["state"] if name == "state.json" else self.body["shards"][0]
        before = dict(entry)
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if name == SHARD:
            entry["bytes"] = before["bytes"]
        (self.folder / name).write_bytes(data)
        body = json.dumps(self.body, separators=(",", ":")).encode()
        (self.folder / "manifest.json").write_bytes(seal(body))
        entry |= before
        with open_checkpoint(self.folder.parent, 5, LAYOUT) as reader:
            assert data != self.whole[name] or same_as(reader, 5)

    def restore(self) -> None:
        for name, data in self.whole.items():
            (self.folder / name).write_bytes(data)


def main() -> None:
    """Fuzz in a child: the fuzzer leaves its process without a word to those that wait in it."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        tempfile.TemporaryDirectory() as seeds,
    ):
        child = os.fork()
        if child == 0:
            fuzz(Path(folder), Path(seeds))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status)


def fuzz(folder: Path, seeds: Path) -> None:
    files = Files(folder)
    body = json.dumps(files.body, separators=(",", ":")).encode()
    examples = (body, json.dumps(files.body["shards"][0]).encode(), files.whole[SHARD])
    for kind, example in enumerate((*examples, files.whole["state.json"])):
        (seeds / str(kind)).write_bytes(bytes([kind]) + example)

    def one(data: bytes) -> None:
        kind, rest = data[:1], data[1:]
        try:
            if kind == b"\0":
                fuzz_manifest(rest)
            elif kind == b"\1":
                fuzz_entry(rest)
            elif kind == b"\2":
                files.fuzz_file(SHARD, rest)
            elif kind == b"\3":
                files.fuzz_file("state.json", rest)
        except CheckpointError:
            return
        finally:
            if kind in (b"\2", b"\3"):
                files.restore()

    atheris.Setup([sys.argv[0], str(seeds), "-max_len=4096", *sys.argv[1:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
