"""Runs that leave checkpoints, and go on from them; in threads, where one can look at all of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import psframe
from psframe import saving
from psframe.cadence import parse_cadence
from psframe.checkpoint import committed_versions, open_checkpoint
from psframe.data import Parts, load, prepare
from psframe.errors import CheckpointError
from psframe.events import EpochDone
from psframe.interrupts import noting_requests
from psframe.layout import Layout
from psframe.models import create
from psframe.trainer import Trainer

PARAMS = {"w": np.linspace(-1, 1, 10, dtype=np.float32), "b": np.zeros(3, np.float32)}
SAMPLES, BATCH, EPOCHS = 48, 4, 4
UPDATES = SAMPLES // BATCH * EPOCHS


def work(worker: psframe.Worker) -> None:
    """Gradients that depend on the parameters, on the samples, and on the worker's numbers."""
    params = worker.pull()
    for indices in worker.leases(SAMPLES, BATCH, epochs=EPOCHS):
        noise = worker.rng.standard_normal(10).astype(np.float32)
        grads = {
            "w": np.tanh(params["w"]) + np.float32(1e-2) * noise,
            "b": params["b"] + np.float32(indices.mean() * 1e-3),
        }
        params = worker.push_pull(grads)


def run(**more: Any) -> psframe.Result:
    more.setdefault("optimizer", psframe.optim.Adam(lr=0.01))
    return psframe.run(work, PARAMS, seed=3, **more)


def same(a: psframe.Result, b: psframe.Result) -> bool:
    assert a.params is not None
    assert b.params is not None
    return all(a.params[name].tobytes() == b.params[name].tobytes() for name in PARAMS)


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found


def versions(folder: Path) -> list[int]:
    return committed_versions(folder / "checkpoints")


SCHEDULE = psframe.optim.schedules.Cosine(0.1, UPDATES)
OPTIMIZERS = [
    psframe.optim.SGD(SCHEDULE, momentum=0.9),
    psframe.optim.Adam(lr=0.01),
    psframe.optim.Adagrad(lr=0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("mode", [psframe.Async(), psframe.SSP(1), psframe.BSP()], ids=repr)
@pytest.mark.parametrize("stops", [(1,), (13,), (12, 25), (UPDATES - 1,)], ids=str)
def test_one_worker_stopped_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, optimizer: Any, mode: Any, stops: tuple[int, ...]
) -> None:
    whole = run(optimizer=optimizer, mode=mode)
    more: dict[str, Any] = {"optimizer": optimizer, "mode": mode, "run_dir": tmp_path / "run"}
    for number, stop in enumerate(stops):
        part = run(max_updates=stop, checkpoint_every=1000, resume=number > 0, **more)
        assert part.version == stop
        assert versions(tmp_path / "run")[-1] == stop
    last = run(resume=True, checkpoint_every=1000, **more)
    assert last.version == whole.version == UPDATES
    assert same(last, whole)
    assert last.ledger.applied == UPDATES
    assert int(last.staleness.sum()) == UPDATES


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_run_goes_on_with_another_number_of_servers(
    tmp_path: Path, before: int, after: int
) -> None:
    whole = run()
    run(max_updates=17, checkpoint_every=8, run_dir=tmp_path, servers=before)
    last = run(resume=True, checkpoint_every=8, run_dir=tmp_path, servers=after)
    assert same(last, whole)
    with open_checkpoint(
        tmp_path / "checkpoints", versions(tmp_path)[-1], Layout.of(PARAMS)
    ) as reader:
        assert len(reader.manifest.shards) == after


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (3, 3)])
def test_every_sample_of_an_epoch_is_done_once_whoever_goes_on(
    tmp_path: Path, before: int, after: int
) -> None:
    lock = threading.Lock()
    seen: dict[int, list[int]] = {}  # by version after the push, what it was about

    def noting(worker: psframe.Worker) -> None:
        for indices in worker.leases(SAMPLES, BATCH, epochs=1):
            worker.pull()
            receipt = worker.push({name: np.ones_like(p) for name, p in PARAMS.items()}).wait()
            if receipt.applied:
                with lock:
                    seen[receipt.version] = indices.tolist()

    def go(workers: int, **more: Any) -> None:
        psframe.run(
            noting,
            PARAMS,
            optimizer=psframe.optim.SGD(0.1),
            workers=workers,
            run_dir=tmp_path,
            **more,
        )

    go(before, max_updates=5, checkpoint_every=1000)
    assert sorted(seen) == [1, 2, 3, 4, 5]
    go(after, resume=True)
    done = [sample for indices in seen.values() for sample in indices]
    assert sorted(done) == list(range(SAMPLES))


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("nesterov", [False, True])
def test_each_worker_goes_on_with_its_velocity_whoever_else_is_there(
    tmp_path: Path, nesterov: bool, servers: int
) -> None:
    """Worker i always pushes i + 1: only how often each has pushed decides the parameters."""
    lr, beta, stays = 0.01, 0.75, ((3, 4), (2, 5), (4, 3))
    optimizer: Any = psframe.optim.DANAZero if nesterov else psframe.optim.WorkerMomentum
    expected, velocities = 0.0, [0.0] * 4
    version = 0
    for workers, pushes in stays:

        def some(worker: psframe.Worker, pushes: int = pushes) -> None:
            for _ in range(pushes):
                worker.pull()
                grads = {name: np.full_like(p, worker.index + 1) for name, p in PARAMS.items()}
                assert worker.push(grads).wait().applied

        result = psframe.run(
            some,
            PARAMS,
            optimizer=optimizer(lr, beta),
            workers=workers,
            servers=servers,
            run_dir=tmp_path,
            checkpoint_every=1000,
            resume=True,
        )
        for worker in range(workers):
            for _ in range(pushes):
                grad = worker + 1
                velocities[worker] = beta * velocities[worker] + grad
                expected -= lr * (
                    grad + beta * velocities[worker] if nesterov else velocities[worker]
                )
        version += workers * pushes
        assert result.version == version
        assert result.params is not None
        for name, first in PARAMS.items():
            np.testing.assert_allclose(result.params[name], first + expected, rtol=1e-4)


