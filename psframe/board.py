"""How a training's statistics are put into words: one line, or a board of lines for a terminal.

Text only: a line is a list of spans, (text, style), whose styles are rich's; no I/O, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from psframe.statistics import Statistics, WorkerStatistics

__all__ = ["Span", "Line", "bar", "board", "duration", "number", "one_line", "rate"]

Span = tuple[str, str]
Line = list[Span]

# A worker that has not been heard of for so long, or for so many of its steps, is called silent.
_SILENT_S = 5.0
_SILENT_STEPS = 5.0
# A worker that waits for more than this part of its time stands out.
_WAITING = 0.5
# The fewest rows of workers that are worth their header.
_ROWS_MIN = 2
_BAR_MAX = 30
_RATE_BAR = 10
_PAIRS_WIDTH = 64  # from here on facts stand in two columns


def duration(seconds: float) -> str:
    """Write a time as 0:07, 12:34, 1:02:03 or 3 d 04 h.

    >>> duration(754.4), duration(3723), duration(273600)
    ('12:34', '1:02:03', '3 d 04 h')
    """
    whole = round(seconds)
    minutes, hours, days = whole // 60 % 60, whole // 3600, whole // 86400
    if days >= 2:
        return f"{days} d {hours % 24:02} h"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def took(seconds: float) -> str:
    """Write how long something took that is over, short times too.

    >>> took(3.5678), took(754.4)
    ('3.57 s', '12:34')
    """
    return f"{seconds:.2f} s" if seconds < 59.995 else duration(seconds)


def number(value: float) -> str:
    """Write a number of few digits: a loss, a mean.

    >>> number(0.123456), number(1234.5), number(float("nan"))
    ('0.1235', '1,234', 'nan')
    """
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def rate(per_s: float) -> str:
    """Write how many a second: whole from 100 on, with three digits below.

    >>> rate(1234.5), rate(56.78), rate(0.0123)
    ('1,234', '56.8', '0.0123')
    """
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def bar(part: float, width: int, *, ascii_only: bool = False) -> str:
    """Draw a bar of a part in [0, 1], padded to the width.

    >>> bar(0.5, 8, ascii_only=True)
    '####....'
    """
    full = round(min(max(part, 0.0), 1.0) * width)
    return ("#" if ascii_only else "█") * full + ("." if ascii_only else "░") * (width - full)


def one_line(
    now: Statistics, *, evaluation: str = "test", last: bool = False, width: int | None = None
) -> str:
    """Say in one line how a training stands, or stood at its end: then of the whole run.

    What matters least is left out if the line would be longer than `width`.
    """
    seconds = max(now.time_s, 1e-9)
    if last:
        some = f"{now.epoch} of " if now.epoch < now.epochs else ""
        parts = [(0, f"{some}{_count(now.epochs, 'epoch')} in {took(now.time_s)}")]
    else:
        parts = [(0, f"epoch {min(now.epoch + 1, now.epochs)}/{now.epochs} {now.fraction:.0%}")]
    updates = (now.updates - now.updates_before) / seconds if last else now.updates_per_s
    samples = now.samples / seconds if last and now.samples else now.samples_per_s
    staleness = now.staleness_mean if last else now.staleness
    if not now.pushes:
        parts.append((0, f"no update yet after {duration(now.time_s)}"))
    else:
        parts.append((2, f"updates {now.updates:,} ({rate(updates)}/s)"))
    if samples is not None:
        parts.append((5, f"{rate(samples)} samples/s"))
    if now.loss is not None:
        parts.append((1, f"loss {number(now.loss)}"))
    if now.accuracy is not None:
        parts.append((0, f"{evaluation} accuracy {now.accuracy:.2%}"))
    if staleness is not None:
        parts.append((4, f"staleness {staleness:.2f}"))
    if now.left_s and not last:
        parts.append((3, f"{duration(now.left_s)} left"))
    while width is not None and sum(len(part) + 2 for _, part in parts) - 2 > width:
        least = max(parts)
        if not least[0]:
            break
        parts.remove(least)
    return "  ".join(part for _, part in parts)


def board(
    now: Statistics,
    width: int,
    height: int,
    *,
    title: str = "",
    evaluation: str = "test",
    ascii_only: bool = False,
) -> list[Line]:
    """Lay out a training's statistics on at most `height` lines of `width` columns."""
    lines = [_progress(now, width, ascii_only)]
    facts = _facts(now, evaluation)
    if width >= _PAIRS_WIDTH:
        half = (len(facts) + 1) // 2
        column = max(width // 2, *(_length(fact) + 2 for fact in facts[:half]))
        for i in range(half):
            line = list(facts[i])
            if i + half < len(facts):
                line.append((" " * (column - _length(line)), ""))
                line += facts[i + half]
            lines.append(line)
    else:
        lines += facts
    if title and height > len(lines) + 1:
        lines.insert(0, [(title, "bold")])
    lines = lines[: max(height, 1)]
    room = height - len(lines) - 2  # a blank line and the header
    if now.workers and room >= min(_ROWS_MIN, len(now.workers)):
        lines.append([])
        lines += _workers(now.workers, width, room, ascii_only)
    return [_cut(line, width) for line in lines]


def _progress(now: Statistics, width: int, ascii_only: bool) -> Line:
    epoch = f"epoch {min(now.epoch + 1, now.epochs)}/{now.epochs} "
    if now.epoch >= now.epochs:
        times = f"  all done  {duration(now.time_s)} elapsed"
    else:
        times = f"  {duration(now.time_s)} elapsed"
        if now.left_s is not None:
            times += f"  {duration(now.left_s)} left"
    whole = (now.epoch + now.fraction) / now.epochs if now.epochs else 0.0
    percent = f" {whole:4.0%}"
    room = min(width - len(epoch) - len(percent) - len(times), _BAR_MAX)
    drawn = bar(whole, room, ascii_only=ascii_only) if room >= 4 else ""
    return [(epoch, "bold"), (drawn, "cyan"), (percent, "bold"), (times, "")]


def _facts(now: Statistics, evaluation: str) -> list[Line]:
    facts: list[Line] = [_rated("updates", now.updates, now.updates_per_s)]
    if now.samples_per_s is not None:
        facts.append(_rated("samples", now.samples, now.samples_per_s))
    if now.staleness is not None:
        mean = "" if now.staleness_mean is None else f"  {now.staleness_mean:.2f} over the run"
        facts.append(_fact("staleness", f"{now.staleness:.2f}", mean))
    if now.loss is not None:
        facts.append(_fact("loss", number(now.loss)))
    if now.accuracy is not None:
        best = ""
        if now.best_accuracy is not None:
            best = f"  best {now.best_accuracy:.2%}"
        facts.append(_fact(f"{evaluation} accuracy", f"{now.accuracy:.2%}", best))
    elif not now.pushes:
        facts = [[("no update yet", "dim")]]
    return facts


def _rated(name: str, count: int, per_s: float) -> Line:
    return _fact(name, f"{count:,}", f"  {rate(per_s)}/s")


def _fact(name: str, value: str, more: str = "") -> Line:
    return [(f"{name:<10} ", "dim"), (value, "bold"), (more, "")]


def _workers(
    workers: Sequence[WorkerStatistics], width: int, room: int, ascii_only: bool
) -> list[Line]:
    """Lay out a header and as many rows as there is room for; the slowest, if not for all."""
    shown, rest = list(workers), list[WorkerStatistics]()
    if len(shown) > room:
        shown.sort(key=lambda worker: (_speed(worker), worker.worker))
        shown, rest = shown[: room - 1], shown[room - 1 :]
    fastest = max(_speed(worker) for worker in workers)
    head, bars, wide = "worker  samples/s", width >= 76, width >= 60
    if workers[0].samples_per_s is None:
        head = "worker   pushes/s"
    head += " " * (_RATE_BAR + 2) if bars else ""
    head += "  compute  servers    data" if wide else "  waiting"
    lines: list[Line] = [[(head + "  staleness", "dim")]]
    for one in shown:
        line: Line = [(f"{one.worker:>6}  ", ""), (f"{rate(_speed(one)):>9}", "bold")]
        if bars:
            part = _speed(one) / fastest if fastest > 0 else 0.0
            line.append(("  " + bar(part, _RATE_BAR, ascii_only=ascii_only), "cyan"))
        line += _shares(one) if wide else [_share(_waiting(one), 9)]
        staleness = "-" if one.staleness is None else f"{one.staleness:.2f}"
        line += [(f"{staleness:>11}", ""), (_silence(one), "yellow")]
        lines.append(line)
    if rest:
        slow, fast = rate(_speed(rest[0])), rate(_speed(rest[-1]))
        text = f"   ... and {len(rest)} more, {slow} to {fast}"
        lines.append([(text if shown else text.lstrip(), "dim")])
    return lines


def _shares(one: WorkerStatistics) -> Line:
    return [_share(one.compute, 9, warn=False), _share(one.servers, 9), _share(one.data, 8)]


def _share(part: float | None, width: int, *, warn: bool = True) -> Span:
    if part is None:
        return "-".rjust(width), "dim"
    return f"{part:.0%}".rjust(width), "yellow" if warn and part > _WAITING else ""


def _waiting(one: WorkerStatistics) -> float | None:
    return None if one.servers is None or one.data is None else one.servers + one.data


def _silence(one: WorkerStatistics) -> str:
    if one.seen_s is None:
        return "  not seen yet"
    mean_s = one.seen_s / one.pushes if one.pushes else 0.0
    mean_s = 1.0 / one.pushes_per_s if one.pushes_per_s > 0 else mean_s
    if one.seen_s < max(_SILENT_S, _SILENT_STEPS * mean_s):
        return ""
    return f"  silent {duration(one.seen_s)}"


def _speed(one: WorkerStatistics) -> float:
    return one.pushes_per_s if one.samples_per_s is None else one.samples_per_s


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _length(line: Line) -> int:
    return sum(len(text) for text, _ in line)


def _cut(line: Line, width: int) -> Line:
    cut: Line = []
    for text, style in line:
        text = text[: width - _length(cut)]
        if text:
            cut.append((text, style))
    return cut
