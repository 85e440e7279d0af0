"""What a user's `work` function holds: the worker, its parameters, its pending pushes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from psframe.devices import Device
from psframe.errors import Stopped, WaitTimeout
from psframe.events import (
    Answer,
    Failure,
    FromWorker,
    Lease,
    LeaseKind,
    Leave,
    Log,
    Reason,
    Report,
    Stop,
    TaskSpec,
)
from psframe.layout import Array, Layout
from psframe.packing import check_gradients, judge, pack
from psframe.worker import Request, WorkerProtocol

__all__ = ["Endpoint", "Params", "Pending", "PendingPull", "Receipt", "Task", "Worker"]

# Calls of `log` after which the sums are sent even if no lease is asked for.
_LOG_EVERY = 64


class Endpoint(Protocol):
    """A worker's end of a transport.

    Attributes:
        index: the worker, 0..W-1.
        workers, servers: W and S.
        in_place: by server, whether its snapshots are read in place.
    """

    index: int
    workers: int
    servers: int
    in_place: Sequence[bool]

    def send(self, server: int, message: FromWorker) -> None:
        """Send; messages to one server arrive in order. The slot named in a push is not
        written again before it is answered."""

    def receive(self, timeout_s: float | None) -> tuple[int, Answer | Lease] | None:
        """Take the next (server, answer); None after `timeout_s` seconds without one.

        Raises:
            RankLost: no answer can come any more.
        """

    def now(self) -> float:
        """Seconds on the clock that `receive` counts by."""

    def slot(self, index: int) -> Array:
        """The worker's flat gradient slot 0 or 1, of P elements."""

    def snapshot(self, server: int, buffer: int) -> Array:
        """The server's shard in that buffer, or COPIED; valid until it is released."""


@dataclass(frozen=True)
class Receipt:
    """What became of a push.

    Attributes:
        applied: whether it is part of the parameters.
        version: server 0's version after handling it.
        staleness: the version just before handling it minus the version it was computed on.
        reason: why it was not applied; empty if it was.
    """

    applied: bool
    version: int
    staleness: int
    reason: str


def _receipt(answer: Answer | None) -> Receipt:
    if answer is None:
        return Receipt(False, 0, 0, Reason.STOPPED.text)
    return Receipt(answer.applied, answer.push_version, answer.staleness, answer.reason.text)


class Params(Mapping[str, Any]):
    """The parameters of one pull: names to arrays on the worker's device, not to be written.

    Valid until this worker's next pull or push_pull (with `pull_async`: until its `wait`).

    Attributes:
        version: updates that server 0's shard had seen.
        versions: the same, of every shard; each shard is one consistent version.
        receipt: what became of the push, if this came of `push_pull`.
    """

    __slots__ = ("_arrays", "receipt", "versions")

    def __init__(
        self, arrays: dict[str, Any], versions: tuple[int, ...], receipt: Receipt | None
    ) -> None:
        self._arrays = arrays
        self.versions = versions
        self.receipt = receipt

    @property
    def version(self) -> int:
        """Server 0's version."""
        return self.versions[0]

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def copy(self) -> dict[str, Any]:
        """Copy the arrays; the copies are the caller's and stay."""
        return {name: array.copy() for name, array in self._arrays.items()}


class Pending:
    """A push under way."""

    def __init__(self, worker: Worker, request: Request) -> None:
        self._worker = worker
        self._request = request

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        self._worker._poll()
        return self._request.done

    def wait(self, timeout_s: float | None = None) -> Receipt:
        """Wait for the servers' answers.

        Args:
            timeout_s: seconds; None waits as long as the servers live.

        Returns:
            The receipt; after the end of the run one with applied=False, reason="stopped".

        Raises:
            WaitTimeout: the bound has passed; the push stays under way.
        """
        self._worker._wait(self._request, timeout_s)
        return _receipt(self._request.receipt)


class PendingPull:
    """A pull under way; the parameters that the worker has stay valid until `wait`."""

    def __init__(self, worker: Worker, request: Request) -> None:
        self._worker = worker
        self._request = request
        self._params: Params | None = None

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        self._worker._poll()
        return self._request.done

    def wait(self, timeout_s: float | None = None) -> Params:
        """Wait for the parameters; they replace the worker's present ones.

        Raises:
            Stopped: the run is over.
            WaitTimeout: the bound has passed; the pull stays under way.
        """
        if self._params is None:
            self._worker._wait(self._request, timeout_s)
            self._params = self._worker._take(self._request)
            if self._worker._prefetch is self:
                self._worker._prefetch = None
        return self._params


