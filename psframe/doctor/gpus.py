"""GPUs as CuPy and the system see them.

CuPy is asked in a process of its own: a driver that is broken hangs or crashes whoever asks it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psframe.throwaway import Unknown, ask

__all__ = ["gpus"]

# The first use of a GPU compiles a kernel, and wakes a driver that nobody keeps awake.
_BOUND_S = 90.0

_ASK_CUPY = """
from psframe.throwaway import answer
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
