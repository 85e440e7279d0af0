"""Measure what psframe does on a GPU, and write the table of RESULTS-GPU.md anew: `make bench-gpu`.

Usage: gpu.py [--only kernels bus step models workers] [--limit SECONDS] [--out FILE]

It needs an interpreter with CuPy that sees a GPU, and psframe's own needs; nothing is installed,
and without such a one it says why and ends. Each part is a process with a bound: one that fails or
hangs costs its own rows. All of it ends within --limit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from on_gpu import Done, Place, find_place, run_bounded
from remake import Table, commit, machine_lines, put

HERE = Path(__file__).resolve().parent
LIMIT_S = 520.0  # of all parts, what finds the GPU and mpirun included
_TABLE = Table("gpu", "One card", 0, ())


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: as the part's output has it.
        what: is measured.
        must, aim: what the figure must reach, and should.
        most: whether they are upper bounds.
        unit: behind the figures.
    """

    name: str
    what: str
    must: float
    aim: float
    most: bool = False
    unit: str = ""

    def verdict(self, figure: float) -> str:
        """Compare a figure with the targets."""
        sign = -1 if self.most else 1
        if sign * figure >= sign * self.aim:
            return "aim reached"
        return "pass" if sign * figure >= sign * self.must else "short"


@dataclass(frozen=True)
class Part:
    """A process that measures some rows.

    Attributes:
        name: of the part.
        ranks: of mpirun; 0 for none.
        arguments: of the interpreter.
        limit_s: its bound.
        rows: what it measures.
    """

    name: str
    ranks: int
    arguments: tuple[str, ...]
    limit_s: float
    rows: tuple[Row, ...]

    @property
    def command(self) -> str:
        """What a reader types to get it."""
        start = f"mpirun -n {self.ranks} " if self.ranks else ""
        return f"{start}python {' '.join(self.arguments)}"


_MLP = "MLP 4096-4096-4096-1000, batch 1024"
PARTS = (
    Part(
        "kernels",
        0,
        ("benchmarks/gpu_parts.py", "kernels"),
        70.0,
        (Row("kernels", "update kernels over the card's own copies of as many bytes", 0.85, 0.95),),
    ),
    Part(
        "bus",
        0,
        ("benchmarks/gpu_parts.py", "bus"),
        50.0,
        (Row("bus", "device to the server's buffer and back, over bare pinned copies", 0.9, 0.97),),
    ),
    Part(
        "step",
        2,
        ("benchmarks/gpu_parts.py", "step"),
        110.0,
        (
            Row(
                "step",
                f"step of one worker and a server over the step alone; {_MLP}",
                1.15,
                1.02,
                most=True,
                unit="x",
            ),
        ),
    ),
    Part(
        "models",
        0,
        ("benchmarks/gpu_models.py", "--json"),
        120.0,
        (
            Row("mlp", f"PyTorch's time a step over ours; {_MLP}", 0.8, 1.0),
            Row(
                "cnn", "PyTorch's time a step over ours; CNN of 3 convolutions, batch 256", 0.5, 0.8
            ),
        ),
    ),
    Part(
        "workers",
        5,
        ("benchmarks/gpu_parts.py", "workers"),
        120.0,
        (Row("workers", "updates a second of four workers on one card over one's", 1.0, 1.3),),
    ),
)


