"""What a user's `work` function holds: the worker, its parameters, its pending pushes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from psframe.devices import Device
from psframe.errors import Stopped, WaitTimeout
from psframe.events import (
    Answer,
    Failure,
    FromWorker,
    GiveBack,
    Lease,
    LeaseKind,
    Leave,
    Log,
    Report,
    SpanKind,
    Spans,
    Stop,
    TaskSpec,
)
from psframe.layout import Array, Layout
from psframe.packing import GradientSlot, Snapshots, check_gradients, is_plain
from psframe.params import Params, Receipt, receipt_of
from psframe.prefetch import Preparation
from psframe.tasks import EpochOrders, Task, real_number, task_spec
from psframe.worker import Request, WorkerProtocol

__all__ = ["Endpoint", "Pending", "PendingPull", "Worker"]

# Calls of `log` after which the sums are sent even if no lease is asked for.
_LOG_EVERY = 64
# Spans in a message.
_SPANS_EVERY = 256


class Endpoint(Protocol):
    """A worker's end of a transport.

    Attributes:
        index: the worker, 0..W-1.
        workers, servers: W and S.
        in_place: by server, whether its snapshots are read in place.
        virtual_time: whether this is a simulation, in which threads have no place.
    """

    virtual_time: bool
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
        return receipt_of(self._request.receipt)


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


class Worker:
    """One worker's connection to the servers. Only the thread that runs `work` may use it.

    Attributes:
        index: 0..W-1.
        count: W.
        xp: numpy or cupy, whichever the parameters are arrays of.
        device: "cpu" or "cuda:k".
    """

    def __init__(
        self,
        endpoint: Endpoint,
        layout: Layout,
        device: Device,
        seed: int,
        *,
        measured: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._layout = layout
        self._device = device
        self._seed = seed
        self._protocol = WorkerProtocol(endpoint.index, endpoint.servers, endpoint.in_place)
        self._shapes = list(zip(layout.names, layout.shapes, strict=True))
        self._snapshots = Snapshots(layout, endpoint.servers, endpoint.snapshot)
        self._slots: list[GradientSlot | None] = [None, None]
        self._staging: list[Mapping[str, Any] | None] = [None, None]
        self._measured = measured  # what of a gradient its norm is of, if not all of it
        self._on_host = device.name == "cpu"
        self._filling: int | None = None  # the slot that `gradients` gave out
        self._prefetch: PendingPull | None = None
        self._abandoned: int | None = None  # the request of a block leased and not begun
        self._plans = 0
        self._logged: dict[str, tuple[float, int]] = {}
        self._log_calls = 0
        self._spans: list[tuple[int, float, float]] = []
        self.index = endpoint.index
        self.count = endpoint.workers
        self.xp: ModuleType = device.xp
        self.device = device.name
        self._rng: np.random.Generator | None = None

    @property
    def rng(self) -> np.random.Generator:
        """This worker's own NumPy Generator, a function of (seed, index)."""
        if self._rng is None:  # made when first asked for: it costs more than the rest
            sequence = np.random.SeedSequence(self._seed, spawn_key=(0, self.index))
            self._rng = np.random.Generator(np.random.PCG64(sequence))
        return self._rng

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

        With another such pull under way, gives that one.

        Raises:
            Stopped: the run is over.
        """
        self._check_running()
        if self._prefetch is not None:
            return self._prefetch
        self._give_back()
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
        return self._take(request, request.receipt)

    def gradients(self) -> Mapping[str, Any]:
        """Give writable arrays, on this device, that `push(None)` sends as they are.

        Write into them (`grads["w"][...] = g`); the mapping itself cannot be changed. They are
        the worker's until that push; what they hold at first is undefined. Waits if two pushes
        are under way.

        Raises:
            Stopped: the run is over.
        """
        self._check_running()
        self._wait_for_slot()
        self._check_running()  # or it would write into a push that servers have still to apply
        index = self._filling = self._protocol.slot
        slot = self._slot(index)
        staging = self._staging[index]
        if staging is None:
            arrays = slot.arrays if self._on_host else self._device.staging(slot.arrays)
            staging = self._staging[index] = MappingProxyType(arrays)
        return staging

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
        prepare: Callable[[Task], Any] | None = None,
    ) -> Iterator[Task]:
        """Lease blocks of training and, after each epoch, of evaluation on one snapshot.

        Args:
            n_samples, batch_size, epochs, shuffle: as for `leases`.
            evaluate: (samples, batch size) of the evaluation set. When an epoch is completed
                server 0 pins a snapshot and leases the evaluation to whichever worker is free;
                such a task has `kind == "evaluate"`, `params()` and `report()`.
            prepare: called with each training task; what it returns is `task.prepared`. The next
                block is then leased while this one is in hand, and prepared in a thread of its
                own (in a simulation: in line). It must not call the worker.

        Yields:
            Tasks. Raises as `leases`, and what `prepare` raises.
        """
        spec = task_spec(n_samples, batch_size, epochs, shuffle, evaluate)
        plan = self._plans
        self._plans += 1
        return self._tasks(plan, spec) if prepare is None else self._prepared(plan, spec, prepare)

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
            self._logged[name] = (total + real_number(name, value), count + 1)
        self._log_calls += 1
        if self._log_calls >= _LOG_EVERY:
            self._flush_log()

    def now(self) -> float:
        """Give the seconds on this worker's clock; in a simulation, virtual ones."""
        return self._endpoint.now()

    def span(self, kind: SpanKind, begin_s: float, end_s: float) -> None:
        """Note for a timeline what this worker was at between two times of its clock.

        They reach the run's observer as `psframe.events.Spans`, some at a time.
        """
        self._spans.append((kind, begin_s, end_s))
        if len(self._spans) >= _SPANS_EVERY:
            self._flush_spans()

    # ---- for the runtime -----------------------------------------------------------------

    def leave(self, failure: Failure | None = None) -> None:
        """Say that `work` is over and wait until every request is answered."""
        self._flush_log()
        self._flush_spans()
        for server in range(self._endpoint.servers):
            self._endpoint.send(server, Leave(self.index, failure if server == 0 else None))
        while self._protocol.outstanding:
            self._receive(None)

    # ---- inside --------------------------------------------------------------------------

    def _give_back(self) -> None:
        """Return the block that was leased ahead of time and will not be begun."""
        seq, self._abandoned = self._abandoned, None
        if seq is not None:
            self._send(0, GiveBack(self.index, seq))

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
        if timeout_s is not None:
            self._wait_until(request, timeout_s)
            return
        endpoint, protocol = self._endpoint, self._protocol
        while request.waiting:
            item = endpoint.receive(None)
            if item is not None:
                protocol.receive(*item)

    def _wait_until(self, request: Request, timeout_s: float) -> None:
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
        self._give_back()
        self._protocol.drop_params()
        request, messages = self._protocol.pull(pinned=pinned)
        for server, message in enumerate(messages):
            self._endpoint.send(server, message)
        self._wait(request, None)
        return self._take(request)

    def _end_prefetch(self) -> None:
        if self._prefetch is not None:
            self._prefetch.wait()

    def _push(self, grads: Mapping[str, Any] | None, *, want_params: bool) -> Request:
        plain = is_plain(self._shapes, self._layout.dtype, grads)
        if not plain:
            self._check_gradients(grads)
        self._check_running()
        versions = self._protocol.versions  # a prefetch that ends now is no reason to tell others
        if want_params:
            self._end_prefetch()
        self._wait_for_slot()
        self._check_running()
        if self._abandoned is not None:
            self._give_back()
        finite, norm = self._fill(grads, plain)
        self._filling = None
        request, messages = self._protocol.push(
            finite=finite, norm=norm, want_params=want_params, versions=versions
        )
        for server, message in enumerate(messages):
            self._endpoint.send(server, message)
        return request

    def _check_gradients(self, grads: Mapping[str, Any] | None) -> None:
        where = f"push from worker {self.index}"
        if grads is not None:
            check_gradients(self._layout, grads, where)
        elif self._filling is None:
            raise ValueError(f"{where}: push(None) sends gradients(), which has not been called")

    def _fill(self, grads: Mapping[str, Any] | None, plain: bool) -> tuple[bool, float]:
        """Put the gradient into the next push's slot; whether it is finite, and its norm."""
        index = self._protocol.slot
        slot = self._slot(index)
        if grads is None:
            if self._on_host:
                return self._measure(slot, *slot.judge())  # the arrays given out are the slot
            grads = self._staging[index]
            assert grads is not None, "gradients() made it"
        if not self._on_host:
            grads = self._device.gradients(grads)
        return self._measure(slot, *slot.pack(grads, plain=plain))

    def _measure(self, slot: GradientSlot, finite: bool, norm: float) -> tuple[bool, float]:
        if self._measured is None or not finite:
            return finite, norm
        return True, slot.norm(self._measured)

    def _slot(self, index: int) -> GradientSlot:
        """The gradient slot, free to be written."""
        flat = self._endpoint.slot(index)  # waits, if its bytes are still leaving
        slot = self._slots[index]
        if slot is None:
            slot = self._slots[index] = GradientSlot(self._layout, flat)
        return slot

    def _take(self, request: Request, push: Answer | None = None) -> Params:
        """Make the answer's parameters the present ones; `push` is the answer to a push."""
        if request.stopped:
            raise Stopped("the run is over")
        self._protocol.take_params(request)
        arrays = self._snapshots.arrays(request.buffers)
        if not self._on_host:
            arrays, copied = self._device.params(arrays)
            if copied:
                self._protocol.drop_params()
        return Params(arrays, tuple(request.versions), push)

    def _tasks(self, plan: int, spec: TaskSpec) -> Iterator[Task]:
        orders = EpochOrders(self._seed, plan, spec)
        while True:
            lease = self._lease(plan, spec)
            if lease.kind is LeaseKind.EXHAUSTED:
                return
            task = orders.task(lease, self._pull_pinned, self._report)
            try:
                yield task
            finally:
                task.close()

    def _prepared(
        self, plan: int, spec: TaskSpec, prepare: Callable[[Task], Any]
    ) -> Iterator[Task]:
        """As `_tasks`; the block after the present one is leased and prepared ahead of time."""
        orders = EpochOrders(self._seed, plan, spec)
        now = self._endpoint.now
        ahead: tuple[int, Task, Callable[[], Any]] | None = None
        with Preparation(prepare, in_line=self._endpoint.virtual_time) as preparation:
            while True:
                if ahead is not None:
                    _, task, prepared = ahead
                else:
                    lease = self._lease(plan, spec)
                    if lease.kind is LeaseKind.EXHAUSTED:
                        return
                    task = orders.task(lease, self._pull_pinned, self._report)
                    prepared = preparation.start(task)
                ahead = None
                try:
                    if task.kind == "train":
                        lease = self._lease(plan, spec, ahead=True)
                        if lease.kind is LeaseKind.TRAIN:
                            following = orders.task(lease, self._pull_pinned, self._report)
                            ahead = lease.seq, following, preparation.start(following)
                        begin = now()
                        task.prepared = prepared()
                        task.data_wait_s = now() - begin
                    yield task
                except BaseException:
                    # `work` has turned to something else; its pushes are not about that block.
                    self._abandoned = None if ahead is None else ahead[0]
                    raise
                finally:
                    task.close()

    def _lease(self, plan: int, spec: TaskSpec, *, ahead: bool = False) -> Lease:
        self._check_running()
        self._flush_log()
        request, message = self._protocol.ask_lease(plan, spec, ahead=ahead)
        self._send(0, message)
        self._wait(request, None)
        if request.stopped or request.lease is None:
            raise Stopped("the run is over")
        if request.lease.kind is LeaseKind.CONFLICT:
            raise ValueError(
                f"leases of worker {self.index}: another worker's call number {plan + 1} asked"
                f" for something else than {spec}; every worker must ask with equal arguments"
            )
        return request.lease

    def _pull_pinned(self) -> Params:
        return self._pull(pinned=True)

    def _report(self, sums: dict[str, float]) -> None:
        self._send(0, Report(self.index, sums))

    def _flush_spans(self) -> None:
        if self._spans:
            self._send(0, Spans(self.index, self.now(), self._spans))
            self._spans = []

    def _flush_log(self) -> None:
        if self._logged:
            self._send(0, Log(self.index, self._logged))
            self._logged = {}
        self._log_calls = 0
