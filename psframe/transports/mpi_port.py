"""The server's end of the MPI transport.

Between processes of one node arrays stay in shared memory, and the most common messages, too (see
`letters`); between nodes an array goes inside its message if it is small, and in transfers of its
own behind the message if it is not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from psframe.codecs import Codec
from psframe.coding import Coded, payload_buffer
from psframe.errors import MessageError
from psframe.events import (
    ALL_REQUESTS,
    NO_BUFFER,
    RELEASE_HOLD,
    Answer,
    Arrived,
    Joined,
    Lease,
    Lost,
    Missing,
    Output,
    Push,
    Reason,
    Sent,
    ToServer,
)
from psframe.layout import Array, Layout
from psframe.server import ServerMemory
from psframe.store import Buffers, HeapBuffers, buffer_count
from psframe.transports.borrowing import card_words
from psframe.transports.frames import Frames
from psframe.transports.in_order import InOrder
from psframe.transports.letters import Desk, can_write
from psframe.transports.meeting import LANDING, SLOTS, Neighbours
from psframe.transports.mpi import Mesh, Patience, Transfers, WrongLength
from psframe.transports.mpi_post import Post, TooLong, close, copy_inline
from psframe.transports.shared_memory import Segment, SegmentBuffers
from psframe.transports.streams import BadStream, Streams
from psframe.wire import (
    HEADER_BYTES,
    Delivery,
    Limits,
    Link,
    decode,
    encode,
    encode_into,
    payload_limit,
    read_plain_push,
    write_plain_answer,
)

__all__ = ["MpiServerPort"]

_IN_PLACE = Delivery.IN_PLACE
_SHARED = frozenset({Delivery.IN_PLACE})
_SENT = frozenset({Delivery.INLINE, Delivery.RANGE})
_WRITTEN = frozenset({Delivery.IN_PLACE, Delivery.STREAMED})
_NONE, _ANSWERS = Reason.NONE, (Answer, Lease)
_ANSWERED = object()  # what is taken in place of an event that has been handled

# Of a leader: (worker, seq, slot, version read, arriving) -> see `Leader.push_pull`.
PushPull = Callable[[int, int, int, int, bool], "tuple[int, int, int] | list[Output] | None"]

_log = logging.getLogger("psframe")


class MpiServerPort:
    """A server's end.

    Attributes:
        workers: W.
        buffers: memory for the store.
        push_pull: the leader's, for the pushes that it can handle in one go; they are then
            answered within `receive`. None if there is nothing of the kind.
    """

    def __init__(
        self, mesh: Mesh, layout: Layout, neighbours: Neighbours, codec: Codec | None = None
    ) -> None:
        self._mesh = mesh
        self._neighbours = neighbours
        self._begin, self._end = layout.shards(neighbours.servers)[mesh.rank]
        self._elements = self._end - self._begin
        self._decoder = None if codec is None else codec.decoder(layout, self._begin, self._end)
        self._payloads: dict[tuple[int, int], Array] = {}  # by worker and slot, if they are coded
        self._dtype = layout.dtype
        self.workers = neighbours.workers
        size, count = self._end - self._begin, buffer_count(self.workers)
        own = neighbours.own
        self.buffers: Buffers = (
            HeapBuffers(count, size, layout.dtype) if own is None else SegmentBuffers(own, count)
        )
        self._gradients: list[list[Any]] = [[None] * SLOTS for _ in range(self.workers)]
        # Where gradients that are no part of a message land, and where the device has a snapshot.
        self._room: Callable[[int], Any] | None = None
        self._device_half: Callable[[int], Any] = lambda index: None
        # By worker whose device memory is open here: what it says of its slots, and these.
        self._borrowed: dict[int, tuple[Any, list[Any]]] = {}
        self._drop: Callable[[int], None] = lambda rank: None
        self._shared = [
            neighbours.servers + worker in neighbours.segments for worker in range(self.workers)
        ]
        senders = (rank for rank in range(mesh.size) if rank != mesh.rank)
        self._patience = Patience(neighbours.crowded, mesh.watch, neighbours.bell(senders))
        self._post: Post = Post(
            mesh.comm,
            HEADER_BYTES + payload_limit(self.workers),
            watch=mesh.watch,
            bells=neighbours.bells(),
            on_ring=self._patience.rung,
        )
        self._desk = self._make_desk()
        self._limits = [self._make_limits(rank, layout) for rank in range(mesh.size)]
        self.push_pull: PushPull | None = None
        self._transfers = Transfers(mesh.watch)
        self._inbox: InOrder[ToServer] = InOrder()
        self._events = self._inbox.ready
        self._distrusted: set[int] = set()
        self._streams = Streams(self._elements, neighbours.servers, neighbours.segments)
        self._turn = False
        # Ranks that others have replaced, of whom nothing comes through any more; and the others.
        self._replaced: set[int] = set()
        self._links: dict[int, Frames] = {}

    @property
    def memory(self) -> ServerMemory:
        """Where the machine finds gradients and landing areas."""
        gradient = self._gradient_anywhere if self._borrowed else self._gradient
        return ServerMemory(gradient, self._landing, self._shared, self._streams.progress)

    def receive(self, timeout_s: float) -> ToServer | None:
        """Take the next event; None after `timeout_s` seconds without one.

        None also when a push has been handled here.
        """
        events, patience, writing = self._events, self._patience, self._streams.writing
        deadline = 0.0
        while not events:
            # By turns, or those who pull in a loop would hold a gradient up, or it them.
            self._turn = not self._turn
            if writing and self._turn and self._follow():
                break
            event = self._take()
            if event is not None:
                patience.reset()
                return None if event is _ANSWERED else event  # type: ignore[return-value]
            if self._progress_transfers() or (writing and self._follow()):
                patience.reset()
            elif patience.wait(busy=bool(writing) or self._unfinished):
                now = time.monotonic()
                if not deadline:
                    deadline = now + timeout_s
                elif now > deadline:
                    return None
        return events.popleft()

    def _progress_transfers(self) -> bool:
        try:
            return self._transfers.progress()
        except WrongLength as error:
            self._distrust(error.source, error)
            return True

    @property
    def _unfinished(self) -> bool:
        return self._transfers.busy or self._post.waiting

    def to_worker(self, answer: Answer | Lease) -> None:
        """Send an answer, and the parameters with it unless the worker reads them in place."""
        worker = answer.worker
        rank = self._neighbours.servers + worker
        if self._replaced and rank in self._replaced:
            link = self._links.get(rank)
            if link is not None:  # or it is lost, too
                link.send(encode(answer))
            return
        if isinstance(answer, Lease) or answer.buffer == NO_BUFFER or self._shared[worker]:
            desk = self._desk
            if desk is not None and isinstance(answer, Answer) and desk.expects(worker, answer.seq):
                encode_into(answer, desk.answers[worker])
                desk.send(worker)
                return
            self._post.send(rank, answer)
            return
        array = self._sent(answer)
        if array.nbytes <= self._post.inline_bytes_max:
            self._post.send(rank, answer, Delivery.INLINE, array)
            self._events.append(Sent(worker))
            return
        self._post.send(rank, answer, Delivery.RANGE, array)
        requests = self._mesh.start_send(array, rank)
        self._transfers.add(
            requests, lambda: self._events.append(Sent(worker)), peer=rank, keep=array
        )

    def _sent(self, answer: Answer) -> Any:
        """Give what is sent of an answer: what stands for the parameters, or themselves."""
        if answer.coded is not None:
            return answer.coded.data
        half = self._device_half(answer.buffer)
        return self.buffers[answer.buffer] if half is None else half

    def to_leader(self, event: Output) -> None:
        """Send to server 0."""
        self._post.send(0, event)  # type: ignore[arg-type]

    def to_followers(self, event: Output) -> None:
        """Send to every server but server 0."""
        for server in range(1, self._neighbours.servers):
            self._post.send(server, event)  # type: ignore[arg-type]

    def close(self) -> None:
        """Wait until everything has left, and take the receives back."""
        close(self._post, self._transfers, self._patience)

    # ---- devices ---------------------------------------------------------------------------

    @property
    def takes_devices(self) -> bool:
        """Whether there is anything that a device could send or receive."""
        alone = self._elements * self._dtype.itemsize > self._post.inline_bytes_max
        return alone and not all(self._shared)

    def land_in(self, empty: Callable[[int], Any]) -> None:
        """Have gradients that are received land in arrays of a device that `empty(size)` gives."""
        assert self._decoder is None, "it reads them on the host"
        self._room = empty

    def borrow(self, opened: Mapping[int, Any], drop: Callable[[int], None]) -> None:
        """Read gradients where workers of this node have them on devices, when they say so.

        Args:
            opened: by rank, its memory that is open here. Before `memory` is asked for.
            drop: closes that of a rank which another process has replaced.
        """
        self._drop = drop
        for rank, one in opened.items():
            slots = [one.array(slot)[self._begin : self._end] for slot in range(SLOTS)]
            words = card_words(self._neighbours.segments[rank])
            self._borrowed[rank - self._neighbours.servers] = words, slots

    def leave_from(self, half: Callable[[int], Any]) -> None:
        """Have snapshots leave from where `half(buffer)` has them on a device, if it does."""
        self._device_half = half

    # ---- replacements ----------------------------------------------------------------------

    def tell(self, event: Missing) -> None:
        """Have an event handled."""
        self._events.append(event)

    def admit(self, worker: int, segment: Segment, link: Frames) -> None:
        """Let another process take the place of a worker that is lost.

        Args:
            worker: whose.
            segment: its memory.
            link: its messages. This end stays the caller's, who closes it.
        """
        rank = self._neighbours.servers + worker
        self._streams.forget(worker)
        self._replaced.add(rank)
        self._links[rank] = link
        self._neighbours.segments[rank] = segment
        self._shared[worker] = True
        if self._desk is not None:
            self._desk.alone = False
        self._gradients[worker] = [None] * SLOTS
        if self._borrowed.pop(worker, None) is not None:
            # Its pushes were dropped when it was lost, and between events no copy is under way.
            self._drop(rank)
        self._limits[rank] = replace(self._limits[rank], deliveries=_SHARED)
        self._events.append(Joined(worker))

    def linked(self, worker: int) -> bool:
        """Whether another process is in the worker's place, and is believed."""
        return self._neighbours.servers + worker in self._links

    def unlink(self, worker: int) -> None:
        """Have a process that took a worker's place count as lost."""
        if self._links.pop(self._neighbours.servers + worker, None) is not None:
            self._events.append(Lost(worker))

    def _take_from_links(self) -> ToServer | None:
        for rank, link in tuple(self._links.items()):
            try:
                message = link.take()
                if message is not None:
                    event, _, _ = decode(message, len(message), self._limits[rank])
                    return event  # type: ignore[return-value]  # the limits allow no other
            except MessageError as error:
                worker = rank - self._neighbours.servers
                _log.error("the replacement of worker %d counts as lost: %s", worker, error)
                self.unlink(worker)
        return None

    def _turn_away(self, rank: int) -> None:
        """Tell a rank that another process has its place."""
        worker = rank - self._neighbours.servers
        self._post.send(rank, Answer(worker, ALL_REQUESTS, stopped=True, reason=Reason.LOST))

    def _take(self) -> object:
        """Take a message; give its event if it is whole and the next in order.

        _ANSWERED if it has been handled at once.
        """
        source, desk = 0, self._desk
        if desk is not None:
            worker = desk.take()
            if worker >= 0:
                desk.busy = True
                return self._take_letter(desk, worker)
        if self._links:
            linked = self._take_from_links()
            if linked is not None:
                return linked
        try:
            once = self._patience.asleep or (desk is not None and desk.busy)
            taken = self._post.take(once=once)
            if taken is None:
                return None
            source, n_bytes, buffer = taken
            if self._replaced and source in self._replaced:
                self._turn_away(source)
                return None
            if desk is not None:
                self._take_earlier(desk, source - self._neighbours.servers)
            limits = self._limits[source]
            if self.push_pull is not None and not self._events:
                plain = read_plain_push(buffer, n_bytes, limits)
                if plain is not None and self._answer(source, *plain):
                    return _ANSWERED
            event, delivery, payload_bytes = decode(buffer, n_bytes, limits)
        except MessageError as error:
            self._distrust(error.source if isinstance(error, TooLong) else source, error)
            return None
        return self._deliver(source, event, delivery, buffer, payload_bytes)

    def _deliver(
        self, source: int, event: Any, delivery: Delivery, buffer: bytearray, payload_bytes: int
    ) -> object:
        """Have the array of a message come where it belongs; give the event if it is the next."""
        if delivery is not _IN_PLACE and isinstance(event, Push):
            if self._decoder is not None:
                payload = self._payload(event, payload_bytes)
                if delivery is Delivery.RANGE:
                    self._receive_coded(source, event, payload)
                    return None
                copy_inline(payload, buffer, payload_bytes)
                if not self._decode(source, event, payload):
                    return None
            elif delivery is Delivery.RANGE:
                if self._neighbours.servers > 1:
                    self._receive_range(source, event)
                    return None
                self._receive_while_applied(source, event)
            elif delivery is Delivery.INLINE:
                copy_inline(self._gradient(event.worker, event.slot), buffer, payload_bytes)
            else:
                self._streams.begin(event.worker, event.slot)
        if not self._inbox.held and not self._events:
            return event
        self._inbox.add(source, event)
        return None

    def _take_earlier(self, desk: Desk, worker: int) -> None:
        """Take the letter that the sender of a message has sent before it, if there is one."""
        desk.busy = False
        if desk.take_from(worker):
            event: Any = self._take_letter(desk, worker)
            if event is not None and event is not _ANSWERED:
                self._events.append(event)

    def _take_letter(self, desk: Desk, worker: int) -> object:
        """Give the event of a letter; _ANSWERED if it has been handled at once."""
        source = self._neighbours.servers + worker
        if self._replaced and source in self._replaced:
            self._turn_away(source)
            return None
        plain = read_plain_push(desk.pushes[worker], HEADER_BYTES, self._limits[source])
        if plain is None:
            self._distrust(source, MessageError("a letter in shared memory is no plain push_pull"))
            return None
        _, seq, slot, version, arriving = plain
        desk.expect(worker, seq)
        try:
            if self.push_pull is not None and self._answer(source, *plain):
                return _ANSWERED
        except MessageError as error:
            self._distrust(source, error)
            return None
        if arriving:
            self._streams.begin(worker, slot)
            desk.busy = False  # what is being written is waited for, too
        push = Push(worker, seq, slot, version, True, 0.0, True, RELEASE_HOLD, 0, arriving)
        if not self._inbox.held:
            return push
        self._inbox.add(source, push)
        return None

    def _answer(
        self, source: int, worker: int, seq: int, slot: int, version: int, arriving: bool
    ) -> bool:
        """Handle a plain push_pull at once, if the leader can; False if nothing has happened."""
        assert self.push_pull is not None, "there is one"
        if self._inbox.held:
            return False
        if arriving:
            self._streams.begin(worker, slot)
        out = self.push_pull(worker, seq, slot, version, arriving)
        if out is None:
            return False
        if not isinstance(out, tuple):
            for one in out:
                assert isinstance(one, _ANSWERS), "nobody else hears of it"
                self.to_worker(one)
            return True
        if arriving:
            self._streams.end(worker, slot)
        staleness, index, version = out
        desk = self._desk
        if desk is not None and desk.expects(worker, seq):
            write_plain_answer(desk.answers[worker], worker, seq, staleness, index, version)
            desk.send(worker)
            return True
        buffer = self._post.header(source)
        if buffer is None:
            self.to_worker(
                Answer(worker, seq, False, True, _NONE, version, staleness, index, version)
            )
            return True
        write_plain_answer(buffer, worker, seq, staleness, index, version)
        self._post.start(source)
        return True

    def _receive_while_applied(self, source: int, push: Push) -> None:
        """Let the machine, which alone decides, have the push before its gradient."""
        worker, slot, finite, norm = push.worker, push.slot, push.finite, push.norm
        push.arriving = True
        item = self._dtype.itemsize

        def more(n_bytes: int) -> None:
            self._events.append(Arrived(worker, slot, n_bytes // item))

        def whole() -> None:
            self._events.append(Arrived(worker, slot, self._elements, True, finite, norm))

        gradient = self._gradient(worker, slot)
        requests = self._mesh.start_receive(gradient, source)
        self._transfers.add(requests, whole, more, peer=source, keep=gradient)

    def _receive_range(self, source: int, push: Push) -> None:
        inbox = self._inbox
        entry = inbox.hold(source, push)
        gradient = self._gradient(push.worker, push.slot)
        requests = self._mesh.start_receive(gradient, source)
        self._transfers.add(
            requests, lambda: inbox.arrived(source, entry), peer=source, keep=gradient
        )

    def _payload(self, push: Push, n_bytes: int) -> Array:
        """Where the payload of a gradient comes to lie."""
        assert self._decoder is not None, "gradients are coded"
        where = push.worker, push.slot
        if where not in self._payloads:
            self._payloads[where] = payload_buffer(self._decoder.bytes_max)
        return self._payloads[where][:n_bytes]

    def _receive_coded(self, source: int, push: Push, payload: Array) -> None:
        inbox = self._inbox
        entry = inbox.hold(source, push)

        def arrived() -> None:
            if self._decode(source, push, payload):
                inbox.arrived(source, entry)

        requests = self._mesh.start_receive(payload, source)
        self._transfers.add(requests, arrived, peer=source)

    def _decode(self, source: int, push: Push, payload: Array) -> bool:
        """Make a gradient of its payload; False if it is none, and its worker lost."""
        assert self._decoder is not None, "gradients are coded"
        try:
            self._decoder.decode(payload, self._gradient(push.worker, push.slot))
        except MessageError as error:
            self._distrust(source, error)
            return False
        push.coded = Coded(payload)  # to be counted
        return True

    def _follow(self) -> bool:
        """Whether something was added to a gradient that is being written; then it is an event."""
        try:
            arrived = self._streams.follow()
        except BadStream as error:
            self._distrust(self._neighbours.servers + error.worker, error)
            return True
        if arrived is not None:
            self._events.append(arrived)
        return arrived is not None

    def _distrust(self, source: int, error: MessageError) -> None:
        """Believe a worker no more that sends what is no message; a server's is fatal."""
        worker = source - self._neighbours.servers
        if worker < 0:
            raise error
        self._streams.forget(worker)
        if source not in self._distrusted:
            self._distrusted.add(source)
            # Not in the next run either: of this one it may have messages under way.
            self._mesh.watch.lose(source, f"it has sent what makes no sense: {error}")
            self._events.append(Lost(worker))

    def lose(self, source: int) -> None:
        """Have a worker's rank count as lost: what was under way to it and from it is dropped."""
        if source in self._replaced:
            return  # it was lost before
        worker = source - self._neighbours.servers
        self._streams.forget(worker)
        self._inbox.drop(source)
        self._events.append(Lost(worker))

    def _gradient(self, worker: int, slot: int) -> Any:
        array = self._gradients[worker][slot]
        if array is None:
            segment = self._neighbours.segments.get(self._neighbours.servers + worker)
            if segment is None and self._room is not None:
                array = self._room(self._elements)
            elif segment is None:
                array = np.empty(self._elements, self._dtype)
            else:
                array = segment.array(slot)[self._begin : self._end]
            self._gradients[worker][slot] = array
        return array

    def _gradient_anywhere(self, worker: int, slot: int) -> Any:
        """Give a gradient on the worker's device, if it says that it is there."""
        borrowed = self._borrowed.get(worker)
        if borrowed is not None and borrowed[0][slot] == 1:
            return borrowed[1][slot]
        return self._gradient(worker, slot)

    def _landing(self, worker: int) -> Array:
        segment = self._neighbours.segments[self._neighbours.servers + worker]
        return segment.array(LANDING)[self._begin : self._end]

    def _deliveries(self, worker: int) -> frozenset[Delivery]:
        if not self._shared[worker]:
            return _SENT
        return _SHARED if self._neighbours.servers > 1 else _WRITTEN

    def _coded_bytes_max(self, worker: int) -> int | None:
        if self._decoder is None or self._shared[worker]:
            return None
        return self._decoder.bytes_max

    def _make_desk(self) -> Desk | None:
        neighbours, servers = self._neighbours, self._neighbours.servers
        near = [
            worker
            for worker, shares in enumerate(self._shared)
            if shares and can_write(servers, worker)
        ]
        if not near or neighbours.own is None:
            return None
        bells = neighbours.bells()
        return Desk(
            neighbours.own,
            {worker: neighbours.segments[servers + worker] for worker in near},
            bells={worker: bells[servers + worker] for worker in near if servers + worker in bells},
            alone=len(near) == self.workers,
            crowded=neighbours.crowded,
            on_ring=self._patience.rung,
        )

    def _make_limits(self, rank: int, layout: Layout) -> Limits:
        servers, leads = self._neighbours.servers, self._mesh.rank == 0
        if rank < servers:
            link = Link.FOLLOWER_TO_LEADER if leads else Link.LEADER_TO_FOLLOWER
            return Limits(link, self.workers, servers, server=rank)
        worker = rank - servers
        return Limits(
            Link.WORKER_TO_LEADER if leads else Link.WORKER_TO_FOLLOWER,
            self.workers,
            servers,
            shard_bytes=(self._end - self._begin) * layout.dtype.itemsize,
            inline_bytes_max=self._post.inline_bytes_max,
            worker=worker,
            deliveries=self._deliveries(worker),
            coded_bytes_max=self._coded_bytes_max(worker),
        )
