"""What runs of workers with a stand-in of CuPy have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

import psframe
from psframe import BSP
from psframe.pending import Pending

__all__ = ["are_ordered", "check_outcome", "push_by_turns"]


def push_by_turns(worker: Any, grads: dict[str, Any], step: int) -> Pending:
    """Push from `gradients()` in every other step, else from arrays that are overwritten then."""
    if step % 2:
        for name, array in worker.gradients().items():
            array[...] = grads[name]
        return worker.push(None)
    pending: Pending = worker.push(grads)
    for array in grads.values():
        array[...] = np.full(array.shape, 7, np.float32)
    return pending


def are_ordered(mode: Any, workers: int) -> bool:
    """Say whether the order of pushes is known, and so the bits of a result."""
    return workers == 1 or isinstance(mode, BSP)


def check_outcome(gpu: psframe.Result, cpu: psframe.Result, *, same_bits: bool) -> None:
    """Compare the parameters of the root's results, of which both are of as many updates."""
    assert gpu.params is not None
    assert cpu.params is not None
    assert gpu.version == cpu.version
    for name, value in cpu.params.items():
        assert np.isfinite(gpu.params[name]).all()
        if same_bits:
            assert gpu.params[name].tobytes() == value.tobytes(), name
