"""A worker's requests under way: its end of a transport, and waiting for the answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from psframe.errors import MessageError, Stopped, WaitTimeout
from psframe.events import Answer, FromWorker, Lease
from psframe.layout import Array
from psframe.worker import Request, WorkerProtocol

__all__ = ["Direct", "Endpoint", "Exchange", "Progress"]


class Progress(Protocol):
    """What a server is told of a gradient that is still being written into its slot.

    Attributes:
        from_any_thread: whether others than the worker's may call `advance` and `close`.
    """

    from_any_thread: bool

    def open(self) -> None:
        """Say that nothing of it is there; before its push is sent."""

    def advance(self, end: int) -> None:
        """Say that the elements [0, end) are there, not yet all."""

    def close(self, finite: bool, norm: float) -> None:
        """Say that all is there, and what it is: as in `Push`."""


class Direct(Protocol):
    """Sends a push_pull to the only server and waits for its answer, without making events of them.

    Its gradient is in the slot, finite, or being written there (`arriving`), and the worker gives
    back the snapshot that it holds.
    """

    def start(self, seq: int, slot: int, version: int, arriving: bool) -> None:
        """Send it; `version` is of the parameters that the gradient was computed on."""

    def finish(self, seq: int) -> tuple[int, int, int] | None:
        """Wait until it has been answered.

        Returns:
            Its staleness, the buffer of the snapshot that came with the answer, and the version, if
            it was applied; None if something else came, which `Endpoint.receive` gives.
        """


class Endpoint(Protocol):
    """A worker's end of a transport.

    Attributes:
        index: the worker, 0..W-1.
        workers, servers: W and S.
        in_place: by server, whether its snapshots are read in place.
        virtual_time: whether this is a simulation, in which threads have no place.
        weighs_codecs: whether it is this worker that looks whether a codec pays: the first one to
            which something travels; the first of all if nothing travels to any.
    """

    virtual_time: bool
    index: int
    workers: int
    servers: int
    in_place: Sequence[bool]
    weighs_codecs: bool

    @property
    def direct(self) -> Direct | None:
        """The direct way of a push_pull, if there is one."""

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

    def progress(self, slot: int, *, judges: bool) -> Progress | None:
        """Where to tell how far the gradient of an `arriving` push is; None if none is to be.

        Args:
            slot: where it is.
            judges: whether the server is to be told if it is finite, and its norm.
        """

    def snapshot(self, server: int, buffer: int) -> Array:
        """The server's shard in that buffer, or COPIED; valid until it is released."""


class Exchange:
    """Feeds the worker's protocol what its endpoint receives, for as long as somebody waits.

    Once a server has sent what makes no sense nothing is waited for any more: it may believe that
    it has answered.

    Attributes:
        endpoint: the worker's end of a transport.
        protocol: its state machine.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.protocol = WorkerProtocol(endpoint.index, endpoint.servers, endpoint.in_place)
        self._wrong: str | None = None  # what a server has sent

    def send(self, server: int, message: FromWorker) -> None:
        """Send to one server."""
        self.endpoint.send(server, message)

    def send_each(self, messages: Iterable[FromWorker]) -> None:
        """Send to every server the message that is for it."""
        send = self.endpoint.send
        for server, message in enumerate(messages):
            send(server, message)

    def check_running(self) -> None:
        """Raise Stopped if the run is known to be over.

        Raises:
            Stopped: it is.
            MessageError: a server has sent what makes no sense.
        """
        if self._wrong is not None:
            raise MessageError(self._wrong)
        if self.protocol.stopped:
            raise Stopped("the run is over")

    def distrust(self, error: MessageError) -> None:
        """Note that a server has sent what makes no sense, and wait for none any more."""
        self._wrong = str(error)

    def poll(self) -> None:
        """Take what has arrived."""
        while self._receive(0.0):
            pass

    def wait(self, request: Request, timeout_s: float | None = None) -> None:
        """Wait until every server has answered the request.

        Raises:
            WaitTimeout: that took longer than `timeout_s`; the request stays under way.
            MessageError: a server has sent what makes no sense.
        """
        if timeout_s is not None:
            self._wait_until(request, timeout_s)
            return
        if self._wrong is not None and request.waiting:
            raise MessageError(self._wrong)
        receive, take = self.endpoint.receive, self.protocol.receive
        try:
            while request.waiting:
                item = receive(None)
                if item is not None:
                    take(*item)
        except MessageError as error:
            self.distrust(error)
            raise

    def drain(self) -> None:
        """Wait until every request has been answered that can be."""
        while self.protocol.outstanding and self._wrong is None:
            self._receive(None)

    def _wait_until(self, request: Request, timeout_s: float) -> None:
        endpoint = self.endpoint
        deadline = endpoint.now() + timeout_s
        while request.waiting:
            left = deadline - endpoint.now()
            if not self._receive(max(left, 0.0)) and left <= 0:
                raise WaitTimeout(
                    f"worker {endpoint.index}: no answer to request {request.seq} within"
                    f" {timeout_s} s; {request.waiting} of {endpoint.servers} servers have not"
                    " answered"
                )

    def _receive(self, timeout_s: float | None) -> bool:
        if self._wrong is not None:
            raise MessageError(self._wrong)
        try:
            item = self.endpoint.receive(timeout_s)
            if item is None:
                return False
            self.protocol.receive(*item)
        except MessageError as error:
            self.distrust(error)
            raise
        return True
