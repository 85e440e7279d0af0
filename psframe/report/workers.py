"""The figures of the workers: how fast each was, and how it spent its time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from psframe.report import canvas
from psframe.report.facts import Facts
from psframe.report.reading import Floats, Run
from psframe.report.spans import Spans, spans_of_times, spans_of_work, started_s
from psframe.report.words import count, seconds

__all__ = ["heat", "rates", "rates_caption", "times", "times_caption"]

_PARTS = ("compute_s", "servers_s", "data_s")
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
# With fewer spans a line between their middles would say more than is known: steps.
_STEPS_MAX = 40


def rates(run: Run, facts: Facts) -> Any | None:
    """Draw samples per second over time, of all workers together and of each."""
    spans = spans_of_work(run.timeline)
    if spans is None:
        return _epoch_rates(run)
    scale, label = canvas.time_scale(spans.edges_s[-1])
    edges, rate = spans.edges_s / scale, spans.rates
    alone = rate.shape[1] == 1
    figure = canvas.new_figure(11, 3.8)
    grid = figure.subplots(1, 1 if alone else 2, squeeze=False, width_ratios=[1, 1.35][alone:])[0]
    total = grid[0]
    x, y = _steps(edges, rate.sum(axis=1))
    total.fill_between(x, y, color=canvas.BLUE, alpha=0.18, linewidth=0)
    total.plot(x, y, color=canvas.BLUE)
    total.set_title("The only worker" if alone else "All workers together")
    if not alone:
        _each(figure, grid[1], edges, rate, facts)
    for axes in grid:
        axes.set_xlabel(label)
        axes.set_ylabel("samples per second")
        axes.set_ylim(bottom=0)
        axes.set_xlim(edges[0], edges[-1])
        canvas.plain_axis(axes.xaxis)
        canvas.plain_axis(axes.yaxis)
    return figure


def _steps(edges: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Give the line of values, one a span: as steps where they are few."""
    if len(values) > _STEPS_MAX:
        return (edges[1:] + edges[:-1]) / 2, values
    return np.repeat(edges, 2)[1:-1], np.repeat(values, 2, axis=0)


def _each(figure: Any, axes: Any, edges: Floats, rate: Floats, facts: Facts) -> None:
    workers = rate.shape[1]
    x, rate = _steps(edges, rate)
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
    scale, label = canvas.time_scale(float(x[known].max()))
    x, y = canvas.thinned(x[known] / scale, y[known])
    figure = canvas.new_figure(11, 3.2)
    axes = figure.subplots()
    axes.plot(x, y, color=canvas.BLUE, marker="o" if len(x) <= 40 else "", ms=3.5)
    axes.set_title("All workers together, by epoch")
    axes.set_xlabel(label)
    axes.set_ylabel("samples per second")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    canvas.plain_axis(axes.yaxis)
    return figure


def times(run: Run, facts: Facts) -> Any | None:
    """Draw how each worker spent its time, as bars; and all of them, over time."""
    workers = [w for w in facts.workers if w.accounted_s > 0]
    if not workers:
        return None
    spans = spans_of_times(run.timeline)
    figure = canvas.new_figure(11, 3.9)
    grid = figure.subplots(1, 1 if spans is None else 2, squeeze=False, sharey=True)[0]
    if spans is not None:  # of the same time as on the right, so that the two agree
        index = np.arange(float(spans.done.shape[1]))
        parts = spans.done.sum(axis=0) / (spans.edges_s[-1] - spans.edges_s[0])
    else:
        index = np.array([float(w.index) for w in workers])
        run_s = facts.seconds if math.isfinite(facts.seconds) else 0.0
        whole = np.array([max(run_s, w.accounted_s) for w in workers])
        parts = np.array([[getattr(w, part) for part in _PARTS] for w in workers])
        parts /= whole[:, None]
    _bars(grid[0], index, parts)
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
    room = 1.6 if len(parts) == 1 else 0.6  # a single bar as wide as the figure is no bar
    axes.set_xlim(x.min() - room, x.max() + room)
    if many or len(parts) <= 16:
        names = [f"{i:.0f}" for i in index]
        axes.set_xticks(x, names, rotation=90 if many else 0, fontsize=7.5 if many else 9)
    else:
        canvas.plain_axis(axes.xaxis, integer=True)


