"""In which arithmetic a model computes on a GPU."""

from __future__ import annotations

from typing import Any, Literal, get_args

from psframe.errors import ArgumentError

__all__ = ["PRECISIONS", "Precision", "check_host", "set_precision"]

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def set_precision(model: Any, precision: str) -> None:
    """Tell a model in which arithmetic to compute; see `psframe.models.Sequential`.

    Raises:
        ArgumentError: there is no such precision, or the model cannot be told.
    """
    if precision not in PRECISIONS:
        raise ArgumentError(
            f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}"
        )
    if hasattr(model, "precision"):
        model.precision = precision
    elif precision != "float32":
        raise ArgumentError(
            f"precision: {precision!r} goes with models that have an attribute `precision`, as the "
            f"built-in ones; {type(model).__name__} has none and computes as it likes"
        )


def check_host(precision: str) -> None:
    """Raise ArgumentError if the host is to compute in anything but float32."""
    if precision != "float32":
        raise ArgumentError(
            f"precision: {precision!r} needs a GPU; on the CPU there is only 'float32'"
        )
