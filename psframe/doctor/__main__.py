"""Say whether this machine and this launch are fit for psframe: `python -m psframe.doctor`."""

# Annotations are evaluated here: tyro's, which are local to a function, could not be found later.
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from psframe.doctor.case import Case, Unknown, gather
from psframe.doctor.checks import diagnose, exit_status
from psframe.doctor.folder import try_folder
from psframe.doctor.gpus import gpus
from psframe.doctor.local import local_probes
from psframe.doctor.ranks import meet
from psframe.doctor.showing import show
from psframe.doctor.software import ask_numba, requirements, versions
from psframe.errors import ArgumentError
from psframe.launcher import find_launcher
from psframe.machine import MPICH, find_mpirun
from psframe.output import give_up_printing, parse_flags
from psframe.throwaway import takes_device_pointers

_DESCRIPTION = """\
Say whether this machine, and this way of starting ranks, is fit for psframe.

  python -m psframe.doctor --run-dir runs
  mpirun -n 4 python -m psframe.doctor

Under a launcher every rank looks at its own node, and rank 0 prints. Exit status: 0, or 1 if
anything is an error; warnings tell what makes runs slow or puts them at risk.
"""
_INTEL = "Intel MPI"  # which is MPICH's kin, and has its launcher
_INTERRUPTED = 130
_TIMEOUT_S_MAX = 86400.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 if anything is an error, 2 for wrong flags."""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        run_dir: Annotated[
            str | None, tyro.conf.arg(metavar="DIR", help="try this folder, as one for runs")
        ] = None
        json: Annotated[bool, tyro.conf.arg(help="one JSON object a line instead of text")] = False
        timeout: Annotated[
            float, tyro.conf.arg(help="seconds for MPI to start and for the ranks to meet")
        ] = 90.0

    launched = find_launcher()
    rank = launched.rank if launched else 0
    flags = parse_flags(
        tyro.cli,
        Arguments,
        name="doctor",
        quiet=rank != 0,
        args=list(sys.argv[1:] if argv is None else argv),
        description=_DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if not 0 < flags.timeout <= _TIMEOUT_S_MAX:
        if rank == 0:
            bounds = f"more than 0 seconds and at most {_TIMEOUT_S_MAX:g}"
            what = f"--timeout: expected {bounds}, got {flags.timeout:g}"
            print(f"psframe: error: {what}", file=sys.stderr)
        return 2
    try:
        case, rank = _examine(flags.run_dir, flags.timeout, rank)
    except KeyboardInterrupt:
        print("psframe: interrupted", file=sys.stderr, flush=True)
        return _INTERRUPTED
    if rank:
        return 0  # rank 0 says it
    rows = diagnose(case)
    try:
        show(rows, as_json=flags.json, launched=launched is not None, stream=sys.stdout)
    except BrokenPipeError:  # a reader that has seen enough
        give_up_printing()
    except OSError as error:
        give_up_printing()
        what = f"psframe: error: the findings cannot be printed: {error.strerror or error}"
        print(what, file=sys.stderr, flush=True)
        return 1
    return exit_status(rows)


def _examine(run_dir: str | None, timeout_s: float, rank: int) -> tuple[Case, int]:
    """Find everything out, together with the other ranks if there are any.

    Returns:
        What was found, and this process's rank: MPI's, if it knows better than the environment.
    """
    facts = gather(
        {
            **local_probes(),
            "versions": versions,
            "requirements": requirements,
            "numba": ask_numba,
            "gpus": gpus,
        }
    )
    here: dict[str, Any] = {}
    if run_dir is not None and rank == 0:
        here = gather({"folder": lambda: try_folder(run_dir)})
    tried = here.get("folder", {})
    folder = tried["folder"] if tried.get("error") == "" else ""
    trouble = ""
    met: dict[str, Any] = {"ranks": [facts], "mpi": None, "lone": ""}
    try:
        met = meet(facts, folder, timeout_s)
    except Unknown as error:
        trouble = str(error)
    here.update(gather(_later(met.get("mpi"), facts)))
    launcher = facts["launcher"]
    together = not trouble and not met["lone"]
    case = Case(tuple(met["ranks"]), launcher, together, trouble, met["lone"], here)
    return case, int(met.get("rank", rank))


def _later(mpi: Any, facts: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """Give the questions of this process alone that depend on what MPI there is."""
    vendor = mpi.get("vendor") if isinstance(mpi, Mapping) else None
    probes: dict[str, Callable[[], Any]] = {"root_allowed": _root_allowed, "home": _home}
    if facts["launcher"] is None:
        probes["mpirun"] = lambda: _mpirun(vendor)
    if vendor is not None and mpi["cuda"]["value"] is None and facts["gpus"].get("devices"):
        probes["pointer"] = takes_device_pointers
    return probes


def _root_allowed() -> bool:
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    return all(os.environ.get(name) == "1" for name in names)


def _home() -> bool:
    return "HOME" in os.environ


def _mpirun(vendor: str | None) -> dict[str, str]:
    """Find the launcher of mpi4py's MPI, and what is called mpirun in PATH."""
    if vendor is None:
        raise Unknown("MPI did not say what it is")
    in_path = shutil.which("mpirun") or ""
    try:
        path = find_mpirun(MPICH if vendor == _INTEL else vendor)
    except ArgumentError as error:
        return {"path": "", "error": str(error), "in_path": in_path}
    return {
        "path": os.path.realpath(path),
        "error": "",
        "in_path": in_path and os.path.realpath(in_path),
    }


if __name__ == "__main__":
    sys.exit(main())
