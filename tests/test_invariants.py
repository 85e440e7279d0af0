"""Random runs in virtual time, in which nothing that must hold may ever fail to hold.

Each seed is one run: a mode, a network, ties, deaths, and a behaviour for every worker. Run one
again by its id: ``pytest "tests/test_invariants.py::test_invariants[seed17]"``.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import POISON, ExactSGD
from injecting import Death, Delay, Fault, Injector, Twice, drawn
from saving import Saver
from watching import Watcher, slow_down, write_slowly

from psframe import BSP, SSP, Async, Diverged, Network, Pending, Stopped, Worker
from psframe.events import Lost
from psframe.layout import Array
from psframe.marking import Marks
from psframe.plan import Plan
from psframe.simulation import Simulation

SEEDS = 600
FAULTY_SEEDS = 2500  # all but the first 300 are slow tests
FOUND = (20801, 21260, 22559, 43792)  # which once failed
# 50 elements: with three servers the shards are 16, 16 and 18, and "b" and "c" lie in two each.
SHAPES = {"a": (3, 5), "b": (20,), "c": (15,)}
SIZE = 50


class Oops(Exception):
    """Raised by a worker's `work`, now and then."""


class Player:
    """One worker's behaviour: a few acts drawn at random."""

    def __init__(self, scenario: Scenario, worker: Worker) -> None:
        self.scenario = scenario
        self.watch = scenario.watch
        self.worker = worker
        self.index = worker.index
        self.rng = random.Random(f"{scenario.seed} {worker.index}")
        self.drawing = random.Random(f"{scenario.seed} draws {worker.index}")
        self.version = 0
        self.pending: list[tuple[int, Pending]] = []
        self.plans = 0

    def play(self) -> None:
        for act in self.scenario.acts(self.rng):
            getattr(self, act)()
        if self.rng.random() < 0.5:
            self.collect()

    # ---- the words of the protocol -----------------------------------------------------------

    def grads(self) -> tuple[int, dict[str, Array]]:
        flat = np.full(SIZE, 1.0 + self.index)
        flat[::4] = len(self.watch.grads[self.index]) % 64
        if self.rng.random() < self.scenario.bad:
            flat[self.rng.randrange(SIZE)] = self.rng.choice([np.nan, np.inf, POISON])
        k = self.watch.pushes(self.index, flat, self.version)
        self.watch.draws[self.index].append(self.draw())
        return k, self.watch.plan.layout.views(flat)

    def draw(self) -> Any:
        """How far the worker's random numbers have got; now and then a little farther."""
        if self.drawing.random() < 0.3:
            self.worker.rng.random(self.drawing.randrange(4), dtype=np.float32)
        if self.worker._rng is None:
            return None
        state: Any = self.worker._rng.bit_generator.state
        numbers = state["state"]["state"], state["state"]["inc"]
        return (*numbers, state["has_uint32"], state["uinteger"])

    def push(self) -> None:
        self.watch.still(self.index)
        k, grads = self.grads()
        if self.rng.random() < 0.3 and self.scenario.writes_in_place:
            for name, view in self.worker.gradients().items():
                view[...] = grads[name]
            self.pending.append((k, self.worker.push(None)))
        else:
            self.pending.append((k, self.worker.push(grads)))
        if self.rng.random() < 0.3:
            self.collect()

    def collect(self) -> None:
        for k, pending in self.pending:
            self.watch.receipts[self.index, k] = pending.wait()
        self.pending.clear()

    def take(self, params: Any) -> None:
        self.watch.pulled(self.index, params)
        self.version = params.version

    def pull(self) -> None:
        self.watch.still(self.index)
        self.take(self.worker.pull())

    def push_pull(self) -> None:
        self.watch.still(self.index)
        k, grads = self.grads()
        params = self.worker.push_pull(grads)
        self.watch.receipts[self.index, k] = params.receipt
        self.take(params)

    # ---- acts --------------------------------------------------------------------------------

    def loop(self) -> None:
        self.pull()
        for _ in range(self.rng.randrange(5)):
            self.push_pull()

    def pairs(self) -> None:
        for _ in range(self.rng.randrange(4)):
            self.pull()
            self.push()

    def doubles(self) -> None:
        for _ in range(self.rng.randrange(3)):
            self.pull()
            self.push()
            self.push()

    def prefetch(self) -> None:
        self.pull()
        for _ in range(self.rng.randrange(4)):
            ahead = self.worker.pull_async()
            self.push()
            if self.rng.random() < 0.4:
                self.push()
            if self.rng.random() < 0.1:
                self.pull()  # ends the abandoned one
                continue
            self.watch.still(self.index)
            self.take(ahead.wait())

    def lease(self) -> None:
        plan = self.plans
        self.plans += 1
        if plan >= len(self.scenario.specs):
            return
        n, batch, epochs, shuffle, evaluate = self.scenario.specs[plan]
        style = self.rng.choice(["pull", "push_pull", "push", "lazy", "prefetch"])
        quits = self.rng.random() < self.scenario.quits
        prepare = self.rng.choice([None, lambda task: task.indices.sum()])
        tasks = self.worker.tasks(
            n, batch, epochs=epochs, shuffle=shuffle, evaluate=evaluate, prepare=prepare
        )
        for task in tasks:
            if task.kind == "evaluate":
                self.evaluate(plan, task)
            else:
                assert task.prepared == (None if prepare is None else task.indices.sum())
                self.watch.leased(self.index, plan, task.epoch, task.indices)
                self.compute(style)
            if quits and self.rng.random() < 0.3:
                return
        self.watch.exhausted.add(plan)

    def compute(self, style: str) -> None:
        if style == "lazy" and self.rng.random() < 0.5:
            return  # completed by asking for the next
        if style in ("pull", "lazy"):
            self.pull()
        if style == "prefetch":
            ahead = self.worker.pull_async()
            self.push()
            self.watch.still(self.index)
            self.take(ahead.wait())
        elif style == "push_pull":
            self.push_pull()
        else:
            self.push()

    def evaluate(self, plan: int, task: Any) -> None:
        if self.rng.random() < 0.1:
            return  # completed, with nothing to add, by asking for the next
        self.watch.still(self.index)
        params = task.params()
        self.watch.pinned(self.index, (plan, task.epoch), params)
        self.take(params)
        if self.rng.random() < 0.9:
            count = float(len(task.indices))
            task.report(n=count, versions=count * params.version, sum=float(task.indices.sum()))

    def stop(self) -> None:
        if self.rng.random() < 0.3:
            self.worker.stop()

    def fail(self) -> None:
        if self.rng.random() < 0.3 and self.index not in self.scenario.deaths:
            raise Oops

    def log(self) -> None:
        self.worker.log(loss=self.rng.random())

    def leave(self) -> None:
        if self.rng.random() < 0.5:
            raise Stopped


