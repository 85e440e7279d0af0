"""GPUs as CuPy and the system see them, and whether MPI takes a device pointer.

CuPy is asked in processes of its own: a driver that is broken hangs or crashes whoever asks it, and
an MPI that is not CUDA-aware dies of a device pointer.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psframe.doctor.case import Unknown
from psframe.doctor.throwaway import alone, ask

__all__ = ["gpus", "takes_device_pointers"]

# The first use of a GPU compiles a kernel, and wakes a driver that nobody keeps awake.
_BOUND_S = 90.0

_ANSWER = "from psframe.doctor.throwaway import answer\n"
_ASK_CUPY = (
    _ANSWER
    + """
import cupy
if not cupy.is_available():
    answer({"devices": [], "error": ""})
    raise SystemExit
runtime, devices, error = cupy.cuda.runtime, [], ""
for ordinal in range(runtime.getDeviceCount()):
    found = runtime.getDeviceProperties(ordinal)
    uuid = found.get("uuid") or bytes(str(ordinal), "ascii")
    name = found["name"].decode(errors="replace")
    try:
        with cupy.cuda.Device(ordinal):
            right = int((cupy.arange(4) + 1).sum()) == 10
        error = error or ("" if right else f"{name}: 1 + 2 + 3 + 4 is not 10")
    except Exception as raised:
        error = error or f"{type(raised).__name__}: {raised}"
    devices.append({"name": name, "uuid": bytes(uuid).hex(), "bytes": found["totalGlobalMem"]})
answer({"devices": devices, "error": error[:400]})
"""
)
_ASK_MPI = (
    _ANSWER
    + """
import cupy
from mpi4py import MPI
there, back = cupy.arange(1024, dtype="f4"), cupy.zeros(1024, "f4")
cupy.cuda.get_current_stream().synchronize()
MPI.COMM_SELF.Sendrecv(there, 0, recvbuf=back, source=0)
answer(bool((there == back).all()))
"""
)


def gpus(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Find the GPUs that this process would compute on.

    Returns:
        `hardware`: GPUs of the machine, as its driver's files tell; `cupy`: whether it is
        installed; `devices`: those that CuPy sees, in its order, each with name, uuid and bytes;
        `error`: of a kernel that should have run on them; `mps`: whether its daemon runs.

    Raises:
        Unknown: CuPy cannot be imported, or did not answer.
    """
    cards = Path("/proc/driver/nvidia/gpus")
    pipes = Path(environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    found: dict[str, Any] = {
        "hardware": len(list(cards.iterdir())) if cards.is_dir() else 0,
        "cupy": importlib.util.find_spec("cupy") is not None,
        "devices": [],
        "error": "",
        "mps": (pipes / "control").exists(),
    }
    if not found["cupy"]:
        return found
    said = ask([sys.executable, "-c", _ASK_CUPY], timeout_s=_BOUND_S)
    if not isinstance(said, dict):
        raise Unknown(f"CuPy's answer: {said!r}")
    return {**found, **said}


def takes_device_pointers() -> dict[str, Any]:
    """Give a device pointer to MPI, in a process that may die of it: {"value": ..., "by": ...}."""
    try:
        value = ask([sys.executable, "-c", _ASK_MPI], timeout_s=_BOUND_S, environ=alone())
    except Unknown as error:
        if "SIGSEGV" not in str(error) and "SIGBUS" not in str(error):
            raise
        value = False
    return {"value": value is True, "by": "a device pointer that it was given"}
