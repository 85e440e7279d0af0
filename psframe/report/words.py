"""What a run's numbers mean, in sentences.

Each rule looks at one thing and says what it sees, whether that is as expected, and what may be
done about it. A rule that lacks its numbers says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from psframe.report.facts import Facts, Worker
from psframe.report.reading import Run
from psframe.summary import FATES

__all__ = ["Finding", "count", "findings", "percent", "seconds"]

# Waiting that is worth a word.
_DATA, _SERVERS = 0.15, 0.35
# A loss that rises by this factor over its least while the training loss falls: overfitting.
_OVERFIT = 1.15
_NAMED_MAX = 5

_STATES = {
    "completed": "The run completed",
    "running": "The run is still running, or died without saying so",
    "failed": "The run failed",
    "interrupted": "The run was interrupted",
}
_WHY = {
    "refused": "refused: not finite, of an unknown version, or from a worker that counts as lost",
    "dropped": "dropped by rule: they came after their round was closed without them",
    "lost": "lost: their worker died before they were applied",
    "stopped": "stopped: they came after the end of the run",
    "partial": "partial: a death left them in some shards only",
}


@dataclass(frozen=True)
class Finding:
    """A sentence, and whether it is "good", "plain" or a "warning"."""

    text: str
    kind: str = "plain"


def count(value: float) -> str:
    """Write a count or a rate: 12,345, or 1.2 where digits after the point matter."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def percent(share: float) -> str:
    """Write a share of 1: 98.06%."""
    return "–" if math.isnan(share) else f"{share:.1%}" if share < 0.9 else f"{share:.2%}"


def seconds(value: float) -> str:
    """Write a time as one says it: 1.61 s, 3 min 5 s, 2 h 7 min.

    Example:
        >>> seconds(0.25), seconds(59.96), seconds(185.2), seconds(7620)
        ('0.25 s', '1 min', '3 min 5 s', '2 h 7 min')
    """
    if math.isnan(value):
        return "–"
    if value < 59.95:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s".removesuffix(" 0 s")
    return f"{minutes // 60:,} h {minutes % 60} min".removesuffix(" 0 min")


def findings(run: Run, facts: Facts) -> list[Finding]:
    """Say what the run's numbers mean, the most important first."""
    rules = (_outcome, _lost, _learning, _staleness, _slowest, _data, _servers, _silent, _ledger)
    return [found for rule in rules for found in rule(run, facts)]


def _outcome(run: Run, facts: Facts) -> Iterator[Finding]:
    text = _STATES.get(facts.state, "It is not known whether the run completed")
    if facts.updates > 0:
        text += f" after {count(facts.updates)} updates"
    if facts.seconds > 0:
        text += f" in {seconds(facts.seconds)}"
    if facts.reason:
        text += f": {facts.reason}"
    kind = {"completed": "good", "failed": "warning", "interrupted": "warning"}
    yield Finding(text.rstrip(".") + ".", kind.get(facts.state, "plain"))
    if facts.stopped_early:
        yield Finding("It was stopped early: further epochs no longer made it better.")


def _lost(run: Run, facts: Facts) -> Iterator[Finding]:
    lost = [worker for worker in facts.workers if worker.lost]
    if lost:
        named = ", ".join(map(_name, lost[:_NAMED_MAX]))
        more = f" and {len(lost) - _NAMED_MAX:,} more" if len(lost) > _NAMED_MAX else ""
        verb = "were" if len(lost) > 1 else "was"
        yield Finding(f"{named}{more} {verb} lost while the run was under way.", "warning")


def _learning(run: Run, facts: Facts) -> Iterator[Finding]:
    held = "validation" if np.isfinite(run.metrics["validation_loss"]).any() else "test"
    epochs, accuracy = run.metrics["epoch"], run.metrics[f"{held}_accuracy"]
    known = np.flatnonzero(np.isfinite(accuracy) & np.isfinite(epochs))
    if len(known) > 1:
        best = known[int(np.argmax(accuracy[known]))]
        text = f"The best {held} accuracy was {percent(accuracy[best])}, in epoch "
        text += f"{epochs[best] + 1:.0f} of {epochs[known].max() + 1:.0f}"
        if accuracy[known[-1]] < accuracy[best]:
            text += f"; the last one was {percent(accuracy[known[-1]])}"
        yield Finding(text + ".")
    train, loss = run.metrics["train_loss"], run.metrics[f"{held}_loss"]
    both = np.flatnonzero(np.isfinite(loss) & np.isfinite(train))
    if len(both) < 3:
        return
    least = both[int(np.argmin(loss[both]))]
    rise = loss[both[-1]] / loss[least] if loss[least] > 0 else 1.0
    if rise > _OVERFIT and train[both[-1]] < train[least]:
        yield Finding(
            f"The {held} loss rose to {rise:.2f} times its least while the training loss went on "
            "falling: the model overfits. Fewer epochs, weight decay or more data would help.",
            "warning",
        )
    elif train[both[-1]] > 1.5 * train[both[0]]:
        yield Finding("The training loss rose: it diverges. Try a lower --lr.", "warning")


