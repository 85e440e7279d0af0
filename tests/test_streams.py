"""Gradients that are followed while they are written: the words, and the kernels behind them."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from psframe.errors import MessageError
from psframe.events import Arrived
from psframe.layout import Layout
from psframe.optim import SGD, Adam, Average, Grouped
from psframe.optim.base import Optimizer
from psframe.server import SLOTS
from psframe.store import STEP, HeapBuffers, Store
from psframe.transports import streams
from psframe.transports.shared_memory import Segment
from psframe.transports.streams import STREAM_BYTES, BadStream, Progress, Streams

SIZE = 1000


def progress_of(size: int = SIZE) -> tuple[Progress, Progress]:
    """Both ends of the same words."""
    memory = bytearray(STREAM_BYTES)
    return Progress(memoryview(memory), size), Progress(memoryview(memory), size)


def test_what_one_end_says_the_other_sees() -> None:
    worker, server = progress_of()
    worker.open()
    assert server.read(0) == 0
    worker.advance(400)
    assert server.read(0) == 400
    assert server.words[0] == 400
    worker.close(True, 2.5)
    assert server.read(400) == SIZE
    assert server.verdict() == (True, 2.5)
    worker.open()
    worker.close(False, float("nan"))
    assert server.verdict()[0] is False


@pytest.mark.parametrize("end", [-1, SIZE + 1, 2**62, 399])
def test_a_length_that_cannot_be_is_an_error(end: int) -> None:
    _, server = progress_of()
    server.words[0] = end
    with pytest.raises(MessageError, match=f"has {end} elements, expected 400 to {SIZE}"):
        server.read(400)


@pytest.mark.parametrize(("finite", "norm"), [(2, 1.0), (-1, 1.0), (1, -1.0), (1, float("nan"))])
def test_a_verdict_that_cannot_be_is_an_error(finite: int, norm: float) -> None:
    _, server = progress_of()
    server.words[1] = finite
    server.words[2:3].view(np.float64)[0] = norm
    with pytest.raises(MessageError, match="is said to be"):
        server.verdict()


# ---- many -----------------------------------------------------------------------------------


def streams_of(*begun: int, size: int = SIZE) -> tuple[Streams, dict[int, Progress]]:
    """A server's end and those of workers 0 and 1, who have begun in this order."""
    segments = {1 + worker: Segment.create(SLOTS, size, "f4") for worker in range(2)}
    server = Streams(size, 1, segments)
    workers = {worker: Progress(segments[1 + worker].words(0), size) for worker in range(2)}
    for worker in begun:
        workers[worker].open()
        server.begin(worker, 0)
    return server, workers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(streams.time, "monotonic", lambda: now[0])
    return now


def test_the_oldest_is_followed_to_its_end(clock: list[float]) -> None:
    size = 2 * STEP + 1
    server, workers = streams_of(1, 0, size=size)
    for worker in workers.values():
        worker.close(True, 2.0)
    seen = [server.follow() for _ in range(6)]
    assert seen == [
        Arrived(worker, 0, end, end == size, True, 2.0 if end == size else 0.0)
        for worker in (1, 0)
        for end in (STEP, 2 * STEP, size)
    ]
    assert not server.writing
    assert server.follow() is None


def test_a_younger_one_is_followed_where_the_older_has_paused(clock: list[float]) -> None:
    server, workers = streams_of(0, 1)
    workers[1].advance(100)
    assert server.follow() is None
    clock[0] = 1.0
    assert server.follow() == Arrived(1, 0, 100, False, True, 0.0)


def test_what_the_machine_has_followed_itself_is_over(clock: list[float]) -> None:
    server, workers = streams_of(0)
    workers[0].close(True, 1.0)
    there = server.progress(0, 0)
    assert there is not None
    there.verdict()
    assert server.follow() is None
    assert not server.writing


def test_bad_words_are_their_worker_s(clock: list[float]) -> None:
    server, workers = streams_of(0, 1)
    clock[0] = 1.0
    workers[1].words[0] = SIZE + 1
    with pytest.raises(BadStream, match=f"has {SIZE + 1} elements") as caught:
        server.follow()
    assert caught.value.worker == 1
    server.forget(1)
    workers[0].close(True, 1.0)
    assert server.follow() == Arrived(0, 0, SIZE, True, True, 1.0)


def test_who_begins_anew_is_the_youngest(clock: list[float]) -> None:
    server, workers = streams_of(0, 1, 0)
    for worker in workers.values():
        worker.close(True, 1.0)
    assert [server.follow() for _ in range(2)] == [
        Arrived(worker, 0, SIZE, True, True, 1.0) for worker in (1, 0)
    ]


