"""Read a checkpoint: everything is verified first, and what was verified is what is read.

All files of a reader stay open from their verification on, so that no rename comes in between.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from psframe.checkpoint.fields import parse_json
from psframe.checkpoint.files import (
    digest_of,
    explained,
    open_file,
    opened_checkpoint,
    opened_folder,
    read_exactly,
    read_file,
)
from psframe.checkpoint.manifest import (
    MANIFEST_BYTES_MAX,
    Manifest,
    NewerFormat,
    check_layout,
)
from psframe.checkpoint.names import MANIFEST, STATE, checkpoint_name, committed_versions
from psframe.checkpoint.shard import Shard, header_of, offsets_of
from psframe.errors import CheckpointError
from psframe.layout import Array, Layout

__all__ = ["Reader", "newest", "open_checkpoint"]

_log = logging.getLogger("psframe")


class Reader:
    """A checkpoint that has been verified, open for reading; a context manager.

    Attributes:
        path: its folder.
        version: the run's.
        manifest: what it consists of.
        state: what `commit` was given.
        arrays: names to "float32" or "float64", each of P elements.
        digest: the manifest's sha256, for `open_checkpoint` in other processes.
        alive: called between two pieces that are read; None for nothing.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        state: dict[str, Any],
        files: dict[int, int],
        opened: ExitStack,
    ) -> None:
        """Own the descriptors of the shards' files, by index; `opened` closes them."""
        self.path = path
        self.version = manifest.version
        self.manifest = manifest
        self.state = state
        self.arrays = dict(manifest.shards[0].arrays)
        self.digest = manifest.digest
        self.alive: Callable[[], None] | None = None
        self._files = files
        self._opened = opened

    @property
    def names(self) -> Collection[str]:
        """The arrays' names."""
        return self.arrays.keys()

    def read(self, name: str, begin: int, end: int, out: Array) -> None:
        """Fill `out` with the elements [begin, end) of a flat array, wherever they lie.

        Args:
            name: of the array.
            begin, end: the range; inside what the reader was opened for.
            out: (end - begin,) contiguous, of the array's dtype.

        Raises:
            CheckpointError: a file cannot be read any more, or has become shorter.
            ValueError: there is no such array or range, or `out` does not fit.
        """
        self._check_request(name, begin, end, out)
        for shard in _overlapping(self.manifest, begin, end):
            low, high = max(begin, shard.begin), min(end, shard.end)
            into = out[low - begin : high - begin].data.cast("B")
            offset = offsets_of(shard.arrays, self.version, shard.begin, shard.end)[name]
            offset += (low - shard.begin) * out.itemsize
            with explained(self.path, "cannot be read"):
                read_exactly(self._files[shard.index], offset, into, shard.file, self.alive)

    def _check_request(self, name: str, begin: int, end: int, out: Array) -> None:
        dtype = self.arrays.get(name)
        if dtype is None:
            raise ValueError(f"{self.path}: no array {name!r}; there are {', '.join(self.arrays)}")
        if not 0 <= begin <= end <= self.manifest.layout.size:
            raise ValueError(
                f"{self.path}: expected a range in [0, {self.manifest.layout.size}), got "
                f"[{begin}, {end})"
            )
        if any(s.index not in self._files for s in _overlapping(self.manifest, begin, end)):
            raise ValueError(f"{self.path}: [{begin}, {end}) is not what the reader is open for")
        if out.shape != (end - begin,) or out.dtype != np.dtype(dtype):
            raise ValueError(
                f"{self.path}: {name!r}: expected {end - begin} elements of {dtype}, got shape "
                f"{out.shape} of {out.dtype}"
            )
        if not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"{self.path}: {name!r}: expected a contiguous, writable array")

    def close(self) -> None:
        """Close the files; a second time does nothing."""
        self._files.clear()
        with explained(self.path, "cannot be closed"):
            self._opened.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def newest(
    folder: str | Path, layout: Layout, alive: Callable[[], None] | None = None
) -> Reader | None:
    """Open the newest checkpoint that verifies; what does not is warned of, and the next one tried.

    Args:
        folder: the run's checkpoints/.
        layout: of the model.
        alive: called between two pieces of what is verified, which may take minutes.

    Returns:
        A reader, which the caller closes; None if nothing was ever committed.

    Raises:
        CheckpointError: there are checkpoints, but none can be used; it says why of the newest. Or
            a later psframe has written the newest, or the folder cannot be listed.
    """
    with explained(folder, "cannot be listed"):
        candidates = committed_versions(folder)
    reasons = []
    for version in reversed(candidates):
        try:
            return open_checkpoint(folder, version, layout, alive=alive)
        except NewerFormat:
            raise  # to go on from an older one would be to lose it
        except CheckpointError as error:
            _log.warning("%s", error)
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(
            f"{folder}: of {len(reasons)} checkpoints none can be used; the newest: {reasons[0]}"
        )
    return None


