"""Velocities of workers: against the algorithms as they stand in the papers, refused, marked."""

from __future__ import annotations

import dataclasses
import doctest
import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from test_optim_cuda import fake_cupy  # noqa: F401 - a fixture

from psframe import optim
from psframe.layout import Array, Layout
from psframe.optim import SGD, Adam, Average, DANAZero, Grouped, WorkerMomentum, per_worker
from psframe.optim.per_worker import PerWorker
from psframe.optim.worker_updater import WorkerUpdater, worker_of
from psframe.store import HeapBuffers, MarkableRule, Store

SHAPES = {"a": 45, "b.bias": 7, "c": 40, "mean": 11}
SIZE = sum(SHAPES.values())
WORKERS = 4
CLASSES: list[Any] = [WorkerMomentum, DANAZero]
RULES: dict[str, PerWorker] = {
    "heavy ball": WorkerMomentum(0.1),
    "nesterov": WorkerMomentum(0.1, 0.8, nesterov=True),
    "dana": DANAZero(0.1),
    "decay": WorkerMomentum(0.1, weight_decay=0.02, no_decay=("*.bias",)),
    "schedule": DANAZero(optim.schedules.Cosine(0.1, 40), weight_decay=0.02),
}
GROUPED: dict[str, Grouped] = {
    "averages": Grouped(WorkerMomentum(0.1), {"mean": Average(0.9)}),
    "mixed": Grouped(DANAZero(0.1), {"b*": Adam(0.01), "mean": SGD(0.1, 0.9)}),
    "two": Grouped(WorkerMomentum(0.1), {"c": DANAZero(0.2, 0.5), "b*": SGD(0.1)}),
    "only averages here": Grouped(Average(0.5), {"c": DANAZero(0.1)}),
}
ALL: dict[str, Any] = RULES | GROUPED
by_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def layout_of(dtype: Any = np.float64) -> Layout:
    return Layout.of({name: np.zeros(size, dtype) for name, size in SHAPES.items()})


def gradient(step: int, dtype: Any = np.float64) -> Array:
    return np.random.default_rng(step).standard_normal(SIZE).astype(dtype)


def worker_at(step: int) -> int:
    """Tell whose push number `step` is; worker 2 comes late, worker 1 is fast."""
    return random.Random(step).choice([0, 1, 1, 1, 3] if step < 6 else [0, 1, 1, 2, 3])


