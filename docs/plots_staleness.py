"""Draw the figures of docs/staleness.md as SVG, beside it or into the folder that is named.

    python docs/plots_staleness.py [FOLDER]

Two are simulated here, which takes some seconds; two show the page's own tables. The extra `plots`
has what this needs.
"""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import psframe
from psframe.report.canvas import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, drawing, new_figure

HERE = Path(__file__).parent
BETA = 0.9  # of all momenta


def simulate(work: Any, **options: Any) -> psframe.SimResult:
    options.setdefault("optimizer", psframe.optim.SGD(0.0))
    return psframe.simulate(work, {"w": np.ones(1)}, **options)


# ---- how stale ---------------------------------------------------------------------------------

SPEEDS: Mapping[str, tuple[str, Callable[..., float]]] = {
    "alike, to 10%": (BLUE, lambda rng, worker, clock: rng.uniform(0.9, 1.1)),
    "exponential": (GREEN, lambda rng, worker, clock: rng.exponential()),
    "one 4 times slower": (
        RED,
        lambda rng, worker, clock: rng.uniform(0.9, 1.1) * (1 if worker else 4),
    ),
}


def draw_histogram(figure: Any) -> None:
    """Shares of the gradients by their staleness, for 8 workers."""

    def work(worker: psframe.Worker) -> None:
        worker.pull()
        while True:
            worker.push_pull({"w": np.zeros(1)})

    axes = figure.subplots()
    for name, (colour, time) in SPEEDS.items():
        result = simulate(work, workers=8, compute_time_s=time, max_updates=40_000)
        found = result.trace["staleness"][1_000:]
        shares = np.bincount(found, minlength=41)[:41] / len(found)
        axes.plot(np.arange(41), shares, color=colour, label=f"{name}: mean {found.mean():.1f}")
    axes.set(xlabel="staleness, updates", ylabel="share of the gradients", xlim=(0, 36))
    axes.set_title("Staleness with 8 workers")
    axes.legend()


# ---- what it leaves of the rate ----------------------------------------------------------------

RULES: Mapping[str, tuple[str, Callable[[float], Any]]] = {
    "no momentum": (BLUE, lambda lr: psframe.optim.SGD(lr)),
    "DANAZero": (PINK, lambda lr: psframe.optim.DANAZero(lr, BETA)),
    "WorkerMomentum": (GREEN, lambda lr: psframe.optim.WorkerMomentum(lr, BETA)),
    "momentum on the server": (RED, lambda lr: psframe.optim.SGD(lr, momentum=BETA)),
}


def is_stable(optimizer: Any, workers: int) -> bool:
    """Whether descent on w^2 / 2 by workers that take turns gets below its start for good."""
    path: list[float] = []

    def work(worker: psframe.Worker) -> None:
        w = worker.pull()["w"]
        while True:
            w = worker.push_pull({"w": w})["w"]
            path.append(abs(float(w[0])))
            if path[-1] > 1e6:
                worker.stop()

    n = 250 * workers
    simulate(
        work,
        workers=workers,
        optimizer=optimizer,
        compute_time_s=lambda rng, worker, clock: 1.0,
        max_updates=n,
    )
    half = len(path) // 2
    return path[-1] <= 1e6 and max(path[half:]) < max(path[: half // 2])


def largest_stable(rule: Callable[[float], Any], workers: int) -> float:
    """Bisect the rate, to 1%."""
    stable, unstable = 1e-4, 4.0
    while unstable / stable > 1.01:
        lr = math.sqrt(stable * unstable)
        stable, unstable = (lr, unstable) if is_stable(rule(lr), workers) else (stable, lr)
    return stable


def draw_rates(figure: Any) -> None:
    """The largest stable rate over the number of workers."""
    axes = figure.subplots()
    workers = [2, 4, 8, 16]
    smooth = np.linspace(2, 16, 100)
    bound = 2 * np.sin(np.pi / (2 * (2 * smooth - 1)))
    axes.plot(smooth, bound, color=GREY, label="2 sin(π / (2 (2W − 1)))")
    for name, (colour, rule) in RULES.items():
        axes.plot(
            workers, [largest_stable(rule, w) for w in workers], "o", color=colour, label=name
        )
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="largest stable rate × curvature")
    axes.set_xticks(workers, [str(w) for w in workers])
    axes.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    axes.minorticks_off()
    axes.set_title("What staleness leaves of the learning rate")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


# ---- the page's tables -------------------------------------------------------------------------

Table = Mapping[str, Mapping[str, str]]  # row -> column -> cell


def read_table(command: str, number: int) -> Table:
    """Give a table of the page: the first, second, ... after the line with the command."""
    page = (HERE / "staleness.md").read_text(encoding="utf-8")
    after = page[page.index(f"\n    {command}\n") :]
    tables = re.findall(r"(?:^\|.*\n)+", after, re.MULTILINE)
    head, _, *rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in tables[number].splitlines()
    ]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


