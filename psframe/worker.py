"""The worker's side of the protocol as a state machine without I/O.

It numbers the requests, knows which servers have still to answer each, which gradient slot is
free, and which snapshots the worker holds on which server. The blocking calls that users make
are in `client.py` and `exchange.py`; they send what this returns and feed it what arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from psframe.errors import MessageError
from psframe.events import (
    ALL_REQUESTS,
    COPIED,
    NO_BUFFER,
    RELEASE_COPY,
    RELEASE_HOLD,
    RELEASE_NONE,
    Answer,
    Lease,
    LeaseKind,
    LeaseRequest,
    Pull,
    Push,
    TaskSpec,
)

__all__ = ["Request", "WorkerProtocol"]


@dataclass(slots=True)
class Request:
    """One request, to one server or to all, until every one of them has answered.

    Attributes:
        seq: its number.
        waiting: servers that have still to answer.
        stopped: whether some server answered that the run is over.
        receipt: server 0's answer to the push in it.
        buffers, versions: by server, where the parameters are and which version they have.
        lease: the block, for a lease request.
        wants_params: whether it asked for the parameters.
    """

    seq: int
    waiting: int
    wants_params: bool = False
    stopped: bool = False
    receipt: Answer | None = None
    lease: Lease | None = None
    buffers: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether every server has answered."""
        return not self.waiting

    @property
    def has_params(self) -> bool:
        """Whether it brought the parameters."""
        return self.wants_params and not self.waiting and not self.stopped


class WorkerProtocol:
    """The worker's state in the protocol.

    Args:
        index: the worker.
        servers: S.
        in_place: by server, whether its snapshots are read in place and so held.

    Attributes:
        versions: by server, the version of the parameters that the worker has now.
        stopped: whether the run is known to be over.
    """

    def __init__(self, index: int, servers: int, in_place: Sequence[bool]) -> None:
        self.index = index
        self.servers = servers
        self.versions = [0] * servers
        self.stopped = False
        self._in_place = list(in_place)
        self._ended = False  # a server has ended every request
        self._log = 0  # the leader's records before what it has answered
        self._seq = 0
        self._requests: dict[int, Request] = {}
        self._slots: list[Request | None] = [None, None]
        self._next_slot = 0
        # By server: what the worker's present parameters lie in, and what it no longer uses
        # and has still to say so.
        self._using = [NO_BUFFER] * servers
        self._has_params = False
        self._releases = [RELEASE_NONE] * servers

    @property
    def outstanding(self) -> int:
        """Requests that some server has still to answer."""
        return len(self._requests)

    @property
    def slot(self) -> int:
        """The gradient slot that the next push uses."""
        return self._next_slot

    @property
    def slot_user(self) -> Request | None:
        """The unanswered push that still uses the next push's slot; None if it is free."""
        user = self._slots[self._next_slot]
        return user if user is not None and user.waiting else None

    def push(
        self,
        *,
        finite: bool,
        norm: float,
        want_params: bool,
        versions: Sequence[int] | None = None,
    ) -> tuple[Request, list[Push]]:
        """Make a push of the gradient in `slot`; its parameters, if wanted, end the present ones.

        Args:
            finite: whether all of the gradient is.
            norm: its Euclidean norm.
            want_params: whether the answer is to bring the parameters.
            versions: by server, what it was computed on; the present versions if None.

        Returns:
            The request, and the message to each server.
        """
        assert self.slot_user is None, "the slot is in use"
        request = self._request(self.servers, want_params)
        slot = self._next_slot
        self._slots[slot] = request
        self._next_slot = 1 - slot
        if want_params:
            self.drop_params()
        read = self.versions if versions is None else versions
        releases, self._releases = self._releases, [RELEASE_NONE] * self.servers
        index, seq, log = self.index, request.seq, self._log
        return request, [
            Push(index, seq, slot, version, finite, norm, want_params, release, log)
            for version, release in zip(read, releases, strict=True)
        ]

    def pull(self, *, pinned: bool = False) -> tuple[Request, list[Pull]]:
        """Make a pull. Call `drop_params` before if the present parameters end with it."""
        request = self._request(self.servers, True)
        messages = [
            Pull(self.index, request.seq, pinned, self._take_release(server), self._log)
            for server in range(self.servers)
        ]
        return request, messages

    def ask_lease(
        self, plan: int, spec: TaskSpec, *, ahead: bool = False
    ) -> tuple[Request, LeaseRequest]:
        """Make a request for a lease, to server 0; with `ahead`, beside the block in hand."""
        request = self._request(1, False)
        return request, LeaseRequest(self.index, request.seq, plan, spec, ahead)

    def drop_params(self) -> None:
        """Use the present parameters no longer; the next push or pull says so to the servers."""
        if not self._has_params:
            return
        self._has_params = False
        for server, buffer in enumerate(self._using):
            if self._in_place[server]:
                self._releases[server] |= RELEASE_COPY if buffer == COPIED else RELEASE_HOLD

    def take_params(self, request: Request) -> None:
        """Make the parameters of an answered request the present ones."""
        assert request.has_params, "the request brought no parameters"
        if self._has_params:
            self.drop_params()
        self._using = request.buffers  # answered: nobody writes to it any more
        self.versions = request.versions
        self._has_params = True

    def receive(self, server: int, answer: Answer | Lease) -> None:
        """Take a server's answer.

        Raises:
            MessageError: it answers nothing that this worker asked of that server.
        """
        if answer.worker != self.index:
            raise MessageError(f"worker {self.index} got an answer for worker {answer.worker}")
        if answer.log > self._log:
            self._log = answer.log
        if isinstance(answer, Answer) and answer.seq == ALL_REQUESTS:
            self._end_all()
            return
        request = self._requests.get(answer.seq)
        if request is None:
            if self._ended:
                return  # another server had answered before it heard of the end
            raise MessageError(f"worker {self.index} got an answer to no request: {answer.seq}")
        request.waiting -= 1
        if isinstance(answer, Lease):
            request.lease = answer
            request.stopped |= answer.kind is LeaseKind.STOPPED
        else:
            request.stopped |= answer.stopped
            request.buffers[server] = answer.buffer
            request.versions[server] = answer.version
            if server == 0:
                request.receipt = answer
        if request.stopped:
            self.stopped = True
        if not request.waiting:
            del self._requests[request.seq]

    def _end_all(self) -> None:
        self.stopped = self._ended = True
        for request in self._requests.values():
            request.waiting = 0
            request.stopped = True
        self._requests.clear()

    def _request(self, waiting: int, wants_params: bool) -> Request:
        seq, servers = self._seq, self.servers
        self._seq = seq + 1
        request = self._requests[seq] = Request(
            seq, waiting, wants_params, False, None, None, [NO_BUFFER] * servers, [0] * servers
        )
        return request

    def _take_release(self, server: int) -> int:
        release = self._releases[server]
        self._releases[server] = RELEASE_NONE
        return release
