"""Pushes and pulls a second through `psframe.run`, beside a bare MPI echo of the same payload.

Both are measured in the same job, with the same ranks and sizes, in turn, so that what else the
host does touches both. One operation is a worker's gradient there and parameters back; psframe
applies the gradient in between, the echo nothing. Both check every answer in the same places.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from psframe.benchmarks.checks import PAIRS_A_PAGE, PAIRS_ALL
from psframe.benchmarks.job import Job, Part, open_job, take_turns
from psframe.benchmarks.report import Spread, format_rows
from psframe.benchmarks.tensors import Tensors, parse_sizes
from psframe.benchmarks.ways import EchoWay, PsframeWay
from psframe.errors import ArgumentError

__all__ = ["PushPull"]

_COLUMNS = {
    "bytes": "",
    "what": "",
    "workers": "d",
    "servers": "d",
    "ops_per_s": ",.0f",
    "ops_per_s_range": ",.0f",
    "gbytes_per_s": ".2f",
    "ratio": ".2f",
    "ratio_range": ".2f",
    "core_ns": ".0f",
}
_ONE = "ratio_to_one"


@dataclass(frozen=True)
class PushPull:
    """Pushes and pulls a second, and their ratio to a bare MPI echo; start it under mpirun.

    Prints, for each size, psframe's figures and the echo's: ops_per_s counts round trips of all
    workers together, gbytes_per_s is the payload of one direction, medians over the rounds, with
    the least and the most in `..._range`; ratio is the median of psframe's rate over the echo's
    in the same round. core_ns is the core-to-core round trip of the moment, in nanoseconds.
    """

    bytes: tuple[str, ...] = ("1KiB", "64KiB", "1MiB", "16MiB")
    """payload of one gradient, and of the parameters; up to 256MiB is sensible"""

    servers: int = 1
    """ranks that hold the parameters; the others work"""

    tensors: int = 1
    """into how many the same bytes are cut; with more than one, one tensor is measured beside"""

    read: bool = False
    """read every element of every answer, the echo's too, and not two in each 4 KiB (of two tensors
    in turn, if there are many); the last answers before and after the measurement are read whole
    in any case"""

    rounds: int = 5
    """measurements of each size, psframe and echo in turn"""

    seconds: float = 0.2
    """length of one measurement, roughly; at 256 MiB a few operations take longer"""

    json: bool = False
    """one JSON object a line instead of a table"""

    def main(self) -> int:
        """Measure and print; return the exit status.

        Raises:
            LaunchError: this is no MPI job.
            ArgumentError: a size, or the number of ranks, will not do.
            WrongAnswer, WorkerFailed: an answer was wrong.
        """
        with open_job("push-pull") as job:
            part = job.part(self.servers)
            bench = _Bench(self, job, part)
            rows: list[dict[str, Any]] = []
            for n_bytes in self.sizes():
                added = bench.measure(n_bytes)
                rows += added
                if job.rank == 0 and self.json:
                    print(format_rows(added, {}, True), flush=True)
            if job.rank == 0 and not self.json:
                print(format_rows(rows, self._columns(), False), flush=True)
            bench.close()
            part.close()
        return 0

    def sizes(self) -> list[int]:
        """Read --bytes.

        Raises:
            ArgumentError: a setting will not do.
        """
        if self.rounds < 1 or self.seconds <= 0:
            raise ArgumentError("--rounds and --seconds: expected more than 0")
        return parse_sizes(self.bytes, self.servers, self.tensors)

    def _columns(self) -> dict[str, str]:
        if self.tensors == 1:
            return _COLUMNS
        return {**_COLUMNS, _ONE: ".2f", f"{_ONE}_range": ".2f"}


class _Bench:
    def __init__(self, settings: PushPull, job: Job, part: Part) -> None:
        from psframe.transports.echo import Echo

        self._settings = settings
        self._job = job
        self._part = part
        self._echo = Echo(settings.servers)

    def measure(self, n_bytes: int) -> list[dict[str, Any]]:
        """Measure one size; the rows count on rank 0."""
        settings, job, part = self._settings, self._job, self._part
        cuts = [settings.tensors] if settings.tensors == 1 else [settings.tensors, 1]
        size, apart = n_bytes // 4, PAIRS_ALL if settings.read else PAIRS_A_PAGE
        ways: list[PsframeWay | EchoWay] = [
            PsframeWay(job, part, Tensors(size, part.servers, n, apart=apart)) for n in cuts
        ]
        ways.append(EchoWay(job, part, self._echo, size, apart))
        timed = [functools.partial(way, *way.for_about(n_bytes, settings.seconds)) for way in ways]
        rates = take_turns(job, timed, settings.rounds)
        common = job.common(part)
        rows = [
            self._row("psframe" if i == 0 else "one tensor", n_bytes, mine, common)
            | {"tensors": cuts[i]}
            | _ratio(mine, rates[-1]).fields("ratio")
            for i, mine in enumerate(rates[:-1])
        ]
        if len(cuts) > 1:
            rows[0] |= _ratio(rates[0], rates[1]).fields(_ONE)
        return [*rows, self._row("echo", n_bytes, rates[-1], common)]

    def close(self) -> None:
        """Give the communicators back."""
        self._echo.close()

    def _row(
        self, what: str, n_bytes: int, rates: list[float], common: dict[str, Any]
    ) -> dict[str, Any]:
        rate = Spread(rates)
        return {
            "benchmark": "push-pull",
            "what": what,
            "bytes": n_bytes,
            **rate.fields("ops_per_s"),
            "gbytes_per_s": float(f"{rate.median * n_bytes / 1e9:.4g}"),
            "rounds": len(rates),
            "read": self._settings.read,
            **common,
        }


def _ratio(mine: list[float], others: list[float]) -> Spread:
    return Spread([a / b for a, b in zip(mine, others, strict=True)])
