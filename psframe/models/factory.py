"""A model from its name, or from `package.module:Class`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from psframe.errors import ArgumentError
from psframe.models.base import Model, check_model
from psframe.models.cnn import CNN
from psframe.models.mlp import MLP
from psframe.models.softmax import Softmax
from psframe.roles import describe

__all__ = ["NAMES", "create"]

_BUILT_IN: dict[str, Callable[[tuple[int, ...], int], Model]] = {
    "cnn": CNN,
    "mlp": MLP,
    "softmax": Softmax,
}
NAMES = tuple(_BUILT_IN)


def create(name: str, input_shape: tuple[int, ...], n_classes: int) -> Model:
    """Build a model.

    Args:
        name: "softmax", "mlp", "cnn", or "package.module:Class", which is imported, from the
            current directory too, and called as `Class(input_shape, n_classes)`.
        input_shape: shape of one sample.
        n_classes: number of classes.

    Raises:
        ArgumentError: no such name, module or class; the class cannot be called so, or lacks a
            method of `Model`. What the user's module raised on import is its cause.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name](input_shape, n_classes)
    module_name, colon, class_name = name.partition(":")
    if not (module_name and colon and class_name):
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(
            f"model {name!r}: expected one of {', '.join(NAMES)}, or package.module:Class{hint}"
        )
    factory = _find(name, _import(name, module_name), class_name)
    try:
        model = factory(input_shape, n_classes)
    except (Exception, SystemExit) as error:
        raise ArgumentError(
            f"model {name!r}: {class_name}(input_shape={input_shape}, n_classes={n_classes}) "
            f"raised {_describe(error)}"
        ) from error
    check_model(model, f"model {name!r}")
    return model  # type: ignore[no-any-return]


def _import(name: str, module_name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ArgumentError(
            f"model {name!r}: importing {module_name} raised {_describe(error)}"
        ) from error


def _find(name: str, module: Any, class_name: str) -> Any:
    try:
        return getattr(module, class_name)
    except AttributeError:
        candidates = [n for n, v in vars(module).items() if isinstance(v, type)]
        near = difflib.get_close_matches(class_name, candidates, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(
            f"model {name!r}: {module.__name__} ({getattr(module, '__file__', 'built in')}) has no "
            f"{class_name!r}{hint}"
        ) from None


def _describe(error: BaseException) -> str:
    """Name an exception and the line of the user's that it came from."""
    what = describe(error)
    text = f"{what.type}: {what.message}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text
