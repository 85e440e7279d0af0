"""Read what a run left in its folder, and believe none of it.

A run may be an old one, still running, or dead in the middle of a line. What is missing is left
out; what is not as it should be is left out too, with a word in `Run.problems`.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe import toml
from psframe.errors import RunDirError

__all__ = ["COUNTS", "LARGEST", "METRICS", "Floats", "Run", "Timeline", "number", "read_run"]

Floats = npt.NDArray[np.float64]

# The columns of a worker in timeline.jsonl, all cumulative.
COUNTS = ("pushes", "samples", "staleness_sum", "compute_s", "servers_s", "data_s")
# The fields of metrics.jsonl that are drawn; others are ignored.
METRICS = (
    *("time_s", "epoch", "update", "samples_per_s", "staleness_mean"),
    *("train_loss", "validation_loss", "test_loss"),
    *("train_accuracy", "validation_accuracy", "test_accuracy"),
)
# Nothing that a run counts or measures is larger; what is, would overflow in a sum.
LARGEST = 1e18
# No run is 300 years old, and a millisecond can still be told in such a time.
_TIME_S_MAX = 1e10
_FILES = ("config.toml", "metrics.jsonl", "status.json", "summary.json", "timeline.jsonl")
# A file that is no run's must not fill the memory. 10^5 lines of metrics are 25 MB; one line of a
# timeline of 10,000 workers is 1 MB.
_DOCUMENT_BYTES_MAX = 64 << 20
_LINE_BYTES_MAX = 16 << 20
_LINES_MAX = 1_000_000
# Lines times workers kept of a timeline. It is cumulative: without every second line it says the
# same, at half the resolution.
_CELLS_MAX = 2_000_000


@dataclass(frozen=True)
class Timeline:
    """What each worker had done by when.

    Attributes:
        time_s: (T,) never decreasing.
        counts: (T, W, 6) cumulative, never decreasing, in the order of `COUNTS`.
    """

    time_s: Floats
    counts: Floats


@dataclass
class Run:
    """A run directory as it was found.

    Attributes:
        path: the folder.
        config, status, summary: the files' tables, unchecked; empty where there is none.
        metrics: a column of `METRICS` each, (n,), NaN where a line lacks it.
        timeline: None where there is none.
        problems: a sentence for each thing that was not as it should be.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Floats] = field(default_factory=dict)
    timeline: Timeline | None = None
    problems: list[str] = field(default_factory=list)


def number(value: Any) -> float:
    """Give a JSON value as a float of a possible size, or NaN if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        value = float(value)
    except OverflowError:
        return math.nan
    return value if abs(value) <= LARGEST else math.nan


def read_run(path: str | Path) -> Run:
    """Read a run directory.

    Raises:
        RunDirError: it is not a folder, or holds none of a run's files.
    """
    folder = Path(path)
    try:
        is_folder = folder.is_dir()
        is_run = any((folder / name).exists() for name in _FILES)
    except OSError as error:  # no permission to look, a name that is too long
        raise RunDirError(f"{str(path)!r}: cannot be read: {error.strerror or error}") from error
    if not is_folder:
        raise RunDirError(f"{str(path)!r}: expected the folder of a run, such as runs/NAME")
    if not is_run:
        raise RunDirError(
            f"{str(path)!r}: is not the folder of a run: it has none of {', '.join(_FILES)}"
        )
    run = Run(folder)
    run.config = _config(run)
    run.status = _document(run, "status.json")
    run.summary = _document(run, "summary.json")
    run.metrics = _metrics(run)
    run.timeline = _timeline(run)
    return run


def _config(run: Run) -> dict[str, Any]:
    file = run.path / "config.toml"
    if not _readable(run, file, _DOCUMENT_BYTES_MAX):
        return {}
    try:
        return toml.load(file)
    except (ValueError, RecursionError) as error:
        run.problems.append(str(error).removeprefix(f"{run.path}/"))
        return {}


def _document(run: Run, name: str) -> dict[str, Any]:
    file = run.path / name
    if not _readable(run, file, _DOCUMENT_BYTES_MAX):
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        run.problems.append(f"{name}: cannot be read: {error.strerror}")
        return {}
    except (ValueError, RecursionError) as error:
        run.problems.append(f"{name}: is not JSON: {error}")
        return {}
    if not isinstance(found, dict):
        run.problems.append(f"{name}: expected a JSON object, got a {type(found).__name__}")
        return {}
    return found


def _readable(run: Run, file: Path, bytes_max: int | None = None) -> bool:
    """Tell whether there is an ordinary file; a pipe, for one, would be waited for."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        run.problems.append(f"{file.name}: cannot be read: {error.strerror}")
        return False
    if not stat.S_ISREG(found.st_mode):
        run.problems.append(f"{file.name}: is not an ordinary file, and was left out")
        return False
    if bytes_max is not None and found.st_size > bytes_max:
        run.problems.append(f"{file.name}: {found.st_size:,} bytes are no run's; it was left out")
        return False
    return True


