"""What cannot be done to a test's own process: a writer that dies, a full disk, a limit.

    python tests/checkpoint_deaths.py {killed,rewritten,full,readonly,limited} FOLDER

Run by test_checkpoint_deaths.py in a process of one thread, since it forks. An assertion that fails
says at which call.
"""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import LAYOUT, STATE, open_newest, same_as, save, write_shards

from psframe.checkpoint import (
    abandon,
    commit,
    files,
    names,
    prune,
    pruning,
    reading,
    versions,
    writing,
)
from psframe.errors import CheckpointError

__all__ = ["CALLS", "Calls", "watch"]

# All functions of `os` through which psframe.checkpoint touches files (strace shows no others).
CALLS = frozenset(
    "open close write fsync mkdir rename unlink rmdir stat fstat listdir scandir preadv".split()
)
BEFORE, AFTER, TORN = "before", "after", "torn"


class Calls:
    """Stands for the module `os`: calls go through `handle(name, function, arguments)`."""

    def __init__(self, handle: Callable[..., Any]) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real
        return lambda *args, **kwargs: self._handle(name, real, *args, **kwargs)


def watch(handle: Callable[..., Any]) -> None:
    """Let all of psframe.checkpoint call `os` through `handle`; `monkeypatch` undoes it."""
    for module in (files, names, pruning, reading, writing):
        module.os = Calls(handle)  # type: ignore[attr-defined]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(number: int, mode: str) -> Callable[..., Any]:
    """Make a handler that dies at a call; a torn write leaves half of its bytes."""
    count = itertools.count()

    def handle(name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        chosen = next(count) == number
        if chosen and mode == BEFORE:
            die()
        if chosen and mode == TORN and name == "write":
            real(args[0], args[1][: len(args[1]) // 2])
            die()
        result = real(*args, **kwargs)
        if chosen and mode == AFTER:
            die()
        return result

    return handle


def write(folder: Path, seed: int) -> None:
    """What is done for one checkpoint: version 9, with the content of `seed`."""
    shards = write_shards(folder, 9, seed=seed)
    commit(folder, 9, shards, {**STATE, "version": seed}, LAYOUT)
    prune(folder, 1, current=9)


def dies(folder: Path, seed: int, number: int, mode: str) -> bool:
    """Write in a child that dies at a call; False if it did not come so far."""
    child = os.fork()
    if child == 0:
        try:
            watch(kill_at(number, mode))
            write(folder, seed)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"{mode} call {number}: status {status}"
    return status != 0


def check(folder: Path, seeds: tuple[int, ...], what: str) -> int:
    """See that the newest checkpoint is one of those, whole, and which."""
    with open_newest(folder) as reader:
        found = [seed for seed in seeds if same_as(reader, seed)]
    assert len(found) == 1, f"{what}: version {reader.version} is none of {seeds}"
    return found[0]


def go_on(folder: Path, seed: int, what: str) -> None:
    """Write the version that was cut short once more: nothing that was left is in the way."""
    write(folder, seed)
    assert check(folder, (seed,), what) == seed
    assert versions(folder) == [9], what
    left = sorted(os.listdir(folder / "v000000009"))
    shards = [f"shard-{index}-of-2.safetensors" for index in (0, 1)]
    assert left == ["manifest.json", *shards, "state.json"], f"{what}: {left}"


def try_all(folder: Path, seed: int, before: tuple[int, ...]) -> None:
    """Die at every call; `before` are the contents that may be found, in their order."""
    template, place = folder / "template", folder / "run"
    template.mkdir()
    for version in dict.fromkeys((before[0], 9)) if len(before) > 1 else before:
        save(template, version)
    seen = []
    for number in itertools.count():
        died = False
        for mode in (BEFORE, AFTER, TORN):
            shutil.copytree(template, place)
            what = f"{mode} call {number}"
            if dies(place, seed, number, mode):
                died = True
                seen.append(check(place, (*before, seed), what))
                if number % 2:
                    abandon(place, 9)
                go_on(place, seed, what)
            shutil.rmtree(place)
        if not died:
            break
    assert set(seen) == {*before, seed}, set(seen)
    print(f"{len(seen)} deaths at {number} calls: {seen.count(seed)} found the new one")


def killed(folder: Path) -> None:
    try_all(folder, 9, (5,))


def rewritten(folder: Path) -> None:
    """The same version with another content: either of them, or the one before, never a mixture."""
    try_all(folder, 10, (5, 9))


def full(folder: Path) -> None:
    """A small disk with one page more free each time, until a checkpoint fits."""
    save(folder, 5)
    failures = 0
    for pages in range(40):
        filler = folder / "filler"
        fill(filler, pages)
        try:
            save(folder, 9)
        except CheckpointError as error:
            said = str(error)
        else:
            said = ""
        if said:
            assert "No space left on device; free some space" in said
            assert check(folder, (5,), f"{pages} pages free") == 5
            assert not list(folder.glob("v*/*.tmp"))
            abandon(folder, 9)
            assert versions(folder) == [5]
            failures += 1
        filler.unlink()
        if not said:
            break
    assert check(folder, (9,), "enough room") == 9
    assert failures > 3
    print(f"{failures} times full")


def fill(filler: Path, pages: int) -> None:
    """Fill the disk but for some pages."""
    page = bytes(4096)
    with filler.open("wb", buffering=0) as stream:
        try:
            while stream.write(page) == len(page):
                pass
        except OSError:
            stream.truncate(max(0, stream.tell() - pages * len(page)))


def readonly(folder: Path) -> None:
    """A disk that takes nothing more, as after an error; the test's shell has made it so."""
    for action in (lambda: save(folder, 9), lambda: prune(folder, 1)):
        with pytest.raises(CheckpointError, match="Read-only file system; see who may"):
            action()
    assert check(folder, (6,), "read-only") == 6


def limited(folder: Path) -> None:
    save(folder, 5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError, match="File too large; allow larger files"):
        write_shards(folder, 9, 1)
    assert check(folder, (5,), "limited") == 5
    assert os.listdir(folder / "v000000009") == []


def prepare(folder: Path) -> None:
    save(folder, 5)
    save(folder, 6)


if __name__ == "__main__":
    actions = (killed, rewritten, full, readonly, limited, prepare)
    {action.__name__: action for action in actions}[sys.argv[1]](Path(sys.argv[2]))
