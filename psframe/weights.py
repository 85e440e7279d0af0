"""Trained weights in a safetensors file, with all that is needed to use them.

The file holds the parameters under their names, the preprocessing's tensors, and as metadata what
the model is: `--model`'s name, the shape of a sample, and the names of the classes.
"""

from __future__ import annotations

import contextlib
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data import Dataset, Preprocessing
from psframe.data.checks import check_classes
from psframe.errors import ArgumentError, RunDirError
from psframe.rundir import CHECKPOINTS

__all__ = ["Weights", "load_weights", "save_weights"]

_FORMAT = "psframe-weights-1"
_FINAL = "final.safetensors"
# Numbers in one sample, 1 GiB of float32: a model for more is not built on a file's word alone.
_SAMPLE_MAX = 1 << 28


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
        with contextlib.suppress(OSError):  # what is wrong with the folder has been said
            temporary.unlink()
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
    metadata, tensors = _read(file)
    if metadata.get("format") != _FORMAT:
        raise ArgumentError(
            f"{file}: expected weights that psframe.train has written ({_FORMAT}), found "
            f"{metadata.get('format', 'a file without that mark')!r}"
        )
    try:
        shape = _input_shape(_json(metadata, "input_shape"))
        classes = _classes(_json(metadata, "classes"))
        preprocessing = Preprocessing.load(tensors)
        for name, array in preprocessing.tensors().items():
            _check_broadcast(name, array.shape, shape)
            del tensors[name]
        if not tensors:
            raise ValueError("it holds no parameters")
        _check_params(tensors)
        return Weights(tensors, metadata["model"], shape, classes, preprocessing)
    except KeyError as error:
        raise ArgumentError(f"{file}: its metadata have no {error}") from error
    except ValueError as error:
        raise ArgumentError(f"{file}: cannot be used: {error}") from error


def _read(file: Path) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    """Read a file's metadata and its tensors.

    Raises:
        ArgumentError: it is no safetensors file, or holds what NumPy has no dtype for.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return opened.metadata() or {}, tensors
    except (SafetensorError, OSError) as error:
        raise ArgumentError(f"{file}: is no safetensors file, or a damaged one: {error}") from error
    except (TypeError, ValueError, AttributeError, MemoryError) as error:
        raise ArgumentError(f"{file}: its tensors cannot be read: {error}") from error


def _json(metadata: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(metadata[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: is no JSON: {reprlib.repr(metadata[name])}") from error


def _input_shape(found: Any) -> tuple[int, ...]:
    sizes = found if isinstance(found, list) else []
    if not sizes or not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(
            f"input_shape: expected a list of sizes from 1 on, got {reprlib.repr(found)}"
        )
    if math.prod(sizes) > _SAMPLE_MAX:
        raise ValueError(
            f"input_shape: {reprlib.repr(found)} are more than {_SAMPLE_MAX:,} numbers in a sample"
        )
    return tuple(sizes)


def _classes(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not found or not all(isinstance(c, str) for c in found):
        raise ValueError(f"classes: expected a list of names, got {reprlib.repr(found)}")
    check_classes(found)
    return tuple(found)


def _check_broadcast(name: str, shape: tuple[int, ...], sample: tuple[int, ...]) -> None:
    try:
        fits = np.broadcast_shapes(shape, sample) == sample
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name!r} has shape {shape}, which does not fit samples of {sample}")


def _check_params(params: Mapping[str, npt.NDArray[Any]]) -> None:
    """See that the parameters are of one real dtype, and finite.

    Raises:
        ValueError: they are not.
    """
    dtypes = {array.dtype for array in params.values()}
    if len(dtypes) > 1 or not dtypes <= {np.dtype(np.float32), np.dtype(np.float64)}:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"expected parameters of float32, or of float64, found {found}")
    for name, array in params.items():
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise ValueError(
                f"{bad} of the {array.size} numbers of parameter {name!r} are NaN or infinite: "
                "the file is damaged, or the training has diverged"
            )
