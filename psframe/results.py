"""How a run's outcome is put into words, sent to every rank, and made a Result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from psframe.coding import Traffic
from psframe.errors import Diverged, Interrupted
from psframe.layout import Array
from psframe.leader import Leader
from psframe.ledger import Ledger
from psframe.plan import Plan, Result, staleness_counts

__all__ = ["diverged", "ended_by", "interrupted_by", "make_result", "summarise"]


def summarise(
    leader: Leader, devices: Iterable[str], followers: Iterable[Traffic] = ()
) -> dict[str, Any]:
    """Describe an outcome in plain data, fit for JSON.

    Args:
        leader: at the end.
        devices: of each worker, such as "cpu" or "cuda:0".
        followers: what those have counted.
    """
    traffic = leader.traffic
    for one in followers:
        traffic.add(one)
    return {
        "traffic": vars(traffic),
        "version": leader.store.version,
        "staleness": sorted(leader.staleness.items()),
        "ledger": leader.ledger.ledger().as_dict(),
        "kept_version": leader.kept_version,
        "lost": sorted(leader.losses),
        "replaced": sorted(leader.replaced),
        "workers": leader.workers,
        "devices": [name.partition(":")[0] for name in devices],
    }


def make_result(
    plan: Plan, summary: Mapping[str, Any], params: Array | None, run_dir: Path | None
) -> Result:
    """Make the Result of a summary.

    Args:
        plan: the run's plan.
        summary: as `summarise` made it.
        params: the flat vector on the root, None elsewhere.
        run_dir: the run directory on the root.
    """
    return Result(
        params=None if params is None else plan.layout.views(params),
        version=summary["version"],
        staleness=staleness_counts(dict(summary["staleness"])),
        is_root=params is not None,
        ledger=Ledger(**summary["ledger"]),
        run_dir=run_dir,
        kept_version=summary["kept_version"],
        lost=tuple(summary["lost"]),
        replaced=tuple(summary["replaced"]),
        traffic=Traffic(**summary["traffic"]),
        workers=summary["workers"],
        devices=tuple(summary["devices"]),
    )


def interrupted_by(request: str, version: int, saved: int | None) -> Interrupted:
    """Make the error of a run that a signal has ended in good order."""
    return Interrupted(ended_by(request, version, saved))


def ended_by(name: str, version: int, saved: int | None) -> str:
    """Say at which version a signal has ended a run, and what there is to go on from."""
    kept = "there is no checkpoint of it"
    if saved is not None:
        kept = f"version {saved} is in a checkpoint, and --resume (resume=True) goes on from it"
    return f"{name} has ended the run at version {version}; {kept}"


def diverged(leader: Leader) -> Diverged:
    """Say how a run diverged, and what to try."""
    counted = leader.ledger.ledger().reasons
    reasons = ", ".join(f"{n} {reason}" for reason, n in counted.items() if reason != "stopped")
    return Diverged(
        f"the last {10 * leader.workers} pushes in a row were refused ({reasons}) at version"
        f" {leader.store.version}; try a smaller learning rate, less momentum (or, asynchronously,"
        " psframe.optim.WorkerMomentum), clip_norm (--clip-norm), a rule against staleness such as"
        " psframe.stale.Inverse() (--stale inverse), or psframe.WarmStart (--warm-start)"
    )
