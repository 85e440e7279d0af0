"""What evaluating and predicting with a run's weights have in common."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from psframe.data import Dataset, Parts, load, prepare
from psframe.data.joining import join
from psframe.data.unlabelled import load_samples
from psframe.devices import choose_device
from psframe.errors import ArgumentError, LaunchError, PsframeError, RankLost
from psframe.launcher import find_launcher
from psframe.models import Model, create
from psframe.optim import SGD
from psframe.output import give_up_printing, parse_flags, prepare_output
from psframe.placement import check_servers
from psframe.plan import check_threads
from psframe.rundir import CONFIG
from psframe.settings import INTERRUPTED, THREADS, Settings, from_file
from psframe.trainer import Trainer, initial_params
from psframe.weights import Weights, load_weights

__all__ = ["Applied", "main_of"]

# What a command loads before it computes.
_Loaded = TypeVar("_Loaded")


@dataclass(frozen=True)
class Applied:
    """A trained model, ready for use on the ranks that there are.

    Attributes:
        source: where it came from.
        weights: as they were stored.
        trainer: to evaluate and predict with.
        root: whether this is the rank that gets the results.
    """

    source: str
    weights: Weights
    trainer: Trainer
    root: bool

    def labelled(self, source: str | None, label: str | None, part: str | None) -> Dataset:
        """Load data with labels, or what the run was trained on, split as it was there.

        Raises:
            ArgumentError: there is no such data or part, or it does not suit the model.
        """
        try:
            parts = self._own_parts() if source is None else _as_parts(load(source, label))
        except ArgumentError:
            raise
        except ValueError as error:
            raise ArgumentError(str(error)) from error
        return self._suited(_chosen(parts, part), labelled=True)

    def samples(self, source: str, label: str | None, part: str | None) -> Dataset:
        """Load data whose labels, if there are any, do not matter.

        Raises:
            ArgumentError: as `labelled`.
        """
        try:
            data = load_samples(source, label, math.prod(self.weights.input_shape))
        except ValueError as error:
            raise ArgumentError(str(error)) from error
        return self._suited(_chosen(_as_parts(data), part), labelled=False)

    def _own_parts(self) -> Parts:
        """Load what the run was trained on, split as it was there.

        Raises:
            ValueError: there is no such data any more, or it is not known.
        """
        settings = self._settings()
        parts = _as_parts(load(settings.data, settings.label))
        # What was measured then is stored, and need not be measured.
        train = replace(parts.train, preprocessing=self.weights.preprocessing)
        return prepare(
            parts._replace(train=train),
            settings.test_fraction,
            settings.split_seed,
            validation_fraction=settings.validation_fraction,
        )

    def _settings(self) -> Settings:
        config = Path(self.source) / CONFIG
        if not config.is_file():
            raise ArgumentError(
                f"{self.source}: there is no {CONFIG} that says what it was trained on; name the "
                "data"
            )
        return from_file(config)

    def _suited(self, parts: Sequence[Dataset], *, labelled: bool) -> Dataset:
        """Give the data the model's shape, classes and preprocessing, and join its parts."""
        weights = self.weights
        suited = []
        for part in parts:
            data = _reshaped(part, weights.input_shape, self.source)
            if labelled:
                data = _renumbered(data, weights.classes, self.source)
            suited.append(
                replace(
                    data,
                    n_classes=len(weights.classes),
                    classes=weights.classes,
                    preprocessing=weights.preprocessing,
                    augmentation=None,
                )
            )
        return join(suited)


def _reshaped(data: Dataset, shape: tuple[int, ...], source: str) -> Dataset:
    """Make images of flat samples, and add or drop the axis of a single channel.

    Raises:
        ArgumentError: the samples have another shape, which no such step turns into the model's.
    """
    given = data.input_shape
    if given == shape:
        return data
    flat = len(given) == 1 and given[0] == math.prod(shape)
    one_channel = len(given) + len(shape) == 5 and (given == (1, *shape) or (1, *given) == shape)
    if not (flat or one_channel) or not isinstance(data.x, np.ndarray):
        raise ArgumentError(
            f"{data.name}: has samples of shape {given}, the model in {source} expects {shape}"
        )
    return replace(data, x=data.x.reshape(len(data.x), *shape))


def _renumbered(data: Dataset, classes: tuple[str, ...], source: str) -> Dataset:
    """Number the data's labels as the model does, by the names of the classes."""
    number = {name: i for i, name in enumerate(classes)}
    used = np.unique(data.labels)
    unknown = [data.classes[i] for i in used if data.classes[i] not in number]
    if unknown:
        raise ArgumentError(
            f"{data.name}: has label {unknown[0]!r}, which is not among the {len(classes)} classes "
            f"of the model in {source}"
        )
    table = np.array([number.get(name, 0) for name in data.classes], np.int64)
    return replace(data, y=table[data.y])


