"""Writes what the checks came to: lines for people, or a JSON object a line."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TextIO

from psframe.doctor.case import Verdict
from psframe.doctor.checks import Row
from psframe.terminal import find_terminal

__all__ = ["report_lines", "show"]

_STYLES = {
    Verdict.OK: "green",
    Verdict.WARNING: "yellow",
    Verdict.ERROR: "bold red",
    Verdict.UNKNOWN: "magenta",
}
_WIDTH, _WIDTH_MIN, _WIDTH_MAX = 100, 40, 120
_VERDICT_WIDTH = max(len(verdict.value) for verdict in Verdict) + 2

Span = tuple[str, str]  # text and rich's name of its style


def show(rows: Sequence[Row], *, as_json: bool, launched: bool, stream: TextIO) -> None:
    """Print the rows; in colour where they reach a terminal."""
    if as_json:
        stream.write("".join(json.dumps(row.as_json()) + "\n" for row in rows))
        stream.flush()
        return
    terminal = find_terminal(stream, launched=launched)
    width = _WIDTH if terminal is None else terminal.size()[0]
    lines = report_lines(rows, min(max(width, _WIDTH_MIN), _WIDTH_MAX))
    if terminal is None:
        stream.writelines("".join(text for text, _ in line) + "\n" for line in lines)
    else:
        from rich.console import Console
        from rich.text import Text

        terminal.close()
        console = Console(file=stream, force_terminal=True, width=width, markup=False, emoji=False)
        for line in lines:
            console.print(Text.assemble(*line), highlight=False, soft_wrap=True)
    stream.flush()


def report_lines(rows: Sequence[Row], width: int) -> list[list[Span]]:
    """Lay the rows out on lines of `width` columns, words that are longer excepted."""
    names = max((len(row.check) for row in rows), default=0) + 2
    indent = _VERDICT_WIDTH + names
    lines: list[list[Span]] = []
    for row in rows:
        finding = row.finding
        for i, text in enumerate(_wrapped(finding.found, width - indent)):
            head = (finding.verdict.value, row.check) if i == 0 else ("", "")
            style = _STYLES[finding.verdict]
            lines.append([(f"{head[0]:<{_VERDICT_WIDTH}}", style), (f"{head[1]:<{names}}", "bold")])
            lines[-1].append((text, ""))
        for i, text in enumerate(_wrapped(finding.remedy, width - indent - 2)):
            lines.append([(" " * indent, ""), ("  " if i else "> ", "cyan"), (text, "cyan")])
    return [*lines, [], [(_summary(rows), "bold")]]


def _wrapped(text: str, width: int) -> Iterator[str]:
    """Wrap a text; what a machine has said may hold characters that move a cursor."""
    plain = "".join(char if char.isprintable() else " " for char in text)
    yield from textwrap.wrap(plain, max(width, 20), break_long_words=False, break_on_hyphens=False)


def _summary(rows: Sequence[Row]) -> str:
    counts = Counter(row.finding.verdict for row in rows)
    bad = [
        f"{counts[verdict]} {verdict.value}{'s' * (verdict is not Verdict.UNKNOWN)}"
        if counts[verdict] > 1
        else f"1 {verdict.value}"
        for verdict in (Verdict.ERROR, Verdict.WARNING, Verdict.UNKNOWN)
        if counts[verdict]
    ]
    if not bad:
        return f"all {len(rows)} checks are ok"
    return f"{', '.join(bad)}; {counts[Verdict.OK]} of {len(rows)} checks are ok"
