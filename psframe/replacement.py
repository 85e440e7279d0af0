"""`psframe.run` in a process that server 0 has started in place of a lost worker.

It is the same program, from its beginning, and joins the run that is under way. It ends here: what
the program does after its run is the ranks' to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from psframe.blas import limited_threads
from psframe.client import Worker
from psframe.devices import Device, choose_device, fit_memory, make_device
from psframe.errors import RankLost
from psframe.launcher import Place
from psframe.plan import Plan
from psframe.roles import open_worker, take_part
from psframe.server_device import choose_server_device
from psframe.transports.stand_in import StandIn
from psframe.transports.watch import Pulse

__all__ = ["stand_in"]

_log = logging.getLogger("psframe")


def stand_in(
    work: Callable[[Worker], Any],
    make_plan: Callable[[], Plan],
    place: Place,
    same: Mapping[str, object],
) -> NoReturn:
    """Join the run, work until its end, and end this process.

    Args:
        work: the user's function.
        make_plan: checks this process's arguments.
        place: where it belongs.
        same: further arguments that must be equal to the ranks'.

    Raises:
        Exception: what `make_plan` raises.
    """
    plan = make_plan().placed((0,))
    try:
        error = _work(work, plan, place, same)
    except RankLost as lost:
        _end(lost)
    # Server 0 has heard of what `work` raised, and tells with its traceback.
    _leave(0 if error is None else 1)


def _work(
    work: Callable[[Worker], Any], plan: Plan, place: Place, same: Mapping[str, object]
) -> BaseException | None:
    end = StandIn(place, plan.layout, plan.digests(**same), plan.timeout_s)
    plan.forget_initial()
    with contextlib.closing(Pulse(end.watch, _end)):
        try:
            worker, device = open_worker(
                end, lambda: _open_device(plan, end), lambda device: plan.build_worker(end, device)
            )
        except Exception as error:  # which the others have heard of
            end.close()
            return error
        with limited_threads(end.ranks_here):
            error_of_work = take_part(work, worker, device)
        end.close()
    return error_of_work


def _open_device(plan: Plan, end: StandIn) -> Device:
    """Open this worker's device; the others keep theirs, and their shares of its memory."""
    name = choose_device(plan.device, end.local_worker)
    device = make_device(name, plan.layout)
    if name != "cpu":
        workers = range(end.ranks_here - 1)  # server 0 is the other one
        users = [choose_device(plan.device, i) for i in workers]
        server = choose_server_device(plan.server_device, server=0)
        fit_memory(name, [*users, f"cuda:{server}"].count(name))
    return device


def _end(lost: RankLost) -> NoReturn:
    """End this process, perhaps from a thread: the run goes on without it, or is over."""
    _log.error("%s", "".join(traceback.format_exception_only(lost)).strip())
    _leave(1)


def _leave(status: int) -> NoReturn:
    """End this process at once; what was printed has left."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    logging.shutdown()
    os._exit(status)
