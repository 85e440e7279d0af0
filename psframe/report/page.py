"""A report as one HTML page: no script, nothing fetched, and every word of the run escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from psframe.report.canvas import THEMES
from psframe.report.facts import Facts, Worker
from psframe.report.reading import Run
from psframe.report.words import Finding, count, percent, seconds
from psframe.summary import FATES

__all__ = ["Figure", "page"]

# Texts come from the run: a word of a megabyte is cut.
_TEXT_MAX = 2000
_SETTINGS_MAX = 200
_ROWS_MAX = 40
_RATES = (
    "Workers' samples per second count from the run's first push; over the whole run, with "
    "start-up and evaluations, there are fewer. Shares are of the time that was measured: "
    "computing and waiting."
)

_LIGHT = "".join(f"--{name}:{colour};" for colour, (name, _) in THEMES.items())
_DARK = "".join(f"--{name}:{colour};" for name, colour in THEMES.values())
_CSS = f"""
:root{{color-scheme:light dark;{_LIGHT}--page:#f5f6f8;--card:#fff;--line:#e1e4e9;
--good:#00795a;--warning:#b04a00;--bad:#b3261e}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}--page:#14171c;--card:#1c2027;
--line:#2f353f;--good:#2bbd92;--warning:#f0954a;--bad:#ff7b70}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
main{{max-width:1120px;margin:0 auto;padding:28px 20px 40px}}
h1{{font-size:25px;margin:0;overflow-wrap:anywhere;display:inline}}
h2{{font-size:17px;margin:0 0 10px}}
.state{{display:inline-block;margin-left:10px;padding:2px 11px;border-radius:12px;font-size:13px;
font-weight:600;border:1.5px solid currentColor;vertical-align:4px;color:var(--muted)}}
.completed{{color:var(--good)}}.failed{{color:var(--bad)}}.interrupted{{color:var(--warning)}}
.running{{color:var(--blue)}}
.sub{{color:var(--muted);margin:4px 0 18px;overflow-wrap:anywhere}}
.cards{{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 14px}}
.card,section{{background:var(--card);border:1px solid var(--line);border-radius:8px}}
.card{{padding:11px 15px;flex:1 1 140px}}
.card b{{display:block;font-size:23px;line-height:1.25;font-weight:650;
font-variant-numeric:tabular-nums}}
.card span{{color:var(--muted);font-size:13px}}
section{{padding:16px 20px;margin:0 0 14px}}
ul{{margin:0;padding:0;list-style:none}}
li{{padding:3px 0 3px 24px;position:relative;overflow-wrap:anywhere}}
li::before{{position:absolute;left:2px;font-weight:700;content:"·";color:var(--muted)}}
li.good::before{{content:"✓";color:var(--good)}}
li.warning::before{{content:"!";left:5px;color:var(--warning)}}
svg{{display:block;width:100%;height:auto}}
figure{{margin:0}}figcaption,.note{{color:var(--muted);font-size:13.5px;margin:8px 0 0}}
table{{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}}
th,td{{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:anywhere}}
th{{font-weight:500;color:var(--muted)}}
td.n,th.n{{text-align:right;overflow-wrap:normal}}
tr.slow td{{color:var(--warning);font-weight:600}}
tr.sum td,tr.sum th{{font-weight:650;color:var(--ink)}}
.pair{{display:flex;flex-wrap:wrap;gap:0 14px;align-items:flex-start}}
.pair section{{flex:1 1 330px;overflow-x:auto}}
.wide{{overflow-x:auto}}
footer{{color:var(--muted);font-size:13px}}
@media print{{body{{background:#fff;font-size:10.5pt}}main{{padding:0;max-width:none}}
section,.card{{border-color:#ccc}}section,figure,.card,tr{{break-inside:avoid}}
h2{{break-after:avoid}}.tall{{break-inside:auto}}}}
"""


@dataclass(frozen=True)
class Figure:
    """A drawn figure.

    Attributes:
        name: of its file, without .png; also the prefix of its ids on the page.
        title: the heading above it.
        caption: a sentence below it.
        drawn: matplotlib's figure.
    """

    name: str
    title: str
    caption: str
    drawn: Any


def page(
    run: Run,
    facts: Facts,
    findings: Sequence[Finding],
    figures: Iterable[tuple[Figure, str]],
    made: str,
) -> str:
    """Make the page.

    Args:
        run, facts, findings: what is known and what it means.
        figures: each with its SVG element.
        made: when and by what, for the last line.
    """
    title = _text(run.path.resolve().name or "run")
    body = [
        f'<h1>{title}</h1><span class="state {_state(facts)}">{_text(facts.state)}</span>',
        f'<p class="sub">{_subtitle(facts)}</p>',
        _cards(facts),
        "<section><h2>What it means</h2><ul>",
        *(f'<li class="{found.kind}">{_text(found.text)}</li>' for found in findings),
        "</ul></section>",
    ]
    for figure, drawing in figures:
        note = f"<figcaption>{_text(figure.caption)}</figcaption>" if figure.caption else ""
        body.append(
            f"<section><h2>{_text(figure.title)}</h2><figure>{drawing}{note}</figure></section>"
        )
    body += [_workers(facts), '<div class="pair">', _settings(run), _ledger(facts), "</div>"]
    if run.problems:
        items = "".join(f"<li>{_text(problem)}</li>" for problem in run.problems)
        body.append(f"<section><h2>What could not be read</h2><ul>{items}</ul></section>")
    body.append(f"<footer>{_text(str(run.path.resolve()))}<br>{_text(made)}</footer>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{title}: report</title>\n<style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _text(value: Any) -> str:
    """Escape a value for HTML, an attribute's included; cut what is too long."""
    text = str(value)
    text = text if len(text) <= _TEXT_MAX else text[:_TEXT_MAX] + "…"
    return escape(text.encode("utf-8", "replace").decode("utf-8"))


def _state(facts: Facts) -> str:
    known = ("completed", "running", "failed", "interrupted")
    return facts.state if facts.state in known else "unknown"


def _subtitle(facts: Facts) -> str:
    parts = [
        facts.model,
        f"on {facts.data}" if facts.data else "",
        f"with {facts.optimizer}" if facts.optimizer else "",
        f"in {facts.mode} mode" if facts.mode else "",
    ]
    if facts.workers:
        parts.append(f"with {len(facts.workers):,} worker{'s' * (len(facts.workers) > 1)}")
    return _text(", ".join(part for part in parts if part))


def _cards(facts: Facts) -> str:
    cards = [
        (percent(facts.accuracy), "test accuracy"),
        (seconds(facts.seconds), "time"),
        (count(facts.updates), "updates"),
        (count(facts.samples_per_s), "samples per second over the whole run"),
        (
            "–" if math.isnan(facts.staleness_mean) else f"{facts.staleness_mean:.2f}",
            "mean staleness",
        ),
    ]
    if not math.isnan(facts.loss):
        cards.insert(1, (f"{facts.loss:.4g}", "test loss"))
    items = "".join(f'<div class="card"><b>{b}</b><span>{s}</span></div>' for b, s in cards)
    return f'<div class="cards">{items}</div>'


def _workers(facts: Facts) -> str:
    """List the workers: all of them, or those that were slowest."""
    if not facts.workers:
        return ""
    many = len(facts.workers) > _ROWS_MAX
    rows = list(enumerate(facts.workers))
    if many:
        rows.sort(key=lambda row: (math.isnan(row[1].samples_per_s), row[1].samples_per_s))
    head = ["worker", "rank", "pushes", "samples/s", "mean staleness", "computing"]
    head += ["waiting for servers", "waiting for data"]
    lines = [_row(worker, position == facts.slowest) for position, worker in rows[:_ROWS_MAX]]
    cells = "".join(f'<th class="{"n" * (i > 1)}">{name}</th>' for i, name in enumerate(head))
    title = f"The {_ROWS_MAX} slowest of {len(rows):,} workers" if many else "Workers"
    return (
        f'<section class="tall"><h2>{title}</h2><div class="wide"><table><thead><tr>{cells}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="note">{_RATES}</p></section>'
    )


def _row(worker: Worker, slowest: bool) -> str:
    stale = "–" if math.isnan(worker.staleness_mean) else f"{worker.staleness_mean:.2f}"
    texts = [f"{worker.index}{' (slowest)' * slowest}{' (lost)' * worker.lost}", worker.rank or "–"]
    numbers = [count(worker.pushes), count(worker.samples_per_s), stale]
    for part in ("compute_s", "servers_s", "data_s"):
        share = worker.share(part)
        numbers.append("–" if math.isnan(share) else f"{share:.0%}")
    cells = "".join(f"<td>{_text(text)}</td>" for text in texts)
    cells += "".join(f'<td class="n">{text}</td>' for text in numbers)
    return f"<tr{' class=slow' * slowest}>{cells}</tr>"


def _settings(run: Run) -> str:
    if not run.config:
        return ""
    rows = list(_flat(run.config, ""))
    lines = [f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows[:_SETTINGS_MAX]]
    if len(rows) > _SETTINGS_MAX:
        lines.append(f"<tr><th>…</th><td>{len(rows) - _SETTINGS_MAX:,} more</td></tr>")
    return (
        '<section class="tall"><h2>Configuration</h2>'
        f"<table><tbody>{''.join(lines)}</tbody></table></section>"
    )


def _flat(table: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and prefix.count(".") < 8:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value).lower() if isinstance(value, bool) else value


def _ledger(facts: Facts) -> str:
    ledger = facts.ledger
    if not ledger:
        return ""
    lines = [
        f'<tr><th>{name}</th><td class="n">{ledger.get(name, 0):,}</td></tr>' for name in FATES
    ]
    total = sum(ledger.get(name, 0) for name in FATES)
    lines.append(f'<tr class="sum"><th>sum</th><td class="n">{total:,}</td></tr>')
    received = ledger.get("received", 0)
    lines.append(f'<tr><th>received by server 0</th><td class="n">{received:,}</td></tr>')
    lines += [
        f'<tr><th>{_text(name)}</th><td class="n">{n:,}</td></tr>'
        for name, n in list(ledger.items())[:_SETTINGS_MAX]
        if name not in (*FATES, "received")
    ]
    lines += [
        f'<tr><th>because: {_text(name)}</th><td class="n">{n:,}</td></tr>'
        for name, n in list(facts.reasons.items())[:_SETTINGS_MAX]
    ]
    word = "adds up" if total == received else "does not add up"
    return (
        "<section><h2>The ledger of pushes</h2>"
        f'<table><tbody>{"".join(lines)}</tbody></table><p class="note">It {word}: received = '
        "applied + refused + dropped + lost + stopped.</p></section>"
    )
