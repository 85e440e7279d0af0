"""How every figure of a report looks, and how it becomes a PNG or a piece of a page."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from psframe.errors import ArgumentError
from psframe.report.reading import Floats

__all__ = [
    "AXIS",
    "BLUE",
    "GREEN",
    "GREY",
    "GRID",
    "INK",
    "MUTED",
    "ORANGE",
    "PALETTE",
    "POINTS_MAX",
    "PINK",
    "PURPLE",
    "RED",
    "SKY",
    "THEMES",
    "drawing",
    "log_axis",
    "new_figure",
    "percent_axis",
    "plain_axis",
    "plain_number",
    "png",
    "shade_start",
    "svg",
    "thinned",
    "time_scale",
]

# Okabe and Ito's palette, whose colours differ for the colour-blind too; without its yellow and
# black, which vanish on white and on dark.
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PINK = "#56b4e9", "#cc79a7"
PURPLE = "#7b5ea7"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, PURPLE, RED)
# Text, secondary text, axes, grid, and what needs no attention.
INK, MUTED, AXIS, GRID, GREY = "#1b1e24", "#59616e", "#8d95a1", "#e1e4e9", "#b4bac4"
# On a page, each colour is a variable, with another value where the reader prefers dark.
THEMES = {
    INK: ("ink", "#e8eaee"),
    MUTED: ("muted", "#a5adba"),
    AXIS: ("axis", "#6d7683"),
    GRID: ("grid", "#2f353f"),
    GREY: ("grey", "#555d69"),
    BLUE: ("blue", "#4ba3e0"),
    GREEN: ("green", "#2bbd92"),
    RED: ("red", "#f0783a"),
    PURPLE: ("purple", "#a68ad0"),
}
_DPI = 150
POINTS_MAX = 1500
_STYLE: dict[str, Any] = {
    "figure.facecolor": "#ffffff",
    "axes.facecolor": "none",
    "axes.edgecolor": AXIS,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "font.size": 9.5,
    # Names come from the run: a dollar sign in one is no formula.
    "text.parse_math": False,
    "text.usetex": False,
    "svg.fonttype": "path",
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw in the report's style, whatever the user's own is.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ArgumentError(
            "the report's figures need matplotlib: pip install 'matplotlib>=3.8' (or psframe's "
            "extra 'plots')"
        ) from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        # They are about looks: a glyph that no font has, labels that leave no room. An ugly figure
        # of an odd run is better than none.
        warnings.simplefilter("ignore", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width_in: float, height_in: float) -> Any:
    """Make an empty figure; no window and no global state are behind it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.05, hspace=0.06)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """Render a figure as PNG on white, once `svg` has laid it out."""
    figure.set_layout_engine("none")  # once is enough, and costs as much as the drawing
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


def svg(figure: Any, name: str, label: str) -> str:
    """Render a figure as an SVG element for a page, its colours the page's variables.

    Args:
        figure: the figure.
        name: of the figure; makes its ids differ from another's on the page.
        label: what a screen reader says; already escaped for HTML.
    """
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", dpi=_DPI, transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # HTML knows them
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, (variable, _) in THEMES.items():
        text = text.replace(colour, f"var(--{variable})")
    head = re.match(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', text)
    assert head is not None, "matplotlib's SVG has a viewBox"
    opened = f'<svg viewBox="{head[1]}" role="img" aria-label="{label}">'
    return opened + re.sub(r"\n\s*", "\n", text[head.end() :]).strip()


def plain_number(value: float, _position: int = 0) -> str:
    """Write a tick's number without a formula: 0.001, 250, 12,000, 3 M."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:,.4g} M"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.6g}"


def plain_axis(axis: Any, *, integer: bool = False) -> None:
    """Write an axis' numbers out: 12,000, with neither exponents nor offsets."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(plain_number))
    if integer:
        axis.get_major_locator().set_params(integer=True)


def percent_axis(axis: Any) -> None:
    """Write an axis of shares as percents, with as many digits as its ticks need."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.6g}%"))


def log_axis(axis: Any, least: float, most: float) -> None:
    """Make an axis logarithmic over a range, with ticks that are written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_yscale("log")
    decades = math.log10(most / least) if 0 < least < most else 1.0
    subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_minor_formatter(NullFormatter())


def time_scale(longest_s: float) -> tuple[float, str]:
    """Choose the unit of an axis of times.

    Returns:
        Seconds in the unit, and the axis' label.
    """
    unit, scale = ("s", 1.0)
    if longest_s > 300:
        unit, scale = ("h", 3600.0) if longest_s > 10800 else ("min", 60.0)
    return scale, f"time since the start ({unit})"


def shade_start(axes: Any, until: float, end: float) -> None:
    """Shade the part of an axis of times in which the run only started."""
    if not 0.01 * end < until < end:
        return
    axes.axvspan(0, until, color=GRID, alpha=0.6, lw=0, zorder=0)
    if until > 0.15 * end:
        axes.annotate(
            "start-up",
            (until / 2, 0.5),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="center",
            color=MUTED,
            fontsize=9,
        )


def thinned(x: Floats, *columns: Floats) -> tuple[Floats, ...]:
    """Average so many neighbours into one point that a line has as many as can be seen.

    NaNs do not count; the order of `x` is kept.
    """
    group = -(-len(x) // POINTS_MAX)
    if group <= 1:
        return (x, *columns)
    starts = np.arange(0, len(x), group)

    def mean(values: Floats) -> Floats:
        known = np.isfinite(values)
        sums = np.add.reduceat(np.where(known, values, 0.0), starts)
        counts = np.add.reduceat(known.astype(np.float64), starts)
        return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1.0), np.nan))

    return tuple(mean(values) for values in (x, *columns))
