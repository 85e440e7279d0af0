"""What remains of a training: summary.json, and the same in words when it is over."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from psframe.plan import Result
from psframe.statistics import Statistics, WorkerStatistics

__all__ = [
    "FATES",
    "SUMMARY",
    "class_accuracies",
    "find_slowest",
    "summarise",
    "write_summary",
]

SUMMARY = "summary.json"
# What becomes of a push: one of these, by the ledger.
FATES = ("applied", "refused", "dropped", "lost", "stopped")

# A worker is slow if its steps take so many times as long as the others' or, where all go at one
# pace because they wait for each other, the part of them that is its own; if that is a part at all.
_SLOW = 1.25
_OWN_SHARE_MIN = 0.1
_WAITING_MODES = ("bsp", "ssp")
_OWN = ("compute_s", "data_s")
_TIMES = (*_OWN, "servers_s")

_log = logging.getLogger("psframe")


def summarise(
    result: Result,
    now: Statistics,
    *,
    seconds: float,
    accuracy: float | None = None,
    loss: float | None = None,
    confusion: Any = None,
    classes: Sequence[str] = (),
    mode: str = "",
    optimizer: str = "",
    model: str = "",
    data: str = "",
    ranks: Sequence[int | None] = (),
    best_epoch: int | None = None,
    stopped_early: bool = False,
) -> dict[str, Any]:
    """Gather what summary.json holds.

    Args:
        result: of the run, on the root.
        now: the monitor's statistics at its end.
        seconds: that the whole training took.
        accuracy, loss: of the result's parameters on the test part, where known.
        confusion: (k, k) counts, a row a true label, a column a predicted one; None if not known.
        classes: the k labels' names.
        mode, optimizer, model, data: as the user gave them.
        ranks: of each worker, as far as known.
        best_epoch: whose parameters were kept as the best; None if the result has the last ones.
        stopped_early: whether the run ended before its last epoch because nothing improved.
    """
    matrix = None if confusion is None else np.asarray(confusion).astype(np.int64)
    workers = [_worker(one, _at(ranks, one.worker)) for one in now.workers]
    ledger = result.ledger.as_dict()
    return {
        "accuracy": _finite(accuracy),
        "loss": _finite(loss),
        "seconds": round(float(seconds), 3),
        "updates": int(result.version),
        "updates_before": now.updates_before,
        "samples": now.samples,
        "staleness": [int(count) for count in result.staleness],
        "ledger": {name: int(count) for name, count in ledger.items() if name != "reasons"},
        "mode": mode,
        "optimizer": optimizer,
        "model": model,
        "data": data,
        "classes": [str(name) for name in classes],
        "confusion": None if matrix is None else matrix.tolist(),
        "per_class": None if matrix is None else class_accuracies(matrix),
        "workers": workers,
        "slowest": find_slowest(workers, mode, result.lost)[0],
        "lost": list(result.lost),
        "replaced": list(result.replaced),
        "devices": list(result.devices),
        "best_epoch": best_epoch,
        "stopped_early": bool(stopped_early),
    }


def class_accuracies(matrix: Any) -> list[float | None]:
    """Give the part of each label's samples that was taken for it; None where there are none.

    Args:
        matrix: (k, k) array of counts, a row a true label, a column a predicted one.
    """
    totals, right = matrix.sum(axis=1), np.diagonal(matrix)
    return [float(r) / float(n) if n else None for r, n in zip(right, totals, strict=True)]


def write_summary(folder: str | Path, record: Mapping[str, Any]) -> bool:
    """Write summary.json; a reader sees none, the old one or the new one, whole.

    A disk that refuses it is logged: a finished run is worth more than its summary.

    Returns:
        True if it was written.
    """
    file = Path(folder) / SUMMARY
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        try:
            text = json.dumps(record, allow_nan=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.warning("%s: %s; the run has no summary", file, error.strerror or error)
        return False
    return True


def find_slowest(
    workers: Sequence[Mapping[str, Any]], mode: str = "", lost: Collection[int] = ()
) -> tuple[int | None, str]:
    """Find the worker that is slower than the others, and why.

    Args:
        workers: the entries of a summary.
        mode: the run's; in "bsp" and "ssp" workers wait for each other.
        lost: the workers that were lost: a dead one is not slow.

    Returns:
        Its index, None if all are much alike; and the reason in words.
    """
    known = [one for one in workers if one["pushes"] and one["worker"] not in lost]
    if len(known) < 2:
        return None, ""
    slow, factor = _outlier(known, _TIMES)
    if factor > _SLOW and not _is_fast(slow, known):
        pace = f"{_times(factor)} slower than the others"
        return slow["worker"], f"{pace}{_why(slow, known, _TIMES)}"
    slow, factor = _outlier(known, _OWN)
    is_much = _step_s(slow, _OWN) > _OWN_SHARE_MIN * _step_s(slow)
    if mode in _WAITING_MODES and factor > _SLOW and is_much:
        pace = f"its own part of a step takes {_times(factor)} as long, and the others wait for it"
        return slow["worker"], f"{pace}{_why(slow, known, _OWN)}"
    return None, "all workers are much alike" if any(map(_step_s, known)) else ""


def _step_s(one: Mapping[str, Any], names: Sequence[str] = _TIMES) -> float:
    """Seconds of a step that went into these."""
    return float(sum(one[name] for name in names) / one["pushes"])


def _is_fast(slow: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether its rate is none of the lower ones, all the same; rates may not be known."""
    rates = [rate for one in known if (rate := one.get("samples_per_s")) and rate > 0]
    return len(rates) == len(known) and bool(slow["samples_per_s"] > median(rates))


def _times(factor: float) -> str:
    return f"{factor:.2g} times" if factor < 100 else f"{factor:,.0f} times"


def _outlier(
    known: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[Mapping[str, Any], float]:
    """Find whose steps take longest, and how many times as long as the others' do."""
    slow = max(known, key=lambda one: _step_s(one, names))
    usual = median(_step_s(one, names) for one in known if one is not slow)
    return slow, _step_s(slow, names) / usual if usual > 0 else 0.0


def _why(slow: Mapping[str, Any], known: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Name what takes most longer in its steps than in the others'."""
    words = {
        "compute_s": "computing gradients",
        "data_s": "waiting for data",
        "servers_s": "waiting for servers",
    }
    usual = {
        name: median(_step_s(one, [name]) for one in known if one is not slow) for name in names
    }
    name = max(names, key=lambda name: _step_s(slow, [name]) - usual[name])
    mine = 1000 * _step_s(slow, [name])
    return f": {mine:.3g} ms a step {words[name]}, the others {1000 * usual[name]:.3g} ms"


def _worker(one: WorkerStatistics, rank: int | None) -> dict[str, Any]:
    return {
        "worker": one.worker,
        "rank": rank,
        "pushes": one.pushes,
        "samples": one.samples,
        "samples_per_s": round(one.mean_samples_per_s or 0.0, 3),
        "staleness_mean": round(one.staleness_mean or 0.0, 4),
        "compute_s": round(one.compute_s, 4),
        "servers_s": round(one.servers_s, 4),
        "data_s": round(one.data_s, 4),
    }


def _at(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
