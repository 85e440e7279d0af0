"""Write a checkpoint: every server its shard, then one process the state and the manifest.

Whatever is cut short, by a death, a full disk or an error, leaves the checkpoints that were
committed before as they were, and no folder that looks whole and is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psframe.checkpoint.files import (
    digest_of,
    explained,
    file_size,
    new_file,
    open_file,
    opened_checkpoint,
    opened_folder,
    read_file,
    unlink_file,
)
from psframe.checkpoint.manifest import (
    MANIFEST_BYTES_MAX,
    STATE_BYTES_MAX,
    Manifest,
)
from psframe.checkpoint.names import (
    MANIFEST,
    SHARDS_MAX,
    STATE,
    VERSION_MAX,
    checkpoint_name,
    shard_name,
)
from psframe.checkpoint.shard import Shard, check_arrays, header_of, offsets_of
from psframe.errors import CheckpointError
from psframe.layout import Array, Layout
from psframe.version import installed_version

__all__ = ["commit", "write_shard"]


def write_shard(
    folder: str | Path,
    version: int,
    index: int,
    count: int,
    arrays: Mapping[str, Array],
    *,
    begin: int,
    end: int,
) -> Shard:
    """Write the file of one shard, durably, by rename; the checkpoint's folder is made if need be.

    The arrays are written from where they are, a piece at a time, and must not change meanwhile.
    All long calls let other threads run.

    Args:
        folder: the run's checkpoints/, which exists.
        version: the run's.
        index, count: which shard of how many.
        arrays: names ("params" and others) to flat, contiguous float32 or float64 arrays of
            end - begin elements.
        begin, end: the shard's range of the flat vector, [begin, end).

    Returns:
        What `commit` needs to know of it.

    Raises:
        CheckpointError: it could not be written. Nothing of it is left, unless the disk refuses
            even that. A checkpoint of this very version but with another content may have been
            withdrawn; all others stay.
        ValueError: the arguments make no shard; nothing has been written.
    """
    _check_place(version, index, count, begin, end)
    dtypes = _check_shard(arrays, end - begin)
    name = shard_name(index, count)
    path = Path(folder, checkpoint_name(version), name)
    with (
        explained(path, "cannot be written"),
        opened_folder(folder) as parent,
        opened_checkpoint(parent, version, create=True) as fd,
        new_file(fd, name, _content(arrays, dtypes, version, begin, end)) as file,
    ):
        shard = Shard(index, count, begin, end, file.bytes, file.sha256, dtypes)
        found = _committed(fd, version)
        # Under the same name the same bytes do no harm. Others would make a checkpoint that was
        # whole one that seems so.
        if found and any(one.file == name and one != shard for one in found.shards):
            _withdraw(fd)
        file.publish()
    return shard


def commit(
    folder: str | Path,
    version: int,
    shards: Sequence[Shard],
    state: Mapping[str, Any],
    layout: Layout,
) -> Manifest:
    """Write the state and then the manifest, with whose name the checkpoint is there.

    A version that is committed already with the same shards and is whole stays as it is, its state
    included.

    Args:
        folder: the run's checkpoints/.
        version: the run's.
        shards: what `write_shard` returned, in order, from all servers.
        state: what JSON can carry, with text as keys and no NaN or infinity.
        layout: of the parameters.

    Raises:
        CheckpointError: the shards do not make up a checkpoint, are not all in the folder, or it
            could not be written. Should the disk fail at the very last step, the manifest may be
            there all the same; then the checkpoint is whole, though a loss of power may undo it.
        ValueError, TypeError: the state cannot be written as JSON.
    """
    data = json.dumps(dict(state), separators=(",", ":"), allow_nan=False).encode("ascii")
    path = Path(folder, checkpoint_name(version))
    sha256 = hashlib.sha256(data).hexdigest()
    time_s = round(time.time(), 3)
    with explained(path, "cannot be committed"):
        manifest = Manifest(
            version, layout, tuple(shards), len(data), sha256, installed_version(), time_s
        )
        if len(data) > STATE_BYTES_MAX:
            raise CheckpointError(f"{STATE} has {len(data)} bytes, more than {STATE_BYTES_MAX}")
        text = manifest.encode()
        Manifest.parse(text, version)  # what a reader would refuse is not committed
        with opened_folder(folder) as parent, opened_checkpoint(parent, version) as fd:
            _check_present(fd, shards)
            found = _committed(fd, version)
            if found and _same(found, manifest) and _has_state(fd, found):
                return found
            _withdraw(fd)
            with (
                new_file(fd, STATE, [memoryview(data)]) as state_file,
                new_file(fd, MANIFEST, [memoryview(text)]) as manifest_file,
            ):
                state_file.publish()
                manifest_file.publish()
    return manifest


def _content(
    arrays: Mapping[str, Array], dtypes: Mapping[str, str], version: int, begin: int, end: int
) -> Iterator[memoryview]:
    yield memoryview(header_of(dtypes, version, begin, end))
    if begin < end:  # an empty array cannot be cast to bytes
        for name in offsets_of(dtypes, version, begin, end):
            yield arrays[name].data.cast("B")


def _check_place(version: int, index: int, count: int, begin: int, end: int) -> None:
    if not 0 <= version <= VERSION_MAX:
        raise ValueError(f"version: expected 0 to {VERSION_MAX}, got {version}")
    if not 0 <= index < count <= SHARDS_MAX:
        raise ValueError(f"expected a shard of at most {SHARDS_MAX}, got {index} of {count}")
    if not 0 <= begin <= end:
        raise ValueError(f"expected a range [begin, end), got [{begin}, {end})")


def _check_shard(arrays: Mapping[str, Any], size: int) -> dict[str, str]:
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.shape != (size,):
            got = getattr(array, "shape", type(array).__name__)
            raise ValueError(
                f"array {name!r}: expected a NumPy array of shape ({size},), got {got}"
            )
        if not array.flags.c_contiguous or not array.dtype.isnative:
            raise ValueError(f"array {name!r}: expected contiguous numbers in native byte order")
    try:
        return check_arrays({name: array.dtype.name for name, array in arrays.items()}, "arrays")
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def _committed(fd: int, version: int) -> Manifest | None:
    """Read the manifest that is there; None if there is none, or none that a reader would take."""
    try:
        return Manifest.parse(read_file(fd, MANIFEST, MANIFEST_BYTES_MAX), version)
    except CheckpointError:
        return None


def _same(found: Manifest, wanted: Manifest) -> bool:
    return (found.layout, found.shards) == (wanted.layout, wanted.shards)


def _has_state(fd: int, found: Manifest) -> bool:
    if file_size(fd, STATE) != found.state_bytes:
        return False
    opened, size = open_file(fd, STATE)
    try:
        return digest_of(opened, size, STATE) == found.state_sha256
    finally:
        os.close(opened)


def _withdraw(fd: int) -> None:
    """Remove the manifest, so that the folder is no checkpoint until it is committed again."""
    if unlink_file(fd, MANIFEST):
        os.fsync(fd)


def _check_present(fd: int, shards: Sequence[Shard]) -> None:
    for shard in shards:
        size = file_size(fd, shard.file)
        if size is None:
            raise CheckpointError(
                f"{shard.file} is not there; is the folder on a file system that all servers share?"
            )
        if size != shard.bytes:
            raise CheckpointError(f"{shard.file} has {size} bytes, expected {shard.bytes}")