def test_checkpoints_come_at_multiples_and_at_the_end_and_few_stay(tmp_path: Path) -> None:
    run(checkpoint_every=5, run_dir=tmp_path, keep_checkpoints=2)
    found = versions(tmp_path)
    assert len(found) == 2
    assert found[-1] == UPDATES
    assert found[0] % 5 == 0


def test_checkpoints_come_by_the_clock(tmp_path: Path) -> None:
    enough = threading.Event()

    def until_there_is_one(worker: psframe.Worker) -> None:
        params = worker.pull()
        while not enough.is_set():
            params = worker.push_pull({name: params[name] for name in PARAMS})

    class Look:
        def __call__(self, event: Any) -> None:
            pass

        def tick(self) -> None:
            if versions(tmp_path):
                enough.set()

    psframe.run(
        until_there_is_one,
        PARAMS,
        optimizer=psframe.optim.SGD(0.1),
        run_dir=tmp_path,
        checkpoint_every="0.05s",
        observer=Look(),
    )
    assert enough.is_set()


def test_without_a_word_a_run_leaves_no_checkpoint(tmp_path: Path) -> None:
    run(run_dir=tmp_path)
    assert versions(tmp_path) == []


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path: Path, name: str) -> None:
    def endless(worker: psframe.Worker) -> None:
        params = worker.pull()
        while True:
            params = worker.push_pull({name: params[name] for name in PARAMS})
            if params.version == 7:
                for _ in range(2):  # the second one changes nothing
                    os.kill(os.getpid(), getattr(signal, name))

    def go(**more: Any) -> None:
        psframe.run(endless, PARAMS, optimizer=psframe.optim.SGD(0.1), run_dir=tmp_path, **more)

    with pytest.raises(psframe.Interrupted, match=f"{name} has ended the run at version") as caught:
        go()
    (version,) = versions(tmp_path)
    assert version >= 7
    assert f"version {version} is in a checkpoint" in str(caught.value)
    found = status(tmp_path)
    assert found["state"] == "interrupted"
    assert found["updates"] == version
    assert name in found["reason"]


def test_an_interrupt_says_what_is_in_a_checkpoint(tmp_path: Path) -> None:
    def endless(worker: psframe.Worker) -> None:
        params = worker.pull()
        while True:
            params = worker.push_pull({name: params[name] for name in PARAMS})
            if params.version == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    def go(**more: Any) -> None:
        psframe.run(endless, PARAMS, optimizer=psframe.optim.SGD(0.1), **more)

    with pytest.raises(KeyboardInterrupt, match="SIGTERM has ended the run at version") as caught:
        go(run_dir=tmp_path)
    (version,) = versions(tmp_path)
    said = f"version {version} is in a checkpoint, and --resume (resume=True) goes on from it"
    assert said in str(caught.value)
    assert status(tmp_path)["reason"] == "SIGTERM received"
    with pytest.raises(KeyboardInterrupt, match="there is no checkpoint of it"):
        go()


