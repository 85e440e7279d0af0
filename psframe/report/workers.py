"""The figures of the workers: how fast each was, and how it spent its time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from psframe.report import canvas
from psframe.report.facts import Facts
from psframe.report.reading import COUNTS, Floats, Run, Timeline
from psframe.report.words import count

__all__ = ["caption", "heat", "rates", "times"]

_SAMPLES = COUNTS.index("samples")
_PARTS = ("compute_s", "servers_s", "data_s")
_FIRST_PART = COUNTS.index("compute_s")
_NAMES = {
    "compute_s": ("computing", canvas.GREEN),
    "servers_s": ("waiting for servers", canvas.ORANGE),
    "data_s": ("waiting for data", canvas.PINK),
}
_OTHER = ("other", canvas.GREY)
# One line a worker, each of its colour; one line a worker, all grey; beyond that, a band.
_COLOURED_MAX, _LINES_MAX = 7, 24
# One bar a worker; with more, those that computed least, so that each can be seen and named.
_BARS_MAX = 64
_WORST = 40
# From so many workers on, a heat map shows more than bars do.
_HEAT_MIN = 12
_HEAT_ROWS_MAX = 1000
# The end of the colours of waiting, at least: two per cent everywhere is nothing to shine.
_HEAT_SHARE_MIN = 0.2
_SPANS_MAX = 120


@dataclass(frozen=True)
class _Spans:
    """A timeline in spans of equal length.

    Attributes:
        edges_s: (N + 1,) from 0 or the first line to the last.
        done: (N, W, 6) what each worker did in each span, in the order of `COUNTS`.
    """

    edges_s: Floats
    done: Floats

    @property
    def middles_s(self) -> Floats:
        return (self.edges_s[1:] + self.edges_s[:-1]) / 2

    @property
    def rates(self) -> Floats:
        """(N, W) samples per second."""
        return np.asarray(self.done[:, :, _SAMPLES] / np.diff(self.edges_s)[:, None])


def _spans(timeline: Timeline | None) -> _Spans | None:
    """Divide a timeline into spans with a few pushes of each worker in each, if it has two."""
    if timeline is None or len(timeline.time_s) < 2:
        return None
    time_s, counts = timeline.time_s, timeline.counts
    keep = np.append(np.diff(time_s) > 0, True)  # of lines at one time, the last
    time_s, counts = time_s[keep], counts[keep]
    if len(time_s) < 2 or not time_s[-1] > time_s[0]:
        return None
    pushes = float(np.median(counts[-1, :, 0]))
    number = int(max(2, min(len(time_s) - 1, _SPANS_MAX, pushes / 12)))
    edges = np.linspace(time_s[0], time_s[-1], number + 1)
    if not np.all(np.diff(edges) > 0):  # a run too short for its clock
        return None
    after = np.clip(np.searchsorted(time_s, edges), 1, len(time_s) - 1)
    part = (edges - time_s[after - 1]) / (time_s[after] - time_s[after - 1])
    part = part[:, None, None]
    at = counts[after - 1] * (1 - part) + counts[after] * part
    return _Spans(edges, np.maximum(np.diff(at, axis=0), 0.0))


def rates(run: Run, facts: Facts) -> Any | None:
    """Draw samples per second over time, of all workers together and of each."""
    spans = _spans(run.timeline)
    if spans is None:
        return _epoch_rates(run)
    unit, scale = _unit(spans.edges_s[-1])
    x, rate = spans.middles_s / scale, spans.rates
    alone = rate.shape[1] == 1
    figure = canvas.new_figure(11, 3.8)
    grid = figure.subplots(1, 1 if alone else 2, squeeze=False, width_ratios=[1, 1.35][alone:])[0]
    total = grid[0]
    total.fill_between(x, rate.sum(axis=1), color=canvas.BLUE, alpha=0.18, linewidth=0)
    total.plot(x, rate.sum(axis=1), color=canvas.BLUE)
    total.set_title("The only worker" if alone else "All workers together")
    if not alone:
        _each(figure, grid[1], x, rate, facts)
    for axes in grid:
        axes.set_xlabel(f"time ({unit})")
        axes.set_ylabel("samples per second")
        axes.set_ylim(bottom=0)
        axes.set_xlim(spans.edges_s[0] / scale, spans.edges_s[-1] / scale)
        canvas.plain_axis(axes.xaxis)
        canvas.plain_axis(axes.yaxis)
    return figure


def _each(figure: Any, axes: Any, x: Floats, rate: Floats, facts: Facts) -> None:
    workers = rate.shape[1]
    axes.set_title("Each worker")
    slowest = facts.slowest
    if slowest is not None and facts.workers[slowest].index < workers:
        slowest = facts.workers[slowest].index
    elif slowest is not None:
        slowest = None
    if workers <= _COLOURED_MAX:
        for i in range(workers):
            note = ", slowest" if i == slowest and workers > 2 else ""
            axes.plot(x, rate[:, i], color=canvas.PALETTE[i], lw=1.5, label=f"worker {i}{note}")
    else:
        if workers <= _LINES_MAX:
            for i in range(workers):
                label = "each worker" if i == 0 else None
                axes.plot(x, rate[:, i], color=canvas.GREY, lw=0.8, alpha=0.7, label=label)
        else:
            for low, high, alpha in ((0, 100, 0.25), (10, 90, 0.6)):
                edges = np.percentile(rate, [low, high], axis=1)
                label = "all of them" if low == 0 else "middle 80%"
                axes.fill_between(x, *edges, color=canvas.GREY, alpha=alpha, lw=0, label=label)
        axes.plot(x, np.median(rate, axis=1), color=canvas.BLUE, label="median")
        if slowest is not None:
            name = f"slowest: worker {slowest:,}"
            axes.plot(x, rate[:, slowest], color=canvas.RED, lw=1.5, label=name)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))


def _epoch_rates(run: Run) -> Any | None:
    """Draw what an older run knows: samples per second, epoch by epoch."""
    x, y = run.metrics["time_s"], run.metrics["samples_per_s"]
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 2:
        return None
    unit, scale = _unit(float(x[known].max()))
    x, y = canvas.thinned(x[known] / scale, y[known])
    figure = canvas.new_figure(11, 3.2)
    axes = figure.subplots()
    axes.plot(x, y, color=canvas.BLUE, marker="o" if len(x) <= 40 else "", ms=3.5)
    axes.set_title("All workers together, by epoch")
    axes.set_xlabel(f"time ({unit})")
    axes.set_ylabel("samples per second")
    axes.set_ylim(bottom=0)
    canvas.plain_axis(axes.yaxis)
    return figure


def times(run: Run, facts: Facts) -> Any | None:
    """Draw how each worker spent its time, as bars; and all of them, over time."""
    workers = [w for w in facts.workers if w.accounted_s > 0]
    if not workers:
        return None
    spans = _spans(run.timeline)
    figure = canvas.new_figure(11, 3.9)
    grid = figure.subplots(1, 1 if spans is None else 2, squeeze=False, sharey=True)[0]
    whole = np.array([max(facts.seconds or 0.0, w.accounted_s) for w in workers])
    whole = np.where(np.isfinite(whole), whole, [w.accounted_s for w in workers])
    parts = np.array([[getattr(w, part) for part in _PARTS] for w in workers]) / whole[:, None]
    _bars(grid[0], np.array([float(w.index) for w in workers]), parts)
    if spans is not None:
        _areas(grid[1], spans)
    grid[0].set_ylabel("share of the time")
    grid[0].set_ylim(0, 1)
    canvas.percent_axis(grid[0].yaxis)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure


def _bars(axes: Any, index: Floats, parts: Floats) -> None:
    many = len(parts) > _BARS_MAX
    axes.set_title("Each worker")
    x, label = index, "worker"
    if many:
        worst = np.argsort(parts[:, 0], kind="stable")[:_WORST]
        axes.set_title(f"The {_WORST} of {len(parts):,} workers that computed least")
        x, index, parts = np.arange(float(_WORST)), index[worst], parts[worst]
    bottom = np.zeros(len(parts))
    heights = [*parts.T, np.maximum(1 - parts.sum(axis=1), 0.0)]
    for height, (name, colour) in zip(heights, [*_NAMES.values(), _OTHER], strict=True):
        axes.bar(x, height, bottom=bottom, width=0.82, color=colour, linewidth=0, label=name)
        bottom = bottom + height
    axes.set_xlabel(label)
    axes.grid(visible=False)
    room = 1.2 if len(parts) < 4 else 0.6  # a single bar as wide as the figure is no bar
    axes.set_xlim(x.min() - room, x.max() + room)
    if many or len(parts) <= 16:
        names = [f"{i:.0f}" for i in index]
        axes.set_xticks(x, names, rotation=90 if many else 0, fontsize=7.5 if many else 9)
    else:
        canvas.plain_axis(axes.xaxis, integer=True)


def _areas(axes: Any, spans: _Spans) -> None:
    unit, scale = _unit(spans.edges_s[-1])
    workers = spans.done.shape[1]
    available = np.diff(spans.edges_s) * workers
    parts = spans.done[:, :, _FIRST_PART:].sum(axis=1) / available[:, None]
    parts /= np.maximum(parts.sum(axis=1), 1.0)[:, None]
    heights = [*parts.T, np.maximum(1 - parts.sum(axis=1), 0.0)]
    x, bottom = np.repeat(spans.edges_s / scale, 2)[1:-1], np.zeros(2 * len(parts))
    for height, (_, colour) in zip(heights, [*_NAMES.values(), _OTHER], strict=True):
        top = bottom + np.repeat(height, 2)
        axes.fill_between(x, bottom, top, color=colour, lw=0)
        bottom = top
    axes.set_title("The worker, over time" if workers == 1 else "All workers, over time")
    axes.set_xlabel(f"time ({unit})")
    axes.set_xlim(x[0], x[-1])
    axes.grid(visible=False)


def heat(run: Run, facts: Facts) -> Any | None:
    """Draw each worker's rate and waiting over time as heat maps; None for a few workers."""
    spans = _spans(run.timeline)
    if spans is None or spans.done.shape[1] < _HEAT_MIN or not spans.done.any():
        return None
    workers = spans.done.shape[1]
    lengths = np.diff(spans.edges_s)[:, None]
    maps: list[tuple[Floats, str, float | None]] = [(spans.rates, "Samples per second", None)]
    for part, title in (("servers_s", "Waiting for servers"), ("data_s", "Waiting for data")):
        share = np.minimum(spans.done[:, :, COUNTS.index(part)] / lengths, 1.0)
        maps.append((share, title, max(float(share.max()), _HEAT_SHARE_MIN)))
    figure = canvas.new_figure(11, min(3.4 + 0.02 * workers, 6.5))
    unit, scale = _unit(spans.edges_s[-1])
    extent = (spans.edges_s[0] / scale, spans.edges_s[-1] / scale, workers - 0.5, -0.5)
    for axes, (values, title, top) in zip(figure.subplots(1, 3, sharey=True), maps, strict=True):
        image = axes.imshow(
            _pooled(values, lowest=top is None).T,
            aspect="auto",
            extent=extent,
            interpolation="nearest",
            cmap="cividis",
            vmin=0,
            vmax=top,
        )
        axes.set_title(title)
        axes.set_xlabel(f"time ({unit})")
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.9, aspect=28, pad=0.02)
        bar.outline.set_visible(False)
        if top is None:
            canvas.plain_axis(bar.ax.xaxis)
        else:
            canvas.percent_axis(bar.ax.xaxis)
        bar.ax.xaxis.get_major_locator().set_params(nbins=5)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("worker")
            canvas.plain_axis(axes.yaxis, integer=True)
    return figure


def _pooled(values: Floats, lowest: bool) -> Floats:
    """Let the worst of neighbouring workers stand for them where there are more than pixels."""
    group = -(-values.shape[1] // _HEAT_ROWS_MAX)
    if group == 1:
        return values
    starts = np.arange(0, values.shape[1], group)
    return np.asarray((np.minimum if lowest else np.maximum).reduceat(values, starts, axis=1))


def _unit(longest_s: float) -> tuple[str, float]:
    return ("h", 3600.0) if longest_s > 10800 else ("min", 60.0) if longest_s > 300 else ("s", 1.0)


def caption(facts: Facts) -> str:
    """Name the slowest worker under the figure of rates."""
    if facts.slowest is None:
        return ""
    worker = facts.workers[facts.slowest]
    if math.isnan(worker.samples_per_s):
        return f"Worker {worker.index} was the slowest."
    return f"Worker {worker.index} was the slowest, at {count(worker.samples_per_s)} samples/s."
