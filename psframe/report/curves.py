"""The figures of learning and of staleness."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from psframe.report import canvas
from psframe.report.facts import Facts
from psframe.report.reading import Floats, Run
from psframe.report.spans import started_s

__all__ = ["curves", "staleness"]

_PARTS = (
    ("train", "training", canvas.BLUE, "o"),
    ("validation", "validation", canvas.ORANGE, "s"),
    ("test", "test", canvas.GREEN, "^"),
)
# With fewer points than this each one is marked.
_MARKED_MAX = 40
_BARS_MAX = 80
# The axis of a histogram has so many values at least.
_VALUES_MIN = 5
_WORKER_BARS_MAX = 64


def curves(run: Run, facts: Facts) -> Any | None:
    """Draw loss and accuracy by epoch and by time; None if neither was written."""
    metrics = run.metrics
    quantities = [
        (what, parts)
        for what in ("loss", "accuracy")
        if (parts := [p for p in _PARTS if np.isfinite(metrics[f"{p[0]}_{what}"]).any()])
    ]
    if not quantities:
        return None
    by_epoch = bool(np.isfinite(metrics["epoch"]).any())
    first = metrics["epoch"] + 1 if by_epoch else metrics["update"]
    end_s = float(np.nanmax(np.append(metrics["time_s"], 0.0)))
    scale, time_label = canvas.time_scale(end_s)
    abscissae = [
        (first, "epochs completed" if by_epoch else "updates"),
        (metrics["time_s"] / scale, time_label),
    ]
    abscissae = [(x, label) for x, label in abscissae if np.isfinite(x).any()]
    if not abscissae:
        abscissae = [(np.arange(1.0, len(first) + 1), "line of metrics.jsonl")]
    figure = canvas.new_figure(11, 0.6 + 3.2 * len(quantities))
    grid = figure.subplots(len(quantities), len(abscissae), squeeze=False, sharey="row")
    for row, (what, parts) in zip(grid, quantities, strict=True):
        for column, (axes, (x, label)) in enumerate(zip(row, abscissae, strict=True)):
            for part, name, colour, marker in parts:
                _line(axes, x, metrics[f"{part}_{what}"], colour, name, marker)
            axes.set_xlabel(label)
            axes.margins(x=0.02)
            if column == 0:
                axes.set_title(what.capitalize())
                axes.set_ylabel("mean loss" if what == "loss" else "accuracy")
            if label == time_label:
                canvas.shade_start(axes, started_s(run.timeline) / scale, end_s / scale)
                axes.set_xlim(left=0)
            canvas.plain_axis(axes.xaxis, integer=label != time_label)
        values = np.concatenate([metrics[f"{part}_{what}"] for part, *_ in parts])
        _scale(row[0], what, values[np.isfinite(values)])
        if what == "accuracy":
            _best(row[0], abscissae[0][0], run, facts)
    handles: dict[str, Any] = {}
    for axes in grid[:, 0]:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper right", ncols=len(handles)
    )
    return figure


def _line(axes: Any, x: Floats, y: Floats, colour: str, name: str = "", marker: str = "o") -> None:
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    known = known[np.argsort(x[known], kind="stable")]
    x, y = canvas.thinned(x[known], y[known])
    if len(x) > _MARKED_MAX:
        marker = ""
    axes.plot(x, y, color=colour, label=name, marker=marker, markersize=4, mew=0)


def _scale(axes: Any, what: str, values: Floats) -> None:
    """Choose the range of a row: logarithmic where the loss fell far, accuracy up to 100%."""
    if what == "accuracy":
        canvas.percent_axis(axes.yaxis)
        low, high = float(values.min()), float(values.max())
        room = max(0.06 * (high - low), 0.004)
        axes.set_ylim(max(low - room, -0.01), min(high + room, 1.004) if high <= 1 else high)
    elif values.min() > 0 and values.max() > 20 * values.min():
        least, most = 0.8 * float(values.min()), 1.25 * float(values.max())
        canvas.log_axis(axes.yaxis, least, most)
        axes.set_ylim(least, most)
        axes.set_ylabel("mean loss (log scale)")
    else:
        axes.set_ylim(bottom=min(0.0, float(values.min())))
        canvas.plain_axis(axes.yaxis)


def _best(axes: Any, x: Floats, run: Run, facts: Facts) -> None:
    """Mark the best held-out accuracy, with a ring and its value."""
    part = "validation" if np.isfinite(run.metrics["validation_accuracy"]).any() else "test"
    y = run.metrics[f"{part}_accuracy"]
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(known) < 2:
        return
    best = known[int(np.argmax(y[known]))]
    chosen = known[run.metrics["epoch"][known] == facts.best_epoch]
    if facts.best_epoch is not None and len(chosen):
        best = chosen[-1]
    axes.plot(x[best], y[best], "o", ms=9, mfc="none", mec=canvas.INK, mew=1.3, clip_on=False)
    axes.annotate(
        f"○ best {part} {y[best]:.2%}",
        (0.98, 0.05),
        xycoords="axes fraction",
        ha="right",
        fontsize=9.5,
    )


def staleness(run: Run, facts: Facts) -> Any | None:
    """Draw the histogram of staleness, its mean by epoch and by worker: what there is of them."""
    means = run.metrics["staleness_mean"]
    by_worker = [w for w in facts.workers if not math.isnan(w.staleness_mean)]
    never = facts.staleness is not None and not facts.staleness[1:].any()
    panels = []
    if facts.staleness is not None:
        panels.append(_histogram)
    if never:
        panels.append(_never)
    if np.isfinite(means).any() and not never:
        panels.append(_by_epoch)
    if len(by_worker) > 1 and not never:
        panels.append(_by_worker)
    if not panels:
        return None
    figure = canvas.new_figure(11, 2.6 if never else 3.6)
    widths = [1.35 if panel is _histogram else 1.0 for panel in panels]
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)
    for axes, panel in zip(grid[0], panels, strict=True):
        panel(axes, run, facts)
    return figure


def _never(axes: Any, run: Run, facts: Facts) -> None:
    """Say so, where curves would be zero everywhere."""
    axes.set_axis_off()
    text = "Staleness was 0 throughout: every gradient met\nthe very parameters it was computed on."
    axes.text(0.02, 0.5, text, va="center", fontsize=10.5, linespacing=1.6)


def _histogram(axes: Any, run: Run, facts: Facts) -> None:
    counts = facts.staleness
    assert counts is not None
    counts = counts[: int(np.flatnonzero(counts)[-1]) + 1]
    width = -(-len(counts) // _BARS_MAX)
    starts = np.arange(0, len(counts), width)
    bars = np.add.reduceat(counts, starts)
    axes.bar(
        starts + (width - 1) / 2,
        bars,
        width=0.86 * width if len(bars) <= 30 else width,
        color=canvas.BLUE,
        linewidth=0,
    )
    if len(counts) < _VALUES_MIN:  # one bar as wide as the figure is no histogram
        axes.set_xlim(-0.6, _VALUES_MIN - 0.4)
    seen = bars[bars > 0]
    far = bool(seen.max() > 200 * seen.min())
    if far:
        canvas.log_axis(axes.yaxis, 0.7, 1.6 * float(seen.max()))
        axes.set_ylim(0.7, 1.6 * float(seen.max()))
    else:
        axes.set_ylim(0, 1.1 * float(seen.max()))
        canvas.plain_axis(axes.yaxis)
    axes.axvline(facts.staleness_mean, color=canvas.RED, lw=1.6, ls=(0, (4, 2)))
    right = facts.staleness_mean > 0.6 * len(counts)
    axes.annotate(
        f"mean {facts.staleness_mean:.2f}",
        (facts.staleness_mean, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if right else 5, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        color=canvas.RED,
        fontsize=9,
    )
    axes.set_title("Pushes by staleness", pad=18)
    axes.set_ylabel("pushes applied" + (" (log scale)" if far else ""))
    of = "" if width == 1 else f", {width} to a bar"
    axes.set_xlabel(f"staleness (updates{of})")
    canvas.plain_axis(axes.xaxis, integer=True)
    axes.grid(axis="x", visible=False)


def _by_epoch(axes: Any, run: Run, facts: Facts) -> None:
    metrics = run.metrics
    epochs = bool(np.isfinite(metrics["epoch"]).any())
    x = metrics["epoch"] + 1 if epochs else metrics["update"]
    _line(axes, x, metrics["staleness_mean"], canvas.BLUE)
    highest = float(np.nanmax(metrics["staleness_mean"]))
    if len(facts.workers) > 1 and facts.mode != "bsp":
        expected = len(facts.workers) - 1
        axes.axhline(expected, color=canvas.AXIS, lw=1.2, ls=(0, (4, 2)), zorder=1)
        axes.annotate(
            f"dashed: W − 1 = {expected:,}",
            (1.0, 1.0),
            xycoords="axes fraction",
            ha="right",
            va="bottom",
            color=canvas.MUTED,
            fontsize=9,
        )
        highest = max(highest, expected)
    axes.set_ylim(0, 1.15 * highest if highest > 0 else 1)
    axes.set_title("Mean by epoch", pad=18)
    axes.set_xlabel("epochs completed" if epochs else "updates")
    axes.set_ylabel("mean staleness (updates)")
    canvas.plain_axis(axes.xaxis, integer=True)
    canvas.plain_axis(axes.yaxis)


def _by_worker(axes: Any, run: Run, facts: Facts) -> None:
    means = np.array([worker.staleness_mean for worker in facts.workers])
    index = np.array([float(worker.index) for worker in facts.workers])
    if len(means) <= _WORKER_BARS_MAX:
        axes.bar(index, np.nan_to_num(means), width=0.8, color=canvas.BLUE, linewidth=0)
        axes.grid(axis="x", visible=False)
    else:
        axes.plot(index, means, ".", ms=3, color=canvas.BLUE, alpha=0.7, mew=0)
    axes.set_ylim(0, 1.15 * float(np.nanmax(means)) or 1)
    canvas.plain_axis(axes.xaxis, integer=True)
    canvas.plain_axis(axes.yaxis)
    axes.set_title("Mean by worker", pad=18)
    axes.set_xlabel("worker")
    axes.set_ylabel("mean staleness (updates)")
