"""The figure of the classes: what was taken for what, and how often each was right."""

from __future__ import annotations

from typing import Any

import numpy as np

from psframe.report import canvas
from psframe.report.facts import Facts
from psframe.report.reading import Floats

__all__ = ["classes"]

# With more classes cells are too small for numbers, and rows for names.
_NUMBERS_MAX, _NAMES_MAX = 20, 40
_NAME_LENGTH_MAX = 18


def classes(facts: Facts) -> Any | None:
    """Draw the confusion matrix and the accuracy of each class; None if neither is known."""
    confusion, per_class = facts.confusion, facts.per_class
    if per_class is not None and not np.isfinite(per_class).any():
        per_class = None
    if confusion is None and per_class is None:
        return None
    size = len(facts.classes)
    height = float(np.clip(1.6 + 0.36 * size, 3.2, 7.2))
    if confusion is not None and size <= _NAMES_MAX and _turned(facts.classes):
        height += 0.07 * max(len(_short(name)) for name in facts.classes)
    both = confusion is not None and per_class is not None
    figure = canvas.new_figure(11, height)
    ratios = [1.6, 1] if both else [1]
    grid = figure.subplots(1, len(ratios), squeeze=False, sharey=both, width_ratios=ratios)[0]
    if confusion is not None:
        _matrix(figure, grid[0], confusion, facts.classes)
    if per_class is not None:
        _accuracies(grid[-1], per_class, named=not both, names=facts.classes)
    for axes in grid:
        axes.set_ylim(size - 0.5, -0.5)
    return figure


def _matrix(figure: Any, axes: Any, confusion: Floats, names: list[str]) -> None:
    from matplotlib.colors import PowerNorm

    totals = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, totals, out=np.zeros_like(confusion), where=totals > 0)
    # The square root as scale: errors of a percent are to be seen beside a full diagonal.
    norm = PowerNorm(0.5, vmin=0.0, vmax=1.0)
    image = axes.imshow(share, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
    axes.set_title("Confusion: test samples by true and predicted class")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.grid(visible=False)
    if len(names) <= _NUMBERS_MAX:
        for (row, column), n in np.ndenumerate(confusion):
            if n:
                dark = share[row, column] > 0.3
                axes.text(
                    *(column, row, f"{n:,.0f}"),
                    ha="center",
                    va="center",
                    fontsize=9 if len(names) <= 12 else 7.5,
                    color="#ffffff" if dark else "#101215",
                )
    if len(names) <= _NAMES_MAX:
        shown = [_short(name) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=90 if _turned(names) else 0)
        axes.set_yticks(range(len(names)), shown)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=24, pad=0.02)
    bar.set_ticks([0.0, 0.01, 0.05, 0.2, 0.5, 1.0])
    canvas.percent_axis(bar.ax.yaxis)
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)


def _accuracies(axes: Any, per_class: Floats, named: bool, names: list[str]) -> None:
    """Draw a dot a class: their axis may begin above 0, where bars would deceive."""
    known = np.isfinite(per_class)
    rows, share = np.flatnonzero(known), per_class[known]
    middle = float(np.median(share))
    worse = share < middle - 2 * max(float(share.std()), 0.005)
    colours = [canvas.RED if low else canvas.BLUE for low in worse]
    few = len(per_class) <= _NAMES_MAX
    least = float(min(share.min(), 0.95))  # a narrower axis would make much of one sample
    least = max(0.0, least - 0.15 * (1 - least)) if least > 0.4 else 0.0
    axes.set_xlim(least, 1 + 0.02 * (1 - least))
    axes.scatter(share, rows, s=64 if few else 7, c=colours, linewidths=0, clip_on=False, zorder=3)
    if few:
        axes.hlines(rows, 0, 1, color=canvas.GRID, lw=0.8, zorder=1)  # guides, not lengths
        for row, part in enumerate(per_class):
            axes.annotate(
                "no samples" if np.isnan(part) else f"{part:.1%}",
                (1.0, row),
                xycoords=("axes fraction", "data"),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
    if named and few:
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
    canvas.percent_axis(axes.xaxis)
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_title("Accuracy of each class")
    axes.set_xlabel("test samples classified correctly")


def _turned(names: list[str]) -> bool:
    """Tell whether names are too long to stand side by side below a matrix."""
    return max(map(len, names)) > 3


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH_MAX else name[: _NAME_LENGTH_MAX - 1] + "…"
