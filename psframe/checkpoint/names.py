"""What the folders and files of a checkpoint are called, and which are there.

    checkpoints/v000000123/shard-0-of-2.safetensors
                           shard-1-of-2.safetensors
                           state.json
                           manifest.json

A name that is not spelt exactly so is not ours, and neither is anything but a real folder or a
regular file: others are never followed, read or removed.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

__all__ = [
    "MANIFEST",
    "SHARDS_MAX",
    "STATE",
    "VERSION_MAX",
    "checkpoint_name",
    "committed_versions",
    "is_ours",
    "shard_name",
    "temporary_name",
    "version_of",
    "versions",
]

MANIFEST, STATE = "manifest.json", "state.json"
# A version is counted in int64 everywhere else.
VERSION_MAX = (1 << 63) - 1
# Servers of one run. A reader of all has as many files open.
SHARDS_MAX = 4096

_SHARD = r"shard-(?:0|[1-9][0-9]{0,3})-of-[1-9][0-9]{0,3}\.safetensors"
_FINAL = re.compile(rf"{_SHARD}|{re.escape(MANIFEST)}|{re.escape(STATE)}")
_TEMPORARY = re.compile(rf"(?:{_FINAL.pattern})\.[0-9a-f]{{16}}\.tmp")
_VERSION = re.compile(r"v([0-9]{9,19})")


def checkpoint_name(version: int) -> str:
    """Name the folder of a version: v000000123."""
    return f"v{version:09d}"


def version_of(name: str) -> int | None:
    """Tell the version that a folder's name means; None if it is no such name."""
    match = _VERSION.fullmatch(name)
    version = int(match[1]) if match else -1
    return version if 0 <= version <= VERSION_MAX and checkpoint_name(version) == name else None


def shard_name(index: int, count: int) -> str:
    """Name the file of a shard."""
    return f"shard-{index}-of-{count}.safetensors"


def temporary_name(name: str) -> str:
    """Name a file that is still being written; two writers, on any hosts, never choose the same."""
    return f"{name}.{secrets.token_hex(8)}.tmp"


def is_ours(name: str) -> bool:
    """Tell whether a checkpoint may have a file of this name, whole or being written."""
    return any(pattern.fullmatch(name) for pattern in (_FINAL, _TEMPORARY))


def versions(folder: str | Path) -> list[int]:
    """List the versions that have a folder, ascending, committed or not.

    Returns:
        Nothing if there is no such folder at all.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return sorted(found for found in map(version_of, names) if found is not None)


def committed_versions(folder: str | Path) -> list[int]:
    """List the versions that have a manifest, ascending; whether they are whole is not looked at.

    Raises:
        OSError: the folder cannot be listed.
    """
    return [
        version
        for version in versions(folder)
        if _is_file(Path(folder, checkpoint_name(version), MANIFEST))
    ]


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False
