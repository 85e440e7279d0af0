"""What evaluating and predicting with a run's weights have in common."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from psframe.data import Dataset, Parts, load, prepare
from psframe.data.unlabelled import load_samples
from psframe.errors import ArgumentError, PsframeError
from psframe.launcher import find_launcher
from psframe.models import create
from psframe.optim import SGD
from psframe.output import give_up_printing
from psframe.rundir import CONFIG
from psframe.settings import Settings, from_file
from psframe.trainer import Trainer
from psframe.weights import Weights, load_weights

__all__ = ["Applied", "main_of"]

_THREADS = 3
_INTERRUPTED = 130


@dataclass(frozen=True)
class Applied:
    """A trained model, ready for use on the ranks that there are.

    Attributes:
        source: where it came from.
        weights: as they were stored.
        trainer: to evaluate and predict with.
    """

    source: str
    weights: Weights
    trainer: Trainer

    def labelled(self, source: str | None, label: str | None, part: str | None) -> Dataset:
        """Load data with labels, or what the run was trained on, split as it was there.

        Raises:
            ArgumentError: there is no such data or part, or it does not suit the model.
        """
        if source is None:
            settings = self._settings()
            parts = _parts(settings.data, settings.label, settings)
        else:
            parts = _parts(source, label, None)
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
        parts = data if isinstance(data, Parts) else Parts(data)
        return self._suited(_chosen(parts, part), labelled=False)

    def _settings(self) -> Settings:
        config = Path(self.source) / CONFIG
        if not config.is_file():
            raise ArgumentError(
                f"{self.source}: there is no {CONFIG} that says what it was trained on; name the "
                "data"
            )
        return from_file(config)

    def _suited(self, data: Dataset, *, labelled: bool) -> Dataset:
        """Give the data the model's shape, classes and preprocessing."""
        weights, shape = self.weights, self.weights.input_shape
        if data.input_shape != shape:
            if math.prod(data.input_shape) != math.prod(shape) or not isinstance(
                data.x, np.ndarray
            ):
                raise ArgumentError(
                    f"{data.name}: has samples of shape {data.input_shape}, the model in "
                    f"{self.source} expects {shape}"
                )
            data = replace(data, x=data.x.reshape(len(data.x), *shape))
        if labelled:
            data = _renumbered(data, weights.classes, self.source)
        return replace(
            data,
            n_classes=len(weights.classes),
            classes=weights.classes,
            preprocessing=weights.preprocessing,
            augmentation=None,
        )


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


def _parts(source: str, label: str | None, settings: Settings | None) -> Parts:
    try:
        data = load(source, label)
        if settings is not None:
            return prepare(
                data,
                settings.test_fraction,
                settings.split_seed,
                validation_fraction=settings.validation_fraction,
            )
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    return data if isinstance(data, Parts) else Parts(data)


def _chosen(parts: Parts, part: str | None) -> Dataset:
    """Pick a part: the one asked for, or the test part if there is one, or all there is."""
    if part is None:
        return parts.train if parts.test is None else parts.test
    if part == "all" and parts.validation is None and parts.test is None:
        return parts.train
    chosen = getattr(parts, part, None)
    if not isinstance(chosen, Dataset):
        there = [name for name in Parts._fields if getattr(parts, name) is not None]
        raise ArgumentError(
            f"--part: there is no part {part!r} in {parts.train.name}, only {there}"
        )
    return chosen


def main_of(
    make_arguments: Callable[[], Any],
    prog: str,
    description: str,
    argv: Sequence[str] | None,
    action: Callable[[Any, Applied], None],
) -> int:
    """Run a command that uses a run's weights.

    Args:
        make_arguments: gives the dataclass of its flags, with run_dir, servers, workers, device.
        prog, description: for --help.
        argv: the flags; sys.argv's if None.
        action: what to do with the flags and the model.

    Returns:
        The exit status: 0, 1 for an error, 130 for an interrupt; wrong flags exit with 2.
    """
    import tyro

    launched = find_launcher()
    rank = launched.rank if launched else 0
    logging.basicConfig(format="psframe: %(levelname)s: %(message)s", level=logging.WARNING)
    if rank:
        logging.getLogger("psframe").setLevel(logging.ERROR)
    arguments = tyro.cli(
        make_arguments(),
        args=list(sys.argv[1:] if argv is None else argv),
        prog=f"python -m psframe.{prog}",
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=rank == 0,
    )
    try:
        try:
            applied = _apply(arguments, launched is not None)
        except Exception as error:
            if launched is None:
                raise
            from psframe.cluster import fail_together

            raise fail_together(launched, error) from error
        action(arguments, applied)
    except KeyboardInterrupt:
        print("psframe: interrupted", file=sys.stderr, flush=True)
        return _INTERRUPTED
    except BrokenPipeError:
        give_up_printing()
    except (PsframeError, OSError) as error:
        if rank == 0:
            print(f"psframe: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _apply(arguments: Any, launched: bool) -> Applied:
    weights = load_weights(arguments.run_dir)
    model = create(weights.model, weights.input_shape, len(weights.classes))
    expected = model.init(np.random.default_rng(0))
    wrong = {n: p.shape for n, p in expected.items()} != {
        n: p.shape for n, p in weights.params.items()
    }
    if wrong:
        raise ArgumentError(
            f"{arguments.run_dir}: its weights are not those of the model {weights.model!r} for "
            f"samples of shape {weights.input_shape}"
        )
    workers = arguments.workers
    if workers is None and not launched:
        workers = _THREADS
    trainer = Trainer(
        model,
        optimizer=SGD(0.0),
        servers=arguments.servers,
        workers=workers,
        device=arguments.device,
    )
    return Applied(str(arguments.run_dir), weights, trainer)
