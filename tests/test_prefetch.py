"""The next block is leased and prepared while the present one is in hand."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

import psframe
from psframe.optim import SGD

PARAMS = {"w": np.zeros(3, np.float32)}
GRADS = {"w": np.ones(3, np.float32)}
WAIT_S = 30.0  # a bound for what comes at once


def test_the_next_block_is_prepared_while_this_one_is_in_hand() -> None:
    begun = [threading.Event() for _ in range(5)]

    def prepare(task: Any) -> int:
        block = int(task.indices[0])
        begun[block].set()
        return block

    def work(worker: Any) -> None:
        worker.pull()
        for task in worker.tasks(5, 1, shuffle=False, prepare=prepare):
            block = int(task.indices[0])
            assert task.prepared == block
            if block < 4:
                assert begun[block + 1].wait(WAIT_S), "nobody prepares the next"
            worker.push_pull(GRADS)

    assert psframe.run(work, PARAMS, optimizer=SGD(0.1)).version == 5


@pytest.mark.parametrize("mode", [psframe.Async(), psframe.SSP(staleness=1), psframe.BSP()])
def test_each_sample_is_completed_once(mode: Any) -> None:
    seen: list[tuple[int, int]] = []

    def work(worker: Any) -> None:
        worker.pull()
        tasks = worker.tasks(50, 3, epochs=3, prepare=lambda task: task.indices * 2)
        for task in tasks:
            assert (task.prepared == task.indices * 2).all()
            seen.extend((task.epoch, int(i)) for i in task.indices)
            worker.push_pull(GRADS)

    psframe.run(work, PARAMS, optimizer=SGD(0.1), mode=mode, workers=3)
    assert Counter(seen) == Counter((epoch, i) for epoch in range(3) for i in range(50))


def test_two_pushes_complete_one_block() -> None:
    """The second is not about the block that has been leased ahead of time."""
    blocks: list[int] = []

    def work(worker: Any) -> None:
        worker.pull()
        for task in worker.tasks(4, 1, shuffle=False, prepare=lambda task: None):
            blocks.append(int(task.indices[0]))
            worker.push_pull(GRADS)
            worker.push_pull(GRADS)

    psframe.run(work, PARAMS, optimizer=SGD(0.1))
    assert blocks == [0, 1, 2, 3]


def test_a_block_that_was_not_begun_goes_to_another_worker() -> None:
    """Worker 0 takes one block and, leased ahead of time, a second; then it turns away."""
    completed: list[int] = []
    away = threading.Event()

    def work(worker: Any) -> None:
        worker.pull()
        if worker.index == 1:
            assert away.wait(WAIT_S)
        for task in worker.tasks(6, 1, shuffle=False, prepare=lambda task: None):
            completed.append(int(task.indices[0]))
            worker.push_pull(GRADS)
            if worker.index == 0:
                break
        if worker.index == 0:
            worker.push_pull(GRADS)  # about nothing
            away.set()
            while len(completed) < 6:
                worker.pull()

    psframe.run(work, PARAMS, optimizer=SGD(0.1), workers=2)
    assert sorted(completed) == list(range(6))


@pytest.mark.parametrize("simulated", [False, True])
def test_what_prepare_raises_ends_the_run(simulated: bool) -> None:
    def prepare(task: Any) -> None:
        if task.indices[0] == 3:
            raise ValueError("row 3 is rotten")

    def work(worker: Any) -> None:
        worker.pull()
        for _ in worker.tasks(6, 1, shuffle=False, prepare=prepare):
            worker.push_pull(GRADS)

    run: Any = psframe.run
    if simulated:
        run = partial(psframe.simulate, workers=1, compute_time_s=lambda *_: 1.0)
    with pytest.raises(ValueError, match="row 3 is rotten"):
        run(work, PARAMS, optimizer=SGD(0.1))


def test_a_blocks_random_stream_does_not_depend_on_the_worker() -> None:
    """The same numbers with 1 and 3 workers, with a thread and without, in a simulation too."""

    def draws(workers: int, prepares: bool, simulated: bool) -> dict[tuple[int, int], float]:
        found: dict[tuple[int, int], float] = {}

        def work(worker: Any) -> None:
            worker.pull()
            how = {"prepare": lambda task: task.rng.random()} if prepares else {}
            for task in worker.tasks(12, 2, epochs=2, **how):
                drawn = task.prepared if prepares else task.rng.random()
                found[task.epoch, int(task.indices.min())] = drawn
                worker.push_pull(GRADS)

        how: dict[str, Any] = {"optimizer": SGD(0.1), "workers": workers, "seed": 5}
        if simulated:
            psframe.simulate(work, PARAMS, compute_time_s=lambda *_: 1.0, **how)
        else:
            psframe.run(work, PARAMS, **how)
        return found

    expected = draws(1, False, False)
    assert len(set(expected.values())) == 12
    for case in [(3, True, False), (3, False, True), (2, True, True)]:
        assert draws(*case) == expected, case


def test_stopping_ends_the_iterator() -> None:
    def work(worker: Any) -> None:
        worker.pull()
        for _ in worker.tasks(6, 1, prepare=lambda task: None):
            worker.push_pull(GRADS)
            worker.stop()

    assert psframe.run(work, PARAMS, optimizer=SGD(0.1)).version == 1


HANGING = """
import sys, threading, numpy as np, psframe

def prepare(task):
    if task.indices[0] == 1:
        started.set()
        threading.Event().wait()  # a disk that hangs

def work(worker):
    worker.pull()
    for _ in worker.tasks(3, 1, shuffle=False, prepare=prepare):
        assert started.wait(30)
        raise ValueError("enough")

started = threading.Event()
try:
    psframe.run(work, {"w": np.zeros(2)}, optimizer=psframe.optim.SGD(0.1))
except ValueError as error:
    print("raised", error)
"""


def test_what_hangs_in_the_thread_does_not_keep_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=WAIT_S
    )
    assert (done.returncode, done.stdout) == (0, "raised enough\n"), done.stderr
