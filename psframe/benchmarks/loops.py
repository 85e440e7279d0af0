"""Training loops that use a worker in different ways, for `overlap`.

Each is a generator: a step computes a gradient on the parameters that it has, by calling `produce`
with the arrays to write it into, and yields the parameters for the next step, the version that
the gradient was computed on, and what tells its receipt. Copied into a training script, `produce`
is the user's own function and the `yield` goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from psframe.client import Worker
from psframe.params import Params, Receipt
from psframe.pending import Pending

__all__ = ["LOOPS", "Arrays", "Loop", "Produce", "Step", "push_pull"]

Arrays: TypeAlias = Mapping[str, Any]
Produce: TypeAlias = Callable[[Arrays], None]
Step: TypeAlias = tuple[Params, int, "Receipt | Pending | None"]
Loop: TypeAlias = Callable[[Worker, Arrays, Produce], Iterator[Step]]


def push_pull(worker: Worker, own: Arrays, produce: Produce) -> Iterator[Step]:
    """Compute, then push and wait for the parameters: nothing at once, no staleness of its own."""
    params = worker.pull()
    while True:
        version = params.version
        produce(own)
        params = worker.push_pull(own)
        yield params, version, params.receipt


def in_slot(worker: Worker, own: Arrays, produce: Produce) -> Iterator[Step]:
    """The same, the gradient written where it is sent from: without the copy."""
    params = worker.pull()
    while True:
        version = params.version
        produce(worker.gradients())
        params = worker.push_pull(None)
        yield params, version, params.receipt


def prefetch(worker: Worker, own: Arrays, produce: Produce) -> Iterator[Step]:
    """Push without waiting, and ask for the next parameters a step ahead: staleness 1."""
    params, ahead = worker.pull(), worker.pull_async()
    while True:
        version = params.version
        produce(own)
        pending = worker.push(own)
        params = ahead.wait()
        ahead = worker.pull_async()
        yield params, version, pending


def in_slot_prefetch(worker: Worker, own: Arrays, produce: Produce) -> Iterator[Step]:
    """The same, the gradient written where it is sent from."""
    params, ahead = worker.pull(), worker.pull_async()
    while True:
        version = params.version
        produce(worker.gradients())
        pending = worker.push(None)
        params = ahead.wait()
        ahead = worker.pull_async()
        yield params, version, pending


def in_slot_late(worker: Worker, own: Arrays, produce: Produce) -> Iterator[Step]:
    """Pull, between computing and pushing, what the step before has made: staleness 1.

    Nothing is copied, not even the parameters. (psframe takes the gradient for one of the
    parameters just pulled, and counts one less than the staleness is.)
    """
    params = worker.pull()
    while True:
        version = params.version
        produce(worker.gradients())
        params = worker.pull()
        yield params, version, worker.push(None)


LOOPS: dict[str, Loop] = {
    "push_pull": push_pull,
    "in-slot": in_slot,
    "prefetch": prefetch,
    "in-slot-prefetch": in_slot_prefetch,
    "in-slot-late": in_slot_late,
}
