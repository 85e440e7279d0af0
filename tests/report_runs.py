"""Run directories as psframe.train leaves them, of made-up runs of any size."""

import json
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 10


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(
    folder: Path,
    workers: int = 3,
    *,
    epochs: int = 30,
    lines: int = 200,
    seconds: float = 40.0,
    slow: int | None = None,
    waits: int | None = None,
    dies: int | None = None,
    seed: int = 7,
) -> Path:
    """Write a whole run directory; equal arguments, equal files.

    Args:
        folder: made anew.
        workers: their number, W.
        epochs: lines of metrics.jsonl.
        lines: of timeline.jsonl.
        seconds: that the run took.
        slow: a worker that computes at 0.4 of the others' speed.
        waits: a worker that waits for data for 0.4 of its time.
        dies: a worker that is lost after half the run.
        seed: of what differs.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rates = 20.0 * rng.normal(1.0, 0.04, workers).clip(0.5)  # pushes a second
    if slow is not None:
        rates[slow] *= 0.4
    shares = np.stack([np.full(workers, 0.8), rng.uniform(0.08, 0.13, workers)], axis=1)
    shares = np.concatenate([shares, np.full((workers, 1), 0.02)], axis=1)
    if waits is not None:
        shares[waits] = (0.5, 0.08, 0.4)
        rates[waits] *= 0.62
    counts = _counts(rng, lines, seconds, rates, shares, workers - 1, dies)
    times = np.linspace(seconds / lines, seconds, lines)
    timeline = [
        {"time_s": round(t, 6), "update": int(row[:, 0].sum()), "workers": row.round(4).tolist()}
        for t, row in zip(times, counts, strict=True)
    ]
    write_lines(folder / "timeline.jsonl", timeline)
    last = counts[-1]
    updates = int(last[:, 0].sum())
    metrics = _metrics(rng, epochs, updates, seconds, workers - 1, float(last[:, 1].sum()))
    write_lines(folder / "metrics.jsonl", metrics)
    status = {"state": "completed", "updates": updates, "reason": ""}
    status["test_accuracy"] = metrics[-1]["test_accuracy"]
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    (folder / "config.toml").write_text(
        'model = "mlp"\ndata = "digits"\nmode = "async"\noptimizer = "adagrad"\nlr = 0.01\n'
        f"epochs = {epochs}\nbatch_size = 32\nservers = 1\nseed = 0\nnesterov = false\n",
        encoding="utf-8",
    )
    summary = _summary(rng, last, seconds, updates, metrics, dies)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def _counts(
    rng: np.random.Generator,
    lines: int,
    seconds: float,
    rates: np.ndarray,
    shares: np.ndarray,
    stale: float,
    dies: int | None,
) -> np.ndarray:
    span = seconds / lines
    pushes = rng.poisson(rates * span, (lines, len(rates))).astype(float)
    pause = slice(int(0.6 * lines), int(0.64 * lines))  # the servers were busy with something else
    pushes[pause] = np.floor(pushes[pause] * 0.3)
    shares = np.broadcast_to(shares, (lines, *shares.shape)).copy()
    shares[pause, :, 0] *= 0.3
    shares[pause, :, 1] += 0.5
    if dies is not None:
        pushes[lines // 2 :, dies] = 0
        shares[lines // 2 :, dies] = 0
    parts = [pushes, 32 * pushes, pushes * stale * rng.normal(1, 0.03, pushes.shape)]
    steps = np.concatenate([np.stack(parts, axis=2), shares * span], axis=2)
    return np.cumsum(steps, axis=0)


def _metrics(
    rng: np.random.Generator,
    epochs: int,
    updates: int,
    seconds: float,
    stale: float,
    samples: float,
) -> list[dict[str, Any]]:
    rows = []
    for epoch in range(epochs):
        done = (epoch + 1) / epochs
        falls = float(np.exp(-6 * done))
        rows.append(
            {
                "time_s": round(done * seconds, 6),
                "epoch": epoch,
                "update": int(done * updates),
                "train_loss": 2.3 * falls + 0.01 + 0.02 * falls * rng.normal(),
                "samples_per_s": samples / seconds,
                "staleness_mean": stale * float(rng.normal(1, 0.01)),
                "test_loss": 2.2 * falls + 0.09 + 0.03 * done + 0.005 * rng.normal(),
                "test_accuracy": min(1.0, 0.985 - 0.6 * falls + 0.003 * rng.normal()),
                "validation_loss": 2.2 * falls + 0.07 + 0.02 * done + 0.005 * rng.normal(),
                "validation_accuracy": min(1.0, 0.99 - 0.6 * falls + 0.003 * rng.normal()),
            }
        )
    return rows


def _summary(
    rng: np.random.Generator,
    last: np.ndarray,
    seconds: float,
    updates: int,
    metrics: list[dict[str, Any]],
    dies: int | None,
) -> dict[str, Any]:
    workers = len(last)
    drawn = np.abs(rng.normal(workers - 1, 0.25 * workers, 20_000)).round().astype(int)
    staleness = np.bincount(drawn) if workers > 1 else np.array([updates])
    confusion = rng.poisson(0.4, (CLASSES, CLASSES)) + np.diag(rng.integers(30, 40, CLASSES))
    confusion[8, 8] -= 9
    confusion[8, 1] += 9
    rates = last[:, 1] / seconds
    lost = 2 if dies is not None else 0
    return {
        "accuracy": metrics[-1]["test_accuracy"],
        "loss": metrics[-1]["test_loss"],
        "seconds": seconds,
        "updates": updates,
        "samples": int(last[:, 1].sum()),
        "staleness": staleness.tolist(),
        "ledger": {
            "received": updates + 3 + lost,
            "applied": updates,
            "refused": 1,
            "dropped": 0,
            "lost": lost,
            "stopped": 2,
            "partial": 0,
        },
        "mode": "async",
        "optimizer": "adagrad",
        "model": "mlp",
        "data": "digits",
        "classes": [str(i) for i in range(CLASSES)],
        "confusion": confusion.tolist(),
        "per_class": (np.diagonal(confusion) / confusion.sum(axis=1)).tolist(),
        "workers": [
            {
                "worker": i,
                "rank": i + 1,
                "pushes": int(row[0]),
                "samples": int(row[1]),
                "samples_per_s": row[1] / seconds,
                "staleness_mean": row[2] / row[0] if row[0] else 0.0,
                "compute_s": row[3],
                "servers_s": row[4],
                "data_s": row[5],
            }
            for i, row in enumerate(last.tolist())
        ],
        "slowest": int(np.argmin(rates)) if workers > 1 else None,
        "best_epoch": int(np.argmax([row["validation_accuracy"] for row in metrics])),
        "stopped_early": False,
        "field_of_a_later_version": [1, {"two": 3}],
    }