COMMAND = "python benchmarks/staleness.py accuracy"
ACCURACY = {
    "Adagrad": COMMAND,
    "SGD": f"{COMMAND} --optimizer sgd --lr 0.1",
    "SGD, momentum 0.9": f"{COMMAND} --optimizer sgd --momentum 0.9 --lr 0.05",
}
SHOWN = {
    "async": (RED, "o-"),
    "inverse": (ORANGE, "s-"),
    "gap-aware": (GREEN, "^-"),
    "dana-zero": (PINK, "D-"),
    "bsp": (INK, "v--"),
}


def draw_accuracy(figure: Any) -> None:
    """The accuracy at equal time over the number of workers, of some ways."""
    panels = figure.subplots(1, len(ACCURACY), sharey=True)
    for axes, (title, command) in zip(panels, ACCURACY.items(), strict=True):
        table = read_table(command, 1)
        for way, (colour, style) in SHOWN.items():
            if way in table:
                workers = [int(re.findall(r"W=(\d+)", head)[0]) for head in table[way]]
                shares = [float(cell.partition("%")[0]) for cell in table[way].values()]
                axes.plot(workers, shares, style, color=colour, label=way, markersize=5)
        axes.set(xscale="log", xlabel="workers")
        axes.set_xticks(workers, [str(w) for w in workers])
        axes.minorticks_off()
        axes.set_title(title)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(*panels[-1].get_legend_handles_labels(), loc="lower left")


STRAGGLER = "python benchmarks/staleness.py straggler"
MODES = ["async", "ssp 3", "dynamic-ssp 3-12", "bsp", "bsp backup 1", "rennala W"]


def draw_stragglers(figure: Any) -> None:
    """The time to an accuracy, by mode and kind of straggler."""
    axes = figure.subplots()
    table = read_table(STRAGGLER, 0)
    kinds = list(table["async"])
    width = 0.8 / len(kinds)
    for k, (kind, colour) in enumerate(zip(kinds, (GREY, RED, BLUE), strict=True)):
        places = np.arange(len(MODES)) + (k - 1) * width
        axes.bar(
            places, [float(table[m][kind]) for m in MODES], width * 0.92, color=colour, label=kind
        )
    axes.set_xticks(np.arange(len(MODES)), MODES)
    axes.grid(visible=False, axis="x")
    axes.set(ylabel="seconds to 97%")
    axes.set_title("8 workers, and stragglers")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


FIGURES: Mapping[str, tuple[Callable[[Any], None], Sequence[float]]] = {
    "staleness-histogram": (draw_histogram, (6.4, 3.2)),
    "staleness-rates": (draw_rates, (7.4, 3.2)),
    "staleness-accuracy": (draw_accuracy, (9.0, 3.2)),
    "staleness-stragglers": (draw_stragglers, (8.4, 3.0)),
}


def render(name: str) -> str:
    """Draw a figure: the same text every time, with ids from a salt, and without a date."""
    import matplotlib

    draw, (width_in, height_in) = FIGURES[name]
    stream = io.StringIO()
    with drawing(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure = new_figure(width_in, height_in)
        draw(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", stream.getvalue(), flags=re.DOTALL)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return re.sub(r"\s*\n\s*", "\n", text)


def main(folder: Path = HERE) -> None:
    """Draw them all."""
    for name in FIGURES:
        path = folder / f"{name}.svg"
        path.write_text(render(name), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
