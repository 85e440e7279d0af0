"""What a server and a worker can say to each other, and a leader to its host.

Server 0 is the *leader*: it decides what becomes of every push, from the message's header
alone, and tells the other servers, the *followers*. Events carry handles of buffers (a slot, a
snapshot buffer), never the bytes. They are slotted dataclasses, not frozen: building a frozen
one costs half a microsecond, and these are made for every message. Whoever receives an event
owns it.

What the leader tells its followers (Decision, Forget, Gone, Pin, Mark, End) is its *log*; a
position in it is a count of records. Messages between two processes arrive in order, but a worker
that the leader has answered may reach a follower before the record that came before the answer. So
answers say in `log` how many records came before them, the worker's later pulls repeat it, and a
follower answers a pull only once it has handled so many.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psframe.coding import Coded

__all__ = [
    "ALL_REQUESTS",
    "COPIED",
    "NOBODY",
    "NO_BUFFER",
    "Answer",
    "Arrived",
    "Decision",
    "End",
    "EpochDone",
    "Evaluated",
    "Failure",
    "Finished",
    "Forget",
    "FromWorker",
    "Gone",
    "HostEvent",
    "Joined",
    "Lease",
    "LeaseKind",
    "GiveBack",
    "LeaseRequest",
    "Leave",
    "Log",
    "Logged",
    "Lost",
    "Mark",
    "Marked",
    "Missing",
    "Output",
    "Pin",
    "Pull",
    "Push",
    "PushHandled",
    "RandomState",
    "RELEASE_COPY",
    "RELEASE_HOLD",
    "RELEASE_NONE",
    "Reason",
    "Record",
    "Report",
    "Saved",
    "Sent",
    "ShardSaved",
    "ShardsSaved",
    "SpanKind",
    "Spans",
    "Stop",
    "TaskSpec",
    "ToServer",
    "Withheld",
]

# `Answer.seq` of an answer that ends every request of the worker.
ALL_REQUESTS = -1

NOBODY = -1  # `Spans.worker` of a server's

# Values of `Answer.buffer` beside the index of a snapshot buffer.
NO_BUFFER = -1
COPIED = -2  # the snapshot was copied into the worker's landing area

# Bits of `release`: what the worker no longer uses.
RELEASE_NONE = 0
RELEASE_HOLD = 1  # the snapshot buffer that it held
RELEASE_COPY = 2  # its landing area


class Reason(enum.IntEnum):
    """Why a push was not applied. The text is what `Receipt.reason` shows."""

    NONE = 0
    NON_FINITE = 1
    NON_FINITE_UPDATE = 2
    BAD_VERSION = 3
    LATE = 4
    STOPPED = 5
    LOST = 6
    STALE = 7

    @property
    def text(self) -> str:
        """The reason in words; empty for a push that was applied."""
        return _REASONS[self]


_REASONS = {
    Reason.NONE: "",
    Reason.NON_FINITE: "non-finite gradient",
    Reason.NON_FINITE_UPDATE: "non-finite update",
    Reason.BAD_VERSION: "unknown version",
    Reason.LATE: "late",
    Reason.STOPPED: "stopped",
    Reason.LOST: "lost",
    Reason.STALE: "stale",
}


class LeaseKind(enum.IntEnum):
    """What a lease asks the worker to do."""

    TRAIN = 0
    EVALUATE = 1
    EXHAUSTED = 2
    STOPPED = 3
    CONFLICT = 4  # this worker asks for other leases than the first one that asked
    LATER = 5  # no block ahead of time; ask again when the one in hand is done


@dataclass(frozen=True)
class TaskSpec:
    """What all workers agree on when they ask for leases; equal on all of them.

    Attributes:
        n_samples: samples in one epoch.
        batch_size: samples in a block; the epoch's last block may have fewer.
        epochs: how often each sample is leased.
        shuffle: whether an epoch's order is a permutation that depends on the seed.
        eval_samples: samples evaluated after each epoch, 0 for none.
        eval_batch_size: samples in an evaluation block.
    """

    n_samples: int
    batch_size: int
    epochs: int
    shuffle: bool
    eval_samples: int = 0
    eval_batch_size: int = 1


@dataclass(slots=True)
class Failure:
    """An exception that left a worker's `work`, as text."""

    type: str
    message: str
    traceback: str

    @property
    def interrupted(self) -> bool:
        """Whether it was the user, or the launcher."""
        return self.type == KeyboardInterrupt.__name__


# ---- worker to server ------------------------------------------------------------------


