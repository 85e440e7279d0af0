"""Which device a worker computes on."""

from __future__ import annotations

import re

from psframe.devices.base import Device, HostDevice
from psframe.devices.cuda import CudaDevice
from psframe.layout import Layout

__all__ = ["choose_device", "make_device", "visible_gpus"]


def choose_device(device: str, worker: int, visible: int | None = None) -> str:
    """Turn `device` into "cpu" or "cuda:k".

    Args:
        device: "auto", "cpu", "cuda" or "cuda:k".
        worker: index of the worker among those on its node; GPUs are given out in turn.
        visible: GPUs visible to this process; asked of CuPy if None.

    Raises:
        ValueError: the device is none of these, or there is no such GPU.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::([0-9]+))?", device)
    if found is None:
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:k', got {device!r}")
    if device == "cpu":
        return "cpu"
    count = visible_gpus() if visible is None else visible
    if device == "auto" and not count:
        return "cpu"
    if not count:
        raise ValueError(
            f"device: {device!r} needs a GPU that CuPy can use, and there is none;"
            " take device='cpu' or 'auto', or install psframe[cuda12] or psframe[cuda13]"
        )
    ordinal = worker % count if found[1] is None else int(found[1])
    if ordinal >= count:
        raise ValueError(f"device: {device!r}, but the visible GPUs are cuda:0 to cuda:{count - 1}")
    return f"cuda:{ordinal}"


def make_device(name: str, layout: Layout) -> Device:
    """Open the device that `choose_device` has named."""
    if name == "cpu":
        return HostDevice()
    return CudaDevice(int(name.partition(":")[2]), layout)


def visible_gpus() -> int:
    """Count the GPUs that CuPy can use; none without CuPy."""
    try:
        import cupy
    except ImportError:
        return 0
    return int(cupy.cuda.runtime.getDeviceCount()) if cupy.is_available() else 0
