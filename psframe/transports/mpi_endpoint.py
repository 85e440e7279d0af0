"""A worker's end of the MPI transport; the server's, `mpi_port`, says how arrays travel.

An array is on the host or, where MPI takes it there, on this worker's device: what is sent and
received is the same, and the other end need not know. A server on a GPU of this node that has
opened this worker's device memory reads a gradient there, if a word in shared memory says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from psframe.codecs import Codec
from psframe.coding import PullDecoder, payload_buffer
from psframe.events import RELEASE_HOLD, Answer, FromWorker, Lease, Push
from psframe.layout import Array, Layout
from psframe.transports.borrowing import card_words
from psframe.transports.in_order import InOrder
from psframe.transports.letters import Letters, can_write
from psframe.transports.meeting import LANDING, SLOTS, Neighbours
from psframe.transports.mpi import Mesh, Patience, Transfers, piece_elements
from psframe.transports.mpi_post import Post, close, copy_inline
from psframe.transports.shared_memory import first_apart
from psframe.transports.streams import STORES_IN_ORDER, Progress
from psframe.wire import (
    HEADER_BYTES,
    Delivery,
    Limits,
    Link,
    decode,
    read_plain_answer,
    write_plain_push,
)

__all__ = ["MpiEndpoint"]

_INLINE, _RANGE, _ANSWERS = Delivery.INLINE, Delivery.RANGE, (Answer, Lease)
_IN_PLACE = frozenset({Delivery.IN_PLACE})
_SENT = frozenset({Delivery.INLINE, Delivery.RANGE})
# A gradient of more is announced before it is written, and applied behind the worker; of less, the
# copying takes no longer than what it takes to follow it. Following costs more where the server has
# no core of its own, or is on another node.
_STREAM_BYTES, _STREAM_FAR_BYTES = 64 << 10, 256 << 10


class MpiEndpoint:
    """A worker's end; see `psframe.exchange.Endpoint`."""

    def __init__(
        self, mesh: Mesh, layout: Layout, neighbours: Neighbours, pull_codec: Codec | None = None
    ) -> None:
        self._mesh = mesh
        self._layout = layout
        self._neighbours = neighbours
        self.servers = neighbours.servers
        self.workers = neighbours.workers
        self.index = mesh.rank - neighbours.servers
        self._shards = layout.shards(self.servers)
        self.virtual_time = False
        self.weighs_codecs = mesh.rank == first_apart(mesh.nodes, self.servers)
        self.in_place: Sequence[bool] = [
            rank in neighbours.segments for rank in range(self.servers)
        ]
        own = neighbours.own
        self._slots = [
            np.empty(layout.size, layout.dtype) if own is None else own.array(index)
            for index in range(SLOTS)
        ]
        self._landing = None if own is None else own.array(LANDING)
        self._leaving: list[Any] = [None] * SLOTS  # a gradient on the device, if it leaves there
        # Servers that read it there themselves, and where they are told; and by server, snapshots
        # on its device that are read there.
        self._readers: Collection[int] = ()
        self._said: Any = None
        self._borrowed: Mapping[int, Any] = {}
        self._room: Callable[[int], Any] | None = None  # on a device, for parameters that land
        # By server without shared memory: where parameters land, two in turn.
        self._landings: dict[tuple[int, int], Any] = {}
        self._turn = [0] * self.servers
        self._snapshots: dict[tuple[int, int], Any] = {}
        bell = neighbours.bell(range(self.servers))
        self._patience = Patience(neighbours.crowded, mesh.watch, bell)
        self._post: Post = Post(
            mesh.comm,
            watch=mesh.watch,
            bells=neighbours.bells(),
            on_ring=self._patience.rung,
        )
        self._letters: Letters | None = None
        if own is not None and self.in_place[0] and can_write(self.servers, self.index):
            self._letters = Letters(
                own,
                neighbours.segments[0],
                self.index,
                crowded=neighbours.crowded,
                bell=neighbours.bells().get(0),
                on_ring=self._patience.rung,
            )
        self._mailed = False  # whether the server may have still to take what went through MPI
        # By server, whether what travels is an array, and not in shared memory or inside a message.
        item, inline = layout.dtype.itemsize, self._post.inline_bytes_max
        self._alone = [
            not near and (end - begin) * item > inline
            for near, (begin, end) in zip(self.in_place, self._shards, strict=True)
        ]
        # By server without shared memory, if parameters are coded.
        self._decoders: list[PullDecoder | None] = [
            None if pull_codec is None or near else PullDecoder(pull_codec, layout, begin, end)
            for near, (begin, end) in zip(self.in_place, self._shards, strict=True)
        ]
        self._limits = [
            Limits(
                Link.SERVER_TO_WORKER,
                self.workers,
                self.servers,
                shard_bytes=(end - begin) * layout.dtype.itemsize,
                inline_bytes_max=self._post.inline_bytes_max,
                worker=self.index,
                server=server,
                # An answer without parameters is IN_PLACE on any link.
                deliveries=_IN_PLACE if self.in_place[server] else _IN_PLACE | _SENT,
                coded_bytes_max=None if decoder is None else decoder.bytes_max,
            )
            for server, ((begin, end), decoder) in enumerate(
                zip(self._shards, self._decoders, strict=True)
            )
        ]
        self._transfers = Transfers(mesh.watch)
        self._slot_sends = [0] * SLOTS
        self._inbox: InOrder[tuple[int, Answer | Lease]] = InOrder()
        self._answers = self._inbox.ready

    def send(self, server: int, message: FromWorker) -> None:
        """Send a message, and the gradient with it unless the server reads it in place."""
        self._mailed = True
        if not isinstance(message, Push) or (self.in_place[server] and not message.arriving):
            self._post.send(server, message)
            return
        begin, end = self._shards[server]
        whole = self.slot_array(message.slot) if self._alone[server] else self._slots[message.slot]
        array = whole[begin:end]
        if message.coded is not None:
            array = message.coded.data
        if message.arriving:
            delivery = Delivery.STREAMED if self.in_place[server] else Delivery.RANGE
            self._post.send(server, message, delivery, array)
            return
        if array.nbytes <= self._post.inline_bytes_max:
            self._post.send(server, message, Delivery.INLINE, array)
            return
        self._post.send(server, message, Delivery.RANGE, array)
        self.follow(message.slot, self._mesh.start_send(array, server), server, keep=array)

    def receive(self, timeout_s: float | None) -> tuple[int, Answer | Lease] | None:
        """Take the next (server, answer); None after `timeout_s` seconds without one."""
        answers, patience = self._answers, self._patience
        if not answers:
            item = self._take()  # before all else: the answer to a small push is soon there
            if item is not None:
                return item
        patience.reset()
        deadline = 0.0
        while not answers:
            item = self._take()
            if item is not None:
                return item
            if self._transfers.progress():
                patience.reset()
            elif timeout_s == 0:
                return None
            elif patience.wait(busy=self._unfinished) and timeout_s is not None:
                now = time.monotonic()
                if not deadline:
                    deadline = now + timeout_s
                elif now > deadline:
                    return None
        return answers.popleft()

    @property
    def direct(self) -> MpiEndpoint:
        """Itself; whether it may be used is the worker's to know."""
        return self

    def start(self, seq: int, slot: int, version: int, arriving: bool) -> None:
        """Send a plain push_pull; see `Direct`."""
        n_bytes = self._slots[slot].nbytes if arriving else 0
        letters = self._letters
        if letters is not None and not self._mailed:
            write_plain_push(letters.push, self.index, seq, slot, version, n_bytes)
            letters.send()
            return
        post = self._post
        header = post.header(0)
        if header is None:
            index = self.index
            self.send(
                0, Push(index, seq, slot, version, True, 0.0, True, RELEASE_HOLD, 0, arriving)
            )
            return
        write_plain_push(header, self.index, seq, slot, version, n_bytes)
        post.start(0)

    def finish(self, seq: int) -> tuple[int, int, int] | None:
        """Wait for its answer; see `Direct`."""
        post, patience, letters = self._post, self._patience, self._letters
        if letters is not None and letters.awaited:
            return self._finish_letter(letters, seq)
        taken = post.take()  # before all else: it is soon there
        patience.reset()
        while not self._answers:
            if taken is not None:
                source, n_bytes, buffer = taken
                answer = read_plain_answer(buffer, n_bytes, seq, self._limits[source])
                if answer is not None:
                    self._mailed = False
                    return answer
                other = self._read(*taken)
                if other is not None:
                    self._answers.append(other)
                    break
            elif not self._transfers.progress():
                patience.wait(busy=self._unfinished)
            taken = post.take(once=patience.asleep)
        return None

    def _finish_letter(self, letters: Letters, seq: int) -> tuple[int, int, int] | None:
        answers, patience = self._answers, self._patience
        patience.reset()
        while not answers:
            if letters.take(once=patience.asleep):
                answer = read_plain_answer(letters.answer, HEADER_BYTES, seq, self._limits[0])
                if answer is not None:
                    return answer
                item = self._read(0, HEADER_BYTES, letters.answer)
            else:
                item = self._take()
                if item is None and not self._transfers.progress():
                    patience.wait(busy=self._unfinished)
            if item is not None:
                answers.appendleft(item)
        return None

    @property
    def _unfinished(self) -> bool:
        return self._transfers.busy or self._post.waiting

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def slot(self, index: int) -> Array:
        """The worker's gradient slot, free to be written."""
        # Its push has been answered, so its bytes have arrived; MPI has still to say so.
        self._patience.reset()
        while self._slot_sends[index]:
            if not self._transfers.progress():
                self._patience.wait(busy=True)
        return self._slots[index]

    def progress(self, slot: int, *, judges: bool) -> Progress | _Sending | None:
        """Where to tell the only server how far the gradient in a slot is."""
        n_bytes = self._slots[slot].nbytes
        if self.servers > 1 or n_bytes <= _STREAM_BYTES or self._readers:
            return None
        if n_bytes <= _STREAM_FAR_BYTES and (self._neighbours.crowded or not self.in_place[0]):
            return None
        own = self._neighbours.own
        if own is not None and self.in_place[0]:
            return Progress(own.words(slot), self._layout.size) if STORES_IN_ORDER else None
        # The message goes before the gradient is judged, and nothing comes after it.
        return None if judges else _Sending(self, slot)

    def slot_array(self, slot: int) -> Any:
        """A slot's gradient, on the host or where it leaves from, whether it is free or not."""
        leaving = self._leaving[slot]
        return self._slots[slot] if leaving is None else leaving

    def send_piece(self, slot: int, begin: int, end: int) -> list[Any]:
        """Start to send [begin, end) of a slot to the only server."""
        return self._mesh.start_send(self.slot_array(slot)[begin:end], 0)

    def follow(self, slot: int, requests: list[Any], server: int = 0, *, keep: Any = None) -> None:
        """Note that a slot is being sent, from the array `keep`, until these are complete."""
        self._slot_sends[slot] += 1
        self._transfers.add(requests, lambda: self._left(slot), peer=server, keep=keep)

    # ---- devices -----------------------------------------------------------------------------

    @property
    def takes_devices(self) -> bool:
        """Whether there is anything that a device could send or receive."""
        return any(self._alone)

    @property
    def near(self) -> list[tuple[int, int]]:
        """The runs of a gradient that do not leave from a device; see `psframe.devices.Door`."""
        return [
            (begin, end)
            for server, (begin, end) in enumerate(self._shards)
            if begin < end and not self._alone[server] and server not in self._readers
        ]

    def leave_from(self, slot: int, array: Any) -> None:
        """Have the next gradient of a slot leave from an array on a device; None for the slot."""
        self._leaving[slot] = array
        if self._said is not None:  # before the message with the push
            self._said[slot] = array is not None

    def borrow(
        self, snapshots: Mapping[int, Any], readers: Collection[int], *, pointers: bool
    ) -> None:
        """Exchange arrays with servers of this node on devices.

        Args:
            snapshots: by server, its memory that is open here, if parameters are read there.
            readers: the servers that have opened this worker's gradient slots.
            pointers: whether MPI takes devices' arrays from and for the others.
        """
        self._borrowed = snapshots
        self._readers = readers
        own = self._neighbours.own
        if readers and own is not None:
            self._said = card_words(own)
        if not pointers:
            self._alone = [False] * self.servers

    def land_in(self, empty: Callable[[int], Any]) -> None:
        """Have parameters land in arrays of a device that `empty(size)` gives."""
        self._room = empty

    def snapshot(self, server: int, buffer: int) -> Any:
        """The server's snapshot, in place or where it has landed."""
        if not self.in_place[server]:
            return self._landings[server, buffer]
        array = self._snapshots.get((server, buffer))
        if array is None:
            begin, end = self._shards[server]
            if server in self._borrowed and buffer >= 0:
                array = self._borrowed[server].array(buffer)
            elif buffer < 0:
                assert self._landing is not None, "memory is shared"
                array = self._landing[begin:end]
            else:
                array = self._neighbours.segments[server].array(buffer)
            self._snapshots[server, buffer] = array
        return array

    def close(self) -> None:
        """Wait until everything has left, and take the receives back."""
        close(self._post, self._transfers, self._patience)
        self._room = None  # its device refers to this

    def _left(self, slot: int) -> None:
        self._slot_sends[slot] -= 1

    def _take(self) -> tuple[int, Answer | Lease] | None:
        """Take a message or the awaited letter; give it if it is whole and the next in order."""
        letters = self._letters
        if letters is None or not letters.awaited:
            taken = self._post.take(once=self._patience.asleep)
            return None if taken is None else self._read(*taken)
        item = None
        if not letters.take(once=True):
            taken = self._post.take(once=True)
            if taken is None:
                return None
            item = self._read(*taken)
            if not letters.take(once=True):
                return item
        if item is not None:  # the letter was sent before it
            self._answers.append(item)
        return self._read(0, HEADER_BYTES, letters.answer)

    def _read(
        self, source: int, n_bytes: int, buffer: bytearray | memoryview
    ) -> tuple[int, Answer | Lease] | None:
        """Read a message or a letter; give it if it is whole and the next in order."""
        answer, delivery, payload_bytes = decode(buffer, n_bytes, self._limits[source])
        assert isinstance(answer, _ANSWERS), "the limits of the link allow no other"
        inbox = self._inbox
        if delivery in _SENT and isinstance(answer, Answer):
            land = self._land(source, answer)
            target: Any = land if answer.coded is None else payload_buffer(payload_bytes)
            if delivery is _RANGE:
                entry = inbox.hold(source, (source, answer))

                def arrived() -> None:
                    self._landed(source, target, land)
                    inbox.arrived(source, entry)

                requests = self._mesh.start_receive(target, source)
                self._transfers.add(requests, arrived, peer=source, keep=target)
                return None
            copy_inline(target, buffer, payload_bytes)
            self._landed(source, target, land)
        if not inbox.held:
            return source, answer
        inbox.add(source, (source, answer))
        return None

    def _landed(self, server: int, came: Any, land: Any) -> None:
        """Make parameters of what has come, if they are coded."""
        decoder = self._decoders[server]
        if decoder is None:
            return
        if came is land:
            decoder.dense(land)
        else:
            decoder.decode(came, land)

    def _land(self, server: int, answer: Answer) -> Any:
        """Choose where the parameters land: not where the present ones may lie."""
        turn = self._turn[server] = 1 - self._turn[server]
        answer.buffer = turn
        array = self._landings.get((server, turn))
        if array is None:
            begin, end = self._shards[server]
            room = self._room if self._alone[server] and self._decoders[server] is None else None
            array = np.empty(end - begin, self._layout.dtype) if room is None else room(end - begin)
            self._landings[server, turn] = array
        return array


