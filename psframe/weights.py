"""Trained weights in a safetensors file, with all that is needed to use them.

The file holds the parameters under their names, the preprocessing's tensors, and as metadata what
the model is: `--model`'s name, the shape of a sample, and the names of the classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data import Dataset, Preprocessing
from psframe.errors import ArgumentError, RunDirError
from psframe.rundir import CHECKPOINTS

__all__ = ["Weights", "load_weights", "save_weights"]

_FORMAT = "psframe-weights-1"
_FINAL = "final.safetensors"


@dataclass(frozen=True)
class Weights:
    """A trained model, to be used.

    Attributes:
        params: names to arrays.
        model: as `--model` names it.
        input_shape: of one sample.
        classes: their names.
        preprocessing: of samples.
    """

    params: dict[str, npt.NDArray[Any]]
    model: str
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def save_weights(folder: Path, params: Mapping[str, Any], model: str, train: Dataset) -> Path:
    """Write the weights into a run directory, by rename.

    Args:
        folder: the run directory.
        params: names to NumPy arrays.
        model: as `--model` names it.
        train: the training part.

    Raises:
        RunDirError: they do not fit, or cannot be written.
    """
    from safetensors.numpy import save

    file = folder / CHECKPOINTS / _FINAL
    temporary = file.with_name(file.name + ".tmp")
    preprocessing = train.preprocessing or Preprocessing.scale(1)
    tensors = {name: np.asarray(p, order="C") for name, p in params.items()}
    metadata = {
        "format": _FORMAT,
        "model": model,
        "input_shape": json.dumps(list(train.input_shape)),
        "classes": json.dumps(list(train.classes)),
    }
    try:
        temporary.write_bytes(save({**tensors, **preprocessing.tensors()}, metadata))
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = f"{file}: the final weights could not be written: {error.strerror}"
        raise RunDirError(reason) from error
    return file


def load_weights(source: str | Path) -> Weights:
    """Read the weights of a run directory, or a file of weights.

    Raises:
        ArgumentError: there are none, or the file is not what `save_weights` wrote.
    """
    path = Path(source)
    file = path / CHECKPOINTS / _FINAL if path.is_dir() else path
    if not file.is_file():
        what = "this run has left no weights; is it completed?" if path.is_dir() else "no such file"
        raise ArgumentError(f"{file}: {what}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArgumentError(f"{file}: is no safetensors file, or a damaged one: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ArgumentError(
            f"{file}: expected weights that psframe.train has written ({_FORMAT}), found "
            f"{metadata.get('format', 'a file without that mark')!r}"
        )
    try:
        preprocessing = Preprocessing.load(tensors)
        for name in preprocessing.tensors():
            del tensors[name]
        return Weights(
            tensors,
            metadata["model"],
            tuple(int(n) for n in json.loads(metadata["input_shape"])),
            tuple(str(c) for c in json.loads(metadata["classes"])),
            preprocessing,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"{file}: its metadata make no sense: {error!r}") from error
