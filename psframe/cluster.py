"""A run over MPI ranks: set-up, who serves and who works, the end, and never a hang.

Set-up is made by all ranks together, with nonblocking collectives polled with a bound; the end by
each rank with the first, since some may have been lost meanwhile. What every rank must learn (an
argument differs, a worker failed) is exchanged there, so that all of them raise; where that is no
longer possible the job is aborted, with the verdict written first.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from psframe.agreement import agree, tell
from psframe.blas import limited_threads
from psframe.cards import Cards
from psframe.client import Worker
from psframe.coding import Traffic
from psframe.errors import CheckpointError, Diverged, Interrupted, RankLost, WorkerFailed
from psframe.events import Failure
from psframe.host import Host
from psframe.interrupts import Interrupts
from psframe.launcher import Launcher
from psframe.layout import Array
from psframe.leader import Leader
from psframe.placement import line_of
from psframe.plan import Plan, Result
from psframe.restoring import Restart, explained_state
from psframe.results import diverged, interrupted_by, make_result, summarise
from psframe.roles import (
    Grace,
    Overdue,
    describe,
    no_host_event,
    open_worker,
    serve,
    serve_first,
    take_part,
)
from psframe.saving import ShardSaver
from psframe.server import Server
from psframe.starting import INTERRUPTED
from psframe.transports.faults import fault_tolerant
from psframe.transports.leaving import part, part_alone
from psframe.transports.meeting import Neighbours, meet
from psframe.transports.mpi import SETUP_BOUND_S, Mesh, abort, open_mesh
from psframe.transports.mpi_endpoint import MpiEndpoint
from psframe.transports.mpi_port import MpiServerPort
from psframe.transports.parting import Ending, tell_end
from psframe.transports.replacements import Replacements
from psframe.transports.rounds import Rounds
from psframe.transports.vigil import keep_watch
from psframe.transports.watch import CountedOut, Pulse, Watch

__all__ = ["fail_together", "run_cluster"]

# Every rank of a run that has failed has this long to come to the end, where it learns why.
_END_BOUND_S = 1.5
_NO_REPLY = "it did not come to the end of the run"

# What `work` calls of the worker: between a message's arrival and its handling no signal may raise,
# or an answer would be lost. Rank 0 ends the run for it.
_DELICATE = frozenset(f"psframe.{name}" for name in ("client", "leasing", "pending", "prefetch"))

# The run of this program: a replacement, which begins with the first, can join no other.
_runs = itertools.count()

_log = logging.getLogger("psframe")


def run_cluster(
    work: Callable[[Worker], Any],
    make_plan: Callable[[], Plan],
    make_host: Callable[[Plan], Host],
    *,
    launcher: Launcher | None,
    comm: Any,
    shared_memory: bool,
    same: Mapping[str, object],
) -> Result:
    """Run on the ranks of `comm`; see `psframe.run`.

    Args:
        work: the user's function.
        make_plan: checks this rank's arguments.
        make_host: opens the run directory (called on rank 0).
        launcher: as the environment tells.
        comm: a communicator, or None for all ranks.
        shared_memory: whether to use it.
        same: further arguments that must be equal on every rank.
    """
    try:
        mesh = open_mesh(comm, launcher, sys.prefix)
    except RankLost as lost:
        print(f"psframe: this rank ends the job: {lost}", file=sys.stderr, flush=True)
        abort(1)
    except KeyboardInterrupt:  # the others may not have been told, and wait for this rank
        print("psframe: this rank ends the job: interrupted", file=sys.stderr, flush=True)
        abort(INTERRUPTED)
    run = _ClusterRun(mesh, work, shared_memory, same)
    result: Result | None = None
    error: BaseException | None = None
    try:
        with run.interrupts:
            plan, wrong = agree(mesh, make_plan, partial(run.open, make_host), same)
            if wrong is None:
                assert plan is not None
                result, error = run.run(plan)
    except CountedOut:  # the others have ended well, and go on
        part_alone(mesh)
        raise
    except BaseException as broken:
        run.abort(broken)
        raise
    part(mesh, run.absent)
    if wrong is not None:
        run.verdict_of(wrong)
        raise wrong
    if error is not None:
        raise error
    assert result is not None, "it ends with a result or with an error"
    return result


def fail_together(launcher: Launcher, error: Exception) -> Exception:
    """Tell the ranks that are, or will be, in `run_cluster` that this one cannot come.

    Without it they would wait for this rank until their bound. Where every rank fails alike,
    each calls this, and each gets its own error back.

    Args:
        launcher: as the environment tells.
        error: why this rank does not call `psframe.run`.

    Returns:
        The error to raise.

    Raises:
        LaunchError: as `psframe.run`.
        RankLost: some rank neither called this nor `psframe.run`.
    """
    mesh = open_mesh(None, launcher, sys.prefix)
    told = tell(mesh, error)
    assert told is not None
    mesh.close()
    return told


class _ClusterRun:
    def __init__(
        self,
        mesh: Mesh,
        work: Callable[[Worker], Any],
        shared_memory: bool,
        same: Mapping[str, object],
    ) -> None:
        self._number = next(_runs)
        self._same = same
        self.mesh = mesh
        self.host = Host(None, None)
        self.interrupts = Interrupts(self._interrupted)
        self._work = work
        self._shared_memory = shared_memory
        self._watch: Watch | None = None
        # Lost, not known to be dead, and not come back when it was over.
        self.absent: Mapping[int, Callable[[], bool]] = {}
        self._error: BaseException | None = None  # what this rank's own `work` raised
        self.restart = Restart()

    # ---- the run -------------------------------------------------------------------------

    def open(
        self, make_host: Callable[[Plan], Host], plan: Plan, alive: Callable[[], None]
    ) -> None:
        """Open the run directory, on rank 0; `alive` shows that it gets on."""
        with self.interrupts.held():  # or it might say "running" for ever
            self.host = make_host(plan)
        self.interrupts.check()
        reader = self.host.resume(plan.layout, plan.seed, alive) if plan.resumes else None
        self.restart = Restart.of(self.host.path, reader)

    def run(self, plan: Plan) -> tuple[Result | None, BaseException | None]:
        """Take part until the end.

        Returns:
            This rank's result, and what it has to raise in place of returning it.
        """
        mesh = self.mesh
        mesh.arrange(line_of(plan.serving, mesh.size))
        wrong = self._share_restart(plan)
        if wrong is not None:
            return None, wrong
        self._share_initial(plan)
        if mesh.rank >= plan.servers:
            plan.forget_initial()
        stays_open = plan.respawn > 0 and mesh.rank == 0
        neighbours = meet(
            mesh, plan.layout, plan.servers, self._shared_memory, stays_open=stays_open
        )
        cards = Cards(mesh, plan, neighbours)
        wrong = cards.share()
        if wrong is not None:
            self.verdict_of(wrong)
            return None, wrong
        watch = self._watch = keep_watch(mesh, neighbours, plan.timeout_s)
        self._share_signals(watch)
        with self.interrupts.held():  # the others wait for this rank
            with contextlib.closing(Pulse(watch, self.abort, cards.adopt_thread)):
                go = self._lead if mesh.rank == 0 else self._accompany
                result, error = go(plan, neighbours, cards, watch)
            cards.free()
        return result, error or self._late_interrupt()

    def _accompany(
        self, plan: Plan, neighbours: Neighbours, cards: Cards, watch: Watch
    ) -> tuple[Result | None, BaseException | None]:
        """Serve or work, and hear how the run has ended."""
        mesh, ending = self.mesh, Ending(self.mesh)
        if mesh.rank < plan.servers:
            self._follow(plan, neighbours, cards, watch)
        else:
            self._take_part(plan, neighbours, cards, watch, ending)
        ending.wait()
        summary, counted_out = json.loads(ending.summary), json.loads(ending.last_word)
        why = counted_out.get(str(mesh.rank))
        if why is not None:
            raise CountedOut(f"this rank ({mesh.name}) counts as lost: {why}")
        self._count_out(counted_out, watch)
        return make_result(plan, summary, None, None), self._outcome(summary, plan)

    def _share_signals(self, watch: Watch) -> None:
        """Have rank 0 hear of the signals to all."""
        if self.mesh.rank == 0:
            watch.on_asked = self.interrupts.take
            return
        self.interrupts.pass_on = watch.beats.ask
        if self.interrupts.asked:
            watch.beats.ask(signal.Signals[self.interrupts.asked])

    def _late_interrupt(self) -> KeyboardInterrupt | None:
        """The interrupt that came when the run was over."""
        return KeyboardInterrupt(self.interrupts.pending) if self.interrupts.pending else None

    def _share_restart(self, plan: Plan) -> Exception | None:
        """Tell every rank of the checkpoints; the error, on all, if one cannot be read."""
        if plan.marks is None:
            return None
        mesh = self.mesh
        told = self.restart.encode() if mesh.rank == 0 else None
        data = mesh.broadcast(told, "the checkpoint to go on from", SETUP_BOUND_S)
        if mesh.rank:
            self.restart = Restart.decode(data)
        if self.restart.version is None:
            return None
        error: Exception | None = None
        rounds = Rounds(mesh, "the checkpoint to go on from")
        if mesh.rank < plan.servers:
            begin, end = plan.layout.shards(plan.servers)[mesh.rank]
            try:
                self.restart.open(plan.layout, begin, end, rounds.alive)
            except CheckpointError as raised:
                error = raised
        wrong = tell(mesh, error, rounds)
        if wrong is not None:
            self.verdict_of(wrong)
        return wrong

    def _share_initial(self, plan: Plan) -> None:
        """Give every server its part of rank 0's values."""
        mesh = self.mesh
        for server, (begin, end) in enumerate(plan.layout.shards(plan.servers)):
            if server and mesh.rank == 0:
                mesh.send(plan.initial[begin:end], server, "the first parameters")
            elif server and mesh.rank == server:
                mesh.receive(plan.initial[begin:end], 0, "the first parameters")

    def _lead(
        self, plan: Plan, neighbours: Neighbours, cards: Cards, watch: Watch
    ) -> tuple[Result, BaseException | None]:
        with self.interrupts.released():  # what is restored may be large
            port = MpiServerPort(self.mesh, plan.layout, neighbours, plan.codec)
            leader = self._build_server(plan, port, cards, self._respawn(plan, neighbours))
        assert isinstance(leader, Leader)
        self.host.begin()
        self.interrupts.check()
        watch.last_message = lambda rank: (
            leader.last_request(rank - plan.servers) if rank >= plan.servers else -1
        )
        watch.tell(lambda rank, why: self._lose(rank, why, plan, port, watch))
        if not (plan.trace or plan.spans):  # somebody wants to hear of each push
            port.push_pull = leader.push_pull
        with self._replacements(plan, leader, port, neighbours) as replacements:

            def look() -> None:
                watch.tick()
                if replacements is not None:
                    replacements.tick()

            grace = Grace(leader, self.interrupts, look)
            serve_first(grace, port, self.host, plan)
            cards.close()
            if replacements is not None:
                replacements.leave()
        return self._conclude(plan, leader, port, cards, watch, grace)

    def _conclude(
        self,
        plan: Plan,
        leader: Leader,
        port: MpiServerPort,
        cards: Cards,
        watch: Watch,
        grace: Grace,
    ) -> tuple[Result, BaseException | None]:
        """Tell every rank how the run has ended."""
        port.push_pull = None  # a circle: it would hold the run's memory
        summary = _summarise(leader, cards.of_workers, watch, grace)
        error = self._outcome(summary, plan)
        if error is not None:
            self.verdict_of(error, updates=summary["version"])
        bound_s = None if error is None else _END_BOUND_S
        counted_out: dict[str, str] = {}

        def last_word() -> bytes:
            counted_out.update({str(rank): watch.why.get(rank, _NO_REPLY) for rank in watch.lost})
            return json.dumps(counted_out).encode()

        try:
            port.close()
            params, traffic = self._collect(plan, leader, bound_s)
            summary["traffic"] = vars(traffic)
            told = json.dumps(summary).encode()
            self.absent = tell_end(self.mesh, told, last_word, bound_s)
        except RankLost as lost:
            raise lost from error
        error = error or self._late_interrupt()
        if error is None:  # it is complete, whatever comes now
            self.host.verdict("completed", updates=summary["version"])
        self._count_out(counted_out, watch)
        return make_result(plan, summary, params, self.host.path), error

    def _count_out(self, counted_out: Mapping[str, str], watch: Watch) -> None:
        """Do without those who are lost from now on, as everybody else does, and nobody else."""
        ranks = set(map(int, counted_out))
        # A rank that shows no more signs of life once it has heard the last word is none of them.
        watch.lost = ranks | watch.faults.dead
        self.mesh.count_out(ranks)

    def _lose(self, rank: int, why: str, plan: Plan, port: MpiServerPort, watch: Watch) -> None:
        """Go on without a worker, or not without a server."""
        if rank < plan.servers:
            watch.give_up(rank, f"server {rank}")
        _log.log(
            logging.DEBUG if self.mesh.rank else logging.ERROR,  # server 0 tells
            "worker %d (rank %d) is lost: %s",
            rank - plan.servers,
            self.mesh.names[rank],
            why,
        )
        port.lose(rank)

    def _follow(self, plan: Plan, neighbours: Neighbours, cards: Cards, watch: Watch) -> None:
        port = MpiServerPort(self.mesh, plan.layout, neighbours, plan.codec)
        follower = self._build_server(plan, port, cards)
        watch.tell(lambda rank, why: self._lose(rank, why, plan, port, watch))
        spans = port.to_leader if plan.spans else None
        folder = self.restart.folder  # None, too, if there can be no checkpoints
        saver = ShardSaver(folder, follower, plan.layout, plan.servers) if folder else None
        observe = no_host_event if saver is None else saver.observe
        serve(follower, port, observe, watch.tick, spans=spans, saver=saver)
        cards.close()
        for worker, lost in enumerate(follower.lost):
            if lost:  # which MPI need not know
                watch.lose(plan.servers + worker, "server 0 says so")
        port.close()
        self.mesh.send(follower.outcome, 0, "this server's parameters", None)
        counts = np.array(list(vars(follower.traffic).values()), np.int64)
        self.mesh.send(counts, 0, "this server's counts", None)

    def _respawn(self, plan: Plan, neighbours: Neighbours) -> int:
        """Say how many lost workers can be replaced, and why none, if some are to be."""
        if not plan.respawn:
            return 0
        why = ""
        if neighbours.own is None:
            why = "they share memory with server 0, which has none to share"
        elif self._number:
            why = "they begin with the program's first run, and this is another"
        if why:
            _log.warning("respawn: there are no replacements: %s", why)
            return 0
        if not fault_tolerant():
            _log.warning(
                "respawn: this MPI ends the job when a rank dies, so there is nobody to replace"
                " but a rank that falls silent; start with Open MPI's mpirun --with-ft ulfm"
            )
        return plan.respawn

    @contextlib.contextmanager
    def _replacements(
        self, plan: Plan, leader: Leader, port: MpiServerPort, neighbours: Neighbours
    ) -> Iterator[Replacements | None]:
        """See to the replacements of lost workers, if there are to be any."""
        if not leader.may_respawn:
            yield None
            return
        replacements = Replacements(
            port,
            plan.layout,
            neighbours,
            names=self.mesh.names,
            nodes=self.mesh.nodes,
            digests=plan.digests(**self._same),
            timeout_s=plan.timeout_s,
            vacant=lambda: leader.vacant,
            gone=lambda worker: leader.gone[worker],
        )
        with contextlib.closing(replacements):
            yield replacements

    def _build_server(
        self, plan: Plan, port: MpiServerPort, cards: Cards, respawn: int = 0
    ) -> Server:
        restart, card = self.restart, cards.open_card(port)
        if restart.reader is not None and self._watch is not None:
            restart.reader.alive = self._watch.tick  # it may be long
        with explained_state(restart.reader):
            machine = plan.build_server(
                self.mesh.rank,
                port.workers,
                port.buffers,
                port.memory,
                resume=restart.resume,
                respawn=respawn,
                card=card,
            )
        restart.close()
        plan.forget_initial()
        if card is not None:
            cards.serve_from(card, port, machine)
        return machine

    def _take_part(
        self, plan: Plan, neighbours: Neighbours, cards: Cards, watch: Watch, ending: Ending
    ) -> None:
        place = str(self.mesh.rank)

        def why_without_this_rank() -> str | None:
            # The summary may come before this rank's last answers; the last word says who is lost.
            return json.loads(ending.last_word).get(place) if ending.poll() else None

        watch.tell(lambda rank, why: self._miss(rank, plan, watch))
        watch.over = why_without_this_rank
        self._work_as(plan, neighbours, cards)
        watch.over = None

    def _miss(self, rank: int, plan: Plan, watch: Watch) -> None:
        """End where a server is lost; of workers, the servers tell."""
        if rank < plan.servers:
            watch.give_up(rank, f"server {rank}")

    def _work_as(self, plan: Plan, neighbours: Neighbours, cards: Cards) -> None:
        endpoint = MpiEndpoint(self.mesh, plan.layout, neighbours, plan.pull_codec)
        random_state = (self.restart.random or {}).get(endpoint.index)
        try:
            worker, device = open_worker(
                endpoint,
                lambda: cards.open_device(endpoint),
                lambda device: plan.build_worker(endpoint, device, random_state),
            )
        except Exception as error:  # which the others have heard of
            self._error = error
        else:
            with limited_threads(neighbours.ranks_here):
                self._error = take_part(self._interruptible_work, worker, device)
        cards.close()
        endpoint.close()

    def _interruptible_work(self, worker: Worker) -> None:
        with self.interrupts.released(_DELICATE):
            self._work(worker)

    # ---- the end -------------------------------------------------------------------------

    def _collect(self, plan: Plan, leader: Leader, bound_s: float | None) -> tuple[Array, Traffic]:
        """Bring the shards to rank 0, and add up what the servers have counted."""
        params = np.empty(plan.layout.size, plan.layout.dtype)
        traffic, counts = leader.traffic, np.zeros(len(vars(Traffic())), np.int64)
        for server, (begin, end) in enumerate(plan.layout.shards(plan.servers)):
            if server:
                what = f"the parameters of server {server}"
                self.mesh.receive(params[begin:end], server, what, bound_s)
                self.mesh.receive(counts, server, f"the counts of server {server}", bound_s)
                traffic.add(Traffic(*counts.tolist()))
            else:
                params[begin:end] = leader.outcome
        return params, traffic

    def _outcome(self, summary: Mapping[str, Any], plan: Plan) -> BaseException | None:
        why = summary["why"]
        if summary["deserted"]:
            reasons = "; ".join(f"rank {self.mesh.names[int(r)]}: {w}" for r, w in why.items())
            return RankLost(f"every worker is lost: {reasons}")
        if summary["interrupted"]:
            return KeyboardInterrupt("the run was interrupted")
        if summary["request"]:
            return interrupted_by(summary["request"], summary["version"], summary["saved"])
        if summary["failure"] is not None:
            worker, *what = summary["failure"]
            place = plan.servers + worker
            if self._error is not None and place == self.mesh.rank:
                return self._error
            failure = Failure(*what)
            rank = self.mesh.names[place]
            return WorkerFailed(worker, rank, failure.type, failure.message, failure.traceback)
        return Diverged(summary["diverged"]) if summary["diverged"] else None

    def _interrupted(self, reason: str) -> None:
        """Write the verdict; a launcher that ends the job may do so because a process has died."""
        watch, ended = self._watch, list[int]()
        if watch is not None:  # of what MPI has told, it is no reason
            ended = [*sorted(watch.lost - watch.faults.dead), *watch.processes.ended()]
        if watch is not None and watch.was_silent:  # and the others have ended the job for it
            self.host.verdict("failed", reason=f"this server was silent; then {reason}")
        elif ended:
            name = self.mesh.names[ended[0]]
            self.host.verdict("failed", reason=f"rank {name} is lost; then {reason}")
        else:
            self.host.verdict("interrupted", reason=reason)

    def verdict_of(self, error: BaseException, updates: int | None = None) -> None:
        """Write to the run directory how the run ended; only the first verdict counts."""
        state = "interrupted" if _was_interrupted(error) else "failed"
        what = describe(error)
        text = what.message.partition("\nits traceback:")[0]
        self.host.verdict(state, updates=updates, reason=f"{what.type}: {text}")

    def abort(self, error: BaseException) -> None:
        """End the whole job: the others cannot be told otherwise any more."""
        try:
            self.verdict_of(error)
            if _was_interrupted(error):  # there is nothing to be found in the stack
                what = "".join(traceback.format_exception_only(error))
            else:
                what = "".join(traceback.format_exception(error))
            print(f"psframe: rank {self.mesh.name} ends the job:\n{what}", file=sys.stderr)
        finally:  # also with a disk that is full
            self.mesh.abort(INTERRUPTED if _was_interrupted(error) else 1)


def _was_interrupted(error: BaseException) -> bool:
    if isinstance(error, Overdue):
        return error.interrupted
    if isinstance(error, WorkerFailed):
        return error.type == KeyboardInterrupt.__name__
    return isinstance(error, (KeyboardInterrupt, Interrupted))


def _summarise(
    leader: Leader, devices: Sequence[str], watch: Watch, grace: Grace
) -> dict[str, Any]:
    failure = None
    if leader.failure is not None:
        worker, what = leader.failure
        failure = [worker, what.type, what.message, what.traceback]
    return {
        **summarise(leader, devices),
        "failure": failure,
        "deserted": all(leader.lost),
        "diverged": str(diverged(leader)) if leader.diverged else "",
        "interrupted": grace.interrupt is not None,
        "request": grace.request,
        "saved": grace.saved,
        "why": {str(rank): why for rank, why in watch.why.items()},
    }
