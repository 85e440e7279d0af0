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

from psframe.closing import print_summary
from psframe.data import Augmentation, Parts, load, prepare
from psframe.errors import ArgumentError, LaunchError, PsframeError, RankLost, RunDirError
from psframe.launcher import Launcher, find_launcher
from psframe.models import create
from psframe.monitor import Monitor
from psframe.output import give_up_printing
from psframe.placement import find_serving, line_of, one_process
from psframe.rundir import RunDir
from psframe.settings import Settings, check_choice, from_file
from psframe.summary import summarise, write_summary
from psframe.trainer import Trainer, TrainResult, initial_params
from psframe.watching import Watching
from psframe.weights import save_weights

__all__ = ["load_parts", "main", "parse"]

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
_log = logging.getLogger("psframe")
_WORKERS_MAX = 4096  # of which the summary names the rank


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
        name, equals, value = flag.partition("=")
        value = value if equals else following
        if name == "--config" and value:
            default = from_file(value)
        elif name.startswith("--") and value:
            check_choice(name, value)  # with the nearest right one; tyro only lists them
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
    serving = find_serving(settings.placement(), launched)  # all ranks together, if at all
    try:
        trainer, parts, watching = _prepare(settings, launched, serving)
    except Exception as error:
        if launched is None:
            raise
        from psframe.cluster import fail_together

        raise fail_together(launched, error) from error  # or the other ranks would wait for this
    with watching:
        trained = trainer.fit(parts)
    if trained.result.is_root:
        _leave(settings, parts, watching, trained, time.monotonic() - start, serving)
    return 0


def _prepare(
    settings: Settings, launched: Launcher | None, serving: tuple[int, ...]
) -> tuple[Trainer, Parts, Watching]:
    """Load the data and make the model, its trainer, and what looks on."""
    parts = load_parts(settings)
    model = create(settings.model, parts.train.input_shape, parts.train.n_classes)
    workers = working = settings.workers
    if launched is not None:
        working = None if launched.size is None else launched.size - len(serving)
    elif workers is None:
        workers = working = _THREADS
    if working is not None and settings.backup and settings.backup >= working:
        raise ArgumentError(
            f"--backup: {settings.backup} of {working} workers cannot all be backups; give fewer"
        )
    root = launched is None or launched.rank == 0
    watching = Watching(
        Monitor(max(working or 0, 0), settings.epochs, len(parts.train)),
        servers=len(serving) or one_process(settings.placement()),
        line=line_of(serving, len(serving) + _WORKERS_MAX) if serving else (),
        show=settings.show if root else "none",
        title=_title(settings),
        evaluation="test",
        launched=launched is not None,
        tensorboard=settings.tensorboard,
        trace=settings.trace,
    )
    trainer = Trainer(
        model,
        optimizer=settings.rule(initial_params(model, settings.seed), len(parts.train), working),
        mode=settings.consistency(),
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        seed=settings.seed,
        patience=settings.patience,
        device=settings.device,
        servers=settings.placement(),
        workers=workers,
        run_dir=settings.run_dir,
        overwrite=settings.overwrite,
        clip_norm=settings.clip_norm,
        config=settings.as_config(),
        callbacks=(watching.epoch,),
        observer=watching,
        prefetch=not settings.no_prefetch,
        spans=settings.trace,
    )
    return trainer, parts, watching


def load_parts(settings: Settings) -> Parts:
    """Load, split and prepare the data that the settings name.

    Raises:
        ArgumentError: it cannot be read, or is not what it should be.
    """
    try:
        return prepare(
            load(settings.data, settings.label),
            settings.test_fraction,
            settings.split_seed,
            validation_fraction=settings.validation_fraction,
            augmentation=Augmentation.parse(settings.augment),
        )
    except ArgumentError:
        raise
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def _title(settings: Settings) -> str:
    return (
        f"psframe: {settings.model} on {settings.data}, {settings.mode}, {settings.optimizer}"
        f" lr {settings.lr:g}"
    )


def _leave(
    settings: Settings,
    parts: Parts,
    watching: Watching,
    trained: TrainResult,
    seconds: float,
    serving: tuple[int, ...],
) -> None:
    """Write weights and summary, and say how it went.

    Raises:
        RunDirError: the weights do not fit; the run's status then says failed.
    """
    result, evaluation = trained.result, trained.evaluation
    record = summarise(
        result,
        watching.monitor.statistics(),
        seconds=seconds,
        accuracy=trained.accuracy,
        loss=None if evaluation is None else evaluation.loss,
        confusion=None if evaluation is None else evaluation.confusion,
        classes=parts.train.classes,
        mode=settings.mode,
        optimizer=settings.optimizer,
        model=settings.model,
        data=settings.data,
        ranks=watching.line[len(serving) :],
        best_epoch=trained.best_epoch,
        stopped_early=trained.stopped_early,
    )
    folder, params = result.run_dir, result.params
    if folder is not None and params is not None:
        run_dir = RunDir(folder)
        try:
            save_weights(folder, params, settings.model, parts.train)
        except RunDirError as error:
            run_dir.status(
                "failed",
                updates=result.version,
                test_accuracy=trained.accuracy,
                reason=str(error),
            )
            raise
        run_dir.status(
            "completed", updates=result.version, test_accuracy=trained.accuracy, reason=""
        )
        write_summary(folder, record)
    try:
        print_summary(
            record,
            sys.stdout,
            run_dir=folder,
            reasons=result.ledger.reasons,
            launched=bool(serving),
        )
    except OSError as error:  # whoever was to read it has gone; the run is completed all the same
        _log.warning("the summary could not be printed: %s", error.strerror or error)
        give_up_printing()


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
        accuracy = status.get("test_accuracy")
        known = "" if accuracy is None else f", test accuracy {accuracy:.2%}"
        print(f"{settings.run_dir}: already completed{known}")
    return True


if __name__ == "__main__":
    sys.exit(main())
