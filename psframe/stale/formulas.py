"""The corrections of stale gradients, one scalar function each: the only place where they stand.

As in `psframe.optim.formulas`, and for the same reasons: numba compiles them for the CPU
(`kernels.py`), and `psframe.optim.cuda` writes them before the update rule's for the GPU. `w` is
the present parameter, `read` the one that the gradient was computed on.
"""

from __future__ import annotations

from math import sqrt

__all__ = ["adaptive", "fixed", "scaled"]


def fixed(g: float, w: float, read: float, lam: float) -> float:
    """Correct to first order: g + lam g g (w - read)."""
    return g + lam * (g * g) * (w - read)


def adaptive(
    g: float,
    w: float,
    read: float,
    s: float,
    lam: float,
    decay: float,
    rest: float,
    eps: float,
) -> tuple[float, float]:
    """Correct with lam over the root of s, the running mean square of the worker's gradients."""
    square = g * g
    s = decay * s + rest * square
    return g + lam / sqrt(s + eps) * square * (w - read), s


def scaled(g: float, factor: float) -> float:
    """Scale."""
    return g * factor
