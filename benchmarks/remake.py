"""Measure everything and write the tables of RESULTS.md anew: `make bench`.

Usage: remake.py [--mpi openmpi|mpich] [--venv FOLDER] [--ranks 2 3] [--only push-pull apply]
                 [--bytes 1KiB 16MiB] [--rounds N] [--seconds S] [--out FILE]

Each table stands between two comments, `<!-- bench: NAME -->` and `<!-- /bench -->`. What is
between them is replaced; a table that the file does not have yet is put at its end; all else, such
as the notes beside a table, is kept. The file is written after each table.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
END = "<!-- /bench -->"
LIMIT_S = 1200
SIZES = ("1KiB", "64KiB", "1MiB", "16MiB", "256MiB")
TENSORS, TENSOR_SIZES = "50", ("64KiB", "1MiB")
TIMED = ("push-pull", "overlap", "scaling", "latency")  # these know --seconds
VERSIONS = """
import importlib.metadata as m, platform, sys
names = ("numpy", "numba", "mpi4py", sys.argv[1], "psframe")
print(f"Python {platform.python_version()}", *(f"{n} {m.version(n)}" for n in names), sep=", ")
"""
BENCHMARKS = ("push-pull", "overlap", "scaling", "latency", "memory", "idle", "apply")


@dataclass(frozen=True)
class Table:
    """One run of the command.

    Attributes:
        name: of its place in the file.
        title: its heading, where the file does not have it yet.
        ranks: of mpirun; 0 for none.
        arguments: of psframe.bench.
    """

    name: str
    title: str
    ranks: int
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """What a reader types to get it."""
        start = f"mpirun -n {self.ranks} " if self.ranks else ""
        return f"{start}python -m psframe.bench {' '.join(self.arguments)}"


def tables(settings: argparse.Namespace) -> Iterator[Table]:
    """List the runs, in the order of the file."""
    for ranks in settings.ranks:
        workers = f"{ranks - 1} worker{'s' * (ranks > 2)}"
        for suffix, what, arguments in (
            ("", "", ("push-pull", "--bytes", *settings.bytes)),
            (
                "-read",
                ", every parameter read",
                ("push-pull", "--read", "--bytes", *settings.bytes),
            ),
            (
                "-tensors",
                f", {TENSORS} tensors",
                ("push-pull", "--tensors", TENSORS, "--bytes", *settings.tensor_bytes),
            ),
        ):
            yield _table(
                settings, f"push-pull{suffix}", f"push-pull{what}, {workers}", ranks, arguments
            )
        for name in ("overlap", "latency", "memory", "idle"):
            yield _table(settings, name, f"{name}, {workers}", ranks, (name,))
    most = max(settings.ranks) + 1
    yield _table(settings, "scaling", f"scaling, {most} ranks", most, ("scaling",))
    yield _table(settings, "apply", "apply", 0, ("apply",))


def _table(
    settings: argparse.Namespace, name: str, title: str, ranks: int, arguments: tuple[str, ...]
) -> Table:
    if settings.rounds is not None:
        arguments = (*arguments, "--rounds", str(settings.rounds))
    if settings.seconds is not None and arguments[0] in TIMED:
        arguments = (*arguments, "--seconds", str(settings.seconds))
    place = f"{settings.mpi} {name}" + (f" {ranks}" if ranks else "")
    return Table(place, f"{title} ({settings.mpi})", ranks, arguments)


def measure(table: Table, venv: Path) -> str:
    """Run it and give what it prints.

    Raises:
        subprocess.CalledProcessError, subprocess.TimeoutExpired: it failed, or did not end.
    """
    line = [str(venv / "bin/python"), "-m", "psframe.bench", *table.arguments]
    if table.ranks:
        line = [str(venv / "bin/mpirun"), "-n", str(table.ranks), *line]
    done = subprocess.run(
        line,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    return done.stdout


def put(text: str, table: Table, content: str) -> str:
    """Replace a table in the file's text, or add it at the end."""
    begin = f"<!-- bench: {table.name} -->"
    block = f"{begin}\n{content.strip()}\n{END}"
    place = re.compile(rf"{re.escape(begin)}\n.*?{re.escape(END)}", re.DOTALL)
    if place.search(text):
        return place.sub(lambda found: block, text, count=1)
    return f"{text.rstrip()}\n\n### {table.title}\n\n{block}\n"


def machine(settings: argparse.Namespace) -> str:
    """Describe what all is measured on, and with."""
    versions = _output([str(settings.venv / "bin/python"), "-c", VERSIONS, settings.mpi])
    hardware, load = machine_lines()
    now = datetime.datetime.now(datetime.timezone.utc)
    lines = (
        hardware,
        f"{versions}; commit {commit()}",
        f"{now:%Y-%m-%d %H:%M} UTC; {load}",
    )
    return "\n".join(f"* {line}" for line in lines)


def machine_lines() -> tuple[str, str]:
    """Describe the machine, and how busy it is."""
    cpu = _first(r"model name\s*: (.*)", Path("/proc/cpuinfo"))
    memory = int(_first(r"MemTotal:\s*(\d+)", Path("/proc/meminfo")) or 0) / 2**20
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    cores = len(os.sched_getaffinity(0))
    system = f"{platform.system()} {platform.release()}"
    return (
        f"{cores} cores of {cpu or platform.processor()}, {memory:.0f} GiB, {system}",
        f"load average before: {load}",
    )


def commit() -> str:
    """Name the commit that is measured."""
    if shutil.which("git") is None:
        return "unknown"
    return _output(["git", "describe", "--always", "--dirty"])


def _first(pattern: str, path: Path) -> str:
    found = re.search(pattern, path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1].strip() if found else ""


def _output(line: list[str]) -> str:
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def read_settings(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    parser.add_argument("--venv", type=Path, help="with its bin/mpirun; default that of --mpi")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="of mpirun")
    parser.add_argument("--bytes", nargs="+", default=SIZES, help="of push-pull")
    parser.add_argument("--tensor-bytes", nargs="+", default=TENSOR_SIZES, help="of many tensors")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--rounds", type=int, help="of every benchmark; default its own")
    parser.add_argument("--seconds", type=float, help="of every benchmark that knows it")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    settings = parser.parse_args(argv)
    if settings.venv is None:
        settings.venv = ROOT / {"openmpi": ".venv", "mpich": ".venv-mpich"}[settings.mpi]
    settings.venv = settings.venv.absolute()
    return settings


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(argv)
    text = settings.out.read_text(encoding="utf-8") if settings.out.exists() else "# Results\n"
    about = Table(f"{settings.mpi} machine", f"The machine ({settings.mpi})", 0, ())
    text = put(text, about, machine(settings))
    for table in tables(settings):
        if table.arguments[0] not in settings.only:
            continue
        print(f"$ {table.command}", flush=True)
        try:
            printed = measure(table, settings.venv)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"remake.py: {error}", file=sys.stderr)
            return 1
        print(printed, flush=True)
        text = put(text, table, f"```text\n$ {table.command}\n{printed.rstrip()}\n```")
        settings.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