class Scenario:
    """What one seed stands for."""

    watcher: type[Watcher] = Watcher

    def __init__(self, seed: int, *, faults: bool = False) -> None:
        self.seed = seed
        rng = random.Random(seed)
        self.workers = rng.choice([1, 2, 2, 3, 3, 4, 5, 7, 9])
        self.mode = self.draw_mode(rng)
        self.servers = rng.choice([1, 1, 2, 2, 3, 3])
        self.network = Network(
            rng.choice([0.0, 0.25, 1.0, rng.random()]),
            rng.choice([float("inf"), float("inf"), 200.0, 3000.0]),
        )
        self.times = rng.choice([[0.0], [1.0], [0.0, 1.0, 1.0, 2.0], [0.1, 8.0], None])
        self.quits = rng.choice([0.0, 0.1, 0.5])  # leave a lease iterator before it ends
        self.bad = rng.choice([0.0, 0.0, 0.05, 0.3])
        rare = [act for act in ("stop", "fail", "leave") if rng.random() < 0.12]
        common = ["loop", "pairs", "doubles", "prefetch", "lease", "lease", "log"]
        self.repertoire = rng.choice([common, ["lease"], ["lease", "loop"], ["loop"]]) + rare
        self.specs = [
            (
                rng.randrange(1, 30),
                rng.choice([1, 2, 3, 5]),
                rng.randrange(4),
                rng.random() < 0.5,
                rng.choice([None, (rng.randrange(1, 9), 2)]),
            )
            for _ in range(3)
        ]
        self.max_updates = rng.choice([None, None, rng.randrange(12)])
        self.deaths = {}
        if rng.random() < 0.5:
            dying = rng.sample(range(self.workers), rng.randint(1, self.workers))
            self.deaths = {worker: rng.randrange(1, 40) for worker in dying}
        # Workers that are taken for dead by one server, at some time, and are not.
        self.suspects = {}
        if rng.random() < 0.2:
            self.suspects = {rng.randrange(self.workers): (rng.uniform(0, 20), rng.random())}
        # One that is taken for dead is told that its slots are free while some server still reads.
        self.writes_in_place = not self.suspects
        # Seconds that a message between servers may take more than a worker's.
        self.lag_s = rng.choice([0.0, 0.0, 1.0, 10.0])
        self.streams = self.servers == 1 and rng.random() < 0.7
        self.optimizer = ExactSGD()
        self.plan = Plan.check(
            self.work,
            {name: np.zeros(shape) for name, shape in SHAPES.items()},
            optimizer=self.optimizer,
            mode=self.mode,
            servers=self.servers,
            seed=seed,
            max_updates=self.max_updates,
        )
        self.add_marks(random.Random(f"{seed} marks"))
        self.watch = self.watcher(self.plan, self.optimizer, self.workers)
        self.faults: list[Fault] = []
        if faults:
            self.faults = drawn(random.Random(f"{seed} faults"), self.workers, self.servers)
            self.streams &= not any(isinstance(fault, Twice) for fault in self.faults)
            self.writes_in_place &= all(isinstance(f, (Death, Delay)) for f in self.faults)

    def draw_mode(self, rng: random.Random) -> Any:
        return rng.choice([Async(), *(SSP(s) for s in range(4)), BSP(), BSP(), BSP(1), BSP(2)])

    def add_marks(self, rng: random.Random) -> None:
        """Checkpoints of most runs: every few updates, at some times, at the end."""
        marks = Marks(rng.choice([None, 1, 2, 5]), rng.random() < 0.5)
        self.plan = dataclasses.replace(self.plan, marks=rng.choice([None, marks, marks]))
        self.marks_at = [rng.uniform(0, 20) for _ in range(rng.choice([0, 0, 1, 4]))]
        if self.plan.marks is None:
            self.marks_at = []
        times = rng.choice([[0.0], [1.0], [0.0, 0.5, 20.0]])
        self.saver = Saver(self.servers, lambda: rng.choice(times))

    def acts(self, rng: random.Random) -> list[str]:
        return [rng.choice(self.repertoire) for _ in range(rng.randint(0, 4))]

    def work(self, worker: Worker) -> None:
        Player(self, worker).play()

    def compute_time_s(self, rng: np.random.Generator, worker: int, clock: int) -> float:
        return float(rng.exponential() if self.times is None else rng.choice(self.times))

    def prepare(self, simulation: Simulation) -> None:
        """Do what is to be done before it runs."""

    def run(self) -> Simulation:
        simulation = Simulation(
            self.work,
            self.plan,
            self.workers,
            self.network,
            self.compute_time_s,
            observer=self.watch.observe,
            deaths=self.deaths,
            inspect=self.watch.inspect,
            save=self.saver,
        )
        self.watch.saver = self.saver
        self.watch.attach(simulation)
        virtual = simulation._virtual
        if self.streams:
            write_slowly(virtual, random.Random(f"{self.seed} streams"))
        if self.lag_s:
            slow_down(virtual, self.lag_s, random.Random(f"{self.seed} lag"))
        injector = Injector(virtual, self.faults)
        for time_s in self.marks_at:
            virtual.at(time_s, -1, simulation.mark)
        for worker, (time_s, which) in self.suspects.items():
            virtual.at(time_s, worker, virtual.deliver[int(which * self.servers)], Lost(worker))
        self.prepare(simulation)
        try:
            result = simulation.run()
        except Oops:
            assert self.watch.leader.failure is not None
        except Diverged:
            assert self.watch.leader.diverged
            assert self.bad
        else:
            assert result.version == self.watch.leader.store.version
        finally:
            injector.close()
        self.events = len(injector.seen)
        return simulation