def _lines(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one a line; count what is none into the problems."""
    file = run.path / name
    if not _readable(run, file):
        return
    bad, first, count, text = 0, 0, 0, b""
    try:
        with file.open("rb") as stream:
            while count < _LINES_MAX and (text := stream.readline(_LINE_BYTES_MAX)):
                count += 1
                found = _parse(text)
                if found is not None:
                    yield found
                elif text.strip():
                    bad, first = bad + 1, first or count
    except OSError as error:
        run.problems.append(f"{name}: cannot be read beyond line {count}: {error.strerror}")
    if count == _LINES_MAX:
        run.problems.append(f"{name}: only the first {_LINES_MAX:,} lines were read")
    if bad == 1 and first == count and not text and not _ends(file):
        run.problems.append(f"{name}: its last line is half-written, and was left out")
    elif bad:
        run.problems.append(
            f"{name}: {bad:,} of {count:,} lines are not JSON objects, and were left out "
            f"(the first is line {first:,})"
        )


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _ends(file: Path) -> bool:
    """Tell whether a file's last line is ended."""
    try:
        with file.open("rb") as stream:
            stream.seek(-1, 2)
            return stream.read() == b"\n"
    except OSError:
        return True


def _metrics(run: Run) -> dict[str, Floats]:
    rows = [[number(line.get(key)) for key in METRICS] for line in _lines(run, "metrics.jsonl")]
    table = np.array(rows, dtype=np.float64).reshape(len(rows), len(METRICS))
    columns = {key: np.ascontiguousarray(table[:, i]) for i, key in enumerate(METRICS)}
    for key, column in columns.items():  # a loss may be negative, and nothing else
        most = 1.0 if key.endswith("accuracy") else _TIME_S_MAX if key == "time_s" else LARGEST
        if not key.endswith("loss"):
            column[(column < 0) | (column > most)] = math.nan
    columns["time_s"] = _continued(columns["time_s"])
    return columns


def _continued(time_s: Floats) -> Floats:
    """Add up the times of a run that was resumed, whose clock began again at 0."""
    known = np.flatnonzero(np.isfinite(time_s))
    steps = np.diff(time_s[known], prepend=0.0)
    whole = np.full(time_s.shape, math.nan)
    whole[known] = np.cumsum(np.where(steps < 0, time_s[known], steps))
    return whole


def _timeline(run: Run) -> Timeline | None:
    times: list[float] = []
    rows: list[Floats] = []
    bad = seen = cells = 0
    every, last = 1, None
    for line in _lines(run, "timeline.jsonl"):
        found = _workers(line.get("workers"))
        time_s = number(line.get("time_s"))
        if found is None or not 0 <= time_s <= _TIME_S_MAX:
            bad += 1
            continue
        last = (time_s, found) if seen % every else None
        seen += 1
        if last is not None:
            continue
        times.append(time_s)
        rows.append(found)
        cells += len(found)
        if cells > _CELLS_MAX and len(rows) > 2:
            times, rows, every = times[::2], rows[::2], every * 2
            cells = sum(map(len, rows))
    if bad:
        run.problems.append(f"timeline.jsonl: {bad:,} lines lack times or workers' numbers")
    if last is not None:
        times.append(last[0])
        rows.append(last[1])
    if not rows or not max(map(len, rows)):
        return None
    return _whole(times, rows)


def _workers(value: Any) -> Floats | None:
    """Give a line's workers as (W, 6), or None if they are not that."""
    if not isinstance(value, list):
        return None
    try:
        table = np.array(value, dtype=np.float64).reshape(len(value), -1)
    except (TypeError, ValueError, OverflowError):
        return None
    if len(value) and table.shape[1] < len(COUNTS):
        return None
    table = table[:, : len(COUNTS)] if len(value) else np.zeros((0, len(COUNTS)))
    return np.where(np.abs(table) <= LARGEST, table, 0.0)


def _whole(times: list[float], rows: list[Floats]) -> Timeline:
    """Make one table; a worker that came later, or a server that began again, may be in it."""
    counts = np.zeros((len(rows), max(map(len, rows)), len(COUNTS)))
    for i, row in enumerate(rows):
        counts[i, : len(row)] = row
        if i:  # a worker that is no longer listed has done what it had done
            counts[i, len(row) :] = counts[i - 1, len(row) :]
    steps = np.diff(counts, axis=0, prepend=0.0)
    counts = np.cumsum(np.where(steps < 0, counts, steps), axis=0)
    return Timeline(_continued(np.array(times)), np.maximum(counts, 0.0))