def test_a_signal_without_a_run_directory_ends_the_run(tmp_path: Path) -> None:
    def endless(worker: psframe.Worker) -> None:
        params = worker.pull()
        os.kill(os.getpid(), signal.SIGUSR1)
        while True:
            params = worker.push_pull({name: params[name] for name in PARAMS})

    with pytest.raises(psframe.Interrupted, match="there is no checkpoint of it"):
        psframe.run(endless, PARAMS, optimizer=psframe.optim.SGD(0.1))


def test_ctrl_c_leaves_a_checkpoint(tmp_path: Path) -> None:
    def interrupted(worker: psframe.Worker) -> None:
        params = worker.pull()
        for number in range(1000):
            params = worker.push_pull({name: params[name] for name in PARAMS})
            if number == 5:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        psframe.run(interrupted, PARAMS, optimizer=psframe.optim.SGD(0.1), run_dir=tmp_path)
    assert status(tmp_path)["state"] == "interrupted"
    assert len(versions(tmp_path)) == 1


def test_a_disk_that_refuses_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*arguments: Any, **more: Any) -> Any:
        if arguments[1] > 20:
            raise CheckpointError("v21: cannot be written: No space left on device")
        return write(*arguments, **more)

    write = saving.write_shard
    monkeypatch.setattr(saving, "write_shard", refuses)
    result = run(run_dir=tmp_path, checkpoint_every=10)
    assert result.version == UPDATES
    assert "No space left on device; the run goes on" in caplog.text
    found = status(tmp_path)
    assert found["state"] == "completed"
    assert f"the checkpoint at version {UPDATES} failed" in found["reason"]
    assert versions(tmp_path)
    assert versions(tmp_path)[-1] <= 20


def test_a_follower_s_disk_that_refuses_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: Any, **more: Any) -> Any:
        if arguments[2] == 1:
            raise CheckpointError("shard 1: cannot be written: Input/output error")
        return write(*arguments, **more)

    write = saving.write_shard
    monkeypatch.setattr(saving, "write_shard", refuses)
    assert run(run_dir=tmp_path, checkpoint_every=10, servers=2).version == UPDATES
    assert "Input/output error" in status(tmp_path)["reason"]
    assert versions(tmp_path) == []
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_nobody_expects_in_the_writing_thread_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*arguments: Any, **more: Any) -> Any:
        raise MemoryError("of all things")

    monkeypatch.setattr(saving, "write_shard", breaks)
    assert run(run_dir=tmp_path, checkpoint_every=10).version == UPDATES
    assert "MemoryError: of all things" in status(tmp_path)["reason"]


def test_a_checkpoint_that_does_not_verify_is_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run()
    run(max_updates=20, checkpoint_every=1000, run_dir=tmp_path)
    run(max_updates=30, checkpoint_every=1000, run_dir=tmp_path, resume=True)
    assert versions(tmp_path) == [20, 30]
    shard = tmp_path / "checkpoints" / "v000000030" / "shard-0-of-1.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert same(run(run_dir=tmp_path, resume=True), whole)
    assert "v000000030" in caplog.text


def epochs_told(folder: Path) -> list[tuple[int, int]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [line["time_s"] for line in found]
    assert times == sorted(times)
    return [(line["epoch"], line["update"]) for line in found]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_metrics_of_an_interrupted_run_that_goes_on_lack_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Wherever in an epoch's end the signal comes; what is told early is told once."""

    def interrupt(event: Any) -> None:
        if isinstance(event, EpochDone) and event.epoch == 1:
            signal.raise_signal(number)

    run(run_dir=tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, psframe.Interrupted)):
        run(run_dir=tmp_path / "parts", observer=interrupt)
    run(run_dir=tmp_path / "parts", resume=True)
    assert epochs_told(tmp_path / "parts") == epochs_told(tmp_path / "whole")


