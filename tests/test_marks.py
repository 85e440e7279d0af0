"""Checkpoints of simulated runs: exact cuts, and runs that go on from them to the same bits."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proofs import OPTIMIZERS, SHAPES, gradient, initial
from saving import Checkpoint, Saver
from watching import slow_down

from psframe import BSP, SSP, Async, Network, Worker, optim
from psframe.events import EpochDone, Evaluated
from psframe.layout import Array
from psframe.marking import Marks
from psframe.optim import Average, Grouped
from psframe.plan import Plan
from psframe.server import Server, ServerMemory
from psframe.simulation import Simulation
from psframe.state import Resume
from psframe.store import HeapBuffers, buffer_count

RULES = {
    **OPTIMIZERS,
    "warm": optim.Adam(lr=optim.schedules.Cosine(0.05, 20), weight_decay=0.01),
    "grouped": Grouped(optim.Adam(0.01), {"b1": Average(0.9)}),
}
MODES = [Async(), SSP(0), SSP(2), BSP(), BSP(1)]


class Run:
    """One simulated run with marks.

    Attributes:
        told: what its host was told.
        final, outcome: the last parameters, and those that the run leaves behind.
    """

    def __init__(
        self,
        work: Any,
        rule: Any,
        mode: Any,
        *,
        workers: int = 1,
        servers: int = 1,
        marks: Marks | None = None,
        start: Checkpoint | None = None,
        save_s: float = 0.0,
        params: Any = None,
        deaths: Any = None,
        lag: random.Random | None = None,
        **plan: Any,
    ) -> None:
        self.told: list[Any] = []
        self.plan = Plan.check(
            work,
            params or initial(np.float32),
            optimizer=rule,
            mode=mode,
            servers=servers,
            seed=5,
            marks=marks,
            **plan,
        )
        self.saver = Saver(servers, lambda: save_s)
        self.simulation = Simulation(
            work,
            self.plan,
            workers,
            Network(),
            lambda rng, worker, clock: float(rng.exponential()),
            observer=self.told.append,
            deaths=deaths,
            save=self.saver,
            resume=None if start is None else start.resume(),
        )
        if lag is not None:
            slow_down(self.simulation._virtual, 2.0, lag)
        self.result = self.simulation.run()
        self.saver.check()
        machines = self.simulation.machines
        assert all(not machine.store.held for machine in machines)
        self.final = np.concatenate([machine.store.params for machine in machines])
        self.outcome = np.concatenate([machine.outcome for machine in machines])

    @property
    def leader(self) -> Any:
        return self.simulation.machines[0]

    def epochs(self) -> list[Any]:
        """What the host was told of epochs and evaluations."""
        return [event for event in self.told if isinstance(event, (EpochDone, Evaluated))]


# ---- one worker: the same bits as if it had never stopped ----------------------------------------


def leased(worker: Worker) -> None:
    """Two plans with evaluations; gradients depend on parameters, samples and random numbers."""
    params = worker.pull()
    for _ in range(2):
        for task in worker.tasks(11, 3, epochs=2, evaluate=(5, 2)):
            if task.kind == "evaluate":
                pinned = task.params()
                sums = {name: float(p.sum()) for name, p in pinned.items()}
                task.report(**sums, n=float(len(task.indices)), version=float(pinned.version))
                params = worker.pull()
                continue
            noise = worker.rng.standard_normal() + worker.rng.random(dtype=np.float32)
            grads = gradient(params, int(task.indices[0]), int(task.indices.sum()))
            params = worker.push_pull({n: g + np.float32(noise) for n, g in grads.items()})


def prepared(worker: Worker) -> None:
    """The next block is leased ahead of time, and pushes are not waited for."""
    for task in worker.tasks(11, 3, epochs=4, prepare=lambda task: task.rng.random()):
        params = worker.pull()
        grads = gradient(params, int(task.indices[0]), int(task.indices.sum()))
        noise = np.float32(task.prepared + worker.rng.random())
        worker.push({name: grad + noise for name, grad in grads.items()})


def score(sums: Any) -> float:
    return float(sums["w1"])


CASES = [(rule, mode) for rule in RULES for mode in (Async(),)] + [
    (rule, mode) for rule in ("momentum", "warm") for mode in MODES[1:]
]


@pytest.mark.parametrize(("name", "mode"), CASES, ids=str)
@pytest.mark.parametrize("work", [leased, prepared], ids=lambda work: work.__name__)
def test_one_worker_ends_with_the_same_bits(name: str, mode: Any, work: Any) -> None:
    rule = RULES[name]
    plain = Run(work, rule, mode, score=score)
    marked = Run(work, rule, mode, score=score, marks=Marks(every=1), save_s=0.0)
    assert marked.final.tobytes() == plain.final.tobytes()
    assert [one.version for one in marked.saver.whole] == list(range(1, plain.result.version + 1))
    for one in marked.saver.whole:
        again = Run(work, rule, mode, score=score, marks=Marks(), start=one)
        assert again.final.tobytes() == plain.final.tobytes(), f"version {one.version}"
        assert again.outcome.tobytes() == plain.outcome.tobytes()
        assert again.result.version == plain.result.version
        assert again.result.kept_version == plain.result.kept_version
        assert again.result.staleness.tolist() == plain.result.staleness.tolist()
        assert again.result.ledger == plain.result.ledger
        assert again.epochs() == plain.epochs()[len(plain.epochs()) - len(again.epochs()) :]
        rows = plain.result.trace[one.version :]
        for column in ("worker", "clock", "version_read", "version_applied", "staleness"):
            assert again.result.trace[column].tolist() == rows[column].tolist()


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("save_s", [0.0, 0.7, 3.0])
def test_other_numbers_of_servers_change_no_bit(servers: int, save_s: float) -> None:
    plain = Run(leased, RULES["warm"], Async(), score=score)
    marks = Marks(every=2, at_end=True)
    marked = Run(
        leased, RULES["warm"], Async(), score=score, servers=servers, marks=marks, save_s=save_s
    )
    assert marked.final.tobytes() == plain.final.tobytes()
    versions = [one.version for one in marked.saver.whole]
    assert versions[-1] == plain.result.version, "one at the end"
    assert marked.leader.marks_skipped == plain.result.version // 2 - (len(versions) - 1)
    for one in marked.saver.whole:
        for other in (1, 2, 3):
            again = Run(leased, RULES["warm"], Async(), score=score, servers=other, start=one)
            assert again.final.tobytes() == plain.final.tobytes()
            assert again.outcome.tobytes() == plain.outcome.tobytes()
            assert again.epochs() == plain.epochs()[len(plain.epochs()) - len(again.epochs()) :]


def test_stopped_at_every_version_and_gone_on() -> None:
    """Stopped by max_updates with a mark at the end, again and again, one update a run."""
    plain = Run(leased, RULES["warm"], Async(), score=score)
    start: Checkpoint | None = None
    epochs = []
    for version in range(1, plain.result.version + 1):
        one = Run(
            leased,
            RULES["warm"],
            Async(),
            score=score,
            marks=Marks(every=1, at_end=True),
            max_updates=version,
            start=start,
            servers=1 + version % 3,
        )
        assert one.result.version == version
        (start,) = one.saver.whole
        assert start.version == version
        epochs += one.epochs()
    last = Run(leased, RULES["warm"], Async(), score=score, start=start)
    assert last.final.tobytes() == plain.final.tobytes()
    assert epochs + last.epochs() == plain.epochs()


# ---- rounds: the same bits whatever the servers ------------------------------------------------


@pytest.mark.parametrize("servers", [1, 3])
def test_rounds_of_several_workers_end_with_the_same_bits(servers: int) -> None:
    def work(worker: Worker) -> None:
        params = worker.pull()
        for indices in worker.leases(43, 4, epochs=3):
            noise = np.float32(worker.rng.random())
            grads = gradient(params, int(indices[0]), int(indices.sum()))
            params = worker.push_pull({name: grad + noise for name, grad in grads.items()})

    plain = Run(work, RULES["adam"], BSP(), workers=3)
    marked = Run(
        work, RULES["adam"], BSP(), workers=3, servers=servers, marks=Marks(every=1), save_s=0.1
    )
    assert marked.saver.whole
    for one in marked.saver.whole:
        for other in (1, 2):
            again = Run(work, RULES["adam"], BSP(), workers=3, servers=other, start=one)
            assert again.final.tobytes() == plain.final.tobytes()


# ---- several workers: nothing twice, nothing lost ----------------------------------------------


def summing(worker: Worker) -> None:
    """Every sample adds its own number once an epoch, whoever computes it."""
    worker.pull()
    for task in worker.tasks(43, 4, epochs=3, evaluate=(5, 2)):
        if task.kind == "evaluate":
            task.params()
            task.report(n=float(len(task.indices)))
            continue
        total = np.float32(task.indices.sum())
        grads = {name: np.full(shape, total, np.float32) for name, shape in SHAPES.items()}
        worker.push_pull(grads)


TOTAL = 3 * 43 * 42 / 2


@pytest.mark.parametrize("mode", MODES, ids=repr)
@pytest.mark.parametrize(("workers", "servers"), [(1, 2), (3, 1), (4, 3)])
def test_each_sample_counts_once_over_the_cut(mode: Any, workers: int, servers: int) -> None:
    begun = initial(np.float32)
    rule = optim.SGD(1.0)  # small integers: no sum is rounded but for where it begins
    plain = {"rule": rule, "mode": mode}
    zeros = {name: np.zeros_like(p) for name, p in begun.items()}
    first = Zeros(summing, zeros, workers=workers, servers=servers, marks=Marks(2), **plain)
    rounds = isinstance(mode, BSP)
    if not rounds:
        assert set(first.final.tolist()) == {-TOTAL}
    assert first.saver.whole
    for one in first.saver.whole:
        for other, shards in ((1, 1), (2, 3), (5, 2)):
            again = Zeros(summing, zeros, workers=other, servers=shards, start=one, **plain)
            done = sum(event.samples for event in again.epochs() if isinstance(event, EpochDone))
            assert done == 43 * (3 - _epochs_done(one))
            if not rounds:
                assert set(again.final.tolist()) == {-TOTAL}, "a block twice, or never"


def _epochs_done(one: Checkpoint) -> int:
    (plan,) = one.state["leases"]["plans"]
    missing = {block // 11 for block in plan["returned"]}
    return sum(epoch not in missing for epoch in range(plan["next_block"] // 11))


class Zeros(Run):
    """A run that begins at 0."""

    def __init__(self, work: Any, zeros: dict[str, Array], **how: Any) -> None:
        super().__init__(work, how.pop("rule"), how.pop("mode"), params=zeros, **how)


@pytest.mark.parametrize("seed", range(60), ids=lambda seed: f"seed{seed}")
def test_each_sample_counts_once_though_workers_die(seed: int) -> None:
    """Gradients in flight are lost with their workers, and computed again: no sum is different."""
    rng = random.Random(seed)
    mode, rule = rng.choice([Async(), SSP(0), SSP(3)]), optim.SGD(1.0)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    how = {"rule": rule, "mode": mode}
    workers, servers = rng.randrange(2, 6), rng.randrange(1, 4)
    deaths = {w: rng.randrange(2, 60) for w in range(1, workers) if rng.random() < 0.5}
    marks = Marks(rng.randrange(1, 6), rng.random() < 0.5)
    first = Zeros(
        summing,
        zeros,
        workers=workers,
        servers=servers,
        marks=marks,
        deaths=deaths,
        lag=random.Random(seed) if rng.random() < 0.5 else None,
        save_s=rng.choice([0.0, 1.0, 5.0]),
        **how,
    )
    for one in rng.sample(first.saver.whole, min(4, len(first.saver.whole))):
        again = Zeros(
            summing,
            zeros,
            workers=rng.randrange(1, 6),
            servers=rng.randrange(1, 4),
            start=one,
            **how,
        )
        done = sum(event.samples for event in again.epochs() if isinstance(event, EpochDone))
        assert done == 43 * (3 - _epochs_done(one))
        if set(one.versions.values()) == {one.version}:  # else a dead worker's part was missing
            assert set(again.final.tolist()) == {-TOTAL}


def test_workers_that_are_as_many_keep_their_clocks() -> None:
    def work(worker: Worker) -> None:
        for _ in range(4 + worker.index):
            worker.push_pull({name: np.ones(shape) for name, shape in SHAPES.items()})

    first = Run(work, RULES["sgd"], SSP(9), workers=3, marks=Marks(every=1))
    for one in first.saver.whole:
        policy = one.state["policy"]
        leader = resumed(first.plan, one.resume(), 3)
        clocks, live = policy["clocks"], policy["live"]
        least = min((c for c, alive in zip(clocks, live, strict=True) if alive), default=0)
        assert leader.policy.clocks == (clocks if all(live) else [least] * 3)
        assert resumed(first.plan, one.resume(), 2).policy.clocks == [least] * 2
    assert any(len(set(one.state["policy"]["clocks"])) > 1 for one in first.saver.whole)


def test_random_states_are_told_when_they_have_changed() -> None:
    told = []

    def work(worker: Worker) -> None:
        grads = {name: np.ones(shape) for name, shape in SHAPES.items()}
        send = worker._exchange.send
        worker._exchange.send = lambda server, e: (told.append(e), send(server, e))[1]  # type: ignore[method-assign]
        worker.pull()
        worker.push(grads)
        first = worker.rng.random()
        worker.push_pull(grads)
        worker.push_pull(grads)
        worker.push_pull(grads) if first < 2 else None
        worker.rng.random()
        worker.push(grads)

    Run(work, RULES["sgd"], Async())
    assert told == [], "there are no checkpoints"
    marked = Run(work, RULES["sgd"], Async(), marks=Marks(every=1))
    assert len(told) == 2
    assert [len(one.state["random"]) for one in marked.saver.whole] == [0, 1, 1, 1, 1]


# ---- states that others have touched -----------------------------------------------------------


def resumed(plan: Plan, resume: Resume, workers: int = 3, index: int = 0) -> Server:
    begin, end = plan.layout.shards(plan.servers)[index]
    buffers = HeapBuffers(buffer_count(workers), end - begin, plan.layout.dtype)
    nothing = np.empty(0)
    memory = ServerMemory(lambda *_: nothing, lambda _: nothing, [True] * workers)
    return plan.build_server(index, workers, buffers, memory, resume=resume)


def busy(worker: Worker) -> None:
    """Evaluates slowly, draws random numbers, and pushes what is late."""
    params = worker.pull()
    for task in worker.tasks(20, 2, epochs=6, evaluate=(40, 1), prepare=lambda task: None):
        if task.kind == "evaluate":
            task.params()
            task.report(w1=float(task.indices.sum()), n=1.0)
            params = worker.pull()
            worker.push(gradient(params, worker.index, 1))
            continue
        worker.rng.random()
        params = worker.push_pull(gradient(params, worker.index, int(task.indices.sum())))


@pytest.fixture(scope="module")
def rich() -> tuple[Plan, Checkpoint]:
    """A checkpoint with something of everything."""
    run = Run(busy, RULES["adam"], Async(), workers=3, servers=2, marks=Marks(every=1), score=score)

    def size(one: Checkpoint) -> int:
        leases = one.state["leases"]
        (plan,) = leases["plans"]
        done = len(leases["evaluation"]["results"]) if leases["evaluation"] else 0
        return ("kept" in one.shards[0]) * len(plan["returned"]) * done

    one = max(run.saver.whole, key=size)
    assert size(one) > 0
    assert one.state["random"]
    return run.plan, one


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in plain data."""
    if path:
        yield path
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from paths(value, (*path, key))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
NEAR = st.sampled_from([-1, 0, 1, 2, 2**31, 2**62, 2**62 + 1, 2**64, 10**5000])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_state_that_was_touched_is_refused_or_is_one(
    rich: tuple[Plan, Checkpoint], data: st.DataObject
) -> None:
    plan, one = rich
    state = copy.deepcopy(one.state)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(list(paths(state))))
        place = state
        for key in path:
            place = place[key]
        act = data.draw(st.sampled_from(["replace", "near", "shift", "drop", "twice"]))
        if act == "drop":
            del place[last]
        elif act == "twice" and isinstance(place, list):
            place.append(place[last])
        elif act == "shift" and type(place[last]) is int:
            place[last] += data.draw(st.integers(-2, 2))
        else:
            place[last] = data.draw(NEAR if act == "near" else PLAIN)
    resume = dataclasses.replace(one.resume(), state=state)
    for index in (0, 1):
        try:
            machine = resumed(plan, resume, data.draw(st.integers(1, 4)), index)
        except ValueError:
            continue
        assert machine.store.version >= 0
        if index == 0:
            json.dumps(machine.state(), allow_nan=False)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("version",), -1, "state: version is -1, expected an integer from 0"),
        (("kept_version",), 10**9, "state: kept_version is 1000000000, expected an integer from 0"),
        (("policy", "clocks"), [], "state.policy: live is list of 3, expected as many"),
        (("policy", "live"), [True], "as many as there are clocks, 3"),
        (("leases", "plans", 0, "next_block"), 61, "expected an integer from 0 to 60"),
        (("leases", "plans", 0, "returned"), [3, 3], "each larger than the one before it"),
        (("leases", "plans", 0, "shuffle"), 1, r"leases.plans\[0\]: shuffle is 1, expected true"),
        (("leases", "wanted"), [[0, 5]], "wanted is .*, expected epochs that are done"),
        (("leases", "evaluation", "results"), [], "expected those of"),
        (("leases", "evaluation", "epoch"), 5, "expected epochs that are done"),
        (("ledger", "by_reason", "none"), 3, "as many pushes as the ledger says"),
        (("staleness",), [[1]], "expected a list of lists of 2"),
        (("best",), "nan", "best is 'nan', expected a number"),
        (("random", 0, 1), "12", "state is '12', expected 32 hexadecimal digits"),
        (("random", 0, 2), "0" * 32, "expected an odd number"),
    ],
)
def test_a_wrong_field_is_named(
    rich: tuple[Plan, Checkpoint], path: tuple[Any, ...], value: Any, text: str
) -> None:
    plan, one = rich
    state = copy.deepcopy(one.state)
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=text):
        resumed(plan, dataclasses.replace(one.resume(), state=state))


@pytest.mark.parametrize("name", ["params", "kept", "pinned", "slot.mean"])
def test_a_missing_array_is_named(rich: tuple[Plan, Checkpoint], name: str) -> None:
    plan, one = rich
    less = copy.deepcopy(one)
    for shard in less.shards.values():
        del shard[name]
    with pytest.raises(ValueError, match="expected"):
        resumed(plan, less.resume())


def test_marks_are_checked() -> None:
    with pytest.raises(ValueError, match="every 1 or more updates, got 0"):
        Marks(every=0)


def test_rules_that_cannot_be_kept_are_refused() -> None:
    class Rule:
        def update(self, *_: Any) -> bool:
            return True

    class Optimizer:
        def updater(self, *_: Any) -> Any:
            return Rule()

    for marks in (Marks(every=1), Marks(at_end=True)):
        with pytest.raises(TypeError, match="cannot be kept in checkpoints"):
            Run(summing, Optimizer(), Async(), marks=marks)
    assert Run(summing, Optimizer(), Async(), marks=Marks()).plan.marks is None, "nobody asked"