@dataclass(frozen=True)
class Found:
    """What came of a row.

    Attributes:
        row: the row.
        figure, least, most: measured; None if it was not.
        detail: more of it, or why it was not measured.
    """

    row: Row
    figure: float | None
    detail: str
    least: float = 0.0
    most: float = 0.0

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of its line."""
        row = self.row
        targets = (f"{row.must:g}{row.unit}", f"{row.aim:g}{row.unit}")
        if self.figure is None:
            return (row.what, "", *targets, "not measured", self.detail)
        spread = f"{self.figure:.3g}{row.unit} ({self.least:.3g} to {self.most:.3g})"
        return (row.what, spread, *targets, row.verdict(self.figure), self.detail)


Run = Callable[[Sequence[str], float, Mapping[str, str]], Done]


def measure(part: Part, place: Place, limit_s: float, run: Run = run_bounded) -> list[Found]:
    """Run a part, and read its rows; what it did not give says why."""
    script = HERE.parent / part.arguments[0]
    if not script.exists():
        return [Found(row, None, f"there is no {part.arguments[0]}") for row in part.rows]
    if limit_s < 1.0:
        return [Found(row, None, "no time was left") for row in part.rows]
    done = run(place.launch(part.ranks, *part.arguments), limit_s, place.environ)
    lines = list(_objects(done.out))
    given = {line["row"]: line for line in lines if "row" in line} | _models(lines)
    found = []
    for row in part.rows:
        one = given.get(row.name)
        if one is None:
            why = "it gave no such row" if done.status == 0 else done.reason
            found.append(Found(row, None, _cell(why)))
        else:  # measured, however the process ended after that
            least, most = one["figure_range"]
            found.append(Found(row, one["figure"], _cell(one["detail"]), least, most))
    if done.status != 0:
        print(f"{done.err[-4000:]}\ngpu.py: {part.name}: {done.reason}", file=sys.stderr)
    return found


def _objects(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # what a library prints besides
        if isinstance(value, dict):
            yield value


def _models(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Make a row a model of what gpu_models.py prints: the precision in which we are slowest."""
    rows = {}
    for name in dict.fromkeys(line["model"] for line in lines if "model" in line):
        mine = [line for line in lines if line.get("model") == name]
        worst = min(mine, key=lambda line: float(line["ratio"]))
        ours, torch = worst["psframe_ms_range"], worst["torch_ms_range"]
        each = (
            f"{one['precision']} {one['ratio']:.2f} ({one['torch_ms']:.2f} over"
            f" {one['psframe_ms']:.2f} ms)"
            for one in mine
        )
        rows[name] = {
            "figure": worst["ratio"],
            "figure_range": [torch[0] / ours[1], torch[1] / ours[0]],
            "detail": ", ".join(each),
        }
    return rows


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def table(found: Sequence[Found]) -> str:
    """Write the table."""
    lines: list[tuple[str, ...]] = [("what", "figure (least to most)", "must reach", "aim", "", "")]
    lines += [one.cells for one in found]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    texts.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(texts)


def about(place: Place, parts: Sequence[Part]) -> str:
    """Describe card, machine and versions, and the commands."""
    now = datetime.datetime.now(datetime.timezone.utc)
    lines = [*place.about, *machine_lines(), f"commit {commit()}; {now:%Y-%m-%d %H:%M} UTC"]
    commands = [part.command for part in parts]
    return "\n".join(
        [*(f"* {line}" for line in lines), "", "```text", "$ make bench-gpu", *commands, "```"]
    )


def read_settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    names = tuple(part.name for part in PARTS)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of everything")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS-GPU.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, run: Run = run_bounded) -> int:
    """Measure, print and write.

    Returns:
        0, also where there is no GPU; 1 if a row that was wanted could not be measured.
    """
    settings = read_settings(argv)
    end = time.monotonic() + settings.limit
    place = find_place(sys.executable)
    if isinstance(place, str):
        print(f"bench-gpu: skipped: {place}")
        return 0
    parts = [part for part in PARTS if part.name in settings.only]
    found: list[Found] = []
    for part in parts:
        print(f"$ {part.command}", file=sys.stderr, flush=True)
        limit_s = min(part.limit_s, end - time.monotonic())
        found += measure(part, place, limit_s, run)
    text = table(found)
    print(text, flush=True)
    if settings.only == read_settings([]).only:  # a table of some rows would hide the others
        old = settings.out.read_text(encoding="utf-8") if settings.out.exists() else "# Results\n"
        content = f"{about(place, parts)}\n\n{text}"
        settings.out.write_text(put(old, _TABLE, content), encoding="utf-8")
    return int(any(one.figure is None for one in found))


if __name__ == "__main__":
    sys.exit(main())