class _Sending:
    """A gradient that is sent, in the pieces that the server awaits, while it is written."""

    from_any_thread = False  # MPI is the worker's thread's

    def __init__(self, endpoint: MpiEndpoint, slot: int) -> None:
        self._endpoint = endpoint
        self._slot = slot
        self._sent = 0
        self._requests: list[Any] = []

    def open(self) -> None:
        """Begin another gradient, on the host unless a device says otherwise."""
        self._endpoint.leave_from(self._slot, None)
        self._sent, self._requests = 0, []

    def advance(self, end: int) -> None:
        """Send the pieces that are whole."""
        piece = piece_elements(self._endpoint.slot_array(self._slot))
        while end - self._sent >= piece:
            self._send(self._sent + piece)

    def close(self, finite: bool, norm: float) -> None:
        """Send the rest; of a gradient that could not be written as NaN, so that it is refused."""
        array = self._endpoint.slot_array(self._slot)
        if not finite:
            array[self._sent :] = np.nan
        self.advance(array.size)
        if self._sent < array.size:
            self._send(array.size)
        self._endpoint.follow(self._slot, self._requests, keep=array)
        self._requests = []

    def _send(self, end: int) -> None:
        self._requests += self._endpoint.send_piece(self._slot, self._sent, end)
        self._sent = end
