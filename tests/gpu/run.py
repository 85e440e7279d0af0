"""Run the tests that need a GPU, all in one go, and print one table: `make test-gpu`.

Usage: run.py [--limit SECONDS]

It needs an interpreter with CuPy that sees a GPU, pytest and psframe's own needs; nothing is
installed, and without such a one it says why and ends. Tests under MPI need an mpirun, and memcheck
needs NVIDIA's compute-sanitizer: the table says what is not there, or had no time left.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from on_gpu import Done, Place, find_place, run_bounded  # noqa: E402

LIMIT_S = 520.0
RANKS = 3
_PYTEST = ("-m", "pytest", "-q", "-c", "tests/gpu/plain.ini", "--rootdir", ".", "-m", "gpu")
# A few: a kernel is many times slower where each access is looked at.
_MEMCHECK = "momentum-fixed-float32 or two_bytes or (order and both) or cupy_agrees"
_MEMCHECK += " or (payloads and float32-3) or (rounding and float32)"
_TOOLKITS = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/lib/nvidia-cuda-toolkit/bin")

Run = Callable[[Sequence[str], float, Mapping[str, str]], Done]


@dataclass(frozen=True)
class Part:
    """Some tests.

    Attributes:
        name: for the table.
        line: the command; empty if there is none.
        limit_s: its bound.
        environ: of the command, more than the others have.
        why: there is no command.
    """

    name: str
    line: Sequence[str]
    limit_s: float
    environ: Mapping[str, str]
    why: str = ""


def parts(place: Place) -> list[Part]:
    """List what is run, in this order."""
    plain = [*_PYTEST, "--confcutdir", "tests/gpu", "tests/gpu"]
    elsewhere = [*_PYTEST, "--confcutdir", "tests/gpu", "tests/test_optim_cuda.py"]
    elsewhere += ["tests/test_models.py", "tests/test_local.py"]
    few = [*plain, "tests/test_models.py", "-k", _MEMCHECK]
    ranks = [*_PYTEST, "--confcutdir", "tests/mpi", "tests/mpi/test_devices_gpu.py"]
    ranks += ["tests/mpi/test_gpu_direct_gpu.py", "tests/mpi/test_encoding_gpu.py"]
    sanitizer = find_sanitizer(place.environ)
    checked = [
        sanitizer,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        "--report-api-errors",
        "no",
    ]
    return [
        Part("workers and servers, in one process", place.launch(0, *plain), 240.0, {}),
        Part("update rules and models", place.launch(0, *elsewhere), 120.0, {}),
        Part(
            f"{RANKS} ranks under mpirun",
            place.launch(RANKS, *ranks) if place.mpirun else (),
            100.0,
            {},
            "there is no mpirun that works",
        ),
        Part(
            "a few under compute-sanitizer's memcheck",
            [*checked, *place.launch(0, *few)] if sanitizer else (),
            180.0,
            {"PSFRAME_TEST_NO_POOL": "1"},
            "compute-sanitizer is not installed",
        ),
    ]


def find_sanitizer(environ: Mapping[str, str]) -> str:
    """Find compute-sanitizer, in PATH or where CUDA's toolkit is usually; "" if it is not there."""
    homes = [f"{environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    path = os.pathsep.join([environ.get("PATH", os.defpath), *homes, *_TOOLKITS])
    return shutil.which("compute-sanitizer", path=path) or ""


def run_part(part: Part, place: Place, limit_s: float, run: Run) -> tuple[str, str, str]:
    """Run some tests.

    Returns:
        Their line of the table: name; passed, failed or not run; and what pytest says, or why.
    """
    if not part.line:
        return part.name, "not run", part.why
    if limit_s < 5.0:
        return part.name, "not run", "no time was left"
    done = run(part.line, limit_s, {**place.environ, **part.environ})
    counts = re.findall(r"^.*\d+ (?:passed|failed|skipped|error).* in [\d.]+s.*$", done.out, re.M)
    said = counts[-1].strip(" =") if counts else done.reason
    if done.status == 0:
        return part.name, "passed", said
    print(f"{done.out[-8000:]}\n{done.err[-4000:]}", file=sys.stderr)
    return part.name, "FAILED", f"{said}; {done.reason}" if counts else said


def table(lines: Sequence[tuple[str, ...]]) -> str:
    """Write lines below each other."""
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return "\n".join(f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in lines)


def main(argv: Sequence[str] | None = None, run: Run = run_bounded) -> int:
    """Run all.

    Returns:
        0, also where there is no GPU; 1 if some test failed.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of everything")
    settings = parser.parse_args(argv)
    end = time.monotonic() + settings.limit
    place = find_place(sys.executable)
    if isinstance(place, str):
        print(f"test-gpu: skipped: {place}")
        return 0
    lines = []
    for part in parts(place):
        print(f"test-gpu: {part.name}", file=sys.stderr, flush=True)
        lines.append(run_part(part, place, min(part.limit_s, end - time.monotonic()), run))
    print("\n".join([*place.about, "", table(lines)]), flush=True)
    return int(any(line[1] == "FAILED" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