class Loop:
    """Updates with gradients that are a function of the step."""

    def __init__(self, rule: Any, begin: int = 0, end: int = SIZE, dtype: Any = np.float64) -> None:
        self.updater = rule.updater(layout_of(dtype), begin, end)
        self.part, self.dtype, self.step = slice(begin, end), dtype, 0
        self.params = np.linspace(-1.0, 1.0, SIZE, dtype=dtype)[self.part].copy()

    def select(self, worker: int) -> None:
        if getattr(self.updater, "per_worker", False):
            self.updater.select(worker)

    def go(self, steps: int = 1, scale: float = 1.0) -> None:
        for _ in range(steps):
            out = np.empty_like(self.params)
            self.select(worker_at(self.step))
            grad = gradient(self.step, self.dtype)[self.part]
            assert self.updater.update(self.step, self.params, grad, out, scale)
            self.params = out
            self.step += 1

    def go_in_parts(self) -> None:
        out, grad = np.empty_like(self.params), gradient(self.step, self.dtype)[self.part]
        self.select(worker_at(self.step))
        self.updater.begin(self.step, self.params)
        for begin in range(0, len(out), 13):
            assert self.updater.extend(self.params, grad, out, begin, min(begin + 13, len(out)))
        self.updater.finish()
        self.params = out
        self.step += 1

    def refuse(self, worker: int) -> None:
        self.updater.select(worker)
        grad = np.full_like(self.params, np.inf)
        assert not self.updater.update(self.step, self.params, grad, np.empty_like(self.params))

    def abandon(self, worker: int) -> None:
        self.updater.select(worker)
        self.updater.begin(self.step, self.params)
        out, grad = np.empty_like(self.params), gradient(99, self.dtype)[self.part]
        self.updater.extend(self.params, grad, out, 0, len(out) // 2)


def bytes_of(slots: dict[str, Array]) -> dict[str, bytes]:
    return {name: slot.tobytes() for name, slot in slots.items()}


# ---- the formulas ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_forty_pushes_follow_the_formula(name: str, scale: float) -> None:
    rule, loop = RULES[name], Loop(RULES[name])
    loop.go(40, scale)
    w = np.linspace(-1.0, 1.0, SIZE)
    v = np.zeros((WORKERS, SIZE))
    decay = np.full(SIZE, rule.weight_decay)
    if rule.no_decay:
        decay[45:52] = 0.0
    for step in range(40):
        i, lr = worker_at(step), rule.learning_rate(step)
        g = scale * gradient(step) + decay * w
        v[i] = rule.momentum * v[i] + g
        w = w - lr * (g + rule.momentum * v[i] if rule.looks_ahead else v[i])
    np.testing.assert_allclose(loop.params, w, rtol=1e-12, atol=1e-12)
    for i in range(WORKERS):
        np.testing.assert_allclose(loop.updater.slots[f"momentum.{i}"], v[i], rtol=1e-12)


@by_dtype
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_one_worker_is_sgd_bit_for_bit(dtype: Any, nesterov: bool, decay: float) -> None:
    sgd = SGD(0.1, 0.9, nesterov, decay, no_decay=("*.bias",))
    rules: list[PerWorker] = [WorkerMomentum(0.1, 0.9, nesterov, decay, no_decay=("*.bias",))]
    if nesterov:
        rules.append(DANAZero(0.1, 0.9, decay, no_decay=("*.bias",)))
    for rule in rules:
        alone, serial = (each.updater(layout_of(dtype), 0, SIZE) for each in (rule, sgd))
        a = b = np.linspace(-1.0, 1.0, SIZE, dtype=dtype)
        for step in range(20):
            out_a, out_b = np.empty_like(a), np.empty_like(b)
            alone.select(0)
            assert alone.update(step, a, gradient(step, dtype), out_a)
            assert serial.update(step, b, gradient(step, dtype), out_b)
            a, b = out_a, out_b
            assert a.tobytes() == b.tobytes()
        assert alone.slots["momentum.0"].tobytes() == serial.slots["momentum"].tobytes()


def test_dana_zero_is_the_literal_algorithm() -> None:
    """x, v_i, their sum, and what is sent: computed as in the paper, of what workers have read."""
    lr, beta, centre = 0.05, 0.9, np.linspace(-2.0, 2.0, SIZE)
    curvature = np.linspace(0.1, 1.0, SIZE)
    updater = DANAZero(lr, beta).updater(layout_of(), 0, SIZE)
    w = np.zeros(SIZE)
    x, v = np.zeros(SIZE), np.zeros((WORKERS, SIZE))
    ours, theirs = [w] * WORKERS, [x] * WORKERS  # what each worker has read
    rng = random.Random(0)
    for step in range(300):
        i = rng.randrange(WORKERS)
        out = np.empty(SIZE)
        updater.select(i)
        assert updater.update(step, w, curvature * (ours[i] - centre), out)
        ours[i] = w = out
        v[i] = beta * v[i] + curvature * (theirs[i] - centre)
        x = x - lr * v[i]
        theirs[i] = x - lr * beta * v.sum(axis=0)
        np.testing.assert_allclose(w, theirs[i], rtol=0, atol=1e-12)
        np.testing.assert_allclose(w + lr * beta * v.sum(axis=0), x, rtol=0, atol=1e-12)
    assert np.abs(w - centre).max() < 0.3  # it has got somewhere, from 2


def test_a_new_learning_rate_moves_x_and_not_what_is_sent() -> None:
    def lr(step: int) -> float:
        return 0.1 if step < 5 else 0.01

    loop = Loop(DANAZero(lr))
    loop.go(5)
    v = loop.updater.slots
    before, i = loop.params, worker_at(5)
    velocity = v.get(f"momentum.{i}", np.zeros(SIZE)).copy()
    loop.go()
    g = gradient(5)
    np.testing.assert_allclose(
        loop.params, before - 0.01 * (g + 0.9 * (0.9 * velocity + g)), rtol=1e-12
    )


@by_dtype
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "cuts", [(0, SIZE), (0, 1, SIZE), (0, 0, 45, 48, 92, 95, SIZE), (0, 90, SIZE, SIZE)]
)
def test_the_number_of_servers_changes_no_bit(name: str, cuts: tuple[int, ...], dtype: Any) -> None:
    whole = Loop(ALL[name], dtype=dtype)
    shards = [Loop(ALL[name], b, e, dtype) for b, e in pairwise(cuts)]
    for loop in (whole, *shards):
        loop.go(15)
        loop.go_in_parts()
    assert np.concatenate([s.params for s in shards]).tobytes() == whole.params.tobytes()
    for shard in shards:
        assert shard.updater.slot_names == whole.updater.slot_names
        for slot_name, slot in whole.updater.slots.items():
            assert shard.updater.slots[slot_name].tobytes() == slot[shard.part].tobytes()