class Task:
    """A block of work leased to this worker.

    Attributes:
        kind: "train" or "evaluate".
        epoch: counted from 0.
        indices: int64 indices of the samples.
    """

    def __init__(self, worker: Worker, kind: str, epoch: int, indices: Array) -> None:
        self._worker = worker
        self.kind = kind
        self.epoch = epoch
        self.indices = indices

    def params(self) -> Params:
        """Pull the snapshot that this evaluation is about; ends the present parameters.

        Raises:
            Stopped: the run is over.
        """
        return self._worker._pull(pinned=True)

    def report(self, **sums: float) -> None:
        """Report sums over this evaluation block; they are added over all blocks in order."""
        sums = {name: _number(name, value) for name, value in sums.items()}
        self._worker._send(0, Report(self._worker.index, sums))


class Worker:
    """One worker's connection to the servers. Only the thread that runs `work` may use it.

    Attributes:
        index: 0..W-1.
        count: W.
        xp: numpy or cupy, whichever the parameters are arrays of.
        device: "cpu" or "cuda:k".
        rng: a NumPy Generator, a function of (seed, index).
    """

    def __init__(self, endpoint: Endpoint, layout: Layout, device: Device, seed: int) -> None:
        self._endpoint = endpoint
        self._layout = layout
        self._device = device
        self._seed = seed
        self._protocol = WorkerProtocol(endpoint.index, endpoint.servers, endpoint.in_place)
        self._shards = layout.shards(endpoint.servers)
        self._assembly = [_Assembly(layout, self._shards), _Assembly(layout, self._shards)]
        self._views: dict[tuple[int, ...], dict[str, Array]] = {}
        self._staging: list[dict[str, Any] | None] = [None, None]
        self._filling: int | None = None  # the slot that `gradients` gave out
        self._prefetch: PendingPull | None = None
        self._plans = 0
        self._logged: dict[str, tuple[float, int]] = {}
        self._log_calls = 0
        self.index = endpoint.index
        self.count = endpoint.workers
        self.xp: ModuleType = device.xp
        self.device = device.name
        self.rng = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0, endpoint.index)))
        )

    # ---- parameters ----------------------------------------------------------------------

    def pull(self) -> Params:
        """Wait for the parameters; each shard comes in one consistent version.

        Returns:
            The parameters, valid until the next pull or push_pull.

        Raises:
            Stopped: the run is over.
        """
        return self._pull(pinned=False)

    def pull_async(self) -> PendingPull:
        """Start a pull and return at once; the present parameters stay valid until its wait.

        With another such pull under way, waits for that one first.

        Raises:
            Stopped: the run is over.
        """
        self._check_running()
        self._end_prefetch()
        request, messages = self._protocol.pull()
        for server, message in enumerate(messages):
            self._send(server, message)
        self._prefetch = PendingPull(self, request)
        return self._prefetch

    def push(self, grads: Mapping[str, Any] | None) -> Pending:
        """Send a gradient; it is copied out when this returns. Waits only if two are under way.

        Args:
            grads: names to arrays shaped like the parameters, on the host or on this device,
                floating-point, cast if need be; or None for what was written into the arrays
                of `gradients()`, which is then not copied on the host.

        Raises:
            ValueError: a name is missing or unknown, or a shape is wrong; nothing is sent.
            TypeError: a dtype is not floating-point; nothing is sent.
            Stopped: the run is over.
        """
        return Pending(self, self._push(grads, want_params=False))

    def push_pull(self, grads: Mapping[str, Any] | None) -> Params:
        """Push, and wait for the parameters after it, in one round trip.

        Args:
            grads: as for `push`.

        Returns:
            The parameters; `.receipt` says what became of the push.

        Raises:
            ValueError, TypeError, Stopped: as for `push`.
        """
        request = self._push(grads, want_params=True)
        self._wait(request, None)
        return self._take(request)

    def gradients(self) -> dict[str, Any]:
        """Give writable arrays, on this device, that `push(None)` sends as they are.

        They are the worker's until that push; what they hold at first is undefined. Waits if
        two pushes are under way.

        Raises:
            Stopped: the run is over.
        """
        self._check_running()
        self._wait_for_slot()
        slot = self._filling = self._protocol.slot
        staging = self._staging[slot]
        if staging is None:
            views = self._layout.views(self._endpoint.slot(slot))
            staging = self._staging[slot] = self._device.staging(views)
        return dict(staging)

    # ---- work ----------------------------------------------------------------------------

    def leases(
        self, n_samples: int, batch_size: int, *, epochs: int = 1, shuffle: bool = True
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Lease blocks of sample indices until every sample of every epoch is completed.

        Over all workers each sample of an epoch is completed exactly once. A block is
        completed by this worker's next push or, without one, by asking for the next block; it
        goes back if the worker is lost. Every worker must ask with equal arguments.

        Args:
            n_samples: samples, >= 1.
            batch_size: samples in a block, >= 1; an epoch's last block may have fewer.
            epochs: how often each sample is leased, >= 0.
            shuffle: whether each epoch is a permutation drawn from the run's seed.

        Yields:
            int64 index arrays, the caller's own.

        Raises:
            ValueError, TypeError: an argument is wrong, or differs from another worker's.
            Stopped: the run is over.
        """
        tasks = self.tasks(n_samples, batch_size, epochs=epochs, shuffle=shuffle)
        return (task.indices for task in tasks)

    def tasks(
        self,
        n_samples: int,
        batch_size: int,
        *,
        epochs: int = 1,
        shuffle: bool = True,
        evaluate: tuple[int, int] | None = None,
    ) -> Iterator[Task]:
        """Lease blocks of training and, after each epoch, of evaluation on one snapshot.

        Args:
            n_samples, batch_size, epochs, shuffle: as for `leases`.
            evaluate: (samples, batch size) of the evaluation set. When an epoch is completed
                server 0 pins a snapshot and leases the evaluation to whichever worker is free;
                such a task has `kind == "evaluate"`, `params()` and `report()`.

        Yields:
            Tasks. Raises as `leases`.
        """
        eval_samples, eval_batch = evaluate if evaluate is not None else (0, 1)
        for name, value, least in (
            ("n_samples", n_samples, 1),
            ("batch_size", batch_size, 1),
            ("epochs", epochs, 0),
            ("evaluate: samples", eval_samples, 0),
            ("evaluate: batch size", eval_batch, 1),
        ):
            _check_count(name, value, least)
        spec = TaskSpec(
            int(n_samples),
            int(batch_size),
            int(epochs),
            bool(shuffle),
            int(eval_samples),
            int(eval_batch),
        )
        plan = self._plans
        self._plans += 1
        return self._tasks(plan, spec)

    def stop(self) -> None:
        """End the run for all workers; what they have pushed before is drained."""
        if not self._protocol.stopped:
            self._send(0, Stop(self.index))
            self._protocol.stopped = True

    def log(self, **numbers: float) -> None:
        """Log numbers; their mean over workers and steps appears in the run's metrics.

        Raises:
            TypeError: a value is not a real number.
        """
        for name, value in numbers.items():
            total, count = self._logged.get(name, (0.0, 0))
            self._logged[name] = (total + _number(name, value), count + 1)
        self._log_calls += 1
        if self._log_calls >= _LOG_EVERY:
            self._flush_log()

    # ---- for the runtime -----------------------------------------------------------------

    def leave(self, failure: Failure | None = None) -> None:
        """Say that `work` is over and wait until every request is answered."""
        self._flush_log()
        for server in range(self._endpoint.servers):
            self._endpoint.send(server, Leave(self.index, failure if server == 0 else None))
        while self._protocol.outstanding:
            self._receive(None)

    # ---- inside --------------------------------------------------------------------------

    def _send(self, server: int, message: FromWorker) -> None:
        self._endpoint.send(server, message)

    def _check_running(self) -> None:
        if self._protocol.stopped:
            raise Stopped("the run is over")

    def _receive(self, timeout_s: float | None) -> bool:
        item = self._endpoint.receive(timeout_s)
        if item is None:
            return False
        self._protocol.receive(*item)
        return True

    def _poll(self) -> None:
        while self._receive(0.0):
            pass

    def _wait(self, request: Request, timeout_s: float | None) -> None:
        if timeout_s is None:
            while request.waiting:
                self._receive(None)
            return
        deadline = self._endpoint.now() + timeout_s
        while request.waiting:
            left = deadline - self._endpoint.now()
            if not self._receive(max(left, 0.0)) and left <= 0:
                raise WaitTimeout(
                    f"worker {self.index}: no answer to request {request.seq} within {timeout_s} s;"
                    f" {request.waiting} of {self._endpoint.servers} servers have not answered"
                )

    def _wait_for_slot(self) -> None:
        user = self._protocol.slot_user
        if user is not None:
            self._wait(user, None)

    def _pull(self, *, pinned: bool) -> Params:
        self._check_running()
        self._end_prefetch()
        self._protocol.drop_params()
        request, messages = self._protocol.pull(pinned=pinned)
        for server, message in enumerate(messages):
            self._send(server, message)
        self._wait(request, None)
        return self._take(request)

    def _end_prefetch(self) -> None:
        if self._prefetch is not None:
            self._prefetch.wait()

    def _push(self, grads: Mapping[str, Any] | None, *, want_params: bool) -> Request:
        where = f"push from worker {self.index}"
        if grads is not None:
            check_gradients(self._layout, grads, where)
        elif self._filling is None:
            raise ValueError(f"{where}: push(None) sends gradients(), which has not been called")
        self._check_running()
        if want_params:
            self._end_prefetch()
        self._wait_for_slot()
        self._check_running()
        slot = self._endpoint.slot(self._protocol.slot)
        if grads is None:
            finite, norm = self._pack_staging(slot)
        else:
            finite, norm = pack(self._layout, self._device.gradients(grads), slot)
        self._filling = None
        request, messages = self._protocol.push(finite=finite, norm=norm, want_params=want_params)
        for server, message in enumerate(messages):
            self._send(server, message)
        return request

    def _pack_staging(self, slot: Array) -> tuple[bool, float]:
        staging = self._staging[self._protocol.slot]
        assert staging is not None, "gradients() made it"
        if self.xp is np:
            return judge(self._layout, slot)  # the arrays are the slot itself
        return pack(self._layout, self._device.gradients(staging), slot)

    def _take(self, request: Request) -> Params:
        """Make the answer's parameters the present ones."""
        if request.stopped:
            raise Stopped("the run is over")
        self._protocol.take_params(request)
        arrays, copied = self._device.params(self._host_views(request.buffers))
        if copied:
            self._protocol.drop_params()
        receipt = None if request.receipt is None else _receipt(request.receipt)
        return Params(arrays, tuple(request.versions), receipt)

    def _host_views(self, buffers: list[int]) -> dict[str, Array]:
        endpoint = self._endpoint
        if len(buffers) > 1:
            parts = [endpoint.snapshot(s, b) for s, b in enumerate(buffers)]
            self._assembly.reverse()  # the other one may still be computed on
            return self._assembly[0].views(parts)
        key = tuple(buffers)
        views = self._views.get(key)
        if views is None:
            flat = endpoint.snapshot(0, buffers[0]).view()
            flat.flags.writeable = False
            views = self._views[key] = self._layout.views(flat)
        return views

    def _tasks(self, plan: int, spec: TaskSpec) -> Iterator[Task]:
        orders: dict[int, Array] = {}
        while True:
            self._check_running()
            self._flush_log()
            request, message = self._protocol.ask_lease(plan, spec)
            self._send(0, message)
            self._wait(request, None)
            lease = request.lease
            if request.stopped or lease is None:
                raise Stopped("the run is over")
            if lease.kind is LeaseKind.EXHAUSTED:
                return
            if lease.kind is LeaseKind.CONFLICT:
                raise ValueError(
                    f"leases of worker {self.index}: another worker's call number {plan + 1} asked"
                    f" for something else than {spec}; every worker must ask with equal arguments"
                )
            if lease.kind is LeaseKind.EVALUATE:
                indices = np.arange(lease.begin, lease.end, dtype=np.int64)
                yield Task(self, "evaluate", lease.epoch, indices)
            else:
                order = self._order(orders, plan, lease.epoch, spec)
                yield Task(self, "train", lease.epoch, order[lease.begin : lease.end].copy())

    def _order(self, orders: dict[int, Array], plan: int, epoch: int, spec: TaskSpec) -> Array:
        """The epoch's order of samples: a function of (seed, plan, epoch) alone."""
        order = orders.get(epoch)
        if order is None:
            order = np.arange(spec.n_samples, dtype=np.int64)
            if spec.shuffle:
                sequence = np.random.SeedSequence(self._seed, spawn_key=(1, plan, epoch))
                np.random.Generator(np.random.PCG64(sequence)).shuffle(order)
            if len(orders) > 1:
                del orders[min(orders)]
            orders[epoch] = order
        return order

    def _flush_log(self) -> None:
        if self._logged:
            self._send(0, Log(self.index, self._logged))
            self._logged = {}
        self._log_calls = 0


class _Assembly:
    """Names tensors in the shards of several servers; one that spans shards is copied."""

    def __init__(self, layout: Layout, shards: list[tuple[int, int]]) -> None:
        self._layout = layout
        self._shards = shards
        self._spanning: dict[str, Array] = {}

    def views(self, parts: list[Array]) -> dict[str, Array]:
        layout = self._layout
        views: dict[str, Array] = {}
        for name, offset, size, shape in zip(
            layout.names, layout.offsets, layout.sizes, layout.shapes, strict=True
        ):
            for part, (begin, end) in zip(parts, self._shards, strict=True):
                if begin <= offset and offset + size <= end:
                    flat = part[offset - begin : offset - begin + size]
                    break
            else:
                flat = self._copy(name, offset, size, parts)
            view = flat.view()
            view.flags.writeable = False
            views[name] = view.reshape(shape)
        return views

    def _copy(self, name: str, offset: int, size: int, parts: list[Array]) -> Array:
        flat = self._spanning.get(name)
        if flat is None:
            flat = self._spanning[name] = np.empty(size, self._layout.dtype)
        for part, (begin, end) in zip(parts, self._shards, strict=True):
            low, high = max(offset, begin), min(offset + size, end)
            if low < high:
                flat[low - offset : high - offset] = part[low - begin : high - begin]
        return flat


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a real number, got {value!r}") from error


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"leases: {name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"leases: {name}: expected at least {least}, got {value}")
