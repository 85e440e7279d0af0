"""A watcher of a simulated run: after every event it asserts what must hold, whatever happens."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from fakes import POISON, ExactSGD
from saving import Checkpoint, Saver

from psframe import BSP, SSP, Params, Receipt, WarmStart
from psframe.draws import read_draws
from psframe.errors import MessageError
from psframe.events import Arrived, EpochDone, Evaluated, Leave, PushHandled, Withheld
from psframe.events import Push as PushEvent
from psframe.layout import Array
from psframe.leader import Leader
from psframe.plan import Plan
from psframe.server import Server, ServerMemory
from psframe.simulation import Simulation
from psframe.state import Fields
from psframe.store import HeapBuffers, Store, buffer_count
from psframe.transports.simulated import VirtualTime

__all__ = ["Watcher", "slow_down", "write_slowly"]


def slow_down(virtual: VirtualTime, lag_s: float, rng: random.Random) -> None:
    """Let servers hear of each other up to `lag_s` late: between any two in order, and no more.

    As over MPI, a worker that server 0 has answered may then be at another server before the
    record that came before the answer.
    """
    last: dict[tuple[int, int], float] = defaultdict(float)
    to_server = virtual.to_server

    def slow(server: int, worker: int, event: Any, *, source: int) -> None:
        if worker >= 0:
            to_server(server, worker, event, source=source)
            return
        late = virtual.now + rng.choice([0.0, lag_s, lag_s * rng.random()])
        last[source, server] = late = max(late, last[source, server])
        virtual.at(late, -1, virtual.deliver[server], event)

    virtual.to_server = slow  # type: ignore[method-assign]


def write_slowly(virtual: VirtualTime, rng: random.Random) -> None:
    """Let some gradients arrive at the only server after their messages, in parts.

    What is not there yet is NaN, so that who reads it too early is found out.
    """
    deliver = virtual.deliver[0]

    def announce(event: Any) -> None:
        if not isinstance(event, PushEvent) or rng.random() < 0.4:
            deliver(event)
            return
        slot = virtual.memory.slot(event.worker, event.slot)
        whole, finite, norm = slot.copy(), event.finite, event.norm
        slot[:] = np.nan
        event.arriving, event.finite, event.norm = True, True, 0.0

        def arrive(end: int) -> None:
            last = end == len(whole)
            slot[:end] = whole[:end]
            verdict = (finite, norm) if last else (True, 0.0)
            deliver(Arrived(event.worker, event.slot, end, last, *verdict))

        time = virtual.now
        deliver(event)
        for end in (*sorted(rng.sample(range(len(whole)), rng.randrange(4))), len(whole)):
            time += rng.choice([0.0, 0.5, rng.expovariate(1.0)])
            virtual.at(time, event.worker, arrive, end)

    virtual.deliver[0] = announce


class Watcher:
    """Keeps its own books of a run and compares them with those of the machines.

    Args:
        plan: of a run whose optimizer is an ExactSGD.
        optimizer: that one.
        workers: W.
    """

    ahead: tuple[int, ...] = (0,)  # by how much a mark's version may be ahead of the last push's

    def __init__(self, plan: Plan, optimizer: ExactSGD, workers: int) -> None:
        self.plan = plan
        self.optimizer = optimizer
        self.in_rounds = isinstance(plan.mode, (BSP, WarmStart))  # at times
        self.shards = plan.layout.shards(plan.servers)
        self.rows: list[PushHandled] = []
        self.grads: list[list[Array]] = [[] for _ in range(workers)]  # as pushed
        self.read: list[list[int]] = [[] for _ in range(workers)]  # the version each is of
        self.receipts: dict[tuple[int, int], Receipt] = {}
        self.exhausted: set[int] = set()  # plans of which some worker was told so
        self.epochs: list[EpochDone] = []
        self.evaluated: list[Evaluated] = []
        self.withheld: list[set[tuple[int, int]]] = [set() for _ in range(plan.servers)]
        self.saver: Saver | None = None
        # By mark: how many rows were handled before it, the blocks that were completed, and whether
        # the run was over.
        self.cuts: dict[int, tuple[int, set[tuple[int, int]], bool]] = {}
        self.draws: list[list[Any]] = [[] for _ in range(workers)]  # with each push
        self._seqs: list[list[int]] = [[] for _ in range(workers)]  # of pushes at server 0
        self.deaths = 0
        self.arrived = 0
        self._left = [False] * workers
        self._steps = [0] * workers
        self._gained = [0] * workers  # steps that a replacement did not have to make, or lost ones
        self._version = [0] * plan.servers
        self._leasing: dict[int, tuple[int, int, Array]] = {}
        self._samples: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        self._blocks: set[tuple[int, int]] = set()
        self._using: dict[int, tuple[Params, bytes]] = {}
        self._pins: dict[tuple[int, int, int], list[int]] = {}  # by (plan, epoch, version)
        self._held: list[dict[int, bytes]] = [{} for _ in range(plan.servers)]

    # ---- attaching -------------------------------------------------------------------------

    def attach(self, simulation: Simulation) -> None:
        self.machines = simulation.machines
        leader = self.machines[0]
        assert isinstance(leader, Leader)
        self.leader = leader
        for server, machine in enumerate(self.machines):
            self._watch_store(server, machine.store)
            if server:
                self._watch_withheld(server, machine)
        self._watch_illegal()
        self._watch_leases()
        self._watch_marks()
        virtual = simulation._virtual
        for server, deliver in enumerate(virtual.deliver):
            virtual.deliver[server] = self._tap(server, deliver)

    def _watch_withheld(self, server: int, machine: Server) -> None:
        """Know at once what the leader may hear late: that a follower's shard lacks an update."""
        handle = machine.handle

        def watched(event: Any) -> list[Any]:
            out = handle(event)
            mine = (e for e in out if isinstance(e, Withheld))
            self.withheld[server].update((e.worker, e.seq) for e in mine)
            return out

        machine.handle = watched  # type: ignore[method-assign]

    def _watch_illegal(self) -> None:
        """Forget a push that the leader refuses as illegal: nothing has been changed by it."""
        leader, handle = self.leader, self.leader.handle

        def watched(event: Any) -> list[Any]:
            try:
                return handle(event)
            except MessageError:
                self.arrived -= isinstance(event, PushEvent)
                raise

        leader.handle = watched  # type: ignore[method-assign]

    def _watch_store(self, server: int, store: Store) -> None:
        held, hold, release = self._held[server], store.hold, store.release
        replace = store.replace

        def watched_hold(on_host: bool = True) -> int | None:
            index = hold(on_host)
            assert index is not None
            assert store.buffer(index).tobytes() == self.version(server, store.version)
            held[index] = store.buffer(index).tobytes()
            return index

        def watched_release(index: int) -> None:
            assert held[index] == store.buffer(index).tobytes(), "a held buffer was written"
            release(index)
            if not store._holds[index]:
                del held[index]

        def watched_replace(index: int, grad: Array) -> int:
            assert held[index] == store.buffer(index).tobytes(), "a held buffer was written"
            if store._holds[index] == 1:
                del held[index]  # it may be the very one that is written next
            target = replace(index, grad)
            if target >= 0:
                assert store.buffer(target).tobytes() == self.version(server, store.version)
                held[target] = store.buffer(target).tobytes()
            return target

        def guard(out: Array) -> None:
            for index in (*held, store.current):
                assert not np.shares_memory(out, store.buffer(index)), f"buffer {index} is in use"

        store.hold = watched_hold  # type: ignore[method-assign]
        store.release = watched_release  # type: ignore[method-assign]
        store.replace = watched_replace  # type: ignore[method-assign]
        self.optimizer.rules[server].guard = guard

    def _watch_leases(self) -> None:
        book = self.leader._book
        complete = book.complete

        def watched_complete(worker: int) -> tuple[int, int] | None:
            hands = list(book._hands[worker])
            assert len(hands) <= 2
            done = complete(worker)
            if len(hands) > len(book._hands[worker]):
                hand = hands[0]
                block = (hand.plan, hand.block)
                assert block not in self._blocks, f"block {block} completed twice"
                self._blocks.add(block)
                plan, epoch, indices = self._leasing[worker]
                assert plan == hand.plan
                self._samples[plan, epoch].update(indices.tolist())
            return done

        book.complete = watched_complete  # type: ignore[method-assign]

    def _watch_marks(self) -> None:
        leader, keep = self.leader, self.leader._keep

        def watched(number: int, state: Any) -> Any:
            # The rows of this very event have still to be told.
            rows = len(self.rows) + sum(isinstance(out, PushHandled) for out in leader._out)
            self.cuts[number] = (rows, set(self._blocks), leader.stopped)
            return keep(number, state)

        leader._keep = watched  # type: ignore[method-assign]

    def _tap(self, server: int, deliver: Callable[[Any], None]) -> Callable[[Any], None]:
        def tapped(event: Any) -> None:
            if server == 0 and isinstance(event, PushEvent):
                self.arrived += 1
                self._seqs[event.worker].append(event.seq)
            if server == 0 and isinstance(event, Leave):
                self._left[event.worker] = True
            deliver(event)

        return tapped

    # ---- what workers tell -----------------------------------------------------------------

    def pushes(self, worker: int, grad: Array, version: int) -> int:
        """The worker is about to push; returns the number of the push, from 0."""
        self.grads[worker].append(grad)
        self.read[worker].append(version)
        return len(self.grads[worker]) - 1

    def replaced(self, worker: int) -> None:
        """Another one begins in the worker's place; what had not been handled has been lost."""
        steps = self._steps[worker]
        for of_worker in (self.grads, self.read, self.draws, self._seqs):
            del of_worker[worker][steps:]  # type: ignore[attr-defined]
        self.receipts = {
            (w, k): one for (w, k), one in self.receipts.items() if w != worker or k < steps
        }
        self._gained[worker] = self.leader.policy.clocks[worker] - steps
        self._left[worker] = False
        self._using.pop(worker, None)
        self._leasing.pop(worker, None)

    def pulled(self, worker: int, params: Params) -> None:
        """Each shard of a pull is one version, all of it."""
        self._using.pop(worker, None)
        if self.suspected(worker):
            return  # what it held has been taken from it
        flat = self.plan.layout.flatten(params)
        for server, (begin, end) in enumerate(self.shards):
            assert flat[begin:end].tobytes() == self.version(server, params.versions[server])
        if self.plan.mode == BSP(0) and not any(self.withheld):
            assert len(set(params.versions)) == 1, "shards of different rounds"
        self._using[worker] = (params, flat.tobytes())

    def pinned(self, worker: int, epoch: tuple[int, int], params: Params) -> None:
        """Whoever evaluates a plan's epoch does so on the same versions of all shards.

        One that was put off begins again, on the version of that time.
        """
        if not self.suspected(worker):
            key = (*epoch, params.version)
            versions = self._pins.setdefault(key, list(params.versions))
            assert list(params.versions) == versions, "blocks of one evaluation on several pins"

    def still(self, worker: int) -> None:
        """What the worker computes on has not changed under its hands."""
        if worker in self._using and not self.suspected(worker):
            params, flat = self._using[worker]
            assert self.plan.layout.flatten(params).tobytes() == flat, "a snapshot changed"

    def suspected(self, worker: int) -> bool:
        """Whether some server takes the worker for dead."""
        return any(machine.gone[worker] for machine in self.machines)

    def leased(self, worker: int, plan: int, epoch: int, indices: Array) -> None:
        self._leasing[worker] = (plan, epoch, indices)

    def version(self, server: int, version: int) -> bytes:
        """The bytes of a shard at a version."""
        if version == 0:
            begin, end = self.shards[server]
            return self.plan.initial[begin:end].tobytes()
        return self.optimizer.rules[server].history[version - 1]

    # ---- after every event -----------------------------------------------------------------

    def observe(self, event: Any) -> None:
        if isinstance(event, EpochDone):
            self.epochs.append(event)
        elif isinstance(event, Evaluated):
            self.evaluated.append(event)
        elif isinstance(event, PushHandled):
            self._handled(event)

    def inspect(self, server: int, machine: Server) -> None:
        store = machine.store
        assert self._version[server] <= store.version, "the version went back"
        self._version[server] = store.version
        assert store.params.tobytes() == self.version(server, store.version)
        for index, data in self._held[server].items():
            assert store.buffer(index).tobytes() == data, "a held buffer was written"
        assert all(len(inbox) <= 10 for inbox in machine._inbox)
        if server == 0:
            self._check_ledger(queued=True)
            self._check_pace()

    def _handled(self, row: PushHandled) -> None:
        worker = row.worker
        assert not self.leader.lost[worker], "a push of a worker that counts as lost"
        k = self._steps[worker]
        self._steps[worker] += 1
        self.rows.append(row)
        assert row.version_read == self.read[worker][k]
        assert row.staleness == row.version_applied - row.applied - row.version_read >= 0
        if not self.in_rounds:
            assert row.clock == k + self._gained[worker]

    def _check_ledger(self, *, queued: bool) -> None:
        ledger = self.leader.ledger.ledger()
        waiting = sum(
            isinstance(event, PushEvent) and event.receipt is None
            for inbox in self.leader._inbox
            for event in inbox
        )
        assert queued or not waiting
        assert ledger.received == self.arrived
        settled = ledger.applied + ledger.refused + ledger.dropped + ledger.lost + ledger.stopped
        assert ledger.received == settled + waiting, ledger
        assert ledger.applied == sum(self.leader.staleness.values())

    def _check_pace(self) -> None:
        mode = self.plan.mode
        live = [w for w, gone in enumerate(self.leader.gone) if not gone]
        if isinstance(mode, SSP) and live:
            steps = [self._steps[w] + self._gained[w] for w in live]
            assert max(steps) <= min(steps) + mode.staleness + 1, steps
        if isinstance(mode, BSP) and live:
            policy = self.leader.policy
            for w in live:
                assert policy.clocks[w] <= policy._round + 1  # type: ignore[attr-defined]

    # ---- at the end ------------------------------------------------------------------------

    def finish(self) -> None:
        """Nothing is left behind, and what was done is what the trace says was done."""
        for server, machine in enumerate(self.machines):
            assert machine.finished
            store = machine.store
            assert store.held == 0
            assert sorted([*store._free, store.current]) == list(
                range(buffer_count(machine.workers))
            )
            assert not self._held[server]
            assert not any(machine._inbox)
            assert not machine._blocked
        self._check_ledger(queued=False)
        self._check_versions()
        self._check_receipts()
        self._check_replay()
        self._check_epochs()
        self._check_cuts()

    def _check_versions(self) -> None:
        version = self.leader.store.version
        assert self.plan.max_updates is None or version <= self.plan.max_updates
        partial = set().union(*self.withheld)
        assert self.leader.ledger.ledger().partial == len(partial)
        for server, machine in enumerate(self.machines[1:], 1):
            if self.in_rounds:
                assert machine.store.version <= version
                if not self.withheld[server]:
                    assert machine.store.version == version
            else:
                assert machine.store.version == version - len(self.withheld[server])

    def _check_receipts(self) -> None:
        kth: Counter[int] = Counter()
        rows = {}
        for row in self.rows:
            rows[row.worker, kth[row.worker]] = row
            kth[row.worker] += 1
        if not self.in_rounds:  # there a round is refused for one of them
            for (worker, k), row in rows.items():
                grad = self.grads[worker][k]
                bad = not np.isfinite(grad).all() or bool((grad == POISON).any())
                assert row.applied or bad, "a good gradient was refused"
        for push, receipt in self.receipts.items():
            handled = rows.get(push)
            if handled is None:
                assert receipt.reason in ("stopped", "lost")
                assert not receipt.applied
            elif receipt.reason in ("stopped", "lost") and self._was_lost(push[0]):
                assert not receipt.applied  # one server ended it before another's answer was there
            else:
                assert receipt.applied == handled.applied == (not receipt.reason)
                assert receipt.version == handled.version_applied
                assert receipt.staleness == handled.staleness

    def _was_lost(self, worker: int) -> bool:
        return any(machine.lost[worker] for machine in self.machines)

    def _check_replay(self) -> None:
        """Server 0's versions are those of one process that does what the trace says."""
        whole = not any(self.withheld)
        flat = self.plan.initial.copy()
        kth: Counter[int] = Counter()
        round_: dict[int, list[tuple[int, Array]]] = defaultdict(list)
        for row in self.rows:
            grad = self.grads[row.worker][kth[row.worker]]
            kth[row.worker] += 1
            if row.applied:
                round_[row.version_applied].append((row.worker, grad))
        assert sorted(round_) == list(range(1, self.leader.store.version + 1))
        begin, end = self.shards[0]
        for version in sorted(round_):
            members = [worker for worker, _ in round_[version]]
            assert members == sorted(set(members)), "a round is summed in worker order"
            assert len(members) == 1 or self.in_rounds
            mean = round_[version][0][1]
            for _, grad in round_[version][1:]:
                mean = mean + grad
            flat = flat - self.optimizer.lr * (mean / len(members))
            assert flat[begin:end].tobytes() == self.version(0, version)
        if whole:
            for machine, (begin, end) in zip(self.machines, self.shards, strict=True):
                assert machine.store.params.tobytes() == flat[begin:end].tobytes()

    def _check_cuts(self) -> None:
        """A mark has in it what the leader had handled before it, on every server the same."""
        if self.saver is None:
            return
        assert len(self.saver.checkpoints) == len(self.cuts)
        for one in self.saver.checkpoints.values():
            self._check_round_trip(one)
            assert len(one.shards) == self.plan.servers, "a server has not marked itself"
            n_rows, blocks, stopped = self.cuts[one.number]
            rows = self.rows[:n_rows]
            assert one.version == one.state["version"]
            assert one.version - (rows[-1].version_applied if rows else 0) in self.ahead
            for server in range(self.plan.servers):
                self._check_shard(one, server, rows)
            plans = {plan["plan"]: plan for plan in one.state["leases"]["plans"]}
            completed = {
                (number, block)
                for number, plan in plans.items()
                for block in set(range(plan["next_block"])) - set(plan["returned"])
            }
            assert completed == blocks
            if not stopped:
                self._check_draws(one, rows)

    def _check_round_trip(self, one: Checkpoint) -> None:
        """A leader that goes on from a state has that state."""
        whole = one.resume()
        workers = len(one.state["policy"]["clocks"])
        nothing = np.empty(0)
        memory = ServerMemory(lambda *_: nothing, lambda _: nothing, [True] * workers)
        buffers = HeapBuffers(buffer_count(workers), *self._shape(0))
        plan = dataclasses.replace(self.plan, max_updates=None)  # or it would be over
        leader = plan.build_server(0, workers, buffers, memory, resume=whole)
        assert isinstance(leader, Leader)
        again = json.loads(json.dumps(leader.state()))
        policy, before = again.pop("policy"), dict(one.state)
        assert policy["round"] == before.pop("policy")["round"]
        before["refusals"] = min(before["refusals"], 9 * workers)
        assert again == before

    def _shape(self, server: int) -> tuple[int, Any]:
        begin, end = self.shards[server]
        return end - begin, self.plan.layout.dtype

    def _check_shard(self, one: Checkpoint, server: int, rows: list[PushHandled]) -> None:
        begin, end = self.shards[server]
        flat = self.plan.initial[begin:end].copy()
        kth: Counter[int] = Counter()
        updates: dict[int, list[Array]] = defaultdict(list)
        withheld = 0
        for row in rows:
            k = kth[row.worker]
            kth[row.worker] += 1
            if row.applied and (row.worker, self._seqs[row.worker][k]) in self.withheld[server]:
                withheld += 1
            elif row.applied:
                updates[row.version_applied].append(self.grads[row.worker][k][begin:end])
        if withheld and self.in_rounds:
            return  # its means are of fewer
        for _, grads in sorted(updates.items()):
            mean = grads[0]
            for grad in grads[1:]:
                mean = mean + grad
            flat = flat - self.optimizer.lr * (mean / len(grads))
        assert one.shards[server]["params"].tobytes() == flat.tobytes(), f"server {server}"
        assert one.versions[server] == len(updates)

    def _check_draws(self, one: Checkpoint, rows: list[PushHandled]) -> None:
        steps = Counter(row.worker for row in rows)
        expected = {w: self.draws[w][n - 1] for w, n in steps.items()}
        found = read_draws(Fields(one.state))
        assert found == {w: numbers for w, numbers in expected.items() if numbers is not None}

    def _check_epochs(self) -> None:
        book = self.leader._book
        for plan in self.exhausted:
            spec = book._plans[plan].spec
            for epoch in range(spec.epochs):
                assert self._samples[plan, epoch] == Counter(range(spec.n_samples)), (plan, epoch)
        for samples in self._samples.values():
            assert max(samples.values()) == 1, "a sample was completed twice"
        done = Counter((e.epoch, e.samples) for e in self.epochs)
        complete: Counter[tuple[int, int]] = Counter()
        for (plan, epoch), samples in self._samples.items():
            n = book._plans[plan].spec.n_samples
            complete[epoch, n] += len(samples) == n
        assert done == +complete
