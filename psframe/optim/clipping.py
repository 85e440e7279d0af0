"""Clipping of a gradient by its global norm."""

from __future__ import annotations

import math

__all__ = ["clip_scale"]


def clip_scale(norm: float, clip_norm: float) -> float:
    """Give the factor that brings a gradient of norm `norm` down to `clip_norm`.

        min(1, clip_norm / norm)

    Pascanu, Mikolov and Bengio, On the Difficulty of Training Recurrent Neural Networks, 2013,
    algorithm 1.

    Args:
        norm: the gradient's Euclidean norm over all tensors (and all shards).
        clip_norm: the largest norm allowed, > 0; infinity clips nothing.

    Returns:
        The factor, or NaN for a norm that is not finite, so that the update is refused: neither
        an unclipped gradient nor 0 in its place would be what was asked for.

    Raises:
        ValueError: `clip_norm` is not > 0.

    >>> clip_scale(5.0, 1.0), clip_scale(0.5, 1.0), clip_scale(0.0, 1.0)
    (0.2, 1.0, 1.0)
    """
    if not clip_norm > 0:
        raise ValueError(
            f"clip_norm: got {clip_norm!r}, expected a number > 0; leave it out to clip nothing"
        )
    if not math.isfinite(norm):
        return math.nan
    return clip_norm / norm if norm > clip_norm else 1.0