def _as_parts(data: Dataset | Parts) -> Parts:
    return data if isinstance(data, Parts) else Parts(data)


def _chosen(parts: Parts, part: str | None) -> list[Dataset]:
    """Pick what was asked for: a part, or all; else the test part if there is one, or all."""
    named = zip(Parts._fields, parts, strict=True)
    there = {name: data for name, data in named if data is not None}
    if part is None:
        part = "test" if "test" in there else "all"
    if part == "all":
        return list(there.values())
    if part not in there:
        raise ArgumentError(
            f"--part: there is no part {part!r} in {parts.train.name}, only {list(there)}"
        )
    return [there[part]]


def main_of(
    make_arguments: Callable[[], Any],
    prog: str,
    description: str,
    argv: Sequence[str] | None,
    prepare_action: Callable[[Any, Applied], _Loaded],
    action: Callable[[Any, Applied, _Loaded], None],
) -> int:
    """Run a command that uses a run's weights.

    Args:
        make_arguments: gives the dataclass of its flags, with run_dir, servers, workers, device.
        prog, description: for --help.
        argv: the flags; sys.argv's if None.
        prepare_action: with the flags and the model: loads the data and checks what can be checked
            beforehand; what is wrong on one rank, all are told.
        action: with these, and what that has loaded: all ranks compute together.

    Returns:
        The exit status: 0, 1 for an error, 130 for an interrupt; wrong flags exit with 2.
    """
    import tyro

    prepare_output()
    launched = find_launcher()
    rank = launched.rank if launched else 0
    logging.basicConfig(format="psframe: %(levelname)s: %(message)s", level=logging.WARNING)
    if rank:
        logging.getLogger("psframe").setLevel(logging.ERROR)
    arguments = parse_flags(
        tyro.cli,
        make_arguments(),
        args=list(sys.argv[1:] if argv is None else argv),
        name=prog,
        quiet=bool(rank),
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        try:
            applied = _apply(arguments, rank, launched is not None)
            loaded = prepare_action(arguments, applied)
        except Exception as error:
            if launched is None:
                raise
            from psframe.cluster import fail_together

            raise fail_together(launched, error) from error
        action(arguments, applied, loaded)
    except KeyboardInterrupt:
        print("psframe: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except SystemExit as error:  # the model's: a program that ended so would not say why
        what = f"the model called sys.exit({error.code!r})"
        print(f"psframe: error: rank {rank}: {what}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:
        give_up_printing()
    except (PsframeError, OSError) as error:
        if isinstance(error, OSError):  # perhaps of a full disk, which has what was printed
            give_up_printing()
        # Where ranks do not find each other there is perhaps no rank 0 to say it.
        if rank == 0 or isinstance(error, (LaunchError, RankLost)):
            print(f"psframe: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _check_flags(arguments: Any, rank: int, launched: bool) -> None:
    """Check the flags that say where to compute, before anything is read.

    Raises:
        ArgumentError: a count is not positive, or this rank computes and has not that device.
    """
    try:
        check_servers(arguments.servers, "--servers")
        if arguments.workers is not None:
            check_threads("--workers", arguments.workers)
        if not launched or rank >= arguments.servers:
            choose_device(arguments.device, worker=0)
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def _made(weights: Weights, source: str) -> Model:
    """Make the model that the weights are of.

    Raises:
        ArgumentError: it cannot be made, or has other parameters.
    """
    try:
        model = create(weights.model, weights.input_shape, len(weights.classes))
        expected = initial_params(model, 0)
    except ArgumentError as error:
        raise ArgumentError(f"{source}: {error}") from error
    except (ValueError, MemoryError, OverflowError) as error:
        raise ArgumentError(
            f"{source}: the model {weights.model!r} cannot be made for samples of shape "
            f"{weights.input_shape}: {type(error).__name__}: {error}"
        ) from error
    if {n: p.shape for n, p in expected.items()} != {n: p.shape for n, p in weights.params.items()}:
        raise ArgumentError(
            f"{source}: its weights are not those of the model {weights.model!r} for samples of "
            f"shape {weights.input_shape} and {len(weights.classes)} classes"
        )
    return model


def _apply(arguments: Any, rank: int, launched: bool) -> Applied:
    _check_flags(arguments, rank, launched)
    weights = load_weights(arguments.run_dir)
    model = _made(weights, str(arguments.run_dir))
    workers = arguments.workers
    if workers is None and not launched:
        workers = THREADS
    trainer = Trainer(
        model,
        optimizer=SGD(0.0),
        servers=arguments.servers,
        workers=workers,
        device=arguments.device,
    )
    return Applied(str(arguments.run_dir), weights, trainer, rank == 0)
