"""Train a classifier with a parameter server: `python -m psframe.train`.

Under mpirun (or srun) the first ranks serve and the others work. Without a launcher the same job
runs in one process with worker threads.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Sequence

from psframe.data import Dataset, load, prepare
from psframe.errors import ArgumentError, LaunchError, PsframeError, RankLost, RunDirError
from psframe.history import EpochSummary
from psframe.launcher import Launcher, find_launcher
from psframe.models import Model, create
from psframe.rundir import CHECKPOINTS, RunDir
from psframe.settings import Settings, from_file
from psframe.trainer import Trainer, TrainResult, initial_params

__all__ = ["main", "parse"]

_DESCRIPTION = """\
Train a classifier with a parameter server.

Under mpirun the first ranks hold the parameters and the others compute gradients; without it, the
same runs in one process. For example:

  asynchronous, nobody waits:
      mpirun -n 4 python -m psframe.train
  at most 3 steps apart:
      mpirun -n 4 python -m psframe.train --mode ssp --staleness 3
  all in step, with momentum:
      mpirun -n 4 python -m psframe.train --mode bsp --optimizer sgd --momentum 0.9
  your model, your data:
      python -m psframe.train --model my.module:Class --data my.npz
"""

_INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended
_THREADS = 3


def parse(argv: Sequence[str], *, quiet: bool = False) -> Settings:
    """Merge defaults, the file of --config, and flags.

    Args:
        argv: the flags.
        quiet: print neither help nor usage errors.

    Raises:
        SystemExit: on --help, or on a wrong flag, after saying so.
        ArgumentError: the file is wrong, or settings are out of range or contradictory.
    """
    import tyro

    default = Settings()
    for flag, following in zip(argv, [*argv[1:], ""], strict=False):
        if flag == "--config" and following:
            default = from_file(following)
        elif flag.startswith("--config="):
            default = from_file(flag.partition("=")[2])
    settings = tyro.cli(
        Settings,
        args=list(argv),
        default=default,
        prog="python -m psframe.train",
        description=_DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=not quiet,
    )
    return settings.resolved()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for an error, 2 for wrong flags, 130."""
    launched = find_launcher()
    rank = launched.rank if launched else 0
    logging.basicConfig(format="psframe: %(levelname)s: %(message)s", level=logging.WARNING)
    if rank:
        logging.getLogger("psframe").setLevel(logging.ERROR)
    try:
        settings = parse(sys.argv[1:] if argv is None else argv, quiet=rank > 0)
    except ArgumentError as error:
        return _fail(error, rank, status=2)
    try:
        return _train(settings, launched)
    except KeyboardInterrupt:
        if rank == 0:
            print("psframe: interrupted", file=sys.stderr, flush=True)
        return _INTERRUPTED
    except (PsframeError, OSError) as error:
        return _fail(error, rank)
    except Exception as error:
        # A bug of the model's or ours: whoever repairs it needs the place. What happens in a
        # worker of another rank, rank 0 tells with the whole traceback.
        if rank == 0:
            traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}, line {place.lineno}"
        print(
            f"psframe: error: rank {rank}: {type(error).__name__}: {error} ({where})",
            file=sys.stderr,
            flush=True,
        )
        return 1


def _train(settings: Settings, launched: Launcher | None) -> int:
    start = time.monotonic()
    if settings.resume and _is_completed(settings, launched):
        return 0
    try:
        trainer, train, test = _prepare(settings, launched)
    except Exception as error:
        if launched is None:
            raise
        from psframe.cluster import fail_together

        raise fail_together(launched, error) from error  # or the other ranks would wait for this
    trained = trainer.fit(train, test)
    if trained.result.is_root:
        _save(trained)
        _summarise(trained, time.monotonic() - start)
    return 0


def _prepare(settings: Settings, launched: Launcher | None) -> tuple[Trainer, Dataset, Dataset]:
    """Load the data and make the model and its trainer."""
    try:
        data = load(settings.data)
        train, test = prepare(data, settings.test_fraction, settings.split_seed)
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    model = create(settings.model, data.input_shape, data.n_classes)
    return _trainer(settings, model, train, launched), train, test


def _fail(error: Exception, rank: int, status: int = 1) -> int:
    """Say what is wrong, once: what is wrong on another rank, rank 0 has been told."""
    if rank == 0 or isinstance(error, (LaunchError, RankLost)):
        print(f"psframe: error: {error}", file=sys.stderr, flush=True)
    return status