def test_metrics_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    run(run_dir=tmp_path / "whole")
    run(run_dir=tmp_path / "parts", max_updates=30, checkpoint_every=1000)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"time_s": 1e9, "update": 40}\n')
    run(run_dir=tmp_path / "parts", resume=True)
    assert epochs_told(tmp_path / "parts") == epochs_told(tmp_path / "whole")
    assert "1e9" in (tmp_path / "parts" / "metrics.undone.jsonl").read_text()


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"checkpoint_every": 5}, "checkpoint_every: needs a run_dir"),
        ({"resume": True}, "resume: needs a run_dir"),
        ({"resume": True, "overwrite": True, "run_dir": "x"}, "resume: goes on with what"),
        ({"keep_checkpoints": 0, "run_dir": "x"}, "keep_checkpoints: expected at least 1"),
        ({"checkpoint_every": 0, "run_dir": "x"}, "checkpoint_every: expected 1 to"),
        ({"checkpoint_every": "5 days", "run_dir": "x"}, "checkpoint_every: expected a number of"),
        ({"checkpoint_every": "0s", "run_dir": "x"}, "expected more than 0 seconds"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=text):
        run(**more)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [True, 1.5, None, b"30s"])
def test_a_cadence_of_another_type_is_named(value: object) -> None:
    with pytest.raises(TypeError, match="checkpoint_every: expected a number of updates"):
        parse_cadence(value)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (7, (7, None)),
        ("7", (7, None)),
        (np.int64(7), (7, None)),
        ("30s", (None, 30.0)),
        ("1.5 min", (None, 90.0)),
        ("2h", (None, 7200.0)),
    ],
)
def test_cadences(value: Any, found: tuple[int | None, float | None]) -> None:
    assert parse_cadence(value) == found


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_another_seed_or_other_parameters_do_not_go_on(tmp_path: Path) -> None:
    run(max_updates=5, checkpoint_every=5, run_dir=tmp_path)
    before = files(tmp_path)
    optimizer = psframe.optim.Adam(lr=0.01)
    with pytest.raises(psframe.ArgumentError, match="seed: the run to go on with has seed 3"):
        psframe.run(work, PARAMS, optimizer=optimizer, seed=4, run_dir=tmp_path, resume=True)
    with pytest.raises(psframe.CheckpointError, match="none can be used"):
        psframe.run(
            work, {"w": PARAMS["w"]}, optimizer=optimizer, seed=3, run_dir=tmp_path, resume=True
        )
    with pytest.raises(psframe.CheckpointError, match="slot"):
        run(optimizer=psframe.optim.SGD(0.1, momentum=0.9), run_dir=tmp_path, resume=True)
    assert files(tmp_path) == before, "the run is as it was"


def test_a_status_of_a_run_that_goes_on_begins_at_its_checkpoint(tmp_path: Path) -> None:
    run(max_updates=5, checkpoint_every=5, run_dir=tmp_path)
    seen: list[dict[str, Any]] = []

    def look(worker: psframe.Worker) -> None:
        seen.append(status(tmp_path))

    psframe.run(
        look,
        PARAMS,
        optimizer=psframe.optim.Adam(lr=0.01),
        seed=3,
        run_dir=tmp_path,
        resume=True,
    )
    assert (seen[0]["state"], seen[0]["updates"]) == ("running", 5)


def test_a_checkpoint_of_a_later_psframe_is_kept(tmp_path: Path) -> None:
    run(max_updates=10, checkpoint_every=5, run_dir=tmp_path)
    manifest = tmp_path / "checkpoints" / "v000000010" / "manifest.json"
    body = manifest.read_bytes().replace(b'"format_version":1', b'"format_version":2')
    body = body[: body.rindex(b',"sha256":')] + b"}"
    end = b',"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()
    manifest.write_bytes(body[:-1] + end)
    before = files(tmp_path)
    with pytest.raises(psframe.CheckpointError, match=r"format version 2.*psframe that wrote it"):
        run(run_dir=tmp_path, resume=True)
    assert files(tmp_path) == before


