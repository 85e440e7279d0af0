"""Train a classifier with a parameter server: `python -m psframe.train`.

Under mpirun (or srun) the first ranks serve and the others work. Without a launcher the same job
runs in one process with worker threads.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from psframe.choices import parse_codec, parse_stale
from psframe.closing import print_summary
from psframe.data import Augmentation, Parts, load, prepare
from psframe.devices import choose_device
from psframe.errors import (
    ArgumentError,
    Interrupted,
    LaunchError,
    PsframeError,
    RankLost,
    WorkerFailed,
)
from psframe.interrupts import interrupting, noting_requests
from psframe.launcher import Launcher, find_launcher
from psframe.models import create
from psframe.models.precision import check_host
from psframe.monitor import Monitor
from psframe.output import give_up_printing, parse_flags, prepare_output
from psframe.placement import find_serving, one_process
from psframe.resuming import is_completed
from psframe.roles import describe
from psframe.server_device import choose_server_device
from psframe.settings import (
    INTERRUPTED,
    PREEMPTED,
    THREADS,
    Settings,
    blamed,
    check_choice,
    from_file,
)
from psframe.summary import summarise, write_summary
from psframe.trainer import Trainer, TrainResult, initial_params
from psframe.watching import Watching

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

_log = logging.getLogger("psframe")


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
    given = set()
    for flag, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = flag.partition("=")
        value = value if equals else following
        given.add(name.removeprefix("--").replace("-", "_"))
        if name == "--config" and value:
            default = from_file(value)
        elif name.startswith("--") and value:
            check_choice(name, value)  # with the nearest right one; tyro only lists them
    settings: Settings = parse_flags(
        tyro.cli,
        Settings,
        name="train",
        quiet=quiet,
        args=list(argv),
        default=default,
        description=_DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    merged = settings.changed_from(default, given)
    try:
        return merged.resolved()
    except ArgumentError as error:
        raise blamed(error, default, merged.config, given) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status.

    0; 1 for an error; 2 for wrong flags; 75 if SIGUSR1 or SIGUSR2 has ended it with a checkpoint,
    so that --resume can go on; 130 if SIGINT or SIGTERM has.
    """
    prepare_output()
    launched = find_launcher()
    rank = launched.rank if launched else 0
    logging.basicConfig(format="psframe: %(levelname)s: %(message)s", level=logging.WARNING)
    if rank:
        logging.getLogger("psframe").setLevel(logging.ERROR)
    try:
        try:
            settings = _parse_together(sys.argv[1:] if argv is None else argv, launched)
        except ArgumentError as error:
            return _fail(error, rank, status=2)
        try:
            return _train(settings, launched)
        except BaseException as error:
            if isinstance(error, (Exception, KeyboardInterrupt)):
                raise
            # SystemExit of the model's: a program that ended so would not say why, nor where.
            return _fail_in_code(error, rank)
    except KeyboardInterrupt as error:
        if rank == 0:
            said = str(error)
            # The bare name of a signal tells nothing; what is in a checkpoint does.
            what = f": {said}" if said and said not in signal.Signals.__members__ else ""
            print(f"psframe: interrupted{what}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Interrupted as error:
        _fail(error, rank)
        return PREEMPTED
    except WorkerFailed as error:
        if error.type != KeyboardInterrupt.__name__:
            return _fail(error, rank)
        if rank == 0:
            what = f"psframe: interrupted: rank {error.rank} received {error.message}"
            print(what, file=sys.stderr, flush=True)
        return INTERRUPTED
    except (PsframeError, OSError) as error:
        return _fail(error, rank)
    except Exception as error:
        # A bug of the model's or ours: whoever repairs it needs the place.
        return _fail_in_code(error, rank)


def _parse_together(argv: Sequence[str], launched: Launcher | None) -> Settings:
    """Parse the flags; a file of settings that one rank cannot read, no rank goes on without.

    Raises:
        SystemExit, ArgumentError: as `parse`, or another rank's.
        LaunchError, RankLost: as `psframe.run`.
    """
    if launched is None or not any(flag.partition("=")[0] == "--config" for flag in argv):
        return parse(argv, quiet=launched is not None and launched.rank > 0)
    from psframe.together import fail_if_any

    try:
        settings = parse(argv, quiet=launched.rank > 0)
    except ArgumentError as error:
        fail_if_any(launched, error)
        raise
    except SystemExit:  # of this rank's, which has said why
        with contextlib.suppress(ArgumentError):
            fail_if_any(launched, ArgumentError("its flags end it"))
        raise
    fail_if_any(launched, None)
    return settings


def _train(settings: Settings, launched: Launcher | None) -> int:
    start = time.monotonic()
    if settings.resume and is_completed(settings, launched):  # all ranks together
        return 0
    serving = find_serving(settings.placement(), launched)  # all ranks together, if at all
    for idle in settings.idle(launched=launched is not None):
        _log.warning("%s", idle)
    try:
        trainer, parts, watching = _prepare(settings, launched, serving)
    except Exception as error:
        if launched is None or launched.replaces:
            raise
        from psframe.cluster import fail_together

        raise fail_together(launched, error) from error  # or the other ranks would wait for this
    with interrupting():
        with noting_requests(), watching:
            trained = trainer.fit(parts)
        if trained.result.is_root:
            _leave(settings, parts, watching, trained, time.monotonic() - start, serving)
    if trained.failure is None:
        return 0
    return _fail_at_the_end(trained.failure, launched.rank if launched else 0)


def _prepare(
    settings: Settings, launched: Launcher | None, serving: tuple[int, ...]
) -> tuple[Trainer, Parts, Watching]:
    """Load the data and make the model, its trainer, and what looks on."""
    if launched is None or launched.rank not in serving:
        _check_device(settings.device, settings.precision)
    if launched is None or launched.rank in serving:
        _check_server_device(settings.server_device)
    parts = load_parts(settings)
    model = create(settings.model, parts.train.input_shape, parts.train.n_classes)
    workers = working = settings.workers
    if launched is not None:
        working = None if launched.size is None else launched.size - len(serving)
    elif workers is None:
        workers = working = THREADS
    if working is not None and settings.backup and settings.backup >= working:
        raise ArgumentError(
            f"--backup: {settings.backup} of {working} workers cannot all be backups; give fewer"
        )
    root = launched is None or launched.rank == 0
    watching = Watching(
        Monitor(max(working or 0, 0), settings.epochs, len(parts.train)),
        servers=len(serving) or one_process(settings.placement()),
        serving=serving,
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
        precision=settings.precision,
        server_device=settings.server_device,
        gpu_direct=settings.gpu_direct,
        servers=settings.placement(),
        workers=workers,
        run_dir=settings.run_dir,
        overwrite=settings.overwrite,
        checkpoint_every=settings.cadence(),
        keep_checkpoints=settings.keep_checkpoints,
        resume=settings.resume,
        clip_norm=settings.clip_norm,
        stale=parse_stale(settings.stale),
        codec=parse_codec(settings.codec, "--codec"),
        pull_codec=parse_codec(settings.pull_codec, "--pull-codec"),
        timeout_s=settings.timeout_s,
        respawn=settings.respawn,
        config=settings.as_config(),
        callbacks=(watching.epoch,),
        observer=watching,
        prefetch=not settings.no_prefetch,
        spans=settings.trace,
        name=settings.model,
    )
    return trainer, parts, watching


def _check_device(device: str, precision: str) -> None:
    try:
        chosen = choose_device(device, worker=0)
    except ValueError as error:
        raise ArgumentError(f"--{error}") from error
    if chosen == "cpu":
        try:
            check_host(precision)
        except ArgumentError as error:
            raise ArgumentError(f"--{error}") from error


def _check_server_device(device: str) -> None:
    try:
        choose_server_device(device, server=0)
    except ValueError as error:
        raise ArgumentError(f"--{str(error).replace('_', '-', 1)}") from error


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
    """Write the summary, and say how it went."""
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
    folder = result.run_dir
    if folder is not None:
        write_summary(folder, record)
    try:
        print_summary(
            record,
            sys.stdout,
            run_dir=None if folder is None else _as_given(folder, settings),
            reasons=result.ledger.reasons,
            launched=bool(serving),
        )
    except OSError as error:  # whoever was to read it has gone; the run is completed all the same
        _log.warning("the summary could not be printed: %s", error.strerror or error)
        give_up_printing()


def _as_given(folder: Path, settings: Settings) -> Path:
    """Show the folder as the user did, if it is still there from here."""
    if Path(settings.run_dir).is_absolute():
        return folder
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _fail(error: Exception, rank: int, status: int = 1) -> int:
    """Say what is wrong, once: what is wrong on another rank, rank 0 has been told."""
    if rank == 0 or isinstance(error, (LaunchError, RankLost)):
        print(f"psframe: error: {error}", file=sys.stderr, flush=True)
    return status


def _fail_in_code(error: BaseException, rank: int) -> int:
    """Show a bug of the model's or ours with its place.

    What happens in a worker of another rank, rank 0 tells with the whole traceback.
    """
    what = describe(error)
    if rank == 0:
        print(what.traceback, end="", file=sys.stderr)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{place.filename}, line {place.lineno}"
    print(
        f"psframe: error: rank {rank}: {what.type}: {what.message} ({where})",
        file=sys.stderr,
        flush=True,
    )
    return 1


def _fail_at_the_end(error: Exception, rank: int) -> int:
    """Say that the training is done and saved, and its evaluation failed."""
    status = _fail(error, rank) if isinstance(error, PsframeError) else _fail_in_code(error, rank)
    status = PREEMPTED if isinstance(error, Interrupted) else status
    if rank == 0:
        print(
            "psframe: the training itself is done and its weights are saved, but they could not "
            "be evaluated; psframe evaluate RUN_DIR tries it again",
            file=sys.stderr,
            flush=True,
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
