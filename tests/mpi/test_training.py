"""The Trainer on ranks: batches in a thread, the best parameters, predictions, a timeline."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import optim
from psframe.data import Dataset, split
from psframe.inference import predict
from psframe.models import MLP, Softmax
from psframe.timetrace import TimeTrace
from psframe.trainer import Trainer

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
ROOT = RANK == 0


def blobs(n: int = 200) -> tuple[Dataset, Dataset]:
    """Make three well separated clusters, and split them; the same on every rank."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = np.array([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])[y] + rng.standard_normal((n, 2))
    return split(Dataset(x.astype(np.float32), y, 3, "blobs"), 0.25)


SERVERS = [servers for servers in (1, 2) if servers < SIZE] or [1]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("servers", SERVERS)
def test_predictions_are_gathered_in_order(servers: int) -> None:
    train, _ = blobs(700)
    model = Softmax((2,), 3)
    params = {"w1": np.array([[1, 0, -1], [0, 1, -1]], np.float32), "b1": np.zeros(3, np.float32)}
    given = params if ROOT else {name: np.zeros_like(p) for name, p in params.items()}
    found = predict(model, given, train, servers=servers)
    assert (found is None) == (not ROOT)
    if found is not None:
        x = train.batch(slice(None))[0]
        np.testing.assert_array_equal(found.labels, model.predict(params, x))
        assert found.probabilities is not None
        expected = model.probabilities(params, x)
        np.testing.assert_allclose(found.probabilities, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.mpi(min_size=2)
def test_that_workers_are_ignored_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    train, test = blobs()
    trainer = Trainer(Softmax((2,), 3), optimizer=optim.SGD(0.1), epochs=1, workers=2)
    trainer.fit(train, test)
    assert caplog.text.count("workers=2 is ignored") == ROOT


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("servers", SERVERS)
@pytest.mark.parametrize("mode", [psframe.Async(), psframe.BSP()], ids=repr)
def test_the_best_parameters_are_kept_on_every_server(servers: int, mode: Any) -> None:
    """A rate that ruins the model in the end; what is kept is a snapshot from before."""
    train, test = blobs()
    train, validation = split(train, 0.2)
    updates = 4 * -(-len(train) // 8) // (SIZE - servers if isinstance(mode, psframe.BSP) else 1)

    def rate(step: int) -> float:
        return 0.1 if step < updates // 2 else 30.0

    trainer = Trainer(
        MLP((2,), 3, hidden=(8,)),
        optimizer=optim.SGD(rate),
        mode=mode,
        batch_size=8,
        epochs=4,
        servers=servers,
        clip_norm=5.0,
    )
    trained = trainer.fit(train, test, validation)
    assert trained.result.is_root == ROOT
    if not ROOT:
        assert trained.accuracy is None
        return
    assert trained.best_epoch is not None
    best = next(epoch for epoch in trained.history if epoch.epoch == trained.best_epoch)
    assert trained.result.kept_version == best.evaluated_version
    assert trained.accuracy == pytest.approx(best.test_accuracy)
    assert trained.accuracy is not None
    assert trained.accuracy > 0.8


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [psframe.Async(), psframe.SSP(1), psframe.BSP()], ids=repr)
def test_blocks_ahead_of_time_are_completed_once(mode: Any) -> None:
    done: list[int] = []

    def work(worker: psframe.Worker) -> None:
        worker.pull()
        for task in worker.tasks(101, 4, epochs=3, prepare=lambda task: task.indices.copy()):
            np.testing.assert_array_equal(task.prepared, task.indices)
            done.extend((1000 * task.epoch + task.indices).tolist())
            worker.push_pull({"w": np.ones(3)})

    result = psframe.run(work, {"w": np.zeros(3)}, optimizer=optim.SGD(0.1), mode=mode)
    counts = np.zeros(3000, np.int64)
    for index, count in Counter(done).items():
        counts[index] = count
    everyone = np.empty_like(counts)
    WORLD.Allreduce(counts, everyone)
    expected = np.zeros(3000, np.int64)
    for epoch in range(3):
        expected[1000 * epoch : 1000 * epoch + 101] = 1
    np.testing.assert_array_equal(everyone, expected)
    assert result.ledger.applied == result.ledger.received


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("servers", SERVERS)
def test_a_timeline_has_a_track_a_rank(tmp_path: Path, servers: int) -> None:
    train, test = blobs()
    trace = TimeTrace()
    trainer = Trainer(
        Softmax((2,), 3),
        optimizer=optim.SGD(0.1),
        epochs=2,
        servers=servers,
        observer=trace,
        spans=True,
    )
    trainer.fit(train, test)
    if not ROOT:
        return
    file = trace.write(tmp_path, servers)
    assert file is not None
    events = json.loads(file.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    names = {rank: {e["name"] for e in spans if e["tid"] == rank} for rank in range(SIZE)}
    assert [names[rank] for rank in range(servers)] == [{"apply"}] * servers
    busy = [found for rank, found in names.items() if rank >= servers and "compute" in found]
    assert busy, names
    assert all({"compute", "push_pull", "lease"} <= found for found in busy)
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in spans)


class BrokenAtTheEnd(Softmax):
    """Learns, and cannot be used."""

    def probabilities(self, params: Any, x: Any) -> Any:
        raise ZeroDivisionError("mine")


@pytest.mark.mpi(min_size=2)
def test_a_failed_evaluation_does_not_lose_the_training(tmp_path: Path) -> None:
    train, test = blobs()
    folder = Path(WORLD.bcast(str(tmp_path)))
    trainer = Trainer(BrokenAtTheEnd((2,), 3), optimizer=optim.SGD(0.1), run_dir=folder)
    trained = trainer.fit(train, test)
    assert trained.failure is not None, "on every rank"
    assert trained.evaluation is None
    if ROOT:
        assert trained.result.params is not None
        assert trained.accuracy == trained.history[-1].test_accuracy
        assert (folder / "checkpoints" / "final.safetensors").exists()
        assert json.loads((folder / "status.json").read_text())["state"] == "failed"