def test_a_checkpoint_that_the_disk_does_not_take_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told, write_shard = threading.Event(), saving.write_shard

    def late(*args: Any, **more: Any) -> Any:
        assert told.wait(30)
        return write_shard(*args, **more)

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "is the disk slow" in record.getMessage():
                told.set()

    monkeypatch.setattr(saving, "_SLOW_S", 0.05)
    monkeypatch.setattr(saving, "write_shard", late)
    logging.getLogger("psframe").addHandler(heard := Heard())
    try:
        run(max_updates=10, checkpoint_every=10, run_dir=tmp_path)
    finally:
        logging.getLogger("psframe").removeHandler(heard)
    assert "the checkpoint at version 10 is not written after 0 s" in caplog.text
    assert versions(tmp_path) == [10]


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    def meanwhile(worker: psframe.Worker) -> None:
        with pytest.raises(psframe.RunDirError, match="another run is writing there"):
            run(run_dir=tmp_path, resume=True)
        with pytest.raises(psframe.RunDirError, match="another run is writing there"):
            run(run_dir=tmp_path, overwrite=True)

    psframe.run(meanwhile, PARAMS, optimizer=psframe.optim.SGD(0.1), run_dir=tmp_path)
    run(run_dir=tmp_path, overwrite=True)
    assert status(tmp_path)["updates"] == UPDATES


def test_a_run_without_a_checkpoint_yet_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(run_dir=tmp_path, max_updates=15)
    result = run(run_dir=tmp_path, resume=True)
    assert result.version == UPDATES
    assert "there is no checkpoint yet; the run begins anew" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == EPOCHS


# ---- a whole training --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> Parts:
    return prepare(load("digits"), 0.2, 1, validation_fraction=0.1)


def test_a_training_with_its_best_epoch_and_its_patience_goes_on(
    tmp_path: Path, parts: Parts
) -> None:
    """One worker: stopped in the middle of an epoch and of an evaluation, it ends alike."""

    def trainer(**more: Any) -> Trainer:
        model = create("mlp", parts.train.input_shape, parts.train.n_classes)
        return Trainer(
            model,
            optimizer=psframe.optim.Adagrad(0.05),
            batch_size=64,
            epochs=40,
            patience=4,
            workers=1,
            seed=5,
            **more,
        )

    whole = trainer().fit(parts)
    assert whole.stopped_early
    folder = tmp_path / "run"
    cuts = [9, 41, 77]

    class Cut:
        """Ends the run soon after so many updates, wherever that is."""

        def __init__(self, at: int) -> None:
            self.at = at

        def __call__(self, event: Any) -> bool:
            return getattr(event, "version_applied", 0) >= self.at

    for number, cut in enumerate(cuts):
        more: dict[str, Any] = {"run_dir": folder, "checkpoint_every": 7, "observer": Cut(cut)}
        part = trainer(resume=number > 0, **more).fit(parts)
        assert cut <= part.result.version < whole.result.version
    last = trainer(run_dir=folder, resume=True).fit(parts)
    assert last.stopped_early
    assert last.best_epoch == whole.best_epoch
    assert last.accuracy == whole.accuracy
    assert whole.result.params is not None
    assert last.result.params is not None
    for name, array in whole.result.params.items():
        assert array.tobytes() == last.result.params[name].tobytes()
    seen = [(one.epoch, one.validation_accuracy, one.best) for one in whole.history]
    assert [(one.epoch, one.validation_accuracy, one.best) for one in last.history] == seen


# ---- signals between runs ------------------------------------------------------------------------


def test_a_request_that_comes_between_runs_ends_the_next_one(tmp_path: Path) -> None:
    with noting_requests():
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(psframe.Interrupted, match="SIGUSR2 has ended the run at version"):
            run(run_dir=tmp_path)
    with noting_requests():
        assert run(run_dir=tmp_path, resume=True).version == UPDATES


def test_a_training_whose_evaluation_is_ended_by_a_request_is_interrupted(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done but for that, and resumed it is evaluated."""

    def requested(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return predict(*arguments)

    model = create("softmax", parts.train.input_shape, parts.train.n_classes)
    more: dict[str, Any] = {"run_dir": tmp_path / "run", "checkpoint_every": "60s"}
    trainer = Trainer(model, optimizer=psframe.optim.Adagrad(0.05), epochs=1, workers=1, **more)
    predict = Trainer._predict
    monkeypatch.setattr(Trainer, "_predict", requested)
    with noting_requests():
        trained = trainer.fit(parts)
    assert isinstance(trained.failure, psframe.Interrupted)
    assert status(tmp_path / "run")["state"] == "interrupted"
    monkeypatch.undo()
    more["resume"] = True
    again = Trainer(model, optimizer=psframe.optim.Adagrad(0.05), epochs=1, workers=1, **more)
    last = again.fit(parts)
    assert last.accuracy is not None
    assert last.result.version == trained.result.version
    assert status(tmp_path / "run")["state"] == "completed"
