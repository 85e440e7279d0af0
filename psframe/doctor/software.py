"""Versions, and where numba keeps what it has compiled. As a program, it asks numba."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from psframe.doctor.case import Unknown
from psframe.throwaway import answer, ask

__all__ = ["NAMES", "ask_numba", "requirements", "versions"]

NAMES = ("psframe", "numpy", "numba", "mpi4py")
_CUPY = ("cupy-cuda12x", "cupy-cuda13x", "cupy-cuda11x", "cupy")
_NUMBA_BOUND_S = 120.0  # its import alone may take a minute where thousands of ranks read one disk


def versions() -> dict[str, str | None]:
    """Give the installed versions, without importing anything; None for what is not installed.

    A psframe that runs from a checkout is "of a checkout".
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in NAMES:
        found[name] = _version(name)
    if found["psframe"] is None:
        found["psframe"] = "of a checkout"
    found["cupy"] = next((v for name in _CUPY if (v := _version(name)) is not None), None)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def requirements() -> dict[str, tuple[int, ...]]:
    """Give the least version of each dependency that psframe's own metadata demand."""
    try:
        lines = requires("psframe") or []
    except PackageNotFoundError:
        return {}
    least: dict[str, tuple[int, ...]] = {}
    for line in lines:
        found = re.match(r"([\w.-]+)\s*>=\s*(\d+(?:\.\d+)*)", line)
        if found is not None and "extra ==" not in line:
            least[found[1].lower()] = tuple(map(int, found[2].split(".")))
    return least


def ask_numba() -> dict[str, Any]:
    """Ask a process for the folder of numba's cache.

    Returns:
        `folder`: its path; `error`: why there is none; `broken`: whether numba cannot be imported.

    Raises:
        Unknown: there was no answer.
    """
    found = ask([sys.executable, "-m", "psframe.doctor.software"], timeout_s=_NUMBA_BOUND_S)
    if not isinstance(found, dict):
        raise Unknown(f"numba's folder: {found!r}")
    return found


def main() -> None:
    """Answer where the update kernels' cache is, without compiling any."""
    answer(_cache())


def _cache() -> dict[str, Any]:
    try:
        import numba
    except ImportError as error:
        return {"folder": "", "error": str(error), "broken": True}
    from psframe.optim.formulas import sgd

    try:
        # It finds a folder, and tries whether it can be written.
        folder = numba.njit(cache=True)(sgd).stats.cache_path
    except (RuntimeError, OSError) as error:
        return {"folder": "", "error": str(error), "broken": False}
    return {"folder": folder, "error": "", "broken": False}


if __name__ == "__main__":
    main()
