"""Make a report: read, draw, write."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from psframe.errors import RunDirError
from psframe.report import canvas
from psframe.report.classes import classes
from psframe.report.curves import curves, staleness
from psframe.report.facts import Facts, gather
from psframe.report.page import Figure, page
from psframe.report.reading import Run, read_run
from psframe.report.spans import on_one_clock
from psframe.report.words import findings
from psframe.report.workers import heat, rates, rates_caption, times, times_caption

__all__ = ["PAGE", "make_report"]

PAGE = "report.html"
_FOLDER = "report"
_LEARNING = (
    "The training loss is the mean of an epoch's batches, each on the parameters of its time."
)
_STALENESS = (
    "The staleness of a gradient is the number of updates that were applied between the pull of "
    "the parameters it was computed on and its own application."
)
_HEAT = "A horizontal streak is one worker's, a vertical one all workers' at that time."


def make_report(
    run_dir: str | Path, folder: str | Path | None = None, *, images: bool = True
) -> list[Path]:
    """Make the report of a run.

    All is drawn before anything is written, and each file is replaced as a whole.

    Args:
        run_dir: the run's folder; it may still be running.
        folder: where the report goes; `run_dir`/report by default.
        images: write each figure as a PNG file, too.

    Returns:
        The files written; the page is the first.

    Raises:
        RunDirError: `run_dir` is no run's, or `folder` cannot be written.
        ArgumentError: matplotlib is not installed.
    """
    run = read_run(run_dir)
    on_one_clock(run)
    facts = gather(run)
    made = f"Made by psframe.report, {time.strftime('%Y-%m-%d %H:%M')}."
    files: dict[str, bytes] = {}
    with canvas.drawing():
        figures = list(_figures(run, facts))
        drawn = [(f, canvas.svg(f.drawn, f.name, f.title)) for f in figures]
        text = page(run, facts, findings(run, facts), drawn, made)
        files[PAGE] = text.encode("utf-8")
        if images:
            files.update((f"{f.name}.png", canvas.png(f.drawn)) for f in figures)
    target = Path(run_dir) / _FOLDER if folder is None else Path(folder)
    return _write(target, files)


def _figures(run: Run, facts: Facts) -> Iterator[Figure]:
    drawings = (
        ("curves", "Learning", _learning(run), curves(run, facts)),
        ("staleness", "Staleness", _STALENESS, staleness(run, facts)),
        ("rates", "How fast the workers were", rates_caption(run, facts), rates(run, facts)),
        ("times", "How the workers spent their time", times_caption(run), times(run, facts)),
        ("heat", "The workers over time", _HEAT, heat(run, facts)),
        ("classes", "Classes", "", classes(facts)),
    )
    return (Figure(*drawing) for drawing in drawings if drawing[-1] is not None)


def _learning(run: Run) -> str:
    lines = len(run.metrics["time_s"])
    if lines > canvas.POINTS_MAX:
        return f"Each point is the mean of neighbours among {lines:,} lines of metrics.jsonl."
    return _LEARNING


def _write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    """Write files so that a reader finds each of them whole, old or new."""
    written = []
    file = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            file = folder / name
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            try:
                temporary.write_bytes(data)
                temporary.replace(file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            written.append(file)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space, or write it to another disk with -o FOLDER"
        else:
            remedy = "write it to another folder with -o FOLDER"
        raise RunDirError(
            f"report: {str(file)!r} cannot be written: {error.strerror or error}; {remedy}"
        ) from error
    return written
