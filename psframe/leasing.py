"""How a worker goes through its leased blocks: one after the other, or one ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from psframe.errors import Stopped
from psframe.events import GiveBack, Lease, LeaseKind, Report, TaskSpec
from psframe.exchange import Exchange
from psframe.params import Params
from psframe.prefetch import Preparation
from psframe.tasks import EpochOrders, Task

__all__ = ["Leasing"]


class Leasing:
    """Asks server 0 for the blocks of one plan after the other.

    Args:
        exchange: the worker's.
        seed: the run's.
        flush_log: sends what the worker has logged; called with every request.

    Attributes:
        abandoned: the request of a block that was leased ahead of time and will not be begun;
            `give_back` before anything else is asked for.
    """

    def __init__(self, exchange: Exchange, seed: int, flush_log: Callable[[], None]) -> None:
        self.abandoned: int | None = None
        self._exchange = exchange
        self._seed = seed
        self._flush_log = flush_log
        self._plans = 0

    def tasks(
        self,
        spec: TaskSpec,
        prepare: Callable[[Task], Any] | None,
        pull_pinned: Callable[[], Params],
    ) -> Iterator[Task]:
        """Begin the next plan; see `Worker.tasks`.

        Args:
            spec, prepare: of the plan.
            pull_pinned: pulls the snapshot that is evaluated. (It is not kept: it is the worker's,
                and that would be a circle, and hold a run's memory after its end.)
        """
        plan = self._plans
        self._plans += 1
        orders = EpochOrders(self._seed, plan, spec)

        def task_of(lease: Lease) -> Task:
            return orders.task(lease, pull_pinned, self._report)

        if prepare is None:
            return self._one_by_one(plan, spec, task_of)
        return self._prepared(plan, spec, task_of, prepare)

    def give_back(self) -> None:
        """Return the block that has been abandoned, if there is one."""
        seq, self.abandoned = self.abandoned, None
        if seq is not None:
            self._exchange.send(0, GiveBack(self._exchange.endpoint.index, seq))

    def _one_by_one(
        self, plan: int, spec: TaskSpec, task_of: Callable[[Lease], Task]
    ) -> Iterator[Task]:
        while True:
            lease = self._ask(plan, spec)
            if lease.kind is LeaseKind.EXHAUSTED:
                return
            task = task_of(lease)
            try:
                yield task
            finally:
                task.close()

    def _prepared(
        self,
        plan: int,
        spec: TaskSpec,
        task_of: Callable[[Lease], Task],
        prepare: Callable[[Task], Any],
    ) -> Iterator[Task]:
        """As `_one_by_one`; the block after the present one is leased and prepared meanwhile."""
        endpoint = self._exchange.endpoint
        ahead: tuple[int, Task, Callable[[], Any]] | None = None
        with Preparation(prepare, in_line=endpoint.virtual_time) as preparation:
            while True:
                if ahead is not None:
                    _, task, prepared = ahead
                else:
                    lease = self._ask(plan, spec)
                    if lease.kind is LeaseKind.EXHAUSTED:
                        return
                    task = task_of(lease)
                    prepared = preparation.start(task)
                ahead = None
                try:
                    if task.kind == "train":
                        lease = self._ask(plan, spec, ahead=True)
                        if lease.kind is LeaseKind.TRAIN:
                            following = task_of(lease)
                            ahead = lease.seq, following, preparation.start(following)
                        begin = endpoint.now()
                        task.prepared = prepared()
                        task.data_wait_s = endpoint.now() - begin
                    yield task
                except BaseException:
                    # `work` has turned to something else; its pushes are not about that block.
                    self.abandoned = None if ahead is None else ahead[0]
                    raise
                finally:
                    task.close()

    def _ask(self, plan: int, spec: TaskSpec, *, ahead: bool = False) -> Lease:
        exchange = self._exchange
        exchange.check_running()
        self._flush_log()
        request, message = exchange.protocol.ask_lease(plan, spec, ahead=ahead)
        exchange.send(0, message)
        exchange.wait(request)
        if request.stopped or request.lease is None:
            raise Stopped("the run is over")
        if request.lease.kind is LeaseKind.CONFLICT:
            raise ValueError(
                f"leases of worker {exchange.endpoint.index}: another worker's call number"
                f" {plan + 1}, or that of the run which this one goes on from, asked for something"
                f" else than {spec}; every worker must ask with equal arguments"
            )
        return request.lease

    def _report(self, sums: dict[str, float]) -> None:
        self._exchange.send(0, Report(self._exchange.endpoint.index, sums))