@dataclass(slots=True)
class Push:
    """A gradient, in the slot `slot` of the worker.

    Attributes:
        version: the version of this server's shard that it was computed on.
        finite: whether the whole gradient is, as the worker's copy pass found.
        norm: Euclidean norm of the whole gradient.
        want_params: answer with the parameters as well (push_pull).
        release: what the worker no longer uses, as RELEASE_* bits.
        log: the leader's records that a follower handles before it answers with parameters.
        arriving: the gradient is still on its way, and `finite` and `norm` with it; `Arrived` tells
            how much of it is there. Only server 0, if it is the only one, can handle such a push.
        coded: what stands for the gradient on its way, if a codec is used.
        scale: factor on the gradient, filled in by server 0.
        receipt: filled in by the server between deciding the push and granting the pull.
    """

    worker: int
    seq: int
    slot: int
    version: int
    finite: bool
    norm: float
    want_params: bool
    release: int
    log: int = 0
    arriving: bool = False
    coded: Coded | None = field(default=None, compare=False)
    scale: float = 1.0
    receipt: Answer | None = None


@dataclass(slots=True)
class Pull:
    """A wish for the current parameters, or for the pinned ones; `release`, `log` as in Push."""

    worker: int
    seq: int
    pinned: bool
    release: int
    log: int = 0


@dataclass(slots=True)
class LeaseRequest:
    """A wish for the next block of samples of the worker's `plan`-th call of leases.

    It completes the block in hand. With `ahead` it asks for one more beside that which the worker
    begins with it: the present one or, if one has been leased ahead of time, that.
    """

    worker: int
    seq: int
    plan: int
    spec: TaskSpec
    ahead: bool = False


@dataclass(slots=True)
class GiveBack:
    """Returns the block that request `seq` has brought ahead of time; it has not been begun."""

    worker: int
    seq: int


@dataclass(slots=True)
class Report:
    """Sums over the evaluation block that the worker has in hand."""

    worker: int
    sums: dict[str, float]


@dataclass(slots=True)
class Log:
    """Numbers that the user logged: sum and count of each since the last such message."""

    worker: int
    sums: dict[str, tuple[float, int]]


@dataclass(slots=True)
class RandomState:
    """The state of the worker's random numbers when it made the push `seq`, which is to come.

    Attributes:
        numbers: of a PCG64: its state and increment, of 128 bits each; whether it has kept half of
            a number of 64 bits, and that half.
    """

    worker: int
    seq: int
    numbers: tuple[int, int, int, int]


class SpanKind(enum.IntEnum):
    """What a rank was at, for a timeline."""

    COMPUTE = 0
    PULL = 1
    PUSH = 2
    PUSH_PULL = 3
    LEASE = 4
    DATA = 5  # waiting for a block's data
    EVALUATE = 6
    APPLY = 7  # a server


@dataclass(slots=True)
class Spans:
    """What a rank was at: (kind, begin, end) in seconds of its own clock, which is `now_s`.

    The rank is `worker`'s or, where that is NOBODY, the server's.
    """

    worker: int
    now_s: float
    spans: list[tuple[int, float, float]]
    server: int = 0


@dataclass(slots=True)
class Stop:
    """The worker asks that the run end."""

    worker: int


@dataclass(slots=True)
class Leave:
    """The worker's `work` has returned, or raised `failure`."""

    worker: int
    failure: Failure | None = None


FromWorker = (
    Push | Pull | LeaseRequest | GiveBack | Report | RandomState | Log | Spans | Stop | Leave
)

# ---- a transport to its server -----------------------------------------------------------


@dataclass(slots=True)
class Lost:
    """The worker is dead, or counts as dead. Nothing more of it will be believed."""

    worker: int


@dataclass(slots=True)
class Joined:
    """Another process is here in place of a worker that was lost; its requests begin anew."""

    worker: int


@dataclass(slots=True)
class Missing:
    """The process that was to replace a worker does not come."""

    worker: int


@dataclass(slots=True)
class Arrived:
    """More of the gradient of a push is there that arrives after its message (`Push.arriving`).

    Attributes:
        worker, slot: whose, and where.
        end: the elements [0, end) are there, those of the worker's whole gradient.
        whole: they are all.
        finite, norm: as in Push, once they are all there.
    """

    worker: int
    slot: int
    end: int
    whole: bool = False
    finite: bool = True
    norm: float = 0.0


@dataclass(slots=True)
class Sent:
    """The bytes of the snapshot answered to this worker have left; its hold can go."""

    worker: int


@dataclass(slots=True)
class Saved:
    """The driver has written what the machine had marked, or given it up; it can go.

    Attributes:
        number: the mark's.
        entry: what a follower's driver has to tell the leader's of it.
    """

    number: int
    entry: str = ""


