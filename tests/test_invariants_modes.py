"""The random runs of test_invariants.py in the modes that gather pushes or change their pace."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from test_invariants import Scenario
from watching import Watcher

from psframe import SSP, Async, Buffered, DynamicSSP, Rennala, Ringleader, WarmStart
from psframe.events import PushHandled
from psframe.layout import Array
from psframe.simulation import Simulation
from psframe.store import Store

SEEDS = 400


class BatchWatcher(Watcher):
    """As a watcher, where pushes are gathered: an applied push may leave the version as it is."""

    ahead = (0, 1)  # what was gathered last makes an update of its own

    def attach(self, simulation: Simulation) -> None:
        # What a batch was told to leave out, and after how many rows.
        self.forgotten: list[tuple[int, int]] = []
        super().attach(simulation)
        self._watch_forget(self.leader.store)

    def _watch_forget(self, store: Store) -> None:
        forget = store.forget

        def watched(worker: int) -> None:
            # The rows of this very event have still to be told.
            rows = len(self.rows) + sum(isinstance(o, PushHandled) for o in self.leader._out)
            self.forgotten.append((rows, worker))
            forget(worker)

        store.forget = watched  # type: ignore[method-assign]

    def _handled(self, row: PushHandled) -> None:
        k = self._steps[row.worker]
        before = self.rows[-1].version_applied if self.rows else 0
        self._steps[row.worker] += 1
        self.rows.append(row)
        assert row.version_read == self.read[row.worker][k]
        assert row.staleness == before - row.version_read >= 0
        assert row.version_applied - before in (0, 1)
        assert row.clock == k + self._gained[row.worker]
        if isinstance(self.plan.mode, Rennala):
            assert not (row.applied and row.staleness)

    def _check_versions(self) -> None:
        version = self.leader.store.version
        assert self.plan.max_updates is None or version <= self.plan.max_updates
        for server, machine in enumerate(self.machines):
            assert machine.store.version <= version
            assert not machine.store.pending or self.leader.failure or self.leader.diverged
            if not self.withheld[server]:  # a last update that a shard refuses is nobody's push
                assert machine.store.version >= version - (server > 0)

    def _check_receipts(self) -> None:
        """Those of a batch are told before it is applied."""

    def means(self, rows: list[PushHandled]) -> list[Array]:
        """What each update was made with, as one process would compute it."""
        found: list[Array] = []
        kth: Counter[int] = Counter()
        batch: list[Array] = []
        table: dict[int, Array] = {}
        before = 0
        forgotten = list(self.forgotten)
        for number, row in enumerate(rows):
            while forgotten and forgotten[0][0] <= number:
                table.pop(forgotten.pop(0)[1], None)
            grad = self.grads[row.worker][kth[row.worker]]
            kth[row.worker] += 1
            stepped = row.version_applied > before
            before = row.version_applied
            if not row.applied:
                if np.isfinite(grad).all() and not row.staleness:
                    batch.clear()  # the batch was refused, with the push that completed it
                continue
            batch.append(grad)
            table[row.worker] = grad
            if stepped:
                used = [g for _, g in sorted(table.items())] if self._is_table else batch
                found.append(sum(used[1:], used[0]) / len(used))
                batch = []
        if batch and not self._is_table:
            found.append(sum(batch[1:], batch[0]) / len(batch))
        return found

    @property
    def _is_table(self) -> bool:
        return isinstance(self.plan.mode, Ringleader)

    def _check_replay(self) -> None:
        flat = self.plan.initial.copy()
        means = self.means(self.rows)
        last = self.leader.store.version
        begin, end = self.shards[0]
        assert last <= len(means) <= last + 1  # what was gathered last may be in no update
        for version, mean in enumerate(means[:last], 1):
            flat = flat - self.optimizer.lr * mean
            assert flat[begin:end].tobytes() == self.version(0, version)
        if not any(self.withheld) and len({m.store.version for m in self.machines}) == 1:
            for machine, (begin, end) in zip(self.machines, self.shards, strict=True):
                assert machine.store.params.tobytes() == flat[begin:end].tobytes()

    def _check_shard(self, one: Any, server: int, rows: list[PushHandled]) -> None:
        begin, end = self.shards[server]
        if any(self.withheld) or one.versions[server] != one.version:
            return
        flat = self.plan.initial[begin:end].copy()
        for mean in self.means(rows)[: one.version]:
            flat = flat - self.optimizer.lr * mean[begin:end]
        assert one.shards[server]["params"].tobytes() == flat.tobytes(), f"server {server}"
        assert one.versions[server] == one.version


class Batches(Scenario):
    watcher = BatchWatcher

    def draw_mode(self, rng: random.Random) -> Any:
        batch = rng.randrange(1, 7)
        return rng.choice([Rennala(batch), Buffered(batch), Ringleader()])


class Paces(Scenario):
    def draw_mode(self, rng: random.Random) -> Any:
        low = rng.randrange(3)
        dynamic = DynamicSSP(low, low + rng.randrange(4))
        then = rng.choice([Async(), SSP(low), dynamic])
        return rng.choice([dynamic, WarmStart(rng.randrange(4), then)])


@pytest.mark.parametrize("seed", range(SEEDS), ids=lambda seed: f"seed{seed}")
def test_batches(seed: int) -> None:
    scenario = Batches(seed, faults=bool(seed % 2))
    scenario.run()
    scenario.watch.finish()


@pytest.mark.parametrize("seed", range(SEEDS), ids=lambda seed: f"seed{seed}")
def test_paces(seed: int) -> None:
    scenario = Paces(seed, faults=bool(seed % 2))
    scenario.run()
    scenario.watch.finish()
