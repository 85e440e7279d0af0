"""Whether a folder is fit for runs: renames, fsync, space. As a program, it tries them.

A file system may hang whoever asks it, so all that touches one is done in another process.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from psframe.doctor.case import Unknown
from psframe.throwaway import answer, ask

__all__ = ["NAME", "exercise", "sees_token", "try_folder"]

# Of what is written to try a folder; the rest of the name is random.
NAME = ".psframe-doctor-"
_MODULE = "psframe.doctor.folder"
_BOUND_S = 30.0
_OLD, _NEW = b"old\n", b"new\n"


def try_folder(path: str) -> dict[str, Any]:
    """Try a folder, or what it would be made in, in a process of its own.

    Returns:
        `folder`: what was tried; `kind` of its file system; `free_bytes`, `free_inodes` (None if
        it does not count them); `step` that failed and `error`, both "" if none did.

    Raises:
        Unknown: there was no answer, as from a file system that hangs.
    """
    return _dict(ask([sys.executable, "-m", _MODULE, "try", path], timeout_s=_BOUND_S))


def sees_token(folder: str, name: str) -> dict[str, Any]:
    """Look in a process of its own for a file that another node has written: {"seen": ...}."""
    command = [sys.executable, "-m", _MODULE, "look", folder, name]
    return _dict(ask(command, timeout_s=_BOUND_S))


def _dict(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise Unknown(f"the answer is {found!r}")
    return found


def main(what: str, folder: str, name: str = "") -> None:
    """Answer one question."""
    if what == "look":
        file = Path(folder) / name
        answer({"seen": file.is_file() and file.read_text(encoding="ascii") == name})
    else:
        answer(_tried(_existing(folder)))


def _existing(path: str) -> Path:
    """Give the folder, or the nearest above it that exists; of "runs/{time}" that is runs."""
    folder = Path(path.partition("{time}")[0] or ".").absolute()
    while not folder.is_dir() and folder != folder.parent and not folder.exists():
        folder = folder.parent
    return folder


def _tried(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "folder": str(folder),
        "kind": _kind(folder),
        "free_bytes": None,
        "free_inodes": None,
        "step": "",
        "error": "",
    }
    if not folder.is_dir():
        return {**found, "step": "open", "error": os.strerror(errno.ENOTDIR)}
    space = os.statvfs(folder)
    found["free_bytes"] = space.f_bavail * space.f_frsize
    found["free_inodes"] = space.f_favail if space.f_files else None
    step, error = exercise(folder)
    return {**found, "step": step, "error": error}


def exercise(folder: Path, replace: Callable[[Path, Path], Any] = os.replace) -> tuple[str, str]:
    """Do in a folder what a run does; give the step that failed and why, or two empty texts.

    Args:
        folder: it exists.
        replace: renames a file over another.
    """
    step = "make a folder"
    inside = None
    try:
        inside = Path(tempfile.mkdtemp(prefix=NAME, dir=folder))
        step = "write a file"
        old, new = inside / "status.json", inside / "status.json.tmp"
        old.write_bytes(_OLD)
        with new.open("wb") as stream:
            stream.write(_NEW)
            stream.flush()
            step = "fsync a file"
            os.fsync(stream.fileno())
        step = "rename a file over another"
        replace(new, old)
        if old.read_bytes() != _NEW or sorted(os.listdir(inside)) != [old.name]:
            return step, "afterwards the old file is there"
        step = "fsync a folder"
        descriptor = os.open(inside, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return step, error.strerror or str(error)
    finally:
        if inside is not None:
            shutil.rmtree(inside, ignore_errors=True)
    return "", ""


def _kind(folder: Path) -> str:
    """Give the type of the file system that a folder is on, such as ext4, nfs4, overlay."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
        _, mount, what, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if folder.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, what
    return kind


if __name__ == "__main__":
    main(*sys.argv[1:])
