"""Whether a run can go on with these settings, or is completed; rank 0 decides it for all."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from psframe.checkpoint import committed_versions
from psframe.errors import ArgumentError
from psframe.launcher import Launcher, starting_mpi
from psframe.rundir import CHECKPOINTS, CONFIG, RunDir
from psframe.settings import Settings, from_file

__all__ = ["is_completed"]

# What the samples that are still to be used, and the parameters, depend on.
_FIXED = (
    "data",
    "label",
    "test_fraction",
    "validation_fraction",
    "split_seed",
    "seed",
    "model",
    "optimizer",
    "epochs",
    "batch_size",
)
# What may change, and changes what is learned from there on.
_TOLD = (
    "mode",
    "staleness",
    "staleness_max",
    "backup",
    "pushes",
    "warm_start",
    "stale",
    "codec",
    "pull_codec",
    "lr",
    "momentum",
    "nesterov",
    "weight_decay",
    "clip_norm",
    "schedule",
    "warmup",
    "augment",
    "patience",
    "precision",
)

_log = logging.getLogger("psframe")


def is_completed(settings: Settings, launched: Launcher | None) -> bool:
    """Tell whether the run to go on with is completed; one that is not there yet can start.

    Under a launcher every rank calls this and rank 0 decides: not every node need see its files.

    Raises:
        ArgumentError: it was begun with other data, another model, or another amount of work.
        RunDirError: there is a status.json, but it is not a run's; on rank 0.
        LaunchError, RankLost: as `psframe.run`.
    """
    if launched is not None and launched.replaces:
        return False  # it is under way
    if launched is None:
        return _look(settings)
    return _decide_together(launched, lambda: _look(settings))


def _look(settings: Settings) -> bool:
    folder = settings.run_dir
    status = RunDir.read_status(folder)
    if status is None or status["state"] != "completed":
        _compare(settings)
        return False
    accuracy = status.get("test_accuracy")
    known = "" if accuracy is None else f", test accuracy {accuracy:.2%}"
    print(f"{folder}: already completed{known}; nothing is changed", flush=True)
    return True


def _compare(settings: Settings) -> None:
    """See that the settings are those of the run, if it has got as far as a checkpoint."""
    folder = Path(settings.run_dir)
    file = folder / CONFIG
    if not committed_versions(folder / CHECKPOINTS) or not file.is_file():
        return
    before = from_file(file).resolved()
    for name in (*_FIXED, *_TOLD):
        was, now = getattr(before, name), getattr(settings, name)
        if was == now:
            continue
        flag = "--" + name.replace("_", "-")
        if name in _FIXED:
            what = "the number of epochs" if name == "epochs" else "that"
            remedy = f"--config {file} brings its settings"
            if settings.config is not None:  # it has, or another file has brought others
                remedy = f"{what} cannot change when a run goes on"
            raise ArgumentError(f"{flag}: the run to go on with has {was!r}, not {now!r}; {remedy}")
        _log.warning("%s: was %r, and is %r from here on", flag, was, now)


def _decide_together(launcher: Launcher, decide: Callable[[], bool]) -> bool:
    """Let rank 0 decide; the other ranks hear of it, and of what it raises, as an ArgumentError."""
    with starting_mpi():
        from psframe.agreement import tell
        from psframe.transports.mpi import SETUP_BOUND_S, open_mesh

    mesh = open_mesh(None, launcher, sys.prefix)
    error: Exception | None = None
    decided = False
    if mesh.rank == 0:
        try:
            decided = decide()
        except Exception as raised:  # the others wait to hear of it, whatever it is
            error = raised
    error = tell(mesh, error)
    answer = mesh.broadcast(bytes([decided]), "what rank 0 has decided", SETUP_BOUND_S)
    mesh.close()
    if error is not None:
        raise error
    return bool(answer[0])
