"""Blocks of work as a worker sees them: which samples, and what it owes for an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.errors import MessageError
from psframe.events import Lease, LeaseKind, TaskSpec
from psframe.params import Params
from psframe.wire import NAME_BYTES_MAX, NAMES_MAX

__all__ = ["EpochOrders", "Task", "real_number", "task_spec"]


class Task:
    """A block of work leased to this worker.

    Attributes:
        kind: "train" or "evaluate".
        epoch: counted from 0.
        indices: int64 indices of the samples, the caller's own.
        prepared: what `prepare` made of it; None without one.
        data_wait_s: seconds that the worker waited for that.
    """

    def __init__(
        self,
        kind: str,
        epoch: int,
        indices: npt.NDArray[np.int64],
        key: tuple[int, ...],
        pull: Callable[[], Params],
        report: Callable[[dict[str, float]], None],
    ) -> None:
        self.kind = kind
        self.epoch = epoch
        self.indices = indices
        self.prepared: Any = None
        self.data_wait_s = 0.0
        self._key = key
        self._rng: np.random.Generator | None = None
        self._pull = pull
        self._report = report
        self._open = kind == "evaluate"

    @property
    def rng(self) -> np.random.Generator:
        """The block's own NumPy Generator, the same whoever computes the block, and again."""
        if self._rng is None:
            seed, *path = self._key
            sequence = np.random.SeedSequence(seed, spawn_key=tuple(path))
            self._rng = np.random.Generator(np.random.PCG64(sequence))
        return self._rng

    def params(self) -> Params:
        """Pull the snapshot that this evaluation is about; ends the worker's present parameters.

        Raises:
            ValueError: this is no evaluation, or it is over.
            Stopped: the run is over.
        """
        self._check("params()")
        return self._pull()

    def report(self, **sums: float) -> None:
        """Report sums over this block, once; they are added over all blocks, in block order.

        Raises:
            ValueError: this is no evaluation, or it is over; or there are more than 64 names, or
                one is longer than 256 bytes.
            TypeError: a value is not a real number.
        """
        self._check("report()")
        if len(sums) > NAMES_MAX:
            raise ValueError(f"report(): expected at most {NAMES_MAX} names, got {len(sums)}")
        numbers = {name: real_number(name, value) for name, value in sums.items()}
        self._open = False
        self._report(numbers)

    def close(self) -> None:
        """The worker has gone on to something else."""
        self._open = False

    def _check(self, call: str) -> None:
        if not self._open:
            why = "this evaluation is over" if self.kind == "evaluate" else "this one is to train"
            raise ValueError(f"{call} belongs to an evaluation task in hand; {why}")


class EpochOrders:
    """The orders of samples of one plan; each is a function of (seed, plan, epoch) alone."""

    def __init__(self, seed: int, plan: int, spec: TaskSpec) -> None:
        self._seed = seed
        self._plan = plan
        self._spec = spec
        # Of two epochs: a block of the last one may come back.
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def task(
        self,
        lease: Lease,
        pull: Callable[[], Params],
        report: Callable[[dict[str, float]], None],
    ) -> Task:
        """Make the task that a lease of a block is about.

        Raises:
            MessageError: there is no such block in the plan.
        """
        evaluates = lease.kind is LeaseKind.EVALUATE
        spec = self._spec
        size = spec.eval_samples if evaluates else spec.n_samples
        if lease.end > size or lease.epoch >= spec.epochs:
            raise MessageError(
                f"a lease is of [{lease.begin}, {lease.end}) in epoch {lease.epoch}, of {size}"
                f" samples and {spec.epochs} epochs"
            )
        kind = "evaluate" if evaluates else "train"
        if evaluates:
            indices = np.arange(lease.begin, lease.end, dtype=np.int64)
        else:
            indices = self.block(lease)
        # worker.rng has the spawn keys (0, ...), an epoch's order (1, ...).
        key = (self._seed, 3 if evaluates else 2, self._plan, lease.epoch, lease.begin)
        return Task(kind, lease.epoch, indices, key, pull, report)

    def block(self, lease: Lease) -> npt.NDArray[np.int64]:
        """Give the sample indices of a training lease, as a copy."""
        order = self._orders.get(lease.epoch)
        if order is None:
            order = self._make(lease.epoch)
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[lease.epoch] = order
        block: npt.NDArray[np.int64] = order[lease.begin : lease.end].copy()
        return block

    def _make(self, epoch: int) -> npt.NDArray[np.int64]:
        order = np.arange(self._spec.n_samples, dtype=np.int64)
        if self._spec.shuffle:
            sequence = np.random.SeedSequence(self._seed, spawn_key=(1, self._plan, epoch))
            np.random.Generator(np.random.PCG64(sequence)).shuffle(order)
        return order


def task_spec(
    n_samples: Any, batch_size: Any, epochs: Any, shuffle: Any, evaluate: tuple[Any, Any] | None
) -> TaskSpec:
    """Check the arguments of `Worker.tasks`.

    Raises:
        TypeError: a count is no integer.
        ValueError: it is too small.
    """
    eval_samples, eval_batch_size = (0, 1) if evaluate is None else evaluate
    for name, value, least in (
        ("n_samples", n_samples, 1),
        ("batch_size", batch_size, 1),
        ("epochs", epochs, 0),
        ("evaluate: samples", eval_samples, 0),
        ("evaluate: batch size", eval_batch_size, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"leases: {name}: expected an integer, got {value!r}")
        if value < least:
            raise ValueError(f"leases: {name}: expected at least {least}, got {value}")
    return TaskSpec(
        int(n_samples),
        int(batch_size),
        int(epochs),
        bool(shuffle),
        int(eval_samples),
        int(eval_batch_size),
    )


def real_number(name: str, value: Any) -> float:
    """Turn a logged or reported value into a float.

    Raises:
        TypeError: it is not a real number.
        ValueError: the name does not fit into a message.
    """
    size = len(name.encode())
    if size > NAME_BYTES_MAX:
        raise ValueError(
            f"{name[:40]!r}...: expected a name of at most {NAME_BYTES_MAX} bytes, got {size}"
        )
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a real number, got {value!r}") from error
    raise TypeError(f"{name}: expected a real number, got {value!r}")
