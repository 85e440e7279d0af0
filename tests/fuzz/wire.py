"""Fuzz what is read of messages, and what servers make of them.

    python -m pip install atheris
    PYTHONPATH=.:tests python tests/fuzz/wire.py -max_total_time=60

An input is either one message for one link, which only MessageError may come of, or an event that
is the same bytes again; or a short run: messages that workers send to one server or two, legal or
not, with what the servers tell each other and the deaths of workers in between. Then the ledger
must add up after every event and, once all workers are lost, all must be over.
"""

from __future__ import annotations

import io
import itertools
import os
import struct
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(
    include=["psframe.wire", "psframe.server", "psframe.leader", "psframe.follower"]
):
    from fakes import Desk

    from psframe.consistency import BSP, SSP, Async
    from psframe.errors import MessageError
    from psframe.events import (
        Answer,
        Arrived,
        Decision,
        End,
        Finished,
        GiveBack,
        Gone,
        Lease,
        LeaseKind,
        LeaseRequest,
        Leave,
        Log,
        Lost,
        Mark,
        Pin,
        Pull,
        Push,
        Report,
        ShardSaved,
        Spans,
        Stop,
        TaskSpec,
        Withheld,
    )
    from psframe.leader import Leader
    from psframe.roles import handle
    from psframe.wire import HEADER_BYTES, Delivery, Kind, Limits, Link, decode, encode

WORKERS, SHARD_BYTES = 3, 16
ELEMENTS = SHARD_BYTES // 8
WAYS = [
    frozenset(Delivery),
    frozenset({Delivery.IN_PLACE}),
    frozenset({Delivery.INLINE, Delivery.RANGE}),
]
LIMITS = [
    Limits(link, workers, servers, SHARD_BYTES, inline_bytes_max, worker, None, ways)
    for link in Link
    for workers, servers, worker in ((1, 1, None), (WORKERS, 2, None), (WORKERS, 2, 1))
    for inline_bytes_max in (0, SHARD_BYTES)
    for ways in WAYS
]
MODES = [Async(), SSP(0), SSP(1), BSP(), BSP(1)]
_HEADER = struct.Struct("<4sBBHiiqqqdqqq")
_SPEC = struct.Struct("<7q")
_NORMS = (0.0, 1.0, float("inf"), float("nan"), -1.0)
# Of a message in a run: kind, flags, worker, slot, seq, version, release, log, norm.
_LINE_BYTES = 9


def fuzz_message(limits: Limits, data: bytes) -> None:
    try:
        event, delivery, n_payload = decode(data, len(data), limits)
    except MessageError:
        return
    again = encode(event, delivery, n_payload)
    if delivery is Delivery.INLINE:
        again += data[HEADER_BYTES:]
    assert again == data, f"{event} has two encodings"


class House:
    """A leader, perhaps a follower, and what they have told each other and not yet heard."""

    def __init__(self, choice: int) -> None:
        mode = MODES[choice % 5]
        self.servers = 1 + choice // 5 % 2
        self.desks = [Desk(WORKERS, mode, servers=self.servers, trace=True)]
        if self.servers == 2:
            self.desks.append(Desk(WORKERS, mode, follower=True))
        for desk in self.desks:
            desk.slots[:] = 1.0
        to_leader, to_follower = Link.WORKER_TO_LEADER, Link.WORKER_TO_FOLLOWER
        ways = WAYS[0] - {Delivery.STREAMED} if self.servers == 2 else WAYS[0]
        self.limits = [
            Limits(link, WORKERS, self.servers, SHARD_BYTES, SHARD_BYTES, deliveries=ways)
            for link in (to_leader, to_follower)
        ]
        self.between = [
            Limits(Link.FOLLOWER_TO_LEADER, WORKERS, 2),
            Limits(Link.LEADER_TO_FOLLOWER, WORKERS, 2),
        ]
        self.posts: list[deque[bytes]] = [deque(), deque()]  # by the server that they are for
        self.arriving: deque[Push] = deque()
        self.version = [0, 0]

    def play(self, data: bytes) -> None:
        stream = io.BytesIO(data)
        while op := stream.read(1):
            what, server = op[0] & 3, (op[0] >> 2 & 1) % self.servers
            if what < 2:
                self.message(server, stream)
            elif what == 2:
                self.relay(server)
            elif op[0] & 8:
                self.hear(server, Lost((op[0] >> 4) % WORKERS))
            elif self.arriving:
                push = self.arriving.popleft()
                self.hear(0, Arrived(push.worker, push.slot, ELEMENTS, True, True, 1.0))
        for server, worker in itertools.product(range(self.servers), range(WORKERS)):
            self.hear(server, Lost(worker))
        while any(self.posts):
            self.relay(0)
            self.relay(1)
        for desk in self.desks:
            assert desk.machine.finished
            assert not desk.store.held

    def message(self, server: int, stream: io.BytesIO) -> None:
        line = stream.read(_LINE_BYTES)
        if len(line) < _LINE_BYTES:
            return
        kind, flags, worker, slot, seq, version, release, log, norm = line
        payload = stream.read(sum(stream.read(1))) if kind in _LONG else b""
        if kind == Kind.LEASE_REQUEST:
            payload = _SPEC.pack(*payload[:7].ljust(7, b"\1"))
        n_bytes = len(payload) or (SHARD_BYTES if flags & 3 and kind == Kind.PUSH else 0)
        if flags & 3 == Delivery.INLINE and kind == Kind.PUSH:
            payload = bytes(SHARD_BYTES)
        weight = _NORMS[norm % len(_NORMS)]
        numbers = (kind, flags, 0, worker, slot, seq, version, 0, weight, n_bytes, release, log)
        whole = _HEADER.pack(b"PSF1", *numbers) + payload
        try:
            event, delivery, _ = decode(whole, len(whole), self.limits[server])
        except MessageError:
            return  # a transport counts its sender as lost
        if delivery is Delivery.STREAMED:
            assert isinstance(event, Push)
            self.arriving.append(event)
        self.hear(server, event)

    def relay(self, server: int) -> None:
        """A server hears the next thing that the other one has told it."""
        if self.posts[server]:
            message = self.posts[server].popleft()
            event, _, _ = decode(message, len(message), self.between[server])
            self.hear(server, event)

    def hear(self, server: int, event: Any) -> None:
        machine = self.desks[server].machine
        for out in handle(machine, event):
            if isinstance(out, (Withheld, Lost, ShardSaved, Finished)):
                self.posts[0].append(encode(out))
            elif isinstance(out, (Decision, Gone, Pin, Mark, End)):
                self.posts[1].append(encode(out))
        assert machine.store.version >= self.version[server]
        self.version[server] = machine.store.version
        assert all(len(inbox) <= 10 for inbox in machine._inbox)
        if isinstance(machine, Leader):
            check_ledger(machine)


