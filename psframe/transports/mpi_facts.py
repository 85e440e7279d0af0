"""What the MPI library says of itself; everything is asked after it has started.

mpi4py has no binding for `MPIX_Query_cuda_support` or the tool interface MPI_T; the library that it
has loaded is asked through ctypes.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from psframe.transports.mpi import MPI  # type: ignore[attr-defined]

__all__ = ["cuda_support", "mpi_facts"]

_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}
# The variable of Open MPI's that its --with-ft sets.
_FT_VARIABLE = "mpi_ft_enable"
_VALUE_BYTES_MAX = 64


def mpi_facts() -> dict[str, Any]:
    """Give what can be asked of MPI.

    Returns:
        vendor and version of the library, as `standard` that of MPI, thread_level; rank and size
        of the world; `fault_tolerant` and `cuda` as {"value": true, false or null, "by": how that
        is known}, and `kinds` as in `mpi_memory_alloc_kinds`, null if it does not tell.
    """
    name, version = MPI.get_vendor()
    library = ctypes.CDLL(MPI.__file__)  # its own symbols, and those of the MPI it has loaded
    kinds = _memory_kinds()
    return {
        "vendor": name,
        "version": ".".join(map(str, version)),
        "standard": ".".join(map(str, MPI.Get_version())),
        "thread_level": _LEVELS.get(MPI.Query_thread(), "unknown"),
        "rank": MPI.COMM_WORLD.rank,
        "size": MPI.COMM_WORLD.size,
        "fault_tolerant": _fault_tolerant(library, name),
        "cuda": _cuda(library, kinds),
        "kinds": kinds,
    }


def cuda_support() -> dict[str, Any]:
    """Give what MPI says of device pointers, as `cuda` in `mpi_facts`."""
    return _cuda(ctypes.CDLL(MPI.__file__), _memory_kinds())


def _memory_kinds() -> str | None:
    """Ask as MPI 4.1 has it; a library that does not know the key has none."""
    info = MPI.COMM_WORLD.Get_info()
    try:
        kinds: str | None = info.Get("mpi_memory_alloc_kinds")
        return kinds
    finally:
        info.Free()


def _cuda(library: ctypes.CDLL, kinds: str | None) -> dict[str, Any]:
    """Say whether device pointers may be given to MPI.

    Kinds without the device's memory do not deny it: who wants one has to ask for it at the start.
    """
    if kinds is not None and any(map(_is_device_memory, kinds.split(","))):
        return {"value": True, "by": "mpi_memory_alloc_kinds"}
    query = getattr(library, "MPIX_Query_cuda_support", None)
    if query is None:
        return {"value": None, "by": "it has no MPIX_Query_cuda_support"}
    return {"value": bool(query()), "by": "MPIX_Query_cuda_support"}


def _is_device_memory(kind: str) -> bool:
    """Whether a kind of MPI 4.1's, a name and its restrictors, has what cudaMalloc gives.

    Without a restrictor it is all of CUDA's; host and managed alone are other memory.
    """
    name, *restrictors = kind.strip().split(":")
    return name == "cuda" and (not restrictors or "device" in restrictors)


def _fault_tolerant(library: ctypes.CDLL, vendor: str) -> dict[str, Any]:
    """Say whether a rank can outlive another's death.

    `Get_failed` answers in any case, and so does not tell.
    """
    if vendor != "Open MPI":
        return {"value": False, "by": f"{vendor} has nothing like --with-ft ulfm"}
    value = _tool_variable(library, _FT_VARIABLE)
    if value is not None:
        return {"value": value, "by": f"MPI_T's {_FT_VARIABLE}"}
    text = os.environ.get(f"OMPI_MCA_{_FT_VARIABLE}")
    if text is None:
        return {"value": None, "by": f"MPI_T does not know {_FT_VARIABLE}"}
    return {"value": text.lower() in ("1", "true", "yes", "on"), "by": "the environment"}


def _tool_variable(library: ctypes.CDLL, name: str) -> bool | None:
    """Read a control variable that is a truth value; None if there is none of that name."""
    level, index, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    handle = ctypes.c_void_p()
    value = (ctypes.c_char * _VALUE_BYTES_MAX)()
    if library.MPI_T_init_thread(0, ctypes.byref(level)):
        return None
    try:
        if library.MPI_T_cvar_get_index(name.encode(), ctypes.byref(index)):
            return None
        if library.MPI_T_cvar_handle_alloc(index, None, ctypes.byref(handle), ctypes.byref(count)):
            return None
        failed = count.value != 1 or library.MPI_T_cvar_read(handle, value)
        library.MPI_T_cvar_handle_free(ctypes.byref(handle))
        return None if failed else any(bytes(value))
    finally:
        library.MPI_T_finalize()
