"""Short runs in virtual time, again and again, each with another fault at another of its events.

No invariant may ever fail to hold; see `watching`. Faults of several kinds in one run, and longer
runs, are in test_invariants.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fakes import ExactSGD
from injecting import Fault, Injector, spread
from saving import Saver
from test_invariants import SHAPES, Player
from watching import Watcher

from psframe import BSP, SSP, Async, Network, Worker
from psframe.consistency import Mode, SSPPolicy
from psframe.events import NO_BUFFER, Push, Reason, Withheld
from psframe.follower import Follower
from psframe.leader import Leader
from psframe.leases import LeaseBook
from psframe.ledger import LedgerBook
from psframe.marking import Marks
from psframe.plan import Plan
from psframe.server import Server
from psframe.simulation import Simulation

# What each worker does, and the leases that it asks for (as in test_invariants).
SCRIPTS = {
    "pushes": ["pull", "push", "push_pull", "push"],
    "leases": ["lease"],
}
SPEC = (4, 2, 1, False, (2, 1))
MODES = [Async(), SSP(0), SSP(1), BSP(0), BSP(1)]


class Short:
    """A short run; what `Player` wants to know of it is here."""

    seed = 0
    bad = quits = 0.0
    writes_in_place = False
    specs = (SPEC,)

    def __init__(self, case: Case, faults: tuple[Fault, ...] = ()) -> None:
        self.case = case
        optimizer = ExactSGD()
        self.plan = Plan.check(
            self.work,
            {name: np.zeros(shape) for name, shape in SHAPES.items()},
            optimizer=optimizer,
            mode=case.mode,
            servers=case.servers,
        )
        if case.marks:
            self.plan = dataclasses.replace(self.plan, marks=Marks(2, True))
        self.watch = Watcher(self.plan, optimizer, case.workers)
        self.simulation = Simulation(
            self.work,
            self.plan,
            case.workers,
            Network(),
            lambda rng, worker, clock: 1.0 + worker % 2,
            observer=self.watch.observe,
            inspect=self.watch.inspect,
            save=self._save(),
        )
        self.watch.attach(self.simulation)
        self.injector = Injector(self.simulation._virtual, faults)

    def _save(self) -> Saver:
        self.watch.saver = Saver(self.case.servers, lambda: 0.5)
        return self.watch.saver

    def acts(self, rng: random.Random) -> list[str]:
        return SCRIPTS[self.case.script]

    def work(self, worker: Worker) -> None:
        Player(self, worker).play()  # type: ignore[arg-type]

    def run(self) -> int:
        """Run to the end; returns the number of events."""
        try:
            self.simulation.run()
        finally:
            self.injector.close()
        self.watch.finish()
        return len(self.injector.seen)


@dataclass(frozen=True)
class Case:
    """What a short run is of."""

    mode: Mode
    workers: int
    servers: int
    script: str
    marks: bool

    def __str__(self) -> str:
        marks = "-marks" if self.marks else ""
        return f"{self.mode}-W{self.workers}-S{self.servers}-{self.script}{marks}"

    @property
    def quick(self) -> bool:
        if self.servers == 1:
            return self.workers < 3 and self.marks
        return self.workers == 2 and self.script == "leases" and not self.marks

    def faults(self) -> list[Fault]:
        """Every fault that there can be at the events of the run that has none."""
        whole = Short(self)
        whole.run()
        return list(spread(whole.injector.seen, self.workers, self.servers))


CASES = [
    case
    for case in itertools.starmap(
        Case, itertools.product(MODES, (1, 2, 3), (1, 2), SCRIPTS, (False, True))
    )
    if case.workers < 3 or case.marks  # the rest would take as long as all of these
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.quick else pytest.mark.slow, id=str(case))
        for case in CASES
    ],
)
def test_a_fault_at_every_event(case: Case, record_property: Callable[[str, Any], None]) -> None:
    faults = case.faults()
    events = sum(run_with(case, fault) for fault in faults)
    assert len(faults) > 50
    record_property("runs with a fault at every event in turn", len(faults))
    record_property("events in these", events)


def run_with(case: Case, fault: Fault) -> int:
    """Run it with a fault; what fails says which."""
    try:
        return Short(case, (fault,)).run()
    except Exception as error:
        raise AssertionError(f"{case} with {fault}: {error!r}") from error


# ---- do the invariants notice? -----------------------------------------------------------------
#
# Each of these breaks the machines in one way, most of them such that it shows only in faults.


def applies_what_comes_late(patch: pytest.MonkeyPatch) -> None:
    """The push of a worker that counts as lost is handled like any."""
    queue = Server._queue

    def broken(self: Server, event: Any) -> None:
        gone, self.gone[event.worker] = self.gone[event.worker], False
        queue(self, event)
        self.gone[event.worker] = gone

    patch.setattr(Server, "_queue", broken)


def applies_what_waited(patch: pytest.MonkeyPatch) -> None:
    """A lost worker's queued push is served before it is forgotten."""
    lose = Leader._lose

    def broken(self: Leader, worker: int) -> None:
        inbox = self._inbox[worker]
        if inbox and isinstance(inbox[0], Push) and inbox[0].receipt is None:
            self._apply(inbox[0], self.policy.clocks[worker])
        lose(self, worker)

    patch.setattr(Leader, "_lose", broken)