def test_a_gradient_is_followed_while_it_arrives() -> None:
    for rule in ALL.values():
        plain, loop = Loop(rule), Loop(rule)
        plain.go(3)
        for step in range(3):
            loop.updater.select(worker_at(step))
            loop.updater.begin(step, loop.params)
            out, words, done, good = np.empty(SIZE), np.zeros(1, np.int64), 0, True
            for there in (10, 50, SIZE):
                words[0] = there
                done, good = loop.updater.follow(
                    loop.params, gradient(step), out, done, SIZE, words
                )
                assert good
            assert done == SIZE
            loop.updater.finish()
            loop.params = out
        assert loop.params.tobytes() == plain.params.tobytes()


# ---- groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPED)
def test_each_parameter_has_its_rule(name: str) -> None:
    loop = Loop(GROUPED[name])
    loop.go(20)
    found = layout_of().views(loop.params)
    for tensor, array in found.items():
        rule: Any = GROUPED[name].rule_of(tensor)
        alone = Loop(rule)
        alone.go(20)
        np.testing.assert_array_equal(array, layout_of().views(alone.params)[tensor])


def test_only_groups_with_such_a_rule_are_per_worker() -> None:
    for grouped in GROUPED.values():
        updater = grouped.updater(layout_of(), 0, 3)
        assert updater.per_worker
        assert isinstance(updater, MarkableRule)
    plain = Grouped(SGD(0.1, 0.9), {"mean": Average(0.9)}).updater(layout_of(), 0, SIZE)
    assert not plain.per_worker
    assert plain.accepts(["momentum"])
    assert not plain.accepts(["momentum", "momentum.0"])
    assert not plain.accepts([])


# ---- refusals and marks ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(6))
def test_refusals_and_marks_change_no_bit_and_marked_slots_are_not_written(
    name: str, seed: int
) -> None:
    loop, plain, rng = Loop(ALL[name]), Loop(ALL[name]), random.Random(seed)
    marked: dict[str, Array] | None = None
    before: dict[str, bytes] = {}
    for _ in range(80):
        act = rng.choice(["go", "go", "parts", "refuse", "mark", "abandon", "rest"])
        if act == "mark" and marked is None:
            loop.updater.mark()
            marked = loop.updater.slots
            before = bytes_of(marked)
        elif act == "mark":
            loop.updater.unmark()
            marked = None
        elif act == "parts":
            loop.go_in_parts()
            plain.go()
        elif act == "abandon":
            loop.abandon(rng.randrange(WORKERS))
        elif act == "refuse":
            loop.refuse(rng.randrange(WORKERS))
        elif act == "go":
            loop.go()
            plain.go()
        if marked is not None:
            assert bytes_of(marked) == before
        assert loop.params.tobytes() == plain.params.tobytes()
        if plain.step:
            assert bytes_of(loop.updater.slots) == bytes_of(plain.updater.slots)


@pytest.mark.parametrize("where", [0, 44, 45, SIZE - 1])
def test_a_refused_push_leaves_no_slot_and_no_trace(where: int) -> None:
    loop, witness = Loop(WorkerMomentum(0.1)), Loop(WorkerMomentum(0.1))
    bad = np.zeros(SIZE)
    bad[where] = np.nan
    for step in range(12):
        for worker in (0, 5, 5):  # worker 5 never pushes anything else
            loop.updater.select(worker)
            assert not loop.updater.update(step, loop.params, bad, np.empty(SIZE))
        loop.go()
        witness.go()
        assert loop.params.tobytes() == witness.params.tobytes()
        assert bytes_of(loop.updater.slots) == bytes_of(witness.updater.slots)
    assert "momentum.5" not in loop.updater.slots


