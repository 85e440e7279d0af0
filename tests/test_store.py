"""Snapshots: what is held is never written, and updates never wait."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import POISON, ExactRule

from psframe.layout import Array, Layout
from psframe.optim import SGD, Adam
from psframe.store import HeapBuffers, Store, buffer_count


def make(workers: int, size: int = 3) -> Store:
    buffers = HeapBuffers(buffer_count(workers), size, np.dtype(np.float64))
    return Store(buffers, np.zeros(size), ExactRule(1.0))


def ones(value: float = 1.0) -> np.ndarray:
    return np.full(3, value)


def test_initial_is_copied() -> None:
    initial = np.zeros(3)
    store = Store(HeapBuffers(4, 3, np.dtype(np.float64)), initial, ExactRule(1.0))
    initial[:] = 9
    assert store.params.tolist() == [0, 0, 0]
    assert store.version == 0


def test_an_update_leaves_the_held_buffer_alone() -> None:
    store = make(1)
    index = store.hold()
    assert index is not None
    before = store.buffer(index)
    for _ in range(5):
        assert store.update(ones())
    assert before.tolist() == [0, 0, 0]
    assert store.params.tolist() == [-5, -5, -5]
    assert store.version == 5
    store.release(index)
    assert store.held == 0


def test_a_refused_update_publishes_nothing() -> None:
    store = make(1)
    store.update(ones())
    assert not store.update(ones(POISON))
    assert store.version == 1
    assert store.params.tolist() == [-1, -1, -1]
    assert store.update(ones())
    assert store.version == 2


def test_two_holds_a_worker_and_the_pins_leave_two_for_updates() -> None:
    workers = 3
    store = make(workers)
    held = []
    for _ in range(2 * workers + 3):  # the pins are three more
        held.append(store.hold())
        assert store.update(ones())
    assert store.held == 2 * workers + 3
    assert store.hold() is None, "one more would leave updates one buffer"
    for _ in range(4):
        assert store.update(ones())
    for k, index in enumerate(held):
        assert index is not None
        assert store.buffer(index)[0] == -k
        store.release(index)
    assert store.held == 0


def test_holds_of_one_buffer_are_counted() -> None:
    store = make(1)
    index = store.hold()
    assert index is not None
    assert store.hold() == index
    assert store.hold_again(index) == index
    assert store.held == 1
    store.release(index)
    store.release(index)
    store.update(ones())
    store.update(ones())
    assert store.buffer(index)[0] == 0
    store.release(index)
    with pytest.raises(AssertionError, match="not held"):
        store.release(index)
    with pytest.raises(AssertionError, match="not held"):
        store.hold_again(index)


def test_buffers_are_touched_no_earlier_than_needed() -> None:
    buffers = HeapBuffers(buffer_count(50), 3, np.dtype(np.float64))
    store = Store(buffers, np.zeros(3), ExactRule(1.0))
    for _ in range(20):
        index = store.hold()
        assert index is not None
        store.update(ones())
        store.release(index)
    assert sum(array is not None for array in buffers._arrays) == 2


def test_mean_is_summed_in_order() -> None:
    store = Store(HeapBuffers(4, 1, np.dtype(np.float64)), np.zeros(1), ExactRule(1.0))
    grads = [np.array([x]) for x in (1e16, 1.0, -1e16, 3.0)]
    assert store.update_mean(grads, [1.0] * 4)
    assert store.params[0] == -((((1e16 + 1.0) - 1e16) + 3.0) / 4)
    assert store.update_mean(grads[::-1], [1.0] * 4)
    assert store.params[0] != 2 * -((((1e16 + 1.0) - 1e16) + 3.0) / 4)
    assert [float(g[0]) for g in grads] == [1e16, 1.0, -1e16, 3.0], "gradients are only read"


def test_mean_scales_each_gradient() -> None:
    store = make(2)
    store.update_mean([ones(8.0), ones(4.0), ones(2.0)], [0.5, 1.0, 2.0])
    assert store.params.tolist() == [-4, -4, -4]
    store.update_mean([ones(8.0)], [0.25])
    assert store.params.tolist() == [-6, -6, -6]
    store.update_mean([ones(1.0), ones(8.0)], [1.0, 0.125])
    assert store.params.tolist() == [-7, -7, -7]


def test_overflowing_mean_is_the_rules_to_judge() -> None:
    store = make(2)
    assert not store.update_mean([ones(1e308), ones(1e308)], [1.0, 1.0])
    assert store.version == 0


@pytest.mark.parametrize("seed", range(10))
def test_random_holds(seed: int) -> None:
    rng = random.Random(seed)
    workers = rng.randrange(1, 6)
    store = make(workers)
    held: list[tuple[int, float]] = []
    for _ in range(200):
        if held and rng.random() < 0.4:
            index, value = held.pop(rng.randrange(len(held)))
            assert store.buffer(index)[0] == value
            store.release(index)
        elif len(held) < workers + 3 and rng.random() < 0.5:
            index = store.hold()
            assert index is not None
            held.append((index, -float(store.version)))
        else:
            assert store.update(ones())
        assert store.params[0] == -store.version
        assert store.held == len({index for index, _ in held})


# ---- marks -------------------------------------------------------------------------------------


def real(rule: Any) -> Store:
    layout = Layout.of({"w": np.zeros(3)})
    buffers = HeapBuffers(buffer_count(1), 3, np.dtype(np.float64))
    return Store(buffers, np.ones(3), rule.updater(layout, 0, 3))


def test_a_marked_version_stays_as_it_is_while_updates_go_on() -> None:
    store, plain = real(Adam(0.1)), real(Adam(0.1))
    for turn in range(3):
        marked = store.mark()
        before = [marked.params.tobytes(), *(s.tobytes() for s in marked.slots.values())]
        assert marked.version == store.version == 4 * turn
        for step in range(4):
            assert store.update(ones(1.0 + step))
            assert plain.update(ones(1.0 + step))
        assert [marked.params.tobytes(), *(s.tobytes() for s in marked.slots.values())] == before
        assert store.held == 1
        store.unmark()
        assert store.held == 0
    assert store.params.tobytes() == plain.params.tobytes()
    with pytest.raises(AssertionError, match="no mark"):
        store.unmark()


def filler(arrays: dict[str, Array]) -> Callable[[str, Array], None]:
    copies = {name: array.copy() for name, array in arrays.items()}

    def fill(name: str, out: Array) -> None:
        out[:] = copies[name]

    return fill


@pytest.mark.parametrize("rule", [SGD(0.1), SGD(0.1, momentum=0.9), Adam(0.1)], ids=repr)
@pytest.mark.parametrize("version", [0, 1, 2, 5])
def test_a_restored_store_goes_on_as_it_would_have(rule: Any, version: int) -> None:
    store, again = real(rule), real(rule)
    for step in range(version):
        store.update(ones(1.0 + step))
    marked = store.mark()
    again.restore(version, marked.slots, filler({"params": marked.params, **marked.slots}))
    index = again.hold_copy(lambda out: out.fill(7))
    for step in range(3):
        assert store.update(ones(1.0 + step))
        assert again.update(ones(1.0 + step))
        assert again.params.tobytes() == store.params.tobytes()
    assert again.version == version + 3
    assert again.buffer(index).tolist() == [7, 7, 7]
    again.release(index)
    assert again.held == 0
    assert sorted([*again._free, again.current]) == list(range(buffer_count(1)))


def test_slots_of_another_optimizer_are_refused() -> None:
    store = real(Adam(0.1))
    for version, names in ((1, ["momentum"]), (1, []), (0, ["momentum"])):
        with pytest.raises(ValueError, match=r"slots are \[.*\], expected \['mean'"):
            store.restore(version, names, filler({}))
    assert store.version == 0
