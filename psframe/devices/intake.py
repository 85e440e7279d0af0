"""Arrays of other libraries: what can be read where it is, and what is refused.

An array with `__dlpack__` or `__cuda_array_interface__` is taken without a copy on the device.
Its producer may still be writing: DLPack makes the stream that is given wait for the producer's,
the other interface names the producer's stream, of which an event is recorded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Accepted", "Intake", "on_host"]

# DLPack's device types.
_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13
_READABLE = (_CPU, _CUDA_HOST)
_GPU = (_CUDA, _CUDA_MANAGED)


def on_host(grads: Any, where: str) -> Any:
    """Make NumPy arrays of what has DLPack and is on the host; the rest is left as it is.

    Raises:
        TypeError: an array is on a device.
    """
    if not isinstance(grads, Mapping) or all(type(g) is np.ndarray for g in grads.values()):
        return grads
    return {name: _on_host(name, grad, where) for name, grad in grads.items()}


def _on_host(name: str, grad: Any, where: str) -> Any:
    if isinstance(grad, np.ndarray):
        return grad
    kind = _dlpack_device(grad)
    if (kind is None and hasattr(grad, "__cuda_array_interface__")) or (
        kind is not None and kind[0] not in _READABLE
    ):
        raise TypeError(
            f"{where}: gradient {name!r} is on a GPU, and this worker computes on the CPU; copy it"
            " to the host first, or run with device='cuda'"
        )
    return grad if kind is None else _from_host(name, grad, where)


def _from_host(name: str, grad: Any, where: str) -> Any:
    """Make a NumPy array of a DLPack one in host memory."""
    try:
        return np.from_dlpack(grad)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise _unusable(name, where, error) from error


def _dlpack_device(grad: Any) -> tuple[int, int] | None:
    """Say where an array with DLPack is: (device type, ordinal); None if it has none."""
    tell = getattr(grad, "__dlpack_device__", None)
    if tell is None or not hasattr(grad, "__dlpack__"):
        return None
    kind, ordinal = tell()
    return int(kind), int(ordinal)


def _unusable(name: str, where: str, error: Exception) -> TypeError:
    return TypeError(
        f"{where}: gradient {name!r} cannot be read here: {error}; give float32 or float64, and"
        " no part of a graph (in PyTorch: .grad, or .detach())"
    )


class Accepted(dict[str, Any]):
    """Arrays of NumPy and CuPy.

    Attributes:
        foreign: whether the memory of some is another library's, which knows nothing of this
            stream, and so may overwrite them whenever it is told that they have been read.
    """

    foreign = False


class Intake:
    """Takes in what is pushed to a worker on a GPU.

    Args:
        cupy: the module.
        ordinal: the worker's GPU.
        stream: the one that will read the arrays; what their producers still do to them is made to
            come before it.
    """

    def __init__(self, cupy: Any, ordinal: int, stream: Any) -> None:
        self._cupy = cupy
        self._ordinal = ordinal
        self._stream = stream
        self._event = cupy.cuda.Event(disable_timing=True)

    def accept(self, grads: Any, where: str) -> Any:
        """Make NumPy or CuPy arrays of all that is readable here; see `Device.accept`."""
        if not isinstance(grads, Mapping):
            return grads
        accepted = Accepted()
        for name, grad in grads.items():
            accepted[name] = self._take(name, grad, where)
            if accepted[name] is not grad and not isinstance(accepted[name], np.ndarray):
                accepted.foreign = True
        return accepted

    def _take(self, name: str, grad: Any, where: str) -> Any:
        if isinstance(grad, np.ndarray):
            return grad
        if isinstance(grad, self._cupy.ndarray):
            self._check_place(name, int(grad.device.id), where)
            return grad
        kind = _dlpack_device(grad)
        if kind is not None and kind[0] in _READABLE:
            return _from_host(name, grad, where)
        if kind is not None and kind[0] in _GPU:
            if kind[0] == _CUDA:
                self._check_place(name, kind[1], where)
            return self._from_dlpack(name, grad, where)
        if hasattr(grad, "__cuda_array_interface__"):
            return self._from_interface(name, grad, where)
        if kind is not None:
            raise TypeError(
                f"{where}: gradient {name!r} is on a device of DLPack's type {kind[0]}, expected"
                f" one on the host or on cuda:{self._ordinal}"
            )
        return grad

    def _check_place(self, name: str, ordinal: int, where: str) -> None:
        if ordinal != self._ordinal:
            raise ValueError(
                f"{where}: gradient {name!r} is on cuda:{ordinal}, and this worker computes on"
                f" cuda:{self._ordinal}; copy it there first"
            )

    def _from_dlpack(self, name: str, grad: Any, where: str) -> Any:
        try:
            with self._stream:  # it is told the producer, which makes it wait
                return self._cupy.from_dlpack(grad)
        except (BufferError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise _unusable(name, where, error) from error

    def _from_interface(self, name: str, grad: Any, where: str) -> Any:
        described = grad.__cuda_array_interface__
        pointer, producer = described["data"][0], described.get("stream")
        runtime = self._cupy.cuda.runtime
        try:
            if pointer:
                place = int(runtime.pointerGetAttributes(pointer).device)
                self._check_place(name, place, where)
            if producer is not None:
                # CuPy may be told not to look at it (CUPY_CUDA_ARRAY_INTERFACE_SYNC=0).
                runtime.eventRecord(self._event.ptr, producer)
                self._stream.wait_event(self._event)
            with self._stream:
                return self._cupy.asarray(grad)
        except (RuntimeError, TypeError) as error:
            raise _unusable(name, where, error) from error
