"""How long a word takes from one core to another and back, at the moment.

A shared host is now faster, now slower at it, fourfold within seconds, and messages on a node go
with it. Two threads, each on a core of its own, spin on one word each. The loads are atomic: a
compiler may take an ordinary one out of the loop, and then it would spin for ever.
"""

from __future__ import annotations

import functools
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["round_trip_ns"]

_TRIPS, _BATCHES = 400, 15
_LINE_BYTES = 64
_ANSWER = 2 * _LINE_BYTES  # from the word that calls to the one that answers
_STOP = -1
# Loads that a batch may take, some milliseconds: fifty times what it needs if both threads run. On
# busy cores one may have lost its own; the batch is then given up.
_LOADS = 5_000_000
_BOUND_S = 0.1


def round_trip_ns() -> float | None:
    """Measure it; the median of some batches of round trips.

    Returns:
        Nanoseconds; None if this process may use one core only, or the cores were too busy.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return None
    ping, pong = _compile()
    words = np.zeros(6 * _LINE_BYTES // 8, np.int64)
    address = words.ctypes.data + _LINE_BYTES
    times: list[float] = []

    def call() -> None:
        try:
            os.sched_setaffinity(0, {cores[0]})  # of this thread alone
            start = time.perf_counter()
            for batch in range(_BATCHES):
                begin = time.perf_counter_ns()
                if ping(address, batch * _TRIPS, _TRIPS):
                    times.append((time.perf_counter_ns() - begin) / _TRIPS)
                if time.perf_counter() - start > _BOUND_S:
                    break
        finally:
            words[_LINE_BYTES // 8] = _STOP

    def answer() -> None:
        os.sched_setaffinity(0, {cores[1]})
        pong(address)

    threads = [threading.Thread(target=call), threading.Thread(target=answer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The first waits for the other thread to begin.
    return statistics.median(times[1:]) if len(times) > 1 else None


@functools.cache
def _compile() -> tuple[Callable[[int, int, int], bool], Callable[[int], None]]:
    """Compile ping(address, number of the first, trips) and pong(address)."""
    import numba

    load, store = _atomics()

    def ping(address: int, first: int, trips: int) -> bool:
        left = _LOADS
        for number in range(first + 1, first + trips + 1):
            store(address, number)
            while load(address + _ANSWER) != number:
                left -= 1
                if left == 0:
                    return False
        return True

    def pong(address: int) -> None:
        last = 0
        while last != _STOP:
            value = load(address)
            if value != last:
                store(address + _ANSWER, value)
                last = value

    call, echo = numba.njit(nogil=True)(ping), numba.njit(nogil=True)(pong)
    words = np.full(6 * _LINE_BYTES // 8, _STOP, np.int64)
    call(words.ctypes.data, 0, 0)  # compiled here: two threads would do it twice
    echo(words.ctypes.data)
    return call, echo


def _atomics() -> tuple[Any, Any]:
    """Make load(address) and store(address, value) of 64-bit words."""
    from numba import types
    from numba.extending import intrinsic

    def pointer(context: Any, builder: Any, address: Any) -> Any:
        return builder.inttoptr(address, context.get_value_type(types.int64).as_pointer())

    def load(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load_atomic(pointer(context, builder, args[0]), "acquire", 8)

        return types.int64(types.int64), generate

    def store(typing: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store_atomic(args[1], pointer(context, builder, args[0]), "release", 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return intrinsic(load), intrinsic(store)