def test_a_schedule_that_fails_in_one_group_leaves_all_alike() -> None:
    def lr(step: int) -> float:
        return -1.0 if step == 3 else 0.1

    rule = Grouped(WorkerMomentum(0.1), {"c": WorkerMomentum(lr)})
    witness = Grouped(WorkerMomentum(0.1), {"c": WorkerMomentum(0.1)})
    loop, plain = Loop(rule), Loop(witness)
    for each in (loop, plain):
        each.go(3)
    loop.updater.select(7)
    with pytest.raises(ValueError, match=r"gave -1\.0 for update 3"):
        loop.updater.update(3, loop.params, gradient(3), np.empty(SIZE))
    for each in (loop, plain):
        each.step = 4
        each.updater.mark()  # so that updates need more arrays
        each.go(12)
    assert loop.params.tobytes() == plain.params.tobytes()
    assert bytes_of(loop.updater.slots) == bytes_of(plain.updater.slots)


@pytest.mark.parametrize("name", ["dana", "two"])
def test_there_is_an_array_a_worker_and_one_and_as_many_for_marks(name: str) -> None:
    loop = Loop(ALL[name])
    updater: Any = loop.updater

    def count() -> int:
        return len(updater._arrays)

    loop.go(60)
    assert sorted(updater.slots) == [f"momentum.{i}" for i in range(WORKERS)]
    assert count() == WORKERS + 1
    counts = []
    for _ in range(3):
        updater.mark()
        loop.go(60)
        updater.unmark()
        loop.go(60)
        counts.append(count())
    assert counts == [2 * WORKERS + 1] * 3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("cuts", [(0, SIZE), (0, 30, SIZE), (0, 0, 48, 92, SIZE)])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_loaded_slots_go_on_in_other_shards(name: str, cuts: tuple[int, ...], steps: int) -> None:
    whole = Loop(ALL[name])
    whole.go(steps)
    slots = {key: slot.copy() for key, slot in whole.updater.slots.items()}
    loops = [Loop(ALL[name], b, e) for b, e in pairwise(cuts)]
    for loop in loops:
        part = loop.part

        def fill(key: str, out: Array, part: slice = part) -> None:
            out[:] = slots[key][part]

        assert loop.updater.accepts(slots.keys())
        loop.step, loop.params = steps, whole.params[part].copy()
        loop.updater.load(loop.params, fill, slots.keys())
        assert set(loop.updater.slot_names) == set(slots)
        loop.go(6)
    whole.go(6)
    assert np.concatenate([loop.params for loop in loops]).tobytes() == whole.params.tobytes()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "names",
    [
        None,
        [],
        ["momentum"],
        ["momentum.0", "mean"],
        ["momentum.-1"],
        ["momentum.01"],
        ["momentum.x"],
    ],
)
def test_other_slots_are_not_loaded(name: str, names: list[str] | None) -> None:
    updater = ALL[name].updater(layout_of(), 0, SIZE)
    with pytest.raises(ValueError, match=r"slots are .*, expected .*momentum\.0"):
        updater.load(np.zeros(SIZE), lambda key, out: None, names)
    assert not [key for key in updater.slots if worker_of(key) is not None]


@pytest.mark.parametrize("name", ["dana", "mixed"])
def test_workers_that_are_given_a_slot_of_zeros_change_no_bit(name: str) -> None:
    """Also while their own first push is being applied, which reads the zeros."""
    loop, plain = Loop(ALL[name]), Loop(ALL[name])
    loop.updater.adopt(loop.params, [2])
    for step in range(12):
        out = np.empty(SIZE)
        worker = worker_at(step)
        loop.updater.select(worker)
        loop.updater.begin(step, loop.params)
        if step % 2:
            loop.updater.adopt(loop.params, [9, worker, 0, 9])
        loop.updater.mark()
        marked = loop.updater.slots
        before = bytes_of(marked)
        assert loop.updater.extend(loop.params, gradient(step), out, 0, SIZE)
        loop.updater.finish()
        loop.params, loop.step = out, step + 1
        assert bytes_of(marked) == before
        loop.updater.unmark()
        plain.go()
        assert loop.params.tobytes() == plain.params.tobytes()
    assert not loop.updater.slots["momentum.9"].any()
    assert len(loop.updater._arrays) == len({0, 1, 2, 3, 9}) + 2  # a spare, and one for the mark
    for key, slot in plain.updater.slots.items():
        assert loop.updater.slots[key].tobytes() == slot.tobytes()