def test_who_has_written_just_now_has_not_paused(clock: list[float]) -> None:
    server, workers = streams_of(0, 1)
    clock[0] = 1.0
    for worker in workers.values():
        worker.advance(100)
    assert server.follow() == Arrived(0, 0, 100, False, True, 0.0)
    assert server.follow() is None  # and nothing of the younger one
    clock[0] = 2.0
    assert server.follow() == Arrived(1, 0, 100, False, True, 0.0)


def test_who_takes_a_worker_s_place_has_words_of_its_own() -> None:
    before, after = (Segment.create(SLOTS, SIZE, "f4") for _ in range(2))
    segments = {1: before}
    server = Streams(SIZE, 1, segments)
    old = server.progress(0, 0)
    server.forget(0)
    segments[1] = after
    Progress(after.words(0), SIZE).advance(7)
    new = server.progress(0, 0)
    assert old is not None
    assert new is not None
    assert (old.read(0), new.read(0)) == (0, 7)


def test_who_shares_no_memory_has_no_words() -> None:
    server, _ = streams_of()
    assert server.progress(0, 1) is server.progress(0, 1) is not None
    assert server.progress(2, 0) is None


RULES = [
    SGD(0.1),
    SGD(0.1, weight_decay=0.01),
    SGD(0.1, weight_decay=0.01, no_decay=("b",)),
    SGD(0.1, momentum=0.9),
    Adam(0.01),
    Grouped(SGD(0.1), {"b": Average(0.9)}),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_following_gives_the_bits_of_a_whole_update(rule: Optimizer, dtype: type) -> None:
    """Three updates, each of a gradient that another thread writes in parts meanwhile."""
    layout = Layout.of({"a": np.zeros(600, dtype), "b": np.zeros(SIZE - 600, dtype)})
    rng = np.random.default_rng(5)
    initial = rng.standard_normal(SIZE).astype(dtype)
    stores = [
        Store(HeapBuffers(4, SIZE, layout.dtype), initial, rule.updater(layout, 0, SIZE))
        for _ in range(2)
    ]
    worker, server = progress_of()
    slot = np.empty(SIZE, dtype)
    for _ in range(3):
        grad = rng.standard_normal(SIZE).astype(dtype)
        slot.fill(np.nan)
        worker.open()

        def write(grad: np.ndarray = grad) -> None:
            for end in (1, 300, 601, 999):
                slot[:end] = grad[:end]
                worker.advance(end)
            slot[:] = grad
            worker.close(True, 1.0)

        thread = threading.Thread(target=write)
        stores[1].begin()
        thread.start()
        while stores[1].follow(slot, server.words) < SIZE:
            pass
        thread.join()
        assert stores[1].commit()
        assert stores[0].update(grad)
        assert stores[1].version == stores[0].version
        np.testing.assert_array_equal(stores[1].params, stores[0].params)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_following_gives_up_where_nothing_comes(rule: Optimizer) -> None:
    layout = Layout.of({"a": np.zeros(600), "b": np.zeros(SIZE - 600)})
    store = Store(HeapBuffers(4, SIZE, layout.dtype), np.ones(SIZE), rule.updater(layout, 0, SIZE))
    worker, server = progress_of()
    slot = np.full(SIZE, np.nan)
    slot[:700] = 1.0
    store.begin()
    assert store.follow(slot, server.words) == 0
    worker.advance(700)
    assert store.follow(slot, server.words) == 700
    for nonsense in (-5, 3):
        server.words[0] = nonsense
        assert store.follow(slot, server.words) == 700
    server.words[0] = SIZE + 5
    assert store.follow(slot, server.words) == SIZE, "nothing beyond the end is touched"
    store.abandon()
    assert store.update(np.ones(SIZE))
    assert store.version == 1


def test_a_part_that_is_not_finite_refuses_the_whole() -> None:
    layout = Layout.of({"a": np.zeros(SIZE)})
    rule = SGD(0.1, momentum=0.9)
    store = Store(HeapBuffers(4, SIZE, layout.dtype), np.ones(SIZE), rule.updater(layout, 0, SIZE))
    worker, server = progress_of()
    slot = np.ones(SIZE)
    slot[17] = np.inf
    worker.advance(SIZE)
    store.begin()
    assert store.follow(slot, server.words) == SIZE
    assert not store.commit()
    assert store.version == 0
    np.testing.assert_array_equal(store.params, 1.0)
    slot[17] = 1.0
    assert store.update(slot)
    np.testing.assert_allclose(store.params, 0.9)
