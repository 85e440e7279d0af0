"""Start a program on several ranks with the flags that this machine needs.

`python -m psframe.launch -n 4 -- train --mode bsp` finds the launcher of the MPI that mpi4py uses,
prints the command, and becomes it.
"""

# Annotations are evaluated here: tyro's, which are local to a function, could not be found later.
import difflib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from psframe.cli import COMMANDS
from psframe.errors import ArgumentError
from psframe.machine import OPEN_MPI, Machine, this_machine
from psframe.output import parse_flags

__all__ = ["arguments", "command_line", "main", "program"]

_DESCRIPTION = """\
Start a program on several ranks, with the flags that this machine needs.

  python -m psframe.launch -n 4 -- train --mode bsp      a command of psframe's
  python -m psframe.launch -n 4 -- my_script.py 1 2      a script of your own
  python -m psframe.launch -n 4 -- -m my.module          a module
  python -m psframe.launch -n 8 --hosts a:4,b:4 -- train on two hosts, reached by ssh

It finds the mpirun of the MPI that mpi4py uses here, prints the command line, and becomes it.
"""
_ALONE = ("launch", "report", "data")  # commands of psframe's that do not run on ranks
_HOST = re.compile(r"[A-Za-z0-9_.\-]+(?::([1-9][0-9]*))?")


def arguments() -> Any:
    """Make the dataclass of the command's flags."""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        n: Annotated[
            int | None,
            tyro.conf.arg(aliases=["-n"], help="ranks; else Slurm's tasks or the cores, 2 or more"),
        ] = None
        hosts: Annotated[
            str | None, tyro.conf.arg(help="where: a,b or with ranks for each, a:4,b:2")
        ] = None
        hostfile: Annotated[str | None, tyro.conf.arg(help="a file of hosts, one a line")] = None
        mpi: Annotated[
            Literal["auto", "openmpi", "mpich"],
            tyro.conf.arg(help="which it must be; auto takes mpi4py's"),
        ] = "auto"
        env: Annotated[
            tuple[str, ...], tyro.conf.arg(help="variables for all ranks, NAME=VALUE")
        ] = field(default=())
        dry_run: Annotated[bool, tyro.conf.arg(help="print the command line only")] = False

    return Arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Become the launcher; return 2 for wrong flags or where there is none, 0 for a dry run."""
    import tyro

    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    own, rest = given[:cut], given[cut + 1 :]
    flags = parse_flags(
        tyro.cli,
        arguments(),
        args=own,
        name="launch",
        quiet=False,
        description=_DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        started = program(rest)
        line = command_line(flags, started, this_machine(flags.mpi), os.environ)
    except ArgumentError as error:
        print(f"psframe: error: {error}", file=sys.stderr, flush=True)
        return 2
    print(shlex.join(line), flush=True)
    if flags.dry_run:
        return 0
    try:
        os.execv(line[0], line)
    except OSError as error:
        print(f"psframe: error: {line[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return 1


def program(rest: Sequence[str]) -> list[str]:
    """Turn what stands after `--` into the command of one rank.

    Raises:
        ArgumentError: there is nothing, or no such command or file.
    """
    if not rest:
        raise ArgumentError("what is to be started stands after --, such as: -- train --mode bsp")
    name, *more = rest
    if name in _ALONE:
        raise ArgumentError(
            f"{name!r} runs in one process and not on ranks; start it as psframe {name} ..."
        )
    if name in COMMANDS:
        return [sys.executable, "-m", COMMANDS[name][0], *more]
    if name == "-m" and more:
        return [sys.executable, "-m", *more]
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ArgumentError(f"{name}: there is no such script")
        return [sys.executable, name, *more]
    found = shutil.which(name)
    if found is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(
            f"{name!r}: expected a command of psframe's, a script.py, -m MODULE or a program{hint}"
        )
    return [found, *more]


def command_line(
    flags: Any, started: Sequence[str], machine: Machine, environ: Mapping[str, str]
) -> list[str]:
    """Put the launcher's command line together.

    Raises:
        ArgumentError: the flags make no sense, or not for this MPI.
    """
    if flags.hosts and flags.hostfile:
        raise ArgumentError("--hosts and --hostfile contradict each other; drop one of them")
    slots = _slots(flags.hosts)
    ranks = flags.n
    if ranks is None:
        slurm = environ.get("SLURM_NTASKS", "")
        known = int(slurm) if slurm.isdigit() else sum(slots.values()) if slots else machine.cores
        ranks = max(2, known)
    if ranks < 1:
        raise ArgumentError(f"-n: expected 1 or more, got {ranks}")
    if flags.hostfile and not Path(flags.hostfile).is_file():
        raise ArgumentError(f"--hostfile: {flags.hostfile}: there is no such file")
    pairs = [_pair(text) for text in flags.env]
    build = _open_mpi if machine.vendor == OPEN_MPI else _mpich
    return [*build(flags, ranks, slots, pairs, machine), *started]


def _open_mpi(
    flags: Any,
    ranks: int,
    slots: Mapping[str, int],
    pairs: Sequence[tuple[str, str]],
    machine: Machine,
) -> list[str]:
    line = [machine.mpirun, "-n", str(ranks)]
    if machine.root:
        line.append("--allow-run-as-root")
    if slots:
        line += ["--host", ",".join(f"{host}:{n}" for host, n in slots.items())]
    if flags.hostfile:
        line += ["--hostfile", flags.hostfile]
    room = sum(slots.values()) if slots else machine.cores
    if ranks > room and not (flags.hostfile or machine.slurm):
        line.append("--oversubscribe")
    # Or each rank may be bound to one core, and a worker's BLAS and prefetching with it.
    line += ["--bind-to", "none"]
    for name, value in pairs:
        line += ["-x", f"{name}={value}"]
    return line


def _mpich(
    flags: Any,
    ranks: int,
    slots: Mapping[str, int],
    pairs: Sequence[tuple[str, str]],
    machine: Machine,
) -> list[str]:
    line = [machine.mpirun, "-n", str(ranks)]
    if slots:
        line += ["-hosts", ",".join(f"{host}:{n}" for host, n in slots.items())]
    if flags.hostfile:
        line += ["-f", flags.hostfile]
    for name, value in pairs:
        line += ["-genv", name, value]
    return line


def _slots(hosts: str | None) -> dict[str, int]:
    """Read --hosts; a host without a number has room for one rank."""
    slots: dict[str, int] = {}
    for text in hosts.split(",") if hosts else []:
        found = _HOST.fullmatch(text)
        if found is None:
            raise ArgumentError(f"--hosts: expected names as in a,b or a:4,b:2, got {text!r}")
        slots[text.partition(":")[0]] = int(found[1] or 1)
    return slots


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ArgumentError(f"--env: expected NAME=VALUE, got {text!r}")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