def forgets_its_blocks(patch: pytest.MonkeyPatch) -> None:
    """The blocks of a worker that goes are not leased again."""
    patch.setattr(LeaseBook, "give_back", lambda self, worker: self._leave_plan(worker))


def keeps_its_block_and_leases_it_again(patch: pytest.MonkeyPatch) -> None:
    """A block that was completed before its worker was lost is leased once more."""
    complete = LeaseBook.complete

    def broken(self: LeaseBook, worker: int) -> Any:
        hands = list(self._hands[worker])
        done = complete(self, worker)
        self._worked = {**getattr(self, "_worked", {}), worker: hands[:1]}  # type: ignore[attr-defined]
        return done

    def give_back(self: LeaseBook, worker: int) -> bool:
        for hand in getattr(self, "_worked", {}).get(worker, ()):
            self._return(hand)
        return give(self, worker)

    give = LeaseBook.give_back
    patch.setattr(LeaseBook, "complete", broken)
    patch.setattr(LeaseBook, "give_back", give_back)


def keeps_its_snapshot(patch: pytest.MonkeyPatch) -> None:
    """What a lost worker held is not released."""
    depart = Server._depart

    def broken(self: Server, worker: int) -> None:
        if self.lost[worker]:
            self._hold[worker] = NO_BUFFER
        depart(self, worker)

    patch.setattr(Server, "_depart", broken)


def counts_it_as_live(patch: pytest.MonkeyPatch) -> None:
    """Others wait for a lost worker's clock."""
    patch.setattr(SSPPolicy, "leave", lambda self, worker: False)


def loses_count(patch: pytest.MonkeyPatch) -> None:
    """The pushes that a lost worker had under way are in no column of the ledger."""
    count = LedgerBook.count
    patch.setattr(
        LedgerBook, "count", lambda self, reason: reason is Reason.LOST or count(self, reason)
    )


def takes_it_twice(patch: pytest.MonkeyPatch) -> None:
    """A message is legal whatever its number is."""
    queue = Server._queue

    def broken(self: Server, event: Any) -> None:
        self._last_seq[event.worker] = -1
        queue(self, event)

    patch.setattr(Server, "_queue", broken)


def waits_for_its_part(patch: pytest.MonkeyPatch) -> None:
    """A follower does not give up what never comes."""
    patch.setattr(Follower, "_give_up", lambda self: False)


def tells_nobody_of_a_missing_part(patch: pytest.MonkeyPatch) -> None:
    """A follower gives up a part, and the leader does not hear of it."""
    serve = Follower._give_up

    def broken(self: Follower) -> bool:
        found = serve(self)
        self._out = [out for out in self._out if not isinstance(out, Withheld)]
        return found

    patch.setattr(Follower, "_give_up", broken)


def marks_too_early(patch: pytest.MonkeyPatch) -> None:
    """A follower keeps its shard for a checkpoint though decisions before it are open."""
    patch.setattr(Follower, "_undone", lambda self: [])


def answers_too_early(patch: pytest.MonkeyPatch) -> None:
    """A worker has the parameters before others have finished the steps that it must wait for."""
    patch.setattr(SSPPolicy, "may_start", lambda self, worker: True)


MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], Case]] = [
    (applies_what_comes_late, Case(Async(), 2, 1, "pushes", False)),
    (applies_what_waited, Case(SSP(0), 2, 1, "pushes", False)),
    (forgets_its_blocks, Case(Async(), 2, 1, "leases", False)),
    (keeps_its_block_and_leases_it_again, Case(Async(), 2, 1, "leases", False)),
    (keeps_its_snapshot, Case(Async(), 2, 1, "pushes", False)),
    (counts_it_as_live, Case(SSP(0), 2, 1, "pushes", False)),
    (loses_count, Case(BSP(0), 2, 1, "pushes", False)),
    (takes_it_twice, Case(Async(), 2, 1, "pushes", False)),
    (waits_for_its_part, Case(Async(), 2, 2, "pushes", False)),
    (tells_nobody_of_a_missing_part, Case(Async(), 2, 2, "pushes", False)),
    (marks_too_early, Case(Async(), 2, 2, "pushes", True)),
    (answers_too_early, Case(SSP(0), 2, 1, "pushes", False)),
]


@pytest.mark.parametrize(("mutant", "case"), MUTANTS, ids=lambda one: getattr(one, "__name__", ""))
def test_a_broken_machine_is_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = case.faults()
    mutant(monkeypatch)
    assert any(fails(case, fault) for fault in faults)


def fails(case: Case, fault: Fault) -> bool:
    try:
        run_with(case, fault)
    except AssertionError:
        return True
    return False