def check_ledger(leader: Leader) -> None:
    ledger = leader.ledger.ledger()
    queued = (event for inbox in leader._inbox for event in inbox)
    waiting = sum(isinstance(event, Push) and event.receipt is None for event in queued)
    settled = ledger.applied + ledger.refused + ledger.dropped + ledger.lost + ledger.stopped
    assert ledger.received == settled + waiting, ledger
    assert ledger.applied == sum(leader.staleness.values())


# Kinds with a payload: its length in a byte, then so many.
_LONG = {Kind.LEASE_REQUEST, Kind.REPORT, Kind.LOG, Kind.LEAVE, Kind.SPANS, Kind.RANDOM_STATE}


def line(event: Any, server: int = 0) -> bytes:
    """Write a worker's message as `House.message` reads it."""
    message = encode(event)
    fields = dict(zip(_NAMES, _HEADER.unpack(message[:HEADER_BYTES]), strict=True))
    norm = 1 if fields["norm"] else 0
    names = ("kind", "flags", "worker", "slot", "seq", "version", "aux", "log")
    head = bytes([server << 2, *(fields[name] for name in names), norm])
    if fields["kind"] not in _LONG:
        return head
    payload = message[HEADER_BYTES:]
    if fields["kind"] == Kind.LEASE_REQUEST:
        payload = bytes(_SPEC.unpack(payload))
    return head + bytes([len(payload)]) + payload


_NAMES = (
    "magic kind flags reason worker slot seq version staleness norm payload_bytes aux log"
).split()
RELAYS = bytes([2, 6, 2, 6])


def examples() -> Iterator[bytes]:
    """Inputs to begin with: a message of each kind, and runs in every mode."""
    spec = TaskSpec(2, 1, 1, False, 1, 1)
    words = [
        Pull(0, 0, False, 0),
        Push(0, 1, 0, 0, True, 1.0, True, 1),
        Log(0, {"loss": (1.0, 1)}),
        LeaseRequest(0, 2, 0, spec),
        LeaseRequest(1, 0, 0, spec, True),
        GiveBack(1, 0),
        Push(0, 3, 1, 0, True, 1.0, False, 0),
        LeaseRequest(0, 4, 0, spec),
        Report(0, {"n": 1.0}),
        Pull(0, 5, True, 1),
        Stop(1),
        Leave(0),
    ]
    for choice in range(10):
        run = b""
        for event in words:
            for server in range(1 + choice // 5):
                if server == 0 or isinstance(event, (Push, Pull, Leave)):
                    run += line(event, server)
            run += RELAYS
        yield bytes([255, choice]) + run
    others = [Answer(0, 1), Lease(0, 1, LeaseKind.TRAIN), Decision([(0, 1), (1, 2)]), Gone(0)]
    others += [Pin(True), End(), Mark(0), Withheld(1, 0, 1, 0), Lost(0), Finished(1)]
    others += [ShardSaved(1, 0, "entry"), Spans(0, 1.0, [(0, 0.0, 1.0)])]
    for index, limits in enumerate(LIMITS):
        for event in (*words, *others):
            message = encode(event)
            if message[4] in limits.kinds:
                yield bytes([index]) + message


def fuzz(seeds: Path) -> None:
    for number, example in enumerate(examples()):
        (seeds / str(number)).write_bytes(example)

    def one(data: bytes) -> None:
        if not data:
            return
        if data[0] >= 128:
            House(data[1] if len(data) > 1 else 0).play(data[2:])
        else:
            fuzz_message(LIMITS[data[0] % len(LIMITS)], data[1:])

    options = ["-max_len=2048", "-rss_limit_mb=1024"]
    atheris.Setup([sys.argv[0], str(seeds), *options, *sys.argv[1:]], one)
    atheris.Fuzz()


def main() -> None:
    """Fuzz in a child: the fuzzer leaves its process without a word to those that wait in it."""
    with tempfile.TemporaryDirectory() as seeds:
        child = os.fork()
        if child == 0:
            fuzz(Path(seeds))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status)


if __name__ == "__main__":
    main()