def test_a_store_takes_it() -> None:
    layout, rule = layout_of(), DANAZero(0.1)
    updater = rule.updater(layout, 0, SIZE)
    assert isinstance(updater, MarkableRule)
    store, loop = (
        Store(HeapBuffers(8, SIZE, layout.dtype), np.linspace(-1.0, 1.0, SIZE), updater),
        Loop(rule),
    )
    for step in range(10):
        assert store.update(gradient(step), 1.0, worker_at(step))
        if step == 4:
            marked = store.mark()
            before = bytes_of(marked.slots)
    assert bytes_of(marked.slots) == before
    store.unmark()
    loop.go(10)
    assert store.params.tobytes() == loop.params.tobytes()


def test_whose_gradient_it_is_must_be_said() -> None:
    updater = WorkerMomentum(0.1).updater(layout_of(), 0, SIZE)
    with pytest.raises(AssertionError, match="no worker has been selected"):
        updater.update(0, np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE))


def test_slots_are_on_the_device_of_the_parameters(fake_cupy: Any) -> None:  # noqa: F811
    fake_cupy.asarray = lambda array: array.view(type(fake_cupy.zeros(1, float)))
    loop, gpu = Loop(RULES["nesterov"]), RULES["nesterov"].updater(layout_of(), 0, SIZE)
    loop.go(5)
    slots = {key: slot.copy() for key, slot in loop.updater.slots.items()}
    params = fake_cupy.asarray(loop.params.copy())
    gpu.load(params, lambda key, out: out.__setitem__(slice(None), slots[key]), list(slots))
    assert all(type(slot) is type(params) for slot in gpu.slots.values())
    for step in range(5, 9):
        out = fake_cupy.zeros(SIZE, float)
        gpu.select(worker_at(step))
        assert gpu.update(step, params, fake_cupy.asarray(gradient(step)), out)
        params = out
    loop.go(4)
    assert bytes_of(gpu.slots) == bytes_of(loop.updater.slots)


# ---- what a user sees --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_frozen_equal_hashable_and_printed_alike(cls: Any) -> None:
    a, b = cls(1, no_decay=["*bias"]), cls(np.float32(1.0), no_decay=("*bias",))
    assert a == b
    assert hash(a) == hash(b)
    assert repr(a) == repr(b)
    assert eval(repr(a), vars(optim)) == a
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.momentum = 0.5


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, r"lr is -0\.1, expected a finite number >= 0"),
        ({"lr": "0.1"}, TypeError, "lr is '0.1' of type str"),
        ({"lr": 0.1, "momentum": 0.0}, ValueError, r"momentum is 0\.0, expected .* > 0 and < 1"),
        ({"lr": 0.1, "momentum": 1.0}, ValueError, r"momentum is 1\.0"),
        ({"lr": 0.1, "momentum": math.nan}, ValueError, "momentum is nan"),
        ({"lr": 0.1, "momentum": True}, TypeError, "momentum is True"),
        ({"lr": 0.1, "weight_decay": -1.0}, ValueError, r"weight_decay is -1\.0"),
        ({"lr": 0.1, "no_decay": "bias"}, TypeError, "no_decay is 'bias'"),
    ],
)
def test_bad_arguments(
    cls: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{cls.__name__}: {message}"):
        cls(**arguments)


def test_nesterov_is_true_or_false() -> None:
    nesterov: Any = 1
    with pytest.raises(TypeError, match="WorkerMomentum: nesterov is 1, expected True or False"):
        WorkerMomentum(0.1, nesterov=nesterov)
    assert WorkerMomentum(0.1, 0.5, True, 0.01) == WorkerMomentum(
        0.1, momentum=0.5, nesterov=True, weight_decay=0.01
    )


def test_the_examples_in_docstrings() -> None:
    result = doctest.testmod(per_worker)
    assert result.attempted > 0
    assert result.failed == 0


def test_no_array_is_made_that_is_not_used() -> None:
    updater: Any = WorkerMomentum(0.1).updater(layout_of(), 0, SIZE)
    assert isinstance(updater, WorkerUpdater)
    assert updater.slots == {}
    assert len(updater._arrays) == 0
