"""The worker's side of the protocol as a state machine without I/O.

It numbers the requests, knows which servers have still to answer each, which gradient slot is
free, and which snapshots the worker holds on which server. The blocking calls that users make
are in `client.py` and `exchange.py`; they send what this returns and feed it what arrives.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class Request:
    """One request, to one server or to all, until every one of them has answered.

    Attributes:
        seq: its number.
        waiting: servers that have still to answer.
        wants_params: whether it asked for the parameters.
        stopped: whether some server answered that the run is over.
        answers: by server; None where it has not answered. A lease request has none.
        lease: the block, for a lease request.
    """

    __slots__ = ("answers", "lease", "seq", "stopped", "waiting", "wants_params")

    def __init__(self, seq: int, waiting: int, wants_params: bool, answers: int) -> None:
        self.seq = seq
        self.waiting = waiting
        self.wants_params = wants_params
        self.stopped = False
        self.answers: list[Answer | None] = [None] * answers
        self.lease: Lease | None = None

    @property
    def done(self) -> bool:
        """Whether every server has answered."""
        return not self.waiting

    @property
    def receipt(self) -> Answer | None:
        """Server 0's answer to the push in it."""
        return self.answers[0]

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
        users: by gradient slot, the last push that used it.
        stopped: whether the run is known to be over.
    """

    def __init__(self, index: int, servers: int, in_place: Sequence[bool]) -> None:
        self.index = index
        self.servers = servers
        self.stopped = False
        self._in_place = list(in_place)
        self._ended = False  # a server has ended every request
        self._log = 0  # the leader's records before what it has answered
        self._seq = 0
        self._requests: dict[int, Request] = {}
        self.users: list[Request | None] = [None, None]
        # The answers that brought the present or, if `_using` is false, the last parameters.
        self._present = [Answer(index, 0) for _ in range(servers)]
        self._plain = [Answer(index, 0)]  # what brought them, where that was no request
        self._using = False
        # By server, what the worker no longer uses and has still to say so.
        self._releases = [RELEASE_NONE] * servers

    @property
    def outstanding(self) -> int:
        """Requests that some server has still to answer."""
        return len(self._requests)

    @property
    def present(self) -> Sequence[Answer]:
        """By server, the answer that brought the last parameters; of version 0 before any."""
        return self._present

    @property
    def next_seq(self) -> int:
        """The number of the next request."""
        return self._seq

    @property
    def slot(self) -> int:
        """The first gradient slot that is free or, if none is, the one that will be first.

        One that takes its pushes in turn touches the memory of one slot alone.
        """
        first, second = self.users
        if first is None or not first.waiting:
            return 0
        if second is None or not second.waiting:
            return 1
        return 0 if first.seq < second.seq else 1

    def slot_user(self, slot: int) -> Request | None:
        """Give the unanswered push that still uses a slot; None if it is free."""
        user = self.users[slot]
        return user if user is not None and user.waiting else None

    def push(
        self,
        slot: int,
        finite: bool,
        norm: float,
        want_params: bool,
        *,
        read: Sequence[Answer] | None = None,
        arriving: bool = False,
    ) -> tuple[Request, list[Push]]:
        """Make a push; the parameters that it brings, if wanted, end the present ones.

        Args:
            slot: where the gradient is, or will be; free.
            finite: whether all of the gradient is.
            norm: its Euclidean norm.
            want_params: whether the answer is to bring the parameters.
            read: by server, what brought the parameters that the gradient was computed on; the
                present ones if None.
            arriving: the gradient is still to be written, and its `finite` and `norm` to be told.

        Returns:
            The request, and the message to each server.
        """
        user = self.users[slot]
        assert user is None or not user.waiting, "the slot is in use"
        request = self.users[slot] = self._request(self.servers, want_params, self.servers)
        if read is None:
            read = self._present
        if want_params and self._using:
            self.drop_params()
        releases = self._releases
        index, seq, log = self.index, request.seq, self._log
        messages: list[Push] = []
        for s, release in enumerate(releases):
            version = read[s].version
            messages.append(
                Push(index, seq, slot, version, finite, norm, want_params, release, log, arriving)
            )
            releases[s] = RELEASE_NONE
        return request, messages

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way and one snapshot is held: a push_pull may be plain."""
        return (
            not self._requests
            and self._using
            and not self.stopped
            and self._present[0].buffer >= 0
            and not self._releases[0]
        )

    def begin_plain(self) -> tuple[int, int]:
        """Begin a push_pull to the only server without a request: (seq, version read).

        `quiet` holds. `end_plain` ends it, or `request_of_plain` makes it like others.
        """
        seq = self._seq
        self._seq = seq + 1
        self._using = False  # the message says so
        return seq, self._present[0].version

    def end_plain(self, buffer: int, version: int) -> Sequence[Answer]:
        """Make the parameters in a snapshot buffer the present ones, and return them."""
        present = self._present = self._plain
        answer = present[0]
        answer.buffer, answer.version = buffer, version
        self._using = True
        return present

    def request_of_plain(self, seq: int) -> Request:
        """Give the request for what `begin_plain` began: it has not been answered plainly."""
        request = self._requests[seq] = Request(seq, 1, True, 1)
        self.users[0] = request
        return request

    def pull(self, *, pinned: bool = False) -> tuple[Request, list[Pull]]:
        """Make a pull. Call `drop_params` before if the present parameters end with it."""
        request = self._request(self.servers, True, self.servers)
        messages = [
            Pull(self.index, request.seq, pinned, self._take_release(server), self._log)
            for server in range(self.servers)
        ]
        return request, messages

    def ask_lease(
        self, plan: int, spec: TaskSpec, *, ahead: bool = False
    ) -> tuple[Request, LeaseRequest]:
        """Make a request for a lease, to server 0; with `ahead`, beside the block in hand."""
        request = self._request(1, False, 0)
        return request, LeaseRequest(self.index, request.seq, plan, spec, ahead)

    def drop_params(self) -> None:
        """Use the present parameters no longer; the next push or pull says so to the servers."""
        if not self._using:
            return
        self._using = False
        for server, answer in enumerate(self._present):
            if self._in_place[server]:
                self._releases[server] |= RELEASE_COPY if answer.buffer == COPIED else RELEASE_HOLD

    def take_params(self, request: Request) -> Sequence[Answer]:
        """Make the parameters of an answered request the present ones, and return them."""
        if self._using:
            self.drop_params()
        assert request.wants_params, "it asked for none"
        self._using = True
        # Each server has answered.
        present = self._present = request.answers  # type: ignore[assignment]
        return present  # type: ignore[return-value]

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
        if isinstance(answer, Answer):
            answers, stopped = request.answers, answer.stopped
            if server >= len(answers) or answers[server] is not None:
                raise self._misplaced(server, answer)
            if not stopped and (answer.buffer == NO_BUFFER) is request.wants_params:
                raise self._misplaced(server, answer)
            answers[server] = answer
        else:
            if request.answers or server:
                raise self._misplaced(server, answer)
            request.lease = answer
            stopped = answer.kind is LeaseKind.STOPPED
        if stopped:
            request.stopped = self.stopped = True
        request.waiting -= 1
        if not request.waiting:
            del self._requests[request.seq]

    def _misplaced(self, server: int, answer: Answer | Lease) -> MessageError:
        if isinstance(answer, Lease):
            what = "a lease"
        else:
            what = "no parameters" if answer.buffer == NO_BUFFER else "parameters"
        return MessageError(
            f"worker {self.index} got from server {server} {what} in answer to request"
            f" {answer.seq}, which asked it for something else or has been answered"
        )

    def _end_all(self) -> None:
        self.stopped = self._ended = True
        for request in self._requests.values():
            request.waiting = 0
            request.stopped = True
        self._requests.clear()

    def _request(self, waiting: int, wants_params: bool, answers: int) -> Request:
        seq = self._seq
        self._seq = seq + 1
        request = self._requests[seq] = Request(seq, waiting, wants_params, answers)
        return request

    def _take_release(self, server: int) -> int:
        release = self._releases[server]
        self._releases[server] = RELEASE_NONE
        return release
