"""Random runs in virtual time whose lost workers are replaced, now and then more than once.

What must hold in every run (`watching`) must hold in these. Run one again by its id:
``pytest "tests/test_replacing.py::test_invariants_with_replacements[seed17]"``.
"""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from fakes import ExactSGD
from test_invariants import SHAPES, Scenario
from watching import Watcher

from psframe import BSP, SSP, Async, Network, Worker
from psframe.events import Joined, Missing
from psframe.leader import Leader
from psframe.plan import Plan
from psframe.simulation import Simulation
from psframe.transports.simulated import SimulatedEndpoint

SEEDS = 400


class Agency:
    """Brings replacements, as server 0's driver does."""

    def __init__(self, simulation: Simulation, rng: random.Random, watch: Watcher | None) -> None:
        leader = simulation.machines[0]
        assert isinstance(leader, Leader)
        self.leader = leader
        self.joined: list[int] = []
        self._simulation = simulation
        self._rng = rng
        self._begun: set[int] = set()
        virtual = simulation._virtual
        self._deliver = virtual.deliver[0]
        virtual.deliver[0] = self._deliver_and_look
        if watch is not None:
            join = leader._join

            def watched(worker: int) -> None:
                join(worker)
                watch.replaced(worker)

            leader._join = watched  # type: ignore[method-assign]

    def _deliver_and_look(self, event: object) -> None:
        self._deliver(event)  # type: ignore[arg-type]
        for worker, number in self.leader.vacant.items():
            if number not in self._begun:
                self._begun.add(number)
                virtual = self._simulation._virtual
                delay_s = self._rng.choice([0.0, 1.0, self._rng.uniform(0, 20)])
                virtual.at(virtual.now + delay_s, worker, self._come, worker, number)

    def _come(self, worker: int, number: int) -> None:
        if self.leader.vacant.get(worker) != number:
            assert self.leader.stopped
            return
        if self._rng.random() < 0.2:
            self._deliver_and_look(Missing(worker))
            return
        virtual = self._simulation._virtual
        virtual.endpoints[worker] = SimulatedEndpoint(virtual, worker)
        if worker in virtual.deaths:
            virtual.deaths[worker] = self._rng.randrange(1, 60)
        self._deliver_and_look(Joined(worker))
        assert not self.leader.gone[worker]
        self.joined.append(worker)
        self._simulation._start(worker)


class ReplacingScenario(Scenario):
    """What one seed stands for: as in `test_invariants`, with deaths and replacements."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = self.rng = random.Random(f"{seed} replacements")
        self.suspects, self.lag_s, self.streams, self.marks_at = {}, 0.0, False, []
        self.plan = dataclasses.replace(self.plan, servers=1, marks=None)
        if not self.deaths:
            self.deaths = {worker: rng.randrange(1, 40) for worker in range(self.workers)}
        self.respawn = rng.choice([1, 2, 5, 20])
        self.watch = Watcher(self.plan, self.optimizer, self.workers)

    def prepare(self, simulation: Simulation) -> None:
        self.agency = Agency(simulation, self.rng, self.watch)
        self.agency.leader._respawn = self.respawn


@pytest.mark.parametrize("seed", range(SEEDS), ids=lambda seed: f"seed{seed}")
def test_invariants_with_replacements(seed: int) -> None:
    scenario = ReplacingScenario(seed)
    scenario.run()
    scenario.watch.finish()
    assert len(scenario.agency.joined) <= scenario.respawn
    assert scenario.agency.leader.losses >= set(scenario.agency.joined)


@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP(), BSP(1)], ids=repr)
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_leases_are_completed_though_every_worker_dies(mode: object, workers: int) -> None:
    """Each sample of each epoch once, by those who come in place of the dead."""

    def work(worker: Worker) -> None:
        for _ in range(2):
            for _ in worker.leases(40, 4, epochs=3):
                worker.pull()
                worker.push({name: np.ones(shape) for name, shape in SHAPES.items()})

    plan = Plan.check(
        work,
        {name: np.zeros(shape) for name, shape in SHAPES.items()},
        optimizer=ExactSGD(),
        mode=mode,  # type: ignore[arg-type]
        servers=1,
    )
    simulation = Simulation(
        work,
        plan,
        workers,
        Network(),
        lambda rng, worker, clock: float(rng.exponential()),
        deaths=dict.fromkeys(range(workers), 9),
    )
    agency = Agency(simulation, random.Random(workers), None)
    agency.leader._respawn = 1000
    result = simulation.run()
    assert set(agency.joined) == set(result.lost) == set(range(workers))
    assert result.ledger.applied + result.ledger.dropped >= 60
    assert all(book.finished for book in agency.leader._book._plans.values())
