"""Measure psframe on this machine: `python -m psframe.bench BENCHMARK`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from psframe.benchmarks.apply import Apply
from psframe.benchmarks.idle import Idle
from psframe.benchmarks.latency import Latency
from psframe.benchmarks.memory import Memory
from psframe.benchmarks.overlap import Overlap
from psframe.benchmarks.push_pull import PushPull
from psframe.benchmarks.scaling import Scaling
from psframe.errors import ArgumentError, LaunchError, PsframeError, WorkerFailed
from psframe.launcher import find_launcher
from psframe.output import parse_flags

__all__ = ["BENCHMARKS", "Benchmark", "main"]

_DESCRIPTION = """\
Measure psframe against what the machine itself can do.

  mpirun -n 2 python -m psframe.bench push-pull --bytes 16MiB --json
  python -m psframe.bench apply
"""


class Benchmark(Protocol):
    """Settings, which are its flags, and what to do with them."""

    def main(self) -> int:
        """Measure and print; return the exit status."""


# A new benchmark is a dataclass in psframe/benchmarks/ and a line here.
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "push-pull": PushPull,
    "apply": Apply,
    "overlap": Overlap,
    "scaling": Scaling,
    "latency": Latency,
    "memory": Memory,
    "idle": Idle,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for a wrong result, 2 for wrong flags."""
    import tyro

    launched = find_launcher()
    rank = launched.rank if launched else 0
    logging.basicConfig(format="psframe: %(levelname)s: %(message)s", level=logging.WARNING)
    benchmark: Benchmark = parse_flags(
        tyro.extras.subcommand_cli_from_dict,
        BENCHMARKS,
        args=list(sys.argv[1:] if argv is None else argv),
        name="bench",
        quiet=bool(rank),
        description=_DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        return benchmark.main()
    except (ArgumentError, LaunchError) as error:
        return _fail(error, rank, 2)
    except WorkerFailed as error:
        return _fail(error, rank, 1)
    except PsframeError as error:
        return _fail(error, 0, 1)  # whoever sees it, says it


def _fail(error: Exception, rank: int, status: int) -> int:
    if rank == 0:
        print(f"psframe: error: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
