"""Sleeping until a neighbour rings. A ring that is not heard makes a test hang, which is killed."""

from __future__ import annotations

import mmap
import os
import threading
import time

import pytest

from psframe.transports.bell import Bell, can_ring
from psframe.transports.patience import Patience

pytestmark = pytest.mark.skipif(not can_ring(), reason="this machine's futex is not known")
LONG_S = 3600.0


def line() -> memoryview:
    return memoryview(mmap.mmap(-1, 4096))[64:128]


def test_a_ring_wakes_who_sleeps_in_another_process() -> None:
    memory = line()
    bell = Bell(memory)
    bell.set()
    child = os.fork()
    if child == 0:
        other = Bell(memory)
        while True:  # the parent may not be asleep yet
            if other.words[0]:
                other.words[1] += 1
                other.ring()
            if other.words[2]:
                os._exit(0)
    while not bell.words[1]:
        bell.set()
        bell.sleep(LONG_S)
    bell.words[2] = 1
    assert os.waitpid(child, 0)[1] == 0
    assert bell.words[0] == 0


def test_who_has_been_rung_for_does_not_fall_asleep() -> None:
    bell = Bell(line())
    bell.set()
    bell.ring()
    bell.sleep(LONG_S)


def test_a_sleep_ends_by_itself() -> None:
    bell = Bell(line())
    bell.set()
    bell.sleep(1e-3)
    assert bell.words[0] == 0


def wait_until_set(patience: Patience, bell: Bell) -> None:
    while not bell.words[0]:
        patience.wait()


def test_patience_looks_once_more_before_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    bell = Bell(line())
    patience = Patience(crowded=True, bell=bell)
    slept = []
    monkeypatch.setattr(bell, "sleep", slept.append)
    wait_until_set(patience, bell)
    assert patience.asleep
    assert slept == []
    patience.wait()
    assert len(slept) == 1
    assert slept[0] <= 0.1


def test_patience_that_is_over_clears_the_bell() -> None:
    bell = Bell(line())
    patience = Patience(crowded=True, bell=bell)
    wait_until_set(patience, bell)
    patience.reset()
    assert bell.words[0] == 0
    assert not patience.asleep


def test_who_waits_for_what_nobody_rings_for_does_not_sleep_at_the_bell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bell = Bell(line())
    patience = Patience(crowded=True, bell=bell)
    wait_until_set(patience, bell)
    monkeypatch.setattr(bell, "sleep", None)
    for _ in range(3):
        patience.wait(busy=True)
        assert bell.words[0] == 0


def spins(patience: Patience) -> int:
    """Count the tests before the first yield."""
    patience.reset()
    count = 0
    while not patience.wait():
        count += 1
    return count


def test_who_rings_or_is_rung_for_yields_the_core_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    bell = Bell(line())
    patience = Patience(crowded=False, bell=bell)
    before = spins(patience)
    assert before > 0
    patience.rung()
    assert spins(patience) == 0
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 1.0)
    patience.wait()
    assert spins(patience) == before

    monkeypatch.setattr(bell, "sleep", lambda bound_s: None)
    wait_until_set(patience, bell)
    patience.wait()
    assert spins(patience) == 0


def test_a_sleep_lets_other_threads_run() -> None:
    bell = Bell(line())
    bell.set()
    thread = threading.Thread(target=bell.ring)
    thread.start()
    bell.sleep(LONG_S)
    thread.join()
