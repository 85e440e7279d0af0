"""The limits that control groups set on this process, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["cores_allowed", "cpu_quota", "memory_limit", "parse_cpus"]

# Version 1 has a huge number for no limit.
_NO_LIMIT = 2**60


def memory_limit(root: Path = Path("/")) -> tuple[int, int] | None:
    """Give the tightest limit on memory and what is used of it, in bytes; None for no limit.

    Page cache that can be dropped is not counted as used.
    """
    best: tuple[int, int] | None = None
    for folder, new in _levels(root, "memory"):
        limit = _read(folder / ("memory.max" if new else "memory.limit_in_bytes"))
        used = _read(folder / ("memory.current" if new else "memory.usage_in_bytes"))
        if not (limit.isdigit() and used.isdigit()) or int(limit) >= _NO_LIMIT:
            continue
        cache = _stat(folder / "memory.stat", "inactive_file" if new else "total_inactive_file")
        found = int(limit), max(0, int(used) - cache)
        if best is None or found[0] - found[1] < best[0] - best[1]:
            best = found
    return best


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Give how many cores' time may be used; None for no limit."""
    best: float | None = None
    for folder, new in _levels(root, "cpu"):
        if new:
            words = _read(folder / "cpu.max").split()
        else:
            words = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
            quota = int(words[0]) / int(words[1])
            best = quota if best is None else min(best, quota)
    return best


def cores_allowed(root: Path = Path("/")) -> list[int] | None:
    """Give the cores that the control group may use; None if it does not say."""
    for folder, new in _levels(root, "cpuset"):
        for name in ("cpuset.cpus.effective",) if new else ("cpuset.effective_cpus", "cpuset.cpus"):
            text = _read(folder / name)
            if text:
                return parse_cpus(text)
    return None


def parse_cpus(text: str) -> list[int]:
    """Read a list of cores as the kernel writes it.

    >>> parse_cpus("0-2,5")
    [0, 1, 2, 5]
    """
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        cores.extend(range(int(first), int(last or first) + 1))
    return cores


def _levels(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Give the folders of this process's group and those above it, and whether of version 2.

    A container may see a path that is not below its own mount; then the mount's root is its group.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        new = number == "0" and not names
        if not new and controller not in names.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("" if new else controller)
        folder = mount / path.lstrip("/")
        while folder != mount:
            yield folder, new
            folder = folder.parent
        yield mount, new


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # this version, or the root of all groups, has no such file
        return ""


def _stat(file: Path, name: str) -> int:
    for line in _read(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0
