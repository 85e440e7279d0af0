"""A training's summary in words, for a terminal or a file."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from psframe.board import Line, bar, number, rate, took
from psframe.display import can_write
from psframe.output import command
from psframe.summary import FATES, find_slowest
from psframe.terminal import find_terminal

__all__ = ["class_lines", "closing_lines", "print_summary"]

_WIDTH, _WIDTH_MAX = 80, 100
_LABEL = 16  # columns of a line's name
_STALENESS_ROWS = 12
_BULK = 0.95  # of the pushes: the values beyond are one row
_WORKER_ROWS = 12
_MATRIX_MAX = 12
_HEAD = 5  # letters of a label's name above a column
_PAIRS = 8
_CLASSES = 5


def print_summary(
    record: Mapping[str, Any],
    stream: TextIO,
    *,
    run_dir: str | Path | None = None,
    reasons: Mapping[str, int] | None = None,
    evaluation: str = "test",
    launched: bool = False,
    width: int | None = None,
    colour: bool | None = None,
) -> None:
    """Print a summary.

    Args:
        record: as `psframe.summary.summarise` made it.
        stream: usually sys.stdout.
        run_dir: where the run's files are, if it left any.
        reasons: the ledger's, of the pushes that were not applied.
        evaluation: what the accuracy is of.
        launched: whether an MPI launcher stands between this process and the terminal.
        width: columns; else the terminal's or, without one, those of COLUMNS or 80.
        colour: whether to style the text; else if it goes to a terminal.
    """
    terminal = find_terminal(stream, launched=launched)
    if terminal is None:
        columns = int(os.environ["COLUMNS"]) if os.environ.get("COLUMNS", "").isdigit() else _WIDTH
    else:
        columns = terminal.size()[0]
        terminal.close()
    columns = columns if width is None else width
    lines = closing_lines(
        record,
        min(columns, _WIDTH_MAX),
        run_dir=run_dir,
        reasons=reasons,
        evaluation=evaluation,
        ascii_only=not can_write(stream, "█"),
    )
    if terminal is not None if colour is None else colour:
        from rich.console import Console
        from rich.text import Text

        console = Console(
            file=stream, force_terminal=True, width=columns, markup=False, emoji=False
        )
        for line in lines:
            console.print(Text.assemble(*line), highlight=False, soft_wrap=True)
    else:
        stream.write("".join("".join(text for text, _ in line).rstrip() + "\n" for line in lines))
    stream.flush()


def closing_lines(
    record: Mapping[str, Any],
    width: int,
    *,
    run_dir: str | Path | None = None,
    reasons: Mapping[str, int] | None = None,
    evaluation: str = "test",
    ascii_only: bool = False,
) -> list[Line]:
    """Lay out a summary on lines of `width` columns (those that name files may be longer)."""
    lines = _outcome(record, evaluation)
    lines += _pushes(record["ledger"], reasons or {}, width)
    lines += _staleness(record["staleness"], width, ascii_only)
    lines += _workers(record, width)
    lines += _classes(record, width)
    if run_dir is not None:
        lines += [
            [],
            _entry("files", str(run_dir)),
            _entry("next", f"{command('report')} {run_dir}"),
        ]
    return lines


def _outcome(record: Mapping[str, Any], evaluation: str) -> list[Line]:
    parts = [record[key] for key in ("model", "data", "mode", "optimizer")]
    what = ", ".join(filter(None, [*parts, _devices(record["devices"])]))
    accuracy, loss = record["accuracy"], record["loss"]
    text = "unknown" if accuracy is None else f"{accuracy:.2%}"
    confusion = record["confusion"]
    if accuracy is not None and confusion:
        right, total = sum(row[i] for i, row in enumerate(confusion)), sum(map(sum, confusion))
        text += f"  ({total - right:,} of {total:,} wrong)"
    if loss is not None:
        text += f"  {evaluation} loss {number(loss)}"
    if record["best_epoch"] is not None:
        text += f"  best epoch {record['best_epoch'] + 1}"
    if record["stopped_early"]:
        text += ", stopped early"
    seconds, samples, updates = record["seconds"], record["samples"], record["updates"]
    own = updates - record["updates_before"]  # in these seconds
    per_s = f"  {rate(own / seconds)} updates/s" if seconds else ""
    per_s += f"  {rate(samples / seconds)} samples/s" if seconds and samples else ""
    lines = [_entry(f"{evaluation} accuracy", text, style="bold")]
    per_s += ", start-up included" if per_s else ""
    lines.append(_entry("time", took(seconds) + per_s))
    lines.append(_entry("updates", f"{updates:,}" + (f"  samples {samples:,}" if samples else "")))
    if what:
        lines.insert(0, [(what, "bold")])
    return lines


def _devices(devices: Sequence[str]) -> str:
    kinds = sorted(set(devices))
    if len(kinds) < 2:
        return "".join(kinds)
    of = f"of {len(devices)} workers"
    return " and ".join(f"{kind} ({devices.count(kind)} {of})" for kind in kinds)


def _pushes(ledger: Mapping[str, int], reasons: Mapping[str, int], width: int) -> list[Line]:
    fates = [f"{ledger[fate]:,} {fate}" for fate in FATES if ledger.get(fate)]
    text = f"{ledger.get('received', 0):,} received = {' + '.join(fates) or 'none'}"
    if ledger.get("partial"):
        text += f"; {ledger['partial']:,} of the applied in part"
    why = [f"{count:,} {reason}" for reason, count in reasons.items() if reason not in FATES]
    text += f" ({', '.join(why)})" if why else ""
    first, *others = textwrap.wrap(text, max(width - _LABEL, 20))
    return [_entry("pushes", first), *(_entry("", other) for other in others)]


def _staleness(counts: Sequence[int], width: int, ascii_only: bool) -> list[Line]:
    total = sum(counts)
    if not total:
        return []
    mean = sum(i * count for i, count in enumerate(counts)) / total
    lines: list[Line] = [[], _entry("staleness", f"mean {mean:.2f} updates", style="bold")]
    rows = _ranges(counts)
    most = max(count for _, count in rows)
    named = max(len(name) for name, _ in rows)
    room = max(width - _LABEL - named - 20, 4)
    for name, count in rows:
        drawn = bar(count / most, room, ascii_only=ascii_only).rstrip("░.")
        if count and not drawn:
            drawn = "|" if ascii_only else "▏"
        text = f"{name:>{_LABEL - 2 + named}}  "
        lines.append(
            [(text, ""), (f"{drawn:<{room}}", "cyan"), (f" {count:>9,} {count / total:>6.1%}", "")]
        )
    return lines


def _ranges(counts: Sequence[int]) -> list[tuple[str, int]]:
    """Gather counts into at most twelve rows by where most of them are; the rest is the last row.

    A row is one value or, if they are more, a range.
    """
    total, sofar = sum(counts), 0
    first = next(i for i, count in enumerate(counts) if count)
    last = max(i for i, count in enumerate(counts) if count)
    high = first
    while (sofar := sofar + counts[high]) < _BULK * total:
        high += 1
    step = 1
    while -(-(high - first + 1) // step) >= _STALENESS_ROWS:
        step = {1: 2, 2: 5}.get(int(str(step)[0]), 10) * 10 ** (len(str(step)) - 1)
    begin = first - first % step
    rows = []
    while begin <= high:
        rows.append((_range(begin, begin + step - 1), sum(counts[begin : begin + step])))
        begin += step
    if begin <= last:
        rows.append((_range(begin, last), sum(counts[begin:])))
    return rows


def _range(least: int, most: int) -> str:
    return f"{least}" if least == most else f"{least} to {most}"


def _workers(record: Mapping[str, Any], width: int) -> list[Line]:
    workers, lost, replaced = record["workers"], record["lost"], record["replaced"]
    active = [one for one in workers if one["pushes"]]
    if not active:
        return []
    slowest, why = find_slowest(workers, record["mode"], lost)
    shown = list(workers)
    if len(shown) > _WORKER_ROWS:
        shown = sorted(shown, key=lambda one: (one["samples_per_s"], one["worker"]))
        # It may be slow in its own time only; and who was lost is to be seen.
        shown.sort(key=lambda one: (one["worker"] != slowest, one["worker"] not in lost))
        shown = shown[: _WORKER_ROWS - 1]
    head = "worker    samples  samples/s  compute  servers  data  staleness"
    lines: list[Line] = [[], [(head[:width], "bold")]]
    for one in shown:
        style = "yellow" if one["worker"] == slowest or one["worker"] in lost else ""
        fate = "lost, replaced" if one["worker"] in replaced else "lost" * (one["worker"] in lost)
        lines.append([(_worker_row(one, width, fate), style)])
    if len(shown) < len(workers):
        rest = [one["samples_per_s"] for one in workers if one not in shown]
        text = f"   ... and {len(rest):,} more, {rate(min(rest))} to {rate(max(rest))} samples/s"
        lines.append([(text, "dim")])
    if slowest is not None:
        pace, _, reason = f"worker {slowest} is the slowest, {why}".partition(": ")
        for text in filter(None, (pace, reason)):
            lines += [[(line, "yellow")] for line in textwrap.wrap(text, max(width, 20))]
    elif why:
        lines.append([(why, "dim")])
    return lines


def _worker_row(one: Mapping[str, Any], width: int, fate: str) -> str:
    whole = one["compute_s"] + one["servers_s"] + one["data_s"]
    shares = [
        f"{one[name] / whole:.0%}" if whole else "-"
        for name in ("compute_s", "servers_s", "data_s")
    ]
    row = f"{one['worker']:>6}{one['samples']:>11,}{rate(one['samples_per_s']):>11}"
    row += f"{shares[0]:>9}{shares[1]:>9}{shares[2]:>6}{one['staleness_mean']:>11.2f}"
    if one["rank"] is not None:  # of the lost one, not of a replacement, which is no rank
        row += f"  rank {one['rank']}" if fate != "lost, replaced" else ""
    return (f"{row}  {fate}" if fate else row)[:width]


def class_lines(record: Mapping[str, Any], width: int = _WIDTH) -> list[str]:
    """Say as plain text how each label fared.

    Args:
        record: with classes, confusion and per_class, as of a summary.
        width: columns.
    """
    return ["".join(text for text, _ in line).rstrip() for line in _classes(record, width)]


def _classes(record: Mapping[str, Any], width: int) -> list[Line]:
    confusion = record["confusion"]
    if not confusion:
        return []
    names = [str(name) for name in record["classes"]]
    names += [str(i) for i in range(len(names), len(confusion))]
    lines: list[Line] = [[]]
    matrix = _matrix(confusion, names, width) if len(confusion) <= _MATRIX_MAX else None
    lines += _pairs(confusion, names) if matrix is None else matrix
    return [*lines, *_per_class(record["per_class"], confusion, names)]


def _matrix(confusion: Sequence[Sequence[int]], names: Sequence[str], width: int) -> Any:
    """Lay out the matrix; None if it is too wide. Names too long for columns are numbered there."""
    digits = max(len(str(cell)) for row in confusion for cell in row)
    title, heads, rows = "true label (row) and what it was taken for (column)", names, list(names)
    if max(map(len, names)) > _HEAD:
        title += ", by number"
        heads = [str(i + 1) for i in range(len(names))]
        rows = [f"{name[:14]} {head:>2}" for name, head in zip(names, heads, strict=True)]
    label, cell = max(map(len, rows)), max(digits, *map(len, heads)) + 1
    if label + 2 + cell * len(names) > width:
        return None
    lines: list[Line] = [[(title, "bold")]]
    lines.append([(" " * (label + 2) + "".join(f"{head:>{cell}}" for head in heads), "dim")])
    for i, row in enumerate(confusion):
        line: Line = [(f"{rows[i]:>{label}}  ", "dim")]
        for j, count in enumerate(row):
            style = "bold" if i == j else "yellow" if count else "dim"
            line.append((f"{count if count or i == j else '.':>{cell}}", style))
        lines.append(line)
    return lines


def _pairs(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[Line]:
    wrong = sorted(
        ((count, i, j) for i, row in enumerate(confusion) for j, count in enumerate(row) if i != j),
        key=lambda pair: (-pair[0], pair[1:]),
    )
    wrong = [pair for pair in wrong[:_PAIRS] if pair[0]]
    if not wrong:
        return [[("no label was taken for another", "bold")]]
    lines: list[Line] = [[("most often taken for another", "bold")]]
    for count, i, j in wrong:
        total = sum(confusion[i])
        text = f"  {names[i][:24]} taken for {names[j][:24]}"
        lines.append([(f"{text:<48}", ""), (f"{count:>7,} of {total:,} ({count / total:.1%})", "")])
    return lines


def _per_class(
    accuracies: Sequence[float | None], confusion: Sequence[Sequence[int]], names: Sequence[str]
) -> list[Line]:
    known = sorted((a, i) for i, a in enumerate(accuracies) if a is not None)
    if not known:
        return []
    worst = [(a, i) for a, i in known if a < 1][:_CLASSES]
    if not worst:
        return []
    lines: list[Line] = [[], [("accuracy by label, the worst first", "bold")]]
    named = min(max(len(names[i]) for _, i in worst), 24)
    for accuracy, i in worst:
        text = f"  {names[i][:24]:>{named}}  {accuracy:>7.2%}"
        text += f"  {confusion[i][i]:,} of {sum(confusion[i]):,}"
        lines.append([(text, "")])
    rest = [f"{a:.2%}" for a, _ in known[len(worst) :]]
    if rest:
        span = rest[0] if rest[0] == rest[-1] else f"{rest[0]} to {rest[-1]}"
        lines.append([(f"  ... and {len(rest)} more, {span}", "dim")])
    return lines


def _entry(name: str, text: str, *, style: str = "") -> Line:
    return [(f"{name:<{_LABEL - 1}} ", "dim"), (text, style)]