def open_checkpoint(
    folder: str | Path,
    version: int,
    layout: Layout,
    *,
    begin: int = 0,
    end: int | None = None,
    digest: str | None = None,
    alive: Callable[[], None] | None = None,
) -> Reader:
    """Verify the checkpoint of a version and open it.

    A server that needs its range only, of a checkpoint that `newest` has verified in another
    process, says which: the files that hold it are verified, and no others.

    Args:
        folder: the run's checkpoints/.
        version: which.
        layout: of the model.
        begin, end: the range that will be read; all files are verified if `end` is None.
        digest: what `Reader.digest` must be.
        alive: as for `newest`.

    Raises:
        CheckpointError: it does not verify; it says why. Nothing large has been allocated.
    """
    path = Path(folder, checkpoint_name(version))
    with explained(path, "is no checkpoint that can be used"), ExitStack() as opened:
        with opened_folder(folder) as parent, opened_checkpoint(parent, version) as fd:
            manifest = Manifest.parse(read_file(fd, MANIFEST, MANIFEST_BYTES_MAX), version)
            if digest is not None and digest != manifest.digest:
                raise CheckpointError("it is another one than was expected of this version")
            check_layout(manifest.layout, layout)
            state = _read_state(fd, manifest)
            shards = manifest.shards if end is None else _overlapping(manifest, begin, end)
            files = {
                shard.index: _open_verified(fd, shard, version, opened, alive) for shard in shards
            }
        return Reader(path, manifest, state, files, opened.pop_all())


def _overlapping(manifest: Manifest, begin: int, end: int) -> list[Shard]:
    return [shard for shard in manifest.shards if max(begin, shard.begin) < min(end, shard.end)]


def _read_state(fd: int, manifest: Manifest) -> dict[str, Any]:
    data = read_file(fd, STATE, manifest.state_bytes)
    if hashlib.sha256(data).hexdigest() != manifest.state_sha256:
        raise CheckpointError(f"{STATE} is damaged: its sha256 is not that of the manifest")
    state = parse_json(data, STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE}: expected an object")
    return state


def _open_verified(
    fd: int, shard: Shard, version: int, opened: ExitStack, alive: Callable[[], None] | None
) -> int:
    """Open a shard's file and see that it is, to the byte, the one that the manifest means."""
    file, size = open_file(fd, shard.file)
    opened.callback(os.close, file)
    if size != shard.bytes:
        raise CheckpointError(f"{shard.file} has {size} bytes, expected {shard.bytes}")
    expected = header_of(shard.arrays, version, shard.begin, shard.end)
    header = bytearray(len(expected))
    read_exactly(file, 0, memoryview(header), shard.file)
    if header != expected:
        raise CheckpointError(f"{shard.file} is damaged: its header is not that of the manifest")
    if digest_of(file, size, shard.file, alive) != shard.sha256:
        raise CheckpointError(f"{shard.file} is damaged: its sha256 is not that of the manifest")
    return file