def _staleness(run: Run, facts: Facts) -> Iterator[Finding]:
    mean, workers = facts.staleness_mean, len(facts.workers)
    if math.isnan(mean):
        return
    said = f"Mean staleness was {mean:.1f}"
    if facts.mode == "bsp":
        fine = mean < 0.005
        why = "as it is when all work in step" if fine else "but in BSP it should be 0"
        yield Finding(f"{said}, {why}.", "good" if fine else "warning")
    elif workers == 1:
        yield Finding(f"{said}: a single worker's gradients meet the parameters they came from.")
    elif workers > 1:
        expected = workers - 1
        rule = f"{expected:,} = W − 1 (W = {workers:,} workers)"
        if mean > 1.15 * expected + 0.1:
            why = f"above {rule}: some workers are much faster than others, or push ahead"
        elif mean < 0.75 * expected - 0.1:
            why = f"below {rule}: not all workers had a gradient under way all the time"
        else:
            why = f"as expected of {rule} that are equally busy"
        yield Finding(f"{said}, {why}.")
    else:
        yield Finding(f"{said}: so many updates, on average, came between pull and push.")


def _slowest(run: Run, facts: Facts) -> Iterator[Finding]:
    if facts.slowest is not None:
        name = _name(facts.workers[facts.slowest])
        pace, _, reason = facts.slowest_why.partition(": ")
        why = f" ({reason})" if reason else ""
        yield Finding(f"{name} was the slowest, {pace}{why}.", "warning")
    elif facts.slowest_why:
        yield Finding(f"{facts.slowest_why.capitalize()}.", "good")


def _data(run: Run, facts: Facts) -> Iterator[Finding]:
    waiting = [w for w in facts.workers if w.share("data_s") > _DATA]
    waiting.sort(key=lambda worker: -worker.share("data_s"))
    if not waiting:
        return
    if len(waiting) > max(2, len(facts.workers) // 2):
        middle = float(np.median([w.share("data_s") for w in waiting]))
        yield Finding(
            f"{count(len(waiting))} of {count(len(facts.workers))} workers waited for data, "
            f"typically {middle:.0%} of their time: a slow disk, or costly preprocessing?",
            "warning",
        )
        return
    named = ", ".join(f"{_name(w)} {w.share('data_s'):.0%}" for w in waiting[:_NAMED_MAX])
    rest = len(waiting) - _NAMED_MAX
    more = f" and {rest} more" if rest > 0 else ""
    if len(waiting) == 1:
        share = waiting[0].share("data_s")
        text = f"{_name(waiting[0])} waited {share:.0%} of its time for data: slow disk?"
    else:
        text = f"Some workers waited for data: {named}{more} of their time. Slow disks?"
    yield Finding(text, "warning")


def _servers(run: Run, facts: Facts) -> Iterator[Finding]:
    shares = [s for w in facts.workers if not math.isnan(s := w.share("servers_s"))]
    if not shares:
        return
    middle = float(np.median(shares))
    text = f"Workers waited {middle:.0%} of their time for servers (median)"
    if middle < _SERVERS:
        yield Finding(f"{text}.", "good" if middle < 0.1 else "plain")
    elif facts.mode in ("bsp", "ssp"):
        yield Finding(
            f"{text}. In {facts.mode.upper()} that includes waiting for each other; --mode async "
            "does without, and larger batches make it rarer.",
            "warning",
        )
    else:
        yield Finding(
            f"{text}: messages, not gradients, set the pace. Larger batches (--batch-size) or "
            "more servers (--servers) would help; more workers would not.",
            "warning",
        )


def _silent(run: Run, facts: Facts) -> Iterator[Finding]:
    """Name the workers that stopped pushing long before the end."""
    timeline = run.timeline
    if timeline is None or len(timeline.time_s) < 10 or facts.state == "running":
        return
    pushes, time_s = timeline.counts[:, :, 0], timeline.time_s
    done = np.argmax(pushes >= pushes[-1], axis=0)  # the first line with the final count
    known = [worker.index for worker in facts.workers if worker.lost]  # which has been said
    early = np.flatnonzero((time_s[done] < 0.8 * time_s[-1]) & (pushes[-1] > 0))
    early = np.setdiff1d(early, known)
    if len(early):
        names = ", ".join(f"{i} after {seconds(time_s[done[i]])}" for i in early[:_NAMED_MAX])
        more = f" and {len(early) - _NAMED_MAX} more" if len(early) > _NAMED_MAX else ""
        yield Finding(f"Fell silent before the end: worker {names}{more}. Lost?", "warning")


def _ledger(run: Run, facts: Facts) -> Iterator[Finding]:
    ledger = facts.ledger
    if not ledger.get("received"):
        return
    received, applied = ledger["received"], ledger.get("applied", 0)
    if sum(ledger.get(fate, 0) for fate in FATES) != received:
        yield Finding("The ledger does not add up: received is not the sum below it.", "warning")
    if applied == received:
        yield Finding(f"Every one of the {received:,} pushes received was applied.", "good")
    for fate, why in _WHY.items():
        if ledger.get(fate):
            share = ledger[fate] / received
            part = f"{share:.1%}" if share >= 0.0005 else "less than 0.1%"
            verb = "was" if ledger[fate] == 1 else "were"
            yield Finding(
                f"{ledger[fate]:,} of {received:,} pushes ({part}) {verb} {why}.",
                "plain" if fate == "stopped" or share < 0.01 else "warning",
            )


def _name(worker: Worker) -> str:
    place = f" (rank {worker.rank})" if worker.rank else ""
    return f"Worker {worker.index}{place}"