def _areas(axes: Any, spans: Spans) -> None:
    scale, label = canvas.time_scale(spans.edges_s[-1])
    workers = spans.done.shape[1]
    parts = spans.done.sum(axis=1) / (spans.lengths_s * workers)[:, None]
    heights = [*parts.T, np.maximum(1 - parts.sum(axis=1), 0.0)]
    x, bottom = np.repeat(spans.edges_s / scale, 2)[1:-1], np.zeros(2 * len(parts))
    for height, (_, colour) in zip(heights, [*_NAMES.values(), _OTHER], strict=True):
        top = bottom + np.repeat(height, 2)
        axes.fill_between(x, bottom, top, color=colour, lw=0)
        bottom = top
    axes.set_title("The worker, over time" if workers == 1 else "All workers, over time")
    axes.set_xlabel(label)
    axes.set_xlim(x[0], x[-1])
    canvas.plain_axis(axes.xaxis)
    axes.grid(visible=False)


def heat(run: Run, facts: Facts) -> Any | None:
    """Draw each worker's rate and waiting over time as heat maps; None for a few workers."""
    spans, waits = spans_of_work(run.timeline), spans_of_times(run.timeline)
    if spans is None or spans.done.shape[1] < _HEAT_MIN or not spans.done.any():
        return None
    workers = spans.done.shape[1]
    maps = [(spans, spans.rates, "Samples per second", True)]
    for part, title in (("servers_s", "Waiting for servers"), ("data_s", "Waiting for data")):
        if waits is not None:
            share = waits.done[:, :, _PARTS.index(part)] / waits.lengths_s[:, None]
            maps.append((waits, share, title, False))
    figure = canvas.new_figure(11, min(3.4 + 0.02 * workers, 6.5))
    scale, label = canvas.time_scale(spans.edges_s[-1])
    grid = figure.subplots(1, len(maps), sharey=True)
    for axes, (of, values, title, is_rate) in zip(grid, maps, strict=True):
        image = axes.imshow(
            _pooled(values, lowest=is_rate).T,
            aspect="auto",
            extent=(of.edges_s[0] / scale, of.edges_s[-1] / scale, workers - 0.5, -0.5),
            interpolation="nearest",
            cmap="cividis",
            vmin=0,
            vmax=None if is_rate else max(float(values.max()), _HEAT_SHARE_MIN),
        )
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.9, aspect=28, pad=0.02)
        bar.outline.set_visible(False)
        (canvas.plain_axis if is_rate else canvas.percent_axis)(bar.ax.xaxis)
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


def times_caption(run: Run) -> str:
    """Say what the figure of times counts as what."""
    other = "Other: evaluating, and whatever else was not measured."
    if spans_of_times(run.timeline) is None:
        return "Shares of the whole run. " + other.replace("evaluating", "starting, evaluating")
    return f"Shares of the time from the first push to the last{_after(run)}. {other}"


def rates_caption(run: Run, facts: Facts) -> str:
    """Say what the figure of rates leaves out, and name the slowest worker."""
    start = f"From the first push to the last{_after(run)}. " if run.timeline is not None else ""
    if facts.slowest is None:
        return start.strip()
    worker = facts.workers[facts.slowest]
    if math.isnan(worker.samples_per_s):
        return f"{start}Worker {worker.index} was the slowest."
    return (
        f"{start}Worker {worker.index} was the slowest, at {count(worker.samples_per_s)} samples/s."
    )


def _after(run: Run) -> str:
    start_s = started_s(run.timeline)
    return "" if math.isnan(start_s) else f", after {seconds(start_s)} of start-up"