# ---- server to worker --------------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    """What became of a push, or the parameters, or both.

    Attributes:
        stopped: the run is over; there are no parameters.
        applied, reason, push_version, staleness: the receipt; push_version is after handling it.
        buffer: where the parameters are: a snapshot buffer, COPIED, or NO_BUFFER for none.
        version: the version of the parameters in it.
        log: the leader's records before this answer; 0 from a follower.
        coded: what stands for the parameters on their way, if a codec is used.
    """

    worker: int
    seq: int
    stopped: bool = False
    applied: bool = False
    reason: Reason = Reason.NONE
    push_version: int = 0
    staleness: int = 0
    buffer: int = NO_BUFFER
    version: int = 0
    log: int = 0
    coded: Coded | None = field(default=None, compare=False)


@dataclass(slots=True)
class Lease:
    """A block [begin, end) of the epoch's order, or why there is none; `log` as in Answer."""

    worker: int
    seq: int
    kind: LeaseKind
    epoch: int = 0
    begin: int = 0
    end: int = 0
    log: int = 0


# ---- leader to followers, and back -------------------------------------------------------


@dataclass(slots=True)
class Decision:
    """The leader's verdict on pushes, in the order in which it made them.

    With reason NONE the pushes of `members` (in worker order) make one update; with another reason
    each is discarded.

    Attributes:
        members: (worker, seq) of each push.
        reason: why they are not applied.
        round: whether it closes a BSP round, which may be empty.
        step: where pushes are gathered, whether an update is made with what has been gathered, this
            one in it; or with what there is, if there are no members.
        scales: by member, the factor on its gradient; none if all are 1.
    """

    members: list[tuple[int, int]]
    reason: Reason = Reason.NONE
    round: bool = False
    step: bool = True
    scales: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Forget:
    """The worker has left, and what has been gathered of it is left out from now on."""

    worker: int


@dataclass(slots=True)
class Gone:
    """The leader counts the worker as lost; what it has not decided of it is discarded."""

    worker: int


@dataclass(slots=True)
class Pin:
    """Pin the current snapshot for an evaluation (or, with on=False, let it go).

    `keep` lets it go with a copy kept: it is the best so far.
    """

    on: bool
    keep: bool = False


@dataclass(slots=True)
class Mark:
    """Keep, for a checkpoint, the snapshot in which is all that was decided before this."""

    number: int


@dataclass(slots=True)
class End:
    """The run is over; pushes that have no decision by now are not applied.

    With `mark`, a Mark comes after it, and is the last record.
    """

    mark: bool = False


Record = Decision | Forget | Gone | Pin | Mark | End  # of the leader's log


@dataclass(slots=True)
class Withheld:
    """A follower could not apply its part of a push that the leader applied.

    `in_a_row` counts non-finite results since its last good update; 0 when the part is missing
    because the worker died.
    """

    server: int
    worker: int
    seq: int
    in_a_row: int


@dataclass(slots=True)
class Finished:
    """A follower has carried out all that was decided; this is the last that it tells."""

    server: int


@dataclass(slots=True)
class ShardSaved:
    """A follower's driver has written what it had marked; `number`, `entry` as in Saved."""

    server: int
    number: int
    entry: str


# Spans are those of followers, too.
ToServer = (
    FromWorker
    | Lost
    | Joined
    | Missing
    | Sent
    | Arrived
    | Saved
    | Record
    | Withheld
    | ShardSaved
    | Finished
)

# ---- a machine to its host ---------------------------------------------------------------


@dataclass(slots=True)
class Marked:
    """A checkpoint of this server is to be written: `Server.marked` has the arrays.

    They stay as they are until the machine is given `Saved`.

    Attributes:
        number: counted from 0 in a run; the same on all servers.
        version: of this server's shard.
        state: plain data, fit for JSON. The leader's is what a run goes on from.
    """

    number: int
    version: int
    state: Mapping[str, Any]


@dataclass(slots=True)
class ShardsSaved:
    """All followers have saved; by server from the second on, what their drivers had to tell."""

    number: int
    entries: list[str]


@dataclass(slots=True)
class Logged:
    """Numbers a worker logged: name -> (sum, count)."""

    worker: int
    sums: dict[str, tuple[float, int]]


@dataclass(slots=True)
class EpochDone:
    """Each sample of the epoch has been completed."""

    epoch: int
    version: int
    samples: int
    staleness_mean: float


@dataclass(slots=True)
class Evaluated:
    """An evaluation of the snapshot pinned for the epoch when it was done, or soon after.

    Sums are added in block order. `best` says that no earlier one scored as high, where the run
    scores evaluations.
    """

    epoch: int
    version: int
    sums: dict[str, float] = field(default_factory=dict)
    best: bool = False


@dataclass(slots=True)
class PushHandled:
    """One push has been handled by the leader (made only when a trace is asked for)."""

    worker: int
    clock: int
    version_read: int
    version_applied: int
    staleness: int
    applied: bool


HostEvent = Logged | EpochDone | Evaluated | PushHandled | Spans | Marked | ShardsSaved

# What a server hands to its driver: answers go to the worker they name, decisions to every other
# server (Withheld, Lost, ShardSaved and Finished to the leader), host events to the process that
# the machine runs in.
Output = Answer | Lease | Record | Withheld | Lost | ShardSaved | Finished | HostEvent
