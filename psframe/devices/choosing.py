"""Which device a worker computes on."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

from psframe.devices.base import Device, HostDevice
from psframe.devices.cuda import CudaDevice
from psframe.devices.direct import DirectDevice, Door
from psframe.layout import Layout

__all__ = ["choose_device", "make_device", "pick_gpu", "use_gpu", "visible_gpus"]

_REASON_CHARS_MAX = 300
_ABSENT = "CuPy is not installed"
# By what is wrong with CuPy, nothing if it only sees no GPU.
_ADVICE = {
    _ABSENT: ", or install psframe[cuda12] or psframe[cuda13]",
    "": "; CuPy is installed and sees none (nvidia-smi, CUDA_VISIBLE_DEVICES)",
}

_log = logging.getLogger("psframe")


def choose_device(device: str, worker: int, visible: int | None = None) -> str:
    """Turn `device` into "cpu" or "cuda:k".

    Args:
        device: "auto", "cpu", "cuda" or "cuda:k".
        worker: index of the worker among those on its node; GPUs are given out in turn.
        visible: GPUs visible to this process; asked of CuPy if None.

    Raises:
        ValueError: the device is none of these, or there is no such GPU.
    """
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device, re.ASCII) is None:
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:k', got {device!r}")
    if device == "cpu":
        return "cpu"
    count = visible_gpus() if visible is None else visible
    if device == "auto" and not count:
        if visible is None:
            _warn(_why_unusable())
        return "cpu"
    ordinal = pick_gpu("device", device, worker, "device='cpu' or 'auto'", count)
    return f"cuda:{ordinal}"


def pick_gpu(what: str, device: str, index: int, remedy: str, visible: int | None = None) -> int:
    """Give the number of the GPU that "auto", "cuda" or "cuda:k" is for one process of a node.

    Args:
        what: the argument's name, for the error.
        device: as above.
        index: of the process among its like on its node; GPUs are given out in turn.
        remedy: what to give in place of it where there is no GPU.
        visible: as for `choose_device`.

    Raises:
        ValueError: there is no such GPU.
    """
    count = visible_gpus() if visible is None else visible
    if not count:
        why = _why_unusable()
        raise ValueError(
            f"{what}: {device!r} needs a GPU that CuPy can use, and there is none; take {remedy}"
            + _ADVICE.get(why, f"; the CuPy that is installed fails with {why}")
        )
    number = device.partition(":")[2]
    ordinal = int(number) if number else index % count
    if ordinal >= count:
        raise ValueError(f"{what}: {device!r}, but the visible GPUs are cuda:0 to cuda:{count - 1}")
    return ordinal


def make_device(
    name: str,
    layout: Layout,
    door: Door | None = None,
    *,
    gradients: bool = True,
    parameters: bool = True,
    slots: Callable[[int], Any] | None = None,
    borrows: bool = False,
) -> Device:
    """Open the device that `choose_device` has named.

    Args:
        name, layout: of the device.
        door: the worker's end, if others take arrays where they are; None for the host's way.
        gradients, parameters: what takes the door.
        slots: gives a gradient slot's buffer on the device, if others have opened that.
        borrows: whether snapshots are read in memory that this process has opened.
    """
    if name == "cpu":
        return HostDevice()
    ordinal = int(name.partition(":")[2])
    if door is None or not (gradients or parameters or borrows):
        return CudaDevice(ordinal, layout)
    return DirectDevice(
        ordinal, layout, door, gradients=gradients, parameters=parameters, slots=slots
    )


def use_gpu(name: str) -> None:
    """Make the GPU "cuda:k" the calling thread's current device."""
    import cupy

    cupy.cuda.Device(int(name.partition(":")[2])).use()


def visible_gpus() -> int:
    """Count the GPUs that CuPy can use; none without CuPy, or with one that is broken."""
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount()) if cupy.is_available() else 0
    except Exception:  # whatever it is: `_why_unusable` says it to whom it matters
        return 0


def _why_unusable() -> str:
    """Say how CuPy fails; "" if it does not, `_ABSENT` if it is not installed.

    One for another NumPy raises ValueError, one without its libraries ImportError or OSError.
    """
    try:
        import cupy

        cupy.is_available()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return _ABSENT
        lines = (line.strip() for line in str(error).splitlines())
        what = " ".join(line for line in lines if line.strip("="))  # it frames what it says
        return f"{type(error).__name__}: {what[-_REASON_CHARS_MAX:]}"
    return ""


@functools.cache
def _warn(why: str) -> None:
    """Log once that no GPU is used because CuPy fails, if it does."""
    if why not in _ADVICE:
        _log.warning("no GPU is looked for: the CuPy that is installed fails with %s", why)