@pytest.mark.parametrize("seed", range(SEEDS), ids=lambda seed: f"seed{seed}")
def test_invariants(seed: int) -> None:
    scenario = Scenario(seed)
    scenario.run()
    scenario.watch.finish()


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(
            seed, marks=() if seed < 300 or seed in FOUND else pytest.mark.slow, id=f"seed{seed}"
        )
        for seed in (*range(FAULTY_SEEDS), *FOUND)
    ],
)
def test_invariants_with_faults(seed: int, record_property: Callable[[str, Any], None]) -> None:
    """Beside all that, deaths and messages that are late or come twice, some in each run."""
    scenario = Scenario(seed, faults=True)
    scenario.run()
    scenario.watch.finish()
    record_property("runs with random faults", 1)
    record_property("events in them", scenario.events)


# ---- servers that hear of each other late ------------------------------------------------------


def simulate_late(work: Any, mode: Any, lag_s: float) -> Simulation:
    """Three workers, three servers; what those tell each other takes longer than all else."""
    params = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    plan = Plan.check(work, params, optimizer=ExactSGD(), mode=mode, servers=3)
    simulation = Simulation(
        work, plan, 3, Network(), lambda rng, worker, clock: float(rng.exponential())
    )
    slow_down(simulation._virtual, lag_s, random.Random(3))
    simulation.run()
    return simulation


