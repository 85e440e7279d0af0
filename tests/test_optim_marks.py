"""Slots that are marked stay as they are, and slots that are loaded go on as they would have."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from test_optim_cuda import fake_cupy  # noqa: F401 - a fixture

from psframe import optim
from psframe.layout import Array, Layout
from psframe.optim import Average, Grouped

RULES: dict[str, Any] = {
    "sgd": optim.SGD(0.1),
    "momentum": optim.SGD(0.1, momentum=0.9),
    "scheduled": optim.SGD(optim.schedules.Cosine(0.1, 9), momentum=0.9, nesterov=True),
    "adagrad": optim.Adagrad(0.1),
    "rmsprop": optim.RMSProp(0.01),
    "adam": optim.Adam(0.01),
    "decay": optim.AdamW(0.01, weight_decay=0.1, no_decay=("b",)),
    "grouped": Grouped(optim.Adam(0.01), {"b": Average(0.9)}),
    "groups": Grouped(optim.SGD(0.1, momentum=0.9), {"b": optim.Adam(0.1), "c": Average(0.5)}),
    "averages": Grouped(Average(0.5)),
}
LAYOUT = Layout.of({"a": np.zeros(5), "b": np.zeros(4), "c": np.zeros(3)})
SIZE = LAYOUT.size


class Loop:
    """Updates with gradients that are a function of the step."""

    def __init__(self, rule: Any, begin: int = 0, end: int = SIZE) -> None:
        self.updater = rule.updater(LAYOUT, begin, end)
        self.part = slice(begin, end)
        self.step = 0
        self.params = np.linspace(-1.0, 1.0, SIZE)[self.part].copy()

    def grad(self, step: int) -> Array:
        return np.random.default_rng(step).standard_normal(SIZE)[self.part]

    def go(self, steps: int = 1) -> None:
        for _ in range(steps):
            out = np.empty_like(self.params)
            assert self.updater.update(self.step, self.params, self.grad(self.step), out)
            self.params = out
            self.step += 1

    def go_in_parts(self) -> None:
        out, updater, grad = np.empty_like(self.params), self.updater, self.grad(self.step)
        updater.begin(self.step, self.params)
        for begin in range(0, len(out), 5):
            assert updater.extend(self.params, grad, out, begin, min(begin + 5, len(out)))
        updater.finish()
        self.params = out
        self.step += 1

    def refuse(self) -> None:
        grad = np.full_like(self.params, np.inf)
        assert not self.updater.update(self.step, self.params, grad, np.empty_like(self.params))


def bytes_of(slots: dict[str, Array]) -> dict[str, bytes]:
    return {name: slot.tobytes() for name, slot in slots.items()}


def copier(slots: dict[str, Array], part: slice = slice(None)) -> Callable[[str, Array], None]:
    """Fill from these slots."""
    copies = {name: slot.copy() for name, slot in slots.items()}

    def fill(name: str, out: Array) -> None:
        out[:] = copies[name][part]

    return fill


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(8))
def test_marked_slots_are_not_written_and_marks_change_no_bit(name: str, seed: int) -> None:
    loop, plain, rng = Loop(RULES[name]), Loop(RULES[name]), random.Random(seed)
    marked: dict[str, Array] | None = None
    before: dict[str, bytes] = {}
    for _ in range(60):
        act = rng.choice(["go", "go", "parts", "refuse", "mark", "abandon"])
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
            out = np.empty_like(loop.params)
            loop.updater.begin(loop.step, loop.params)
            loop.updater.extend(loop.params, loop.grad(99), out, 0, 5)
        elif act == "refuse":
            loop.refuse()
        else:
            loop.go()
            plain.go()
        if marked is not None:
            assert bytes_of(marked) == before
        assert loop.params.tobytes() == plain.params.tobytes()
        if loop.updater.slots and plain.updater.slots:  # a refused update is enough to have some
            assert bytes_of(loop.updater.slots) == bytes_of(plain.updater.slots)


@pytest.mark.parametrize("name", ["momentum", "adam", "grouped"])
def test_a_third_set_is_made_when_it_is_needed_and_kept(name: str) -> None:
    loop = Loop(RULES[name])
    loop.go(2)
    sets = []
    for steps in (1, 3, 3):
        loop.updater.mark()
        loop.go(steps)
        loop.updater.unmark()
        parts = getattr(loop.updater, "_parts", [(loop.updater, None)])
        sets.append(len(parts[0][0]._sets))
        loop.go()
    assert sets == [2, 3, 3]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("cuts", [(0, SIZE), (0, 4, SIZE), (0, 1, 7, SIZE), (0, 0, 5, SIZE)])
def test_loaded_slots_go_on_in_other_shards(name: str, cuts: tuple[int, ...]) -> None:
    for steps in range(4):
        whole = Loop(RULES[name])
        whole.go(steps)
        assert set(whole.updater.slots) <= set(whole.updater.slot_names)
        loops = [Loop(RULES[name], b, e) for b, e in pairwise(cuts)]
        for loop in loops:
            loop.step, loop.params = steps, whole.params[loop.part].copy()
            if steps:
                slots = whole.updater.slots
                assert all(slot.shape == (SIZE,) for slot in slots.values())
                assert loop.updater.slot_names == whole.updater.slot_names
                loop.updater.load(loop.params, copier(slots, loop.part))
            loop.go(3)
        whole.go(3)
        assert np.concatenate([loop.params for loop in loops]).tobytes() == whole.params.tobytes()


def test_slots_go_to_a_device_by_way_of_the_host(fake_cupy: Any) -> None:  # noqa: F811
    fake_cupy.asarray = lambda array: array.view(type(fake_cupy.zeros(1, float)))
    loop = Loop(optim.Adam(0.1))
    loop.go(3)
    gpu = Loop(optim.Adam(0.1))
    gpu.params = fake_cupy.asarray(loop.params.copy())
    gpu.updater.load(gpu.params, copier(loop.updater.slots))
    assert bytes_of(gpu.updater.slots) == bytes_of(loop.updater.slots)
    gpu.updater.mark()
    before, marked = bytes_of(gpu.updater.slots), gpu.updater.slots
    for step in range(3, 6):
        out = fake_cupy.zeros(SIZE, float)
        grad = fake_cupy.asarray(loop.grad(step))
        assert gpu.updater.update(step, gpu.params, grad, out)
        gpu.params = out
    assert bytes_of(marked) == before
    loop.go(3)
    assert bytes_of(gpu.updater.slots) == bytes_of(loop.updater.slots)
