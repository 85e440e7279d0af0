"""What a user's `work` function holds: the worker, with its parameters, gradients and leases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.coding import PushCoder
from psframe.devices import Coder, Device
from psframe.errors import MessageError, Stopped
from psframe.events import Answer, Failure, Leave, RandomState, SpanKind, Stop
from psframe.exchange import Direct, Endpoint, Exchange, Progress
from psframe.layout import Layout
from psframe.leasing import Leasing
from psframe.notes import Notes
from psframe.packing import GradientSlot, check_gradients
from psframe.params import Params
from psframe.pending import Pending, PendingPull
from psframe.snapshots import Snapshots
from psframe.tasks import Task, task_spec
from psframe.worker import Request
from psframe.worth import Worth

__all__ = ["Worker"]


class Worker:
    """One worker's connection to the servers. Only the thread that runs `work` may use it.

    Args:
        endpoint, layout, device, seed: of the run, and this worker's end of a transport.
        judges, measured: as `Plan` has them.
        coder: codes gradients, if they do not travel as they are.
        tells_random: whether server 0 is to be told how far `rng` has got, with each push.
        random_state: how far it had got in the run that this one goes on from; None for a new one.

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
        judges: bool = True,
        measured: Sequence[tuple[int, int]] | None = None,
        coder: PushCoder | Coder | None = None,
        tells_random: bool = False,
        random_state: tuple[int, int, int, int] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._layout = layout
        self._device = device
        self._seed = seed
        self._exchange = Exchange(endpoint)
        self._protocol = self._exchange.protocol
        self._snapshots = Snapshots(layout, endpoint.servers, endpoint.snapshot)
        self._slots: list[GradientSlot | None] = [None, None]
        self._staging: list[Mapping[str, Any] | None] = [None, None]
        self._coder = coder
        weighs = coder is not None and endpoint.weighs_codecs
        self._worth = Worth(coder.codec) if coder is not None and weighs else None
        self._progress = [
            None if coder is not None else endpoint.progress(k, judges=judges) for k in (0, 1)
        ]
        self._judges = judges  # whether it says if gradients are finite, and their norms
        self._measured = measured  # what of a gradient its norm is of, if not all of it
        self._on_host = device.name == "cpu"
        self._copying = False  # the present parameters, from snapshots that are still held
        # Whether pushes are copied at once, whole, in host memory that stays the slot's.
        self._plain = (
            self._on_host and measured is None and coder is None and all(endpoint.in_place)
        )
        plain = self._plain and not judges and endpoint.servers == 1
        self._direct = endpoint.direct if plain else None
        self._filling: int | None = None  # the slot that `gradients` gave out
        self._prefetch: PendingPull | None = None
        self._notes = Notes(self._exchange)
        self._leasing = Leasing(self._exchange, seed, self._notes.flush_log)
        self.index = endpoint.index
        self.count = endpoint.workers
        self.xp: ModuleType = device.xp
        self.device = device.name
        self._rng: np.random.Generator | None = None
        self._tells_random = tells_random
        self._random_state = random_state  # as server 0 knows it

    @property
    def rng(self) -> np.random.Generator:
        """This worker's own NumPy Generator, a function of (seed, index)."""
        if self._rng is None:  # made when first asked for: it costs more than the rest
            sequence = np.random.SeedSequence(self._seed, spawn_key=(0, self.index))
            bits = np.random.PCG64(sequence)
            if self._random_state is not None:
                state, increment, has_half, half = self._random_state
                whole: Any = {
                    "bit_generator": "PCG64",
                    "state": {"state": state, "inc": increment},
                    "has_uint32": has_half,
                    "uinteger": half,
                }
                bits.state = whole
            self._rng = np.random.Generator(bits)
            if self._tells_random:  # with each push: none goes the short ways
                self._plain, self._direct = False, None
        return self._rng

    def _tell_random(self, rng: np.random.Generator) -> None:
        """Tell server 0 how far `rng` has got, if that has changed; the next request is a push."""
        now: Any = rng.bit_generator.state
        numbers = now["state"]["state"], now["state"]["inc"], now["has_uint32"], now["uinteger"]
        if numbers != self._random_state:
            self._random_state = numbers
            self._exchange.send(0, RandomState(self.index, self._protocol.next_seq, numbers))

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
        self._exchange.check_running()
        if self._prefetch is not None:
            return self._prefetch
        self._leasing.give_back()
        self._let_go(waits=False)
        request, messages = self._protocol.pull()
        self._exchange.send_each(messages)
        self._prefetch = PendingPull(self._exchange, request, self._take_prefetched)
        return self._prefetch

    def push(self, grads: Mapping[str, Any] | None) -> Pending:
        """Send a gradient; it is copied out when this returns. Waits only if two are under way.

        Args:
            grads: names to arrays shaped like the parameters, on the host or on this device,
                floating-point, cast if need be; or None for what was written into the arrays
                of `gradients()`, which is then not copied on the host. Other libraries' arrays
                are read through DLPack or `__cuda_array_interface__`.

        Raises:
            ValueError: a name is missing or unknown, a shape is wrong, or an array is on another
                GPU; nothing is sent.
            TypeError: a dtype is not floating-point, or an array is on a GPU and this worker
                computes on the CPU; nothing is sent.
            Stopped: the run is over.
        """
        return Pending(self._exchange, self._push(grads, want_params=False))

    def push_pull(self, grads: Mapping[str, Any] | None) -> Params:
        """Push, and wait for the parameters after it, in one round trip.

        Args:
            grads: as for `push`.

        Returns:
            The parameters; `.receipt` says what became of the push.

        Raises:
            ValueError, TypeError, Stopped: as for `push`.
        """
        if self._direct is not None:
            params = self._push_pull_directly(self._direct, grads)
            if params is not None:
                return params
        request = self._push(grads, want_params=True)
        self._exchange.wait(request)
        return self._take(request, request.answers[0])

    def gradients(self) -> Mapping[str, Any]:
        """Give writable arrays, on this device, that `push(None)` sends as they are.

        Write into them (`grads["w"][...] = g`); the mapping itself cannot be changed. They are
        the worker's until that push; what they hold at first is undefined. Waits if two pushes
        are under way.

        Raises:
            Stopped: the run is over.
        """
        self._exchange.check_running()
        index = self._filling = self._free_slot()
        slot = self._slot(index)
        staging = self._staging[index]
        if staging is None:
            arrays = slot.arrays if self._on_host else self._device.staging(index, slot.arrays)
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
        return self._leasing.tasks(spec, prepare, self._pull_pinned)

    def stop(self) -> None:
        """End the run for all workers; what they have pushed before is drained."""
        if not self._protocol.stopped:
            self._exchange.send(0, Stop(self.index))
            self._protocol.stopped = True

    def log(self, **numbers: float) -> None:
        """Log numbers; their mean over workers and steps appears in the run's metrics.

        Raises:
            TypeError: a value is not a real number; nothing is logged.
            ValueError: a name is longer than 256 bytes; nothing is logged.
        """
        self._notes.log(numbers)

    def now(self) -> float:
        """Give the seconds on this worker's clock; in a simulation, virtual ones."""
        return self._endpoint.now()

    def span(self, kind: SpanKind, begin_s: float, end_s: float) -> None:
        """Note for a timeline what this worker was at between two times of its clock.

        They reach the run's observer as `psframe.events.Spans`, some at a time.
        """
        self._notes.span(kind, begin_s, end_s)

    # ---- for the runtime -----------------------------------------------------------------

    def leave(self, failure: Failure | None = None) -> None:
        """Say that `work` is over and wait until every request is answered."""
        self._notes.flush_log()
        self._notes.flush_spans()
        if failure is None:  # else the device may have failed, and would say so again
            self._let_go()
        self._exchange.send_each(
            Leave(self.index, failure if server == 0 else None)
            for server in range(self._endpoint.servers)
        )
        self._exchange.drain()
        self._prefetch = None  # it knows the worker: a circle, that would hold a run's memory

    # ---- inside --------------------------------------------------------------------------

    def _free_slot(self) -> int:
        """Wait for a free gradient slot.

        Raises:
            Stopped: the run is over; the servers may have still to read what is in the slot.
        """
        index = self._protocol.slot
        user = self._protocol.slot_user(index)
        if user is not None:
            self._exchange.wait(user)
            self._exchange.check_running()
        return index

    def _pull(self, *, pinned: bool) -> Params:
        self._exchange.check_running()
        self._end_prefetch()
        self._leasing.give_back()
        self._let_go()
        self._protocol.drop_params()
        request, messages = self._protocol.pull(pinned=pinned)
        begin_s = self._endpoint.now()
        self._exchange.send_each(messages)
        self._exchange.wait(request)
        if self._worth is not None:
            self._worth.pulled(sum(self._travelling()), self._endpoint.now() - begin_s)
        return self._take(request)

    def _pull_pinned(self) -> Params:
        return self._pull(pinned=True)

    def _travelling(self) -> list[int]:
        """By server, the bytes of its parameters; 0 where they are read in shared memory."""
        size, endpoint = self._layout.dtype.itemsize, self._endpoint
        shards = self._layout.shards(endpoint.servers)
        return [
            0 if near else (end - begin) * size
            for near, (begin, end) in zip(endpoint.in_place, shards, strict=True)
        ]

    def _end_prefetch(self) -> None:
        if self._prefetch is not None:
            self._prefetch.wait()

    def _push_pull_directly(self, direct: Direct, grads: Mapping[str, Any] | None) -> Params | None:
        """Make a push_pull as most are, without a request of its own; None if it is another.

        It comes to what the general way comes to.
        """
        protocol, slot = self._protocol, self._slots[0]
        if (
            slot is None
            or self._filling is not None
            or self._prefetch is not None
            or self._leasing.abandoned is not None
            or not protocol.quiet
        ):
            return None
        progress = self._progress[0]
        if not (slot.pack_fitting(grads, False) if progress is None else slot.fits(grads)):
            return None
        seq, version = protocol.begin_plain()
        try:
            if progress is None:
                direct.start(seq, 0, version, False)
            else:
                progress.open()
                direct.start(seq, 0, version, True)
                finite = False
                try:
                    slot.write(grads, progress.advance)  # type: ignore[arg-type]  # it fits
                    finite = True
                finally:  # if it could not be written: it is refused, and nobody waits for it
                    progress.close(finite, 0.0)
            answer = direct.finish(seq)
        except BaseException as error:
            protocol.request_of_plain(seq)  # its answer will still come
            if isinstance(error, MessageError):  # or none will
                self._exchange.distrust(error)
            raise
        if answer is None:
            request = protocol.request_of_plain(seq)
            self._exchange.wait(request)
            return self._take(request, request.answers[0])
        staleness, buffer, version = answer
        present = protocol.end_plain(buffer, version)
        return Params(self._snapshots.arrays(present), (version,), (version, staleness))

    def _push(self, grads: Mapping[str, Any] | None, *, want_params: bool) -> Request:
        protocol = self._protocol
        index = protocol.slot
        slot = self._slots[index]
        if (
            slot is None
            or self._filling is not None
            or not self._plain
            or protocol.stopped
            or (want_params and self._prefetch is not None)
            or self._leasing.abandoned is not None
            or ((user := protocol.users[index]) is not None and user.waiting)
        ):
            return self._push_any(grads, want_params)
        progress = self._progress[index]
        if progress is not None:
            if not slot.fits(grads):
                return self._push_any(grads, want_params)
            return self._stream(index, slot, progress, grads, want_params, protocol.present)
        verdict = slot.pack_fitting(grads, self._judges)
        if verdict is None:
            return self._push_any(grads, want_params)
        request, messages = protocol.push(index, verdict[0], verdict[1], want_params)
        if len(messages) == 1:
            self._endpoint.send(0, messages[0])
        else:
            self._exchange.send_each(messages)
        return request

    def _push_any(self, grads: Mapping[str, Any] | None, want_params: bool) -> Request:
        """Push whatever is one, with whatever has to be done before."""
        grads = self._accept(grads)
        exchange, protocol = self._exchange, self._protocol
        exchange.check_running()
        read = protocol.present  # a prefetch that ends now is no reason to tell others
        if want_params and self._prefetch is not None:
            self._prefetch.wait()
            exchange.check_running()
        self._let_go()
        index = self._free_slot() if self._filling is None else self._filling
        if self._leasing.abandoned is not None:
            self._leasing.give_back()
        slot = self._slot(index)
        progress = self._progress[index]
        self._filling = None
        if self._tells_random and self._rng is not None:
            self._tell_random(self._rng)
        if progress is not None:
            return self._stream(index, slot, progress, grads, want_params, read)
        if self._coder is not None:
            return self._push_coded(self._coder, index, slot, grads, want_params, read)
        finite, norm = self._fill(index, slot, grads)
        request, messages = protocol.push(index, finite, norm, want_params, read=read)
        exchange.send_each(messages)
        return request

    def _push_coded(
        self,
        coder: PushCoder | Coder,
        index: int,
        slot: GradientSlot,
        grads: Mapping[str, Any] | None,
        want_params: bool,
        read: Sequence[Answer],
    ) -> Request:
        """Push what a codec makes of a gradient; coded on the host, the slot has it, too."""
        judged = True, 0.0
        if isinstance(coder, PushCoder):
            self._fill(index, slot, grads)
            flat, begin_s = self._endpoint.slot(index), self._endpoint.now()
            coded = coder.encode(index, flat)
            seconds = self._endpoint.now() - begin_s
            if self._judges:
                judged = self._measure(slot, *slot.judge())
        else:
            grads = self._staged(index) if grads is None else grads
            coded, finite, seconds = coder.encode(index, grads, slot)
            judged = finite or not self._judges, 0.0
        if self._worth is not None:
            dense = self._travelling()
            saved = sum(n - len(data) for n, data in zip(dense, coded, strict=True) if n)
            self._worth.coded(saved, seconds)
        request, messages = self._protocol.push(index, *judged, want_params, read=read)
        for message, payload in zip(messages, coded, strict=True):
            message.coded = payload
        self._exchange.send_each(messages)
        return request

    def _stream(
        self,
        index: int,
        slot: GradientSlot,
        progress: Progress,
        grads: Mapping[str, Any] | None,
        want_params: bool,
        read: Sequence[Answer],
    ) -> Request:
        """Announce a push, and let the server follow while the gradient is written."""
        progress.open()
        request, messages = self._protocol.push(
            index, True, 0.0, want_params, read=read, arriving=True
        )
        self._exchange.send_each(messages)
        self._write(index, slot, grads, progress)
        return request

    def _write(
        self, index: int, slot: GradientSlot, grads: Mapping[str, Any] | None, progress: Progress
    ) -> None:
        """Write a gradient whose push has been announced, or have it written."""
        finite, norm, behind = False, 0.0, False
        try:
            if not self._on_host and progress.from_any_thread:
                behind = self._write_behind(index, slot, grads, progress)
            if not behind:
                finite, norm = self._fill(index, slot, grads, progress.advance)
        finally:  # if it could not be written: it is refused, and nobody waits for it
            if not behind:
                progress.close(finite, norm)

    def _write_behind(
        self, index: int, slot: GradientSlot, grads: Mapping[str, Any] | None, progress: Progress
    ) -> bool:
        """Have a gradient written behind this thread; False if it cannot be."""

        def judge(found: tuple[bool, float] | None) -> tuple[bool, float]:
            return self._measure(slot, *(slot.judge() if found is None else found))

        return self._device.fetch_behind(
            index,
            self._staged(index) if grads is None else grads,
            slot,
            judge if self._judges else None,
            progress.advance,
            progress.close,
        )

    def _accept(self, grads: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Give what is to be pushed as arrays that can be read here, checked."""
        where = f"push from worker {self.index}"
        if grads is not None:
            accepted: Mapping[str, Any] = self._device.accept(grads, where)
            check_gradients(self._layout, accepted, where)
            return accepted
        if self._filling is None:
            raise ValueError(f"{where}: push(None) sends gradients(), which has not been called")
        return None

    def _fill(
        self,
        index: int,
        slot: GradientSlot,
        grads: Mapping[str, Any] | None,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[bool, float]:
        """Put the gradient into a slot; whether it is finite, and its norm."""
        if grads is None:
            if self._on_host:  # the arrays given out are the slot
                return self._measure(slot, *slot.judge(advance)) if self._judges else (True, 0.0)
            grads = self._staged(index)
        fetched = self._device.fetch(index, grads, slot, self._judges, advance)
        return self._measure(slot, *fetched)

    def _staged(self, index: int) -> Mapping[str, Any]:
        staging = self._staging[index]
        assert staging is not None, "gradients() made it"
        return staging

    def _measure(self, slot: GradientSlot, finite: bool, norm: float) -> tuple[bool, float]:
        if self._measured is None or not (finite and self._judges):
            return finite, norm
        return True, slot.norm(self._measured)

    def _slot(self, index: int) -> GradientSlot:
        """The gradient slot, free to be written."""
        flat = self._endpoint.slot(index)  # waits, if its bytes are still leaving
        self._device.settle(index)
        slot = self._slots[index]
        if slot is None:
            slot = self._slots[index] = GradientSlot(self._layout, flat)
        return slot

    def _let_go(self, *, waits: bool = True) -> None:
        """Use the snapshots no longer that have been copied to the device; before a message.

        Args:
            waits: until they have been. Else, should they not be, another message will say so.
        """
        if self._copying and self._device.copied(waits=waits):
            self._copying = False
            self._protocol.drop_params()

    def _take_prefetched(self, request: Request) -> Params:
        params = self._take(request)
        self._prefetch = None  # there is one at a time, so this was it
        return params

    def _take(self, request: Request, push: Answer | None = None) -> Params:
        """Make the answer's parameters the present ones; `push` is the answer to a push."""
        if request.stopped:
            raise Stopped("the run is over")
        self._let_go()
        answers = self._protocol.take_params(request)
        if self._on_host:
            arrays = self._snapshots.arrays(answers)
        else:
            snapshot = self._endpoint.snapshot
            arrays = self._device.params([snapshot(s, a.buffer) for s, a in enumerate(answers)])
            self._copying = True
        versions = tuple([answer.version for answer in answers])
        return Params(arrays, versions, push)
