"""Remove checkpoints that are no longer wanted, and what deaths have left.

The manifest goes first, so that nothing that is half removed looks whole. Only files with the names
of a checkpoint are removed; a folder that holds others is left with them.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from psframe.checkpoint.files import (
    explained,
    file_size,
    opened_checkpoint,
    opened_folder,
    read_file,
    unlink_file,
)
from psframe.checkpoint.manifest import MANIFEST_BYTES_MAX, Manifest
from psframe.checkpoint.names import (
    MANIFEST,
    STATE,
    checkpoint_name,
    is_ours,
    versions,
)
from psframe.errors import CheckpointError

__all__ = ["abandon", "prune", "remove_all"]

_log = logging.getLogger("psframe")


def prune(
    folder: str | Path, keep: int, best: int | None = None, *, current: int | None = None
) -> list[int]:
    """Keep the newest checkpoints and the best one; remove older ones, and what deaths have left.

    What counts has a manifest and all files in their sizes; a damaged one never costs a good one
    its place. What is newer than the newest is being written and stays. If nothing counts, nothing
    is removed.

    Args:
        folder: the run's checkpoints/.
        keep: how many of the newest to keep, at least 1.
        best: a version to keep besides.
        current: the version that was committed last. Newer ones come from an earlier attempt, whose
            end did not verify or was given up, and are removed.

    Returns:
        The versions that were kept, ascending.

    Raises:
        CheckpointError: something could not be read or removed; the rest of the work is not done.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    with explained(folder, "old checkpoints cannot be removed"), opened_folder(folder) as parent:
        found = versions(folder)
        manifests = {version: _manifest_of(parent, version) for version in found}
        whole = [v for v in found if manifests[v] and (current is None or v <= current)]
        if not whole:
            return []
        kept = sorted({*whole[-keep:], *([best] if best in whole else [])})
        for version in found:
            if version in kept:
                _tidy(parent, version, manifests[version])
            elif version < kept[-1] or _is_given_up(parent, version, current):
                _remove(parent, version)
    return kept


def abandon(folder: str | Path, version: int) -> bool:
    """Remove a checkpoint that was not committed, when a part of it could not be written.

    Returns:
        True if it was removed; False if it is committed, or not there.

    Raises:
        CheckpointError: it could not be removed.
    """
    path = Path(folder, checkpoint_name(version))
    with explained(path, "cannot be removed"), opened_folder(folder) as parent:
        if version not in versions(folder) or _is_committed(parent, version):
            return False
        _remove(parent, version)
    return True


def remove_all(folder: str | Path) -> None:
    """Remove all checkpoints of a run, and nothing else.

    Raises:
        CheckpointError: something could not be removed.
    """
    with explained(folder, "checkpoints cannot be removed"):
        found = versions(folder)
        if found:
            with opened_folder(folder) as parent:
                for version in found:
                    _remove(parent, version)


def _manifest_of(parent: int, version: int) -> Manifest | None:
    """Read the manifest of a checkpoint whose files have the right sizes; else None."""
    with opened_checkpoint(parent, version) as fd:
        try:
            manifest = Manifest.parse(read_file(fd, MANIFEST, MANIFEST_BYTES_MAX), version)
        except CheckpointError:
            return None
        sizes = {STATE: manifest.state_bytes, **{s.file: s.bytes for s in manifest.shards}}
        return manifest if all(file_size(fd, n) == size for n, size in sizes.items()) else None


def _is_given_up(parent: int, version: int, current: int | None) -> bool:
    return current is not None and version > current and _is_committed(parent, version)


def _is_committed(parent: int, version: int) -> bool:
    with opened_checkpoint(parent, version) as fd:
        return file_size(fd, MANIFEST) is not None


def _tidy(parent: int, version: int, manifest: Manifest | None) -> None:
    """Remove what the writing of a committed checkpoint has left beside it."""
    assert manifest is not None
    wanted = {MANIFEST, STATE, *(shard.file for shard in manifest.shards)}
    with opened_checkpoint(parent, version) as fd:
        for name in sorted(os.listdir(fd)):
            if name not in wanted and is_ours(name):
                unlink_file(fd, name)


def _remove(parent: int, version: int) -> None:
    with opened_checkpoint(parent, version) as fd:
        if unlink_file(fd, MANIFEST):
            os.fsync(fd)
        for name in sorted(os.listdir(fd)):
            if is_ours(name):
                unlink_file(fd, name)
    try:
        os.rmdir(checkpoint_name(version), dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _log.info("%s is left: it holds other files", checkpoint_name(version))
