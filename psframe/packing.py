"""Gradients into a slot: checked, cast, copied, and judged finite in the same pass.

The norm is summed over blocks of each tensor, whatever the shards, so that it does not depend
on the number of servers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from psframe.layout import Array, Layout, check_gradient_dtype

__all__ = ["check_gradients", "judge", "pack"]

# Elements summed and copied at a time: 32 KiB of float32 stay in the first cache, and BLAS does
# not start threads for so few (so that the sum's bits do not depend on their number).
_BLOCK = 8192


def check_gradients(layout: Layout, grads: Mapping[str, Any], where: str) -> None:
    """Check names, dtypes and shapes of a gradient against the parameters.

    Args:
        layout: the parameters.
        grads: mapping of names to arrays.
        where: beginning of the error's text, such as "push from worker 3".

    Raises:
        ValueError: a name is missing or unknown, or a shape is wrong.
        TypeError: not a mapping of arrays, or a dtype is not floating-point.
    """
    if not isinstance(grads, Mapping):
        raise TypeError(
            f"{where}: expected a mapping of names to arrays, got {type(grads).__name__}"
        )
    if len(grads) != len(layout.names) or any(name not in grads for name in layout.names):
        missing = [name for name in layout.names if name not in grads]
        unknown = [name for name in grads if name not in layout.names]
        raise ValueError(
            f"{where}: the gradient must have the parameters' names;"
            f" missing: {missing or 'none'}, unknown: {unknown or 'none'}"
        )
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        grad = grads[name]
        if getattr(grad, "dtype", None) != layout.dtype:
            check_gradient_dtype(name, getattr(grad, "dtype", None), where)
        if grad.shape != shape:
            raise ValueError(
                f"{where}: gradient {name!r} has shape {tuple(grad.shape)}, expected {shape}"
            )


def pack(layout: Layout, grads: Mapping[str, Any], slot: Array) -> tuple[bool, float]:
    """Copy checked host gradients into a flat slot.

    Args:
        layout: the parameters.
        grads: mapping of names to NumPy arrays, checked; only read.
        slot: flat array of P elements of the layout's dtype, written.

    Returns:
        Whether all elements are finite in the slot's dtype, and their Euclidean norm.
    """
    total = 0.0  # an overflow in it is looked into by _verdict
    for name, offset, size in zip(layout.names, layout.offsets, layout.sizes, strict=True):
        source = grads[name]
        target = slot[offset : offset + size]
        if source.dtype == slot.dtype and source.flags.c_contiguous:
            flat = source.reshape(-1)
            for begin in range(0, size, _BLOCK):
                block = flat[begin : begin + _BLOCK]
                total += float(np.dot(block, block))
                target[begin : begin + _BLOCK] = block
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # judged below
                target.reshape(source.shape)[...] = source
            total += _sum_in_blocks(target)
    return _verdict(slot, total)


def judge(layout: Layout, slot: Array) -> tuple[bool, float]:
    """Say of gradients written straight into a slot what `pack` says of those it copies."""
    total = 0.0
    for offset, size in zip(layout.offsets, layout.sizes, strict=True):
        total += _sum_in_blocks(slot[offset : offset + size])
    return _verdict(slot, total)


def _sum_in_blocks(flat: Array) -> float:
    total = 0.0
    for begin in range(0, flat.size, _BLOCK):
        block = flat[begin : begin + _BLOCK]
        total += float(np.dot(block, block))
    return total


def _verdict(slot: Array, total: float) -> tuple[bool, float]:
    if math.isfinite(total):
        return True, math.sqrt(total)
    if not bool(np.isfinite(slot).all()):
        return False, math.nan
    # Finite, but the squares overflow: elements above 1e19 in float32, 1e154 in float64.
    largest = float(np.abs(slot).max())
    return True, largest * math.sqrt(float(np.square(slot / slot.dtype.type(largest)).sum()))