def _is_completed(settings: Settings, launched: Launcher | None) -> bool:
    """Tell whether the run to resume is completed; a run that is not there yet can start.

    Raises:
        ArgumentError: it was begun and not completed.
    """
    status = RunDir.read_status(settings.run_dir)
    if status is None:
        return False
    if status["state"] != "completed":
        raise ArgumentError(
            f"--resume: the run in {settings.run_dir!r} is {status['state']} after "
            f"{status.get('updates', 0)} updates and left no checkpoint to continue from; start "
            "it again with --overwrite"
        )
    if launched is None or launched.rank == 0:
        print(f"{settings.run_dir}: already completed, {_accuracy(status.get('test_accuracy'))}")
    return True


def _trainer(
    settings: Settings, model: Model, train: Dataset, launched: Launcher | None
) -> Trainer:
    workers = working = settings.workers
    if launched is not None:
        working = None if launched.size is None else launched.size - settings.servers
    elif workers is None:
        workers = working = _THREADS
    if working is not None and settings.backup and settings.backup >= working:
        raise ArgumentError(
            f"--backup: {settings.backup} of {working} workers cannot all be backups; give fewer"
        )
    params = initial_params(model, settings.seed)
    return Trainer(
        model,
        optimizer=settings.rule(params, len(train), working),
        mode=settings.consistency(),
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        seed=settings.seed,
        device=settings.device,
        servers=settings.servers,
        workers=workers,
        run_dir=settings.run_dir,
        overwrite=settings.overwrite,
        clip_norm=settings.clip_norm,
        config=settings.as_config(),
        observer=_Progress(settings.epochs),
    )


class _Progress:
    """Prints one line an epoch."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._time = time.monotonic()

    def __call__(self, epoch: EpochSummary) -> None:
        now = time.monotonic()
        rate = epoch.samples / max(now - self._time, 1e-9)
        self._time = now
        parts = [f"epoch {epoch.epoch + 1:>{len(str(self._epochs))}}/{self._epochs}"]
        parts.append(f"updates {epoch.version}")
        if epoch.train_loss is not None:
            parts.append(f"loss {epoch.train_loss:.4f}")
        parts.append(_accuracy(epoch.test_accuracy))
        parts.append(f"{rate:,.0f} samples/s")
        if epoch.staleness_mean is not None:
            parts.append(f"staleness {epoch.staleness_mean:.2f}")
        print("  ".join(parts), flush=True)


def _accuracy(accuracy: float | None) -> str:
    return "test accuracy unknown" if accuracy is None else f"test accuracy {accuracy:.2%}"


def _save(trained: TrainResult) -> None:
    """Write the final weights as safetensors into the run directory, by rename.

    Raises:
        RunDirError: they do not fit; the run's status then says failed.
    """
    folder, params = trained.result.run_dir, trained.result.params
    if folder is None or params is None:
        return
    from safetensors.numpy import save

    file = folder / CHECKPOINTS / "final.safetensors"
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_bytes(save(dict(params)))
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = f"{file}: the final weights could not be written: {error.strerror}"
        RunDir(folder).status(
            "failed",
            updates=trained.result.version,
            test_accuracy=trained.accuracy,
            reason=reason,
        )
        raise RunDirError(reason) from error


def _summarise(trained: TrainResult, seconds: float) -> None:
    result, ledger = trained.result, trained.result.ledger
    counts = [int(count) for count in result.staleness]
    total = sum(counts)
    print(f"{_accuracy(trained.accuracy)} after {result.version} updates in {seconds:.2f} s")
    if total:
        mean = sum(i * count for i, count in enumerate(counts)) / total
        shares = "  ".join(f"{i}: {c / total:.1%}" for i, c in enumerate(counts[:8]) if c)
        rest = sum(counts[8:])
        more = f"  8 to {len(counts) - 1}: {rest / total:.1%}" if rest else ""
        print(f"staleness      mean {mean:.2f};  {shares}{more}")
    fates = ("applied", "refused", "dropped", "lost", "stopped", "partial")
    parts = [f"{getattr(ledger, fate)} {fate}" for fate in fates if getattr(ledger, fate)]
    print(f"pushes         {ledger.received} received: {', '.join(parts) or 'none'}")
    if result.run_dir is not None:
        print(f"run directory  {result.run_dir}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