@pytest.mark.parametrize("lag_s", [0.0, 1.0, 20.0])
def test_shards_are_of_one_round_though_servers_hear_late(lag_s: float) -> None:
    """Who waits for a lease takes no part in rounds meanwhile, and pulls as soon as it has one."""
    pulls = 0

    def work(worker: Worker) -> None:
        nonlocal pulls
        for plan in range(4):
            for _ in worker.leases(8, 2, epochs=1 + plan):
                params = worker.pull()
                assert len(set(params.versions)) == 1, params.versions
                pulls += 1
                worker.push({name: np.ones(shape) for name, shape in SHAPES.items()})

    simulation = simulate_late(work, BSP(), lag_s)
    assert pulls == 4 * (1 + 2 + 3 + 4)
    assert len({machine.store.version for machine in simulation.machines}) == 1


@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP()], ids=repr)
@pytest.mark.parametrize("lag_s", [0.0, 1.0, 20.0])
def test_an_evaluation_is_of_one_pin_though_servers_hear_late(mode: Any, lag_s: float) -> None:
    """Who takes no part in an epoch has no push of its own that would make its pull wait."""
    pins: dict[int, set[tuple[int, ...]]] = {}

    def work(worker: Worker) -> None:
        for task in worker.tasks(2, 1, epochs=5, evaluate=(6, 1)):
            if task.kind == "evaluate":
                pins.setdefault(task.epoch, set()).add(tuple(task.params().versions))
                task.report(n=1.0)
            else:
                worker.push({name: np.ones(shape) for name, shape in SHAPES.items()})

    simulate_late(work, mode, lag_s)
    assert sorted(pins) == list(range(5))
    assert [len(versions) for versions in pins.values()] == [1] * 5


# ---- BSP and leases ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(150), ids=lambda seed: f"seed{seed}")
def test_a_round_has_no_stale_gradient_though_workers_sit_rounds_out(seed: int) -> None:
    """Who waits for a block takes no part in rounds, and may have no parameters but old ones."""
    rng = random.Random(seed)
    workers, servers = rng.randrange(2, 6), rng.randrange(1, 3)
    n, batch, epochs = rng.randrange(1, 20), rng.randrange(1, 4), rng.randrange(1, 3)
    evaluate = rng.choice([None, (3, 1)])
    params = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    grads = {name: np.ones(shape) for name, shape in SHAPES.items()}

    def work(worker: Worker) -> None:
        worker.pull()
        for _ in range(3):
            for task in worker.tasks(n, batch, epochs=epochs, evaluate=evaluate):
                if task.kind == "evaluate":
                    task.params()
                    task.report(n=1.0)
                    worker.pull()
                else:
                    worker.push_pull(grads)

    plan = Plan.check(
        work, params, optimizer=ExactSGD(), mode=BSP(rng.randrange(3)), servers=servers, seed=seed
    )
    deaths = {worker: rng.randrange(4, 30) for worker in range(1, workers) if rng.random() < 0.3}
    result = Simulation(
        work, plan, workers, Network(), lambda rng, worker, clock: rng.exponential(), deaths=deaths
    ).run()
    assert result.staleness.tolist() == [result.ledger.applied]
    assert result.ledger.refused == 0
