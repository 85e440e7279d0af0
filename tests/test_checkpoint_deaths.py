"""A writer that dies at any call, a disk that fails at any call, is full, or loses power."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_deaths import Calls
from checkpoint_files import (
    LAYOUT,
    STATE,
    no_descriptor_left,
    open_newest,
    same_as,
    save,
    write_shards,
)

from psframe.checkpoint import commit, committed_versions, prune, remove_all
from psframe.errors import CheckpointError

TESTS = Path(__file__).parent
MODULES = [f"psframe.checkpoint.{name}" for name in "files names pruning reading writing".split()]
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
    "PATH": os.environ["PATH"],
}


@pytest.fixture
def fast_folder() -> Iterator[Path]:
    """A folder in memory where there is one, for what syncs hundreds of times."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="psframe-test-") as folder:
        yield Path(folder)


def watch(monkeypatch: pytest.MonkeyPatch, handle: Callable[..., Any]) -> None:
    for module in MODULES:
        monkeypatch.setattr(f"{module}.os", Calls(handle))


def run(what: str, folder: Path, *before: str) -> str:
    command = [*before, sys.executable, str(TESTS / "checkpoint_deaths.py"), what, str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


# ---- deaths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["killed", "rewritten"])
def test_a_writer_that_dies_at_any_call(fast_folder: Path, what: str) -> None:
    """Before the call, after it, and in the middle of a write."""
    assert "deaths at" in run(what, fast_folder)


# ---- errors ------------------------------------------------------------------------------------


class Failing:
    """A handler whose call of a number fails; a close that fails has closed."""

    def __init__(self, number: int) -> None:
        self.failed = ""
        self._number = number
        self._count = itertools.count()

    def __call__(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if next(self._count) != self._number:
            return real(*args, **kwargs)
        self.failed = name
        if name == "close":
            real(*args)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_at_any_call(fast_folder: Path) -> None:
    template, place = fast_folder / "template", fast_folder / "run"
    template.mkdir()
    save(template, 5)
    for number in itertools.count():
        shutil.copytree(template, place)
        handler, said = Failing(number), ""
        with pytest.MonkeyPatch.context() as patch, no_descriptor_left():
            watch(patch, handler)
            try:
                commit(place, 9, write_shards(place, 9), {**STATE, "version": 9}, LAYOUT)
                prune(place, 1, current=9)
            except CheckpointError as error:
                said = str(error)
        if handler.failed:
            assert said.endswith("Input/output error; the disk may be failing"), handler.failed
            assert str(place) in said
        with open_newest(place) as reader:
            assert same_as(reader, reader.version)
            assert reader.version in (5, 9)
        assert not list(place.glob("v*/*.tmp"))
        save(place, 9)
        with open_newest(place) as reader:
            assert same_as(reader, 9)
        shutil.rmtree(place)
        if not handler.failed:
            break
    assert number > 50


def test_a_disk_that_fails_while_it_is_read(fast_folder: Path) -> None:
    save(fast_folder, 5)
    for number in itertools.count():
        handler, said = Failing(number), ""
        with pytest.MonkeyPatch.context() as patch, no_descriptor_left():
            watch(patch, handler)
            try:
                with open_newest(fast_folder) as reader:
                    assert same_as(reader, 5)
            except CheckpointError as error:
                said = str(error)
        if not handler.failed:
            break
        assert said.endswith("Input/output error; the disk may be failing"), handler.failed
    assert number > 20


def test_what_cannot_be_removed_is_left_and_said(
    fast_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name in ("write", "unlink"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(*args, **kwargs)

    watch(monkeypatch, handle)
    with caplog.at_level("INFO", "psframe"), pytest.raises(CheckpointError, match="Read-only"):
        write_shards(fast_folder, 9)
    assert "what was written of it is left behind: Read-only file system" in caplog.text


def test_writes_that_take_a_few_bytes(fast_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == "write":
            return real(args[0], args[1][:7])
        if name == "preadv":
            return real(args[0], [args[1][0][:11]], args[2])
        return real(*args, **kwargs)

    watch(monkeypatch, handle)
    save(fast_folder, 5)
    with open_newest(fast_folder) as reader:
        assert same_as(reader, 5)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for action in (lambda: save(tmp_path / "none", 5), lambda: prune(tmp_path / "none", 1)):
        with pytest.raises(CheckpointError, match=r"none.*No such file or directory"):
            action()
    (tmp_path / "file").write_text("")
    for action in (lambda: save(tmp_path / "file", 5), lambda: remove_all(tmp_path / "file")):
        with pytest.raises(CheckpointError, match=r"file.*Not a directory"):
            action()
    with pytest.raises(CheckpointError, match="cannot be listed: Not a directory"):
        open_newest(tmp_path / "file")


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    run("limited", tmp_path)


def in_a_small_disk(folder: Path, remount: bool) -> list[str]:
    """Make a command's prefix that gives it a disk of its own, of 200 KiB."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("mounting a small disk needs root and mount namespaces")
    script = 'folder=$1; shift; mount -t tmpfs -o size=200k tmpfs "$folder"'
    if remount:
        script += ' && "$1" "$2" prepare "$4" && mount -o remount,ro "$folder"'
    return ["unshare", "-m", "sh", "-c", f'{script} && exec "$@"', "sh", str(folder)]


def test_a_full_disk(tmp_path: Path) -> None:
    assert "times full" in run("full", tmp_path, *in_a_small_disk(tmp_path, remount=False))


def test_a_disk_that_became_read_only(tmp_path: Path) -> None:
    run("readonly", tmp_path, *in_a_small_disk(tmp_path, remount=True))


# ---- a loss of power ---------------------------------------------------------------------------


def path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


class Journal:
    """Notes what is done to which path, in order, as a disk would see it."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []

    def __call__(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        paths = []
        if name in ("write", "fsync"):
            paths = [path_of(args[0])]
        elif name in ("mkdir", "unlink", "rmdir"):
            paths = [f"{path_of(kwargs['dir_fd'])}/{args[0]}"]
        elif name == "rename":
            folder = path_of(kwargs["src_dir_fd"])
            paths = [f"{folder}/{args[0]}", f"{folder}/{args[1]}"]
        result = real(*args, **kwargs)
        self.entries += [(f"{name}{place or ''}", path) for place, path in enumerate(paths)]
        return result

    def between(self, first: tuple[str, str], last: tuple[str, str]) -> list[tuple[str, str]]:
        """What was done after the last time of the one and before the first time of the other."""
        end = self.entries.index(last)
        begin = max(i for i, entry in enumerate(self.entries[:end]) if entry == first)
        return self.entries[begin:end]


def test_what_a_commit_relies_on_has_reached_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's bytes before its name, all names before the manifest's, and that before success."""
    journal = Journal()
    watch(monkeypatch, journal)
    save(tmp_path, 9)
    entries, folder = journal.entries, str(tmp_path / "v000000009")
    manifest = ("rename1", f"{folder}/manifest.json")
    renames = [i for i, (name, _) in enumerate(entries) if name == "rename"]
    assert [Path(entries[i + 1][1]).name for i in renames] == [
        "shard-0-of-2.safetensors",
        "shard-1-of-2.safetensors",
        "state.json",
        "manifest.json",
    ]
    for i in renames:
        path = entries[i][1]
        assert [name for name, other in entries[:i] if other == path][-2:] == ["write", "fsync"]
        assert entries[i + 2] == ("fsync", folder)
    assert ("fsync", str(tmp_path)) in journal.between(("mkdir", folder), manifest)


def test_a_checkpoint_is_unmade_before_its_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (5, 9):
        save(tmp_path, version)
    journal = Journal()
    watch(monkeypatch, journal)
    prune(tmp_path, 1)
    folder = str(tmp_path / "v000000005")
    assert journal.entries[:2] == [("unlink", f"{folder}/manifest.json"), ("fsync", folder)]
    assert [name for name, _ in journal.entries[2:]] == ["unlink", "unlink", "unlink", "rmdir"]
    journal.entries.clear()
    write_shards(tmp_path, 9, seed=10)
    folder = str(tmp_path / "v000000009")
    withdrawn = journal.entries.index(("unlink", f"{folder}/manifest.json"))
    assert journal.entries[withdrawn + 1] == ("fsync", folder)
    assert not any(name == "rename" for name, _ in journal.entries[:withdrawn])
    assert committed_versions(tmp_path) == []
