"""The Trainer, with worker threads in this process, and with a worker that is scripted."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import psframe
from psframe import optim
from psframe.data import Dataset, split
from psframe.errors import ArgumentError
from psframe.events import SpanKind
from psframe.history import TIMES
from psframe.models import MLP, Softmax
from psframe.models.contract import Contract
from psframe.stepping import Stepper
from psframe.trainer import Trainer, initial_params

ROOT = Path(psframe.__file__).parents[1]


def blobs(n: int = 120, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Make three well separated clusters, and split them."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    centres = np.array([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    x = (centres[y] + rng.standard_normal((n, 2))).astype(np.float32)
    return split(Dataset(x, y, 3, "blobs"), 0.25)


def trainer(model: Any = None, **keywords: Any) -> Trainer:
    """Make a trainer with small numbers."""
    arguments: dict[str, Any] = {"optimizer": optim.SGD(0.1), "batch_size": 8, "epochs": 4}
    arguments.update(device="cpu", **keywords)
    return Trainer(model or Softmax((2,), 3), **arguments)


class Plain:
    """A user's model: no base class, no `out`, linear regression onto one-hot labels."""

    def __init__(self, input_shape: tuple[int, ...], n_classes: int) -> None:
        self.shape = (input_shape[0], n_classes)

    def init(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"w": np.zeros(self.shape, np.float32)}

    def loss_and_gradients(self, params: Any, x: Any, y: Any) -> tuple[float, dict[str, Any]]:
        error = x @ params["w"] - np.eye(self.shape[1], dtype=np.float32)[y]
        return float((error**2).mean()), {"w": x.T @ error / len(x)}

    def evaluate(self, params: Any, x: Any, y: Any) -> dict[str, float]:
        return {"correct": float((self.predict(params, x) == y).sum()), "count": float(len(y))}

    def predict(self, params: Any, x: Any) -> Any:
        return (x @ params["w"]).argmax(axis=1)


class Blank(Plain):
    """Learns nothing, and tells of each draw of its random stream."""

    def __init__(self, input_shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__(input_shape, n_classes)
        self.drawn: list[float] = []

    def loss_and_gradients(
        self, params: Any, x: Any, y: Any, rng: Any = None
    ) -> tuple[float, dict[str, Any]]:
        self.drawn.append(float(rng.random()))
        return 0.0, {"w": np.zeros(self.shape, np.float32)}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "mode", [psframe.Async(), psframe.SSP(1), psframe.BSP()], ids=lambda m: type(m).__name__
)
def test_fit_learns_in_every_mode(mode: Any, workers: int) -> None:
    train, test = blobs()
    trained = trainer(MLP((2,), 3, hidden=(8,)), mode=mode, workers=workers).fit(train, test)
    assert trained.accuracy is not None
    assert trained.accuracy > 0.9
    assert trained.result.ledger.received == trained.result.ledger.applied
    # An epoch is done when its last block is: a slow thread may hold one of an earlier epoch.
    assert sorted(epoch.epoch for epoch in trained.history) == [0, 1, 2, 3]
    for epoch in trained.history:
        assert epoch.samples == len(train)
        assert epoch.test_accuracy is not None


def test_one_worker_equals_a_serial_loop() -> None:
    train, test = blobs()
    model = MLP((2,), 3, hidden=(8,))
    trained = trainer(model, workers=1, seed=5).fit(train, test)
    batches = []

    def collect(worker: psframe.Worker) -> None:
        for indices in worker.leases(len(train), 8, epochs=4):
            batches.append(indices.copy())

    initial = initial_params(model, 5)
    psframe.run(collect, initial, optimizer=optim.SGD(0.1), seed=5)
    params = {name: p.copy() for name, p in initial.items()}
    for indices in batches:
        _, grads = model.loss_and_gradients(params, *train.batch(indices))
        for name, p in params.items():
            p -= np.float32(0.1) * grads[name]
    assert trained.result.params is not None
    for name, p in params.items():
        np.testing.assert_array_equal(trained.result.params[name], p)


def test_accuracy_is_that_of_the_final_parameters() -> None:
    train, test = blobs()
    subject = trainer(workers=2)
    trained = subject.fit(train, test)
    assert trained.result.params is not None
    found = subject.evaluate(trained.result.params, test)
    assert found is not None
    assert trained.evaluation is not None
    assert trained.accuracy == found.accuracy == trained.evaluation.accuracy
    predictions = subject.predict(trained.result.params, test)
    assert predictions is not None
    params = {name: np.asarray(p) for name, p in trained.result.params.items()}
    labels = subject.model.predict(params, test.batch(slice(None))[0])
    np.testing.assert_array_equal(predictions.labels, labels)
    assert (labels == test.labels).mean() == pytest.approx(trained.accuracy)
    assert found.confusion.sum() == len(test)
    assert np.trace(found.confusion) == (labels == test.labels).sum()
    last = trained.history[-1]
    assert last.version == trained.result.version
    assert last.test_loss == pytest.approx(found.loss, rel=1e-5)


def test_without_a_test_part() -> None:
    train, _ = blobs()
    trained = trainer(workers=2).fit(train)
    assert trained.accuracy is None
    assert len(trained.history) == 4
    assert {epoch.test_accuracy for epoch in trained.history} == {None}
    assert all(epoch.train_loss is not None for epoch in trained.history)


class Counting(Blank):
    """Its loss is the number of its step."""

    def loss_and_gradients(
        self, params: Any, x: Any, y: Any, rng: Any = None
    ) -> tuple[float, dict[str, Any]]:
        _, grads = super().loss_and_gradients(params, x, y, rng)
        return float(len(self.drawn)), grads


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("mode", [psframe.Async(), psframe.BSP()], ids=repr)
def test_the_training_loss_is_of_the_epochs_own_steps(
    tmp_path: Path, mode: Any, prefetch: bool
) -> None:
    """With one block an epoch, each epoch's is its only step's."""
    train, _ = blobs()
    subject = trainer(
        Counting((2,), 3), batch_size=len(train), mode=mode, prefetch=prefetch, run_dir=tmp_path
    )
    trained = subject.fit(train)
    assert [epoch.train_loss for epoch in trained.history] == [1.0, 2.0, 3.0, 4.0]
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["train_loss"] for line in lines] == [1.0, 2.0, 3.0, 4.0]
    assert all({"compute_s", "servers_s", "data_s"} <= set(line) for line in lines)


def test_the_run_directory_tells_of_every_epoch(tmp_path: Path) -> None:
    train, test = blobs()
    config = {"who": "me"}
    trained = trainer(workers=2, run_dir=tmp_path / "r", config=config).fit(train, test)
    text = (tmp_path / "r" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert sorted(line["epoch"] for line in lines) == [0, 1, 2, 3]
    assert lines[-1]["test_accuracy"] == pytest.approx(trained.accuracy)
    assert json.loads((tmp_path / "r" / "status.json").read_text()) == {
        "state": "completed",
        "updates": trained.result.version,
        "test_accuracy": lines[-1]["test_accuracy"],
        "reason": "",
    }
    assert psframe_config(tmp_path / "r") == config


def psframe_config(folder: Path) -> dict[str, Any]:
    """Read a run's configuration."""
    from psframe import toml

    return toml.load(folder / "config.toml")


def test_a_run_from_the_library_leaves_weights_that_the_commands_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from psframe import evaluate
    from psframe.weights import load_weights

    monkeypatch.setattr("psframe.applying.find_launcher", lambda: None)
    train, test = blobs()
    folder = tmp_path / "r"
    trained = trainer(workers=2, run_dir=folder).fit(train, test)
    assert trained.result.params is not None
    weights = load_weights(folder)
    assert weights.model == "psframe.models.softmax:Softmax"
    for name, p in trained.result.params.items():
        np.testing.assert_array_equal(weights.params[name], p)
    np.savez(tmp_path / "test.npz", x=test.x[test.rows], y=test.labels)
    assert evaluate.main([str(folder), str(tmp_path / "test.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == trained.accuracy


def test_a_model_of_a_program_is_named_by_its_file(tmp_path: Path) -> None:
    text = """
        from psframe.ending import name_of
        class Net: ...
        print(name_of(Net()))
    """
    file = tmp_path / "my_net.py"
    file.write_text(textwrap.dedent(text))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, tmp_path)))}
    for how in ([str(file)], ["-m", "my_net"]):
        done = subprocess.run(
            [sys.executable, *how], capture_output=True, text=True, env=environ, timeout=60
        )
        assert done.stdout == "my_net:Net\n", done.stderr


class BrokenAtTheEnd(Plain):
    """Learns, and cannot be used."""

    def predict(self, params: Any, x: Any) -> Any:
        raise ZeroDivisionError("mine")

    def evaluate(self, params: Any, x: Any, y: Any) -> dict[str, float]:
        return {"correct": 1.0, "count": 2.0}


def test_a_failed_evaluation_does_not_lose_the_training(tmp_path: Path) -> None:
    train, test = blobs()
    trained = trainer(BrokenAtTheEnd((2,), 3), workers=2, run_dir=tmp_path).fit(train, test)
    assert isinstance(trained.failure, ZeroDivisionError)
    assert trained.result.params is not None
    assert trained.evaluation is None
    assert trained.accuracy == 0.5, "as it was found during the run"
    assert len(trained.history) == 4
    assert (tmp_path / "checkpoints" / "final.safetensors").exists()
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "ZeroDivisionError: mine")


def test_a_users_class_needs_the_methods_only() -> None:
    train, test = blobs()
    trained = trainer(Plain((2,), 3), optimizer=optim.SGD(0.02), workers=2).fit(train, test)
    assert trained.accuracy is not None
    assert trained.accuracy > 0.9
    assert trained.history[-1].test_loss is None


def test_a_batch_larger_than_the_data_is_clipped_with_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train, test = blobs()
    with caplog.at_level(logging.WARNING, "psframe"):
        trained = trainer(batch_size=1000, epochs=2).fit(train, test)
    assert "batch size 1000 is larger than the 90 training samples; using 90" in caplog.text
    assert trained.result.version == 2


def test_the_precision_is_the_models_and_the_devices() -> None:
    model, rule = MLP((64,), 10), optim.SGD(0.1)
    Trainer(model, optimizer=rule, precision="tf32")
    assert model.precision == "tf32"
    Trainer(model, optimizer=rule)
    assert model.precision == "tf32"  # as the model has it, unless one is given
    with pytest.raises(ArgumentError, match="precision: 'tf32' needs a GPU; on the CPU"):
        Trainer(model, optimizer=rule, device="cpu")
    with pytest.raises(ArgumentError, match=r"precision: expected one of float32, tf32, .*'half'"):
        Trainer(model, optimizer=rule, precision="half")
    Trainer(Contract(MLP((64,), 10), 10), optimizer=rule, precision="float32")
    with pytest.raises(ArgumentError, match="Contract has none and computes as it likes"):
        Trainer(Contract(MLP((64,), 10), 10), optimizer=rule, precision="float16")


def test_wrong_arguments_are_named() -> None:
    train, test = blobs()
    with pytest.raises(ArgumentError, match="object lacks the methods init"):
        trainer(object())
    for name in ("epochs", "batch_size"):
        with pytest.raises(ArgumentError, match=f"{name}: expected 1 or more, got 0"):
            trainer(**{name: 0})
    given: Any
    for given in ("2", 2.0, True):
        with pytest.raises(ArgumentError, match="epochs: expected an integer, got"):
            trainer(epochs=given)
    for given in (print, [3], None):
        with pytest.raises(ArgumentError, match="callbacks: expected a tuple of functions, got"):
            trainer(callbacks=given)
    for given in (None, (np.zeros((3, 2)), np.zeros(3))):
        with pytest.raises(ArgumentError, match=r"train: expected a psframe.data.Dataset, got"):
            trainer().fit(given)
        with pytest.raises(ArgumentError, match=r"data: expected a psframe.data.Dataset, got"):
            trainer().predict({}, given)
    with pytest.raises(ArgumentError, match=r"test: expected a psframe.data.Dataset, got list"):
        trainer().fit(train, given := [])
    for given in ({}, {"w": np.zeros((2, 3))}, {"w1": np.zeros((2, 4)), "b1": np.zeros(3)}):
        with pytest.raises(ArgumentError, match=r"params: expected those of Softmax, \{'w1'.*got"):
            trainer().predict(given, test)
        with pytest.raises(ArgumentError, match="params: expected those of Softmax"):
            trainer().evaluate(given, test)
    with pytest.raises(ArgumentError, match="params: expected a mapping of names to arrays"):
        trainer().predict(None, test)
    none = train.subset(np.arange(0))
    with pytest.raises(ArgumentError, match="train: expected at least one sample"):
        trainer().fit(none, test)
    with pytest.raises(ArgumentError, match="test: expected at least one sample"):
        trainer().fit(train, none)
    wide = Dataset(np.zeros((4, 5), np.float32), np.arange(4) % 3, 3, "wide")
    with pytest.raises(ArgumentError, match=r"shape \(5,\), expected \(2,\)"):
        trainer().fit(train, wide)


def test_parameters_that_a_server_cannot_hold_are_the_models_fault() -> None:
    class Wrong(Plain):
        def init(self, rng: np.random.Generator) -> dict[str, Any]:
            return {"w": np.zeros(3, np.int64)}

    train, test = blobs()
    with pytest.raises(ArgumentError, match=r"model: Wrong.init: params: 'w' has int64"):
        trainer(Wrong((2,), 3)).fit(train, test)


@pytest.mark.parametrize("averages", [("mean",), 5])
def test_averages_are_a_mapping(averages: Any) -> None:
    model = Plain((2,), 3)
    model.averages = averages  # type: ignore[attr-defined]
    with pytest.raises(ArgumentError, match=r"model: Plain.averages: expected a dict of names"):
        trainer(model)


def test_a_models_wrong_answers_are_told_as_such() -> None:
    class NoGradients(Plain):
        def loss_and_gradients(self, params: Any, x: Any, y: Any) -> Any:
            return None

    class NoSums(Plain):
        def evaluate(self, params: Any, x: Any, y: Any) -> dict[str, float]:
            return {"foo": 1.0}

    class NotFinite(Plain):
        def init(self, rng: np.random.Generator) -> dict[str, Any]:
            return {"w": np.full(self.shape, np.nan, np.float32)}

    class NoLabels(Plain):
        def predict(self, params: Any, x: Any) -> Any:
            return np.full(len(x), 3)

    train, test = blobs()
    for model, words in (
        (NoGradients, "NoGradients.loss_and_gradients: expected the loss and a dict"),
        (NoSums, "NoSums.evaluate: expected 'count'"),
        (NotFinite, "NotFinite.init: 'w' is not finite"),
    ):
        with pytest.raises(ArgumentError, match=words):
            trainer(model((2,), 3), workers=2).fit(train, test)
    failure = trainer(NoLabels((2,), 3)).fit(train, test).failure
    assert "NoLabels.predict: expected labels from 0 to 2" in str(failure)


def test_what_the_model_raises_comes_out() -> None:
    class Broken(Plain):
        def evaluate(self, params: Any, x: Any, y: Any) -> dict[str, float]:
            raise ZeroDivisionError("mine")

    train, test = blobs()
    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer(Broken((2,), 3), workers=2).fit(train, test)


def test_divergence_is_told_without_numpy_warnings() -> None:
    train, test = blobs()
    subject = trainer(MLP((2,), 3, hidden=(8,)), optimizer=optim.SGD(1e30), epochs=20)
    with pytest.raises(psframe.Diverged):
        subject.fit(train, test)


class Scripted:
    """A worker that leases a fixed list of tasks and notes what is asked of it."""

    xp = np

    def __init__(self, model: Any, script: list[tuple[str, list[int]]]) -> None:
        self.calls: list[str] = []
        self.logged: list[dict[str, float]] = []
        self._notes = self  # of the real one: here what is logged is there at once
        self.spans: list[tuple[SpanKind, float, float]] = []
        self.clock = 0.0
        self.reports: list[dict[str, float]] = []
        self._model = model
        self._params = initial_params(model, 0)
        self._script = script

    def tasks(self, n_samples: int, batch_size: int, **keywords: Any) -> Iterator[Any]:
        self.calls.append(f"tasks {n_samples} {batch_size} {keywords}")
        for kind, indices in self._script:
            yield ScriptedTask(self, kind, np.array(indices))

    def pull(self) -> Any:
        self.calls.append("pull")
        return self._params

    def gradients(self) -> Any:
        return {name: np.empty_like(p) for name, p in self._params.items()}

    def push_pull(self, grads: Any) -> Any:
        self.calls.append("push_pull" if grads is None else "push_pull grads")
        return self._params

    def log(self, **numbers: float) -> None:
        self.logged.append(numbers)

    def flush_log(self) -> None:
        self.calls.append("log")

    def now(self) -> float:
        self.clock += 1.0
        return self.clock

    def span(self, kind: SpanKind, begin: float, end: float) -> None:
        self.spans.append((kind, begin, end))


class ScriptedTask:
    """One of its tasks."""

    epoch = 0
    rng = np.random.default_rng(0)
    prepared: Any = None
    data_wait_s = 0.0

    def __init__(self, worker: Scripted, kind: str, indices: Any) -> None:
        self._worker, self.kind, self.indices = worker, kind, indices

    def params(self) -> Any:
        self._worker.calls.append("pinned")
        return self._worker._params

    def report(self, **sums: float) -> None:
        self._worker.reports.append(sums)


def stepper(model: Any, train: Dataset, test: Dataset | None, **how: Any) -> Stepper:
    """Make a stepper of four epochs in batches of 8."""
    arguments: dict[str, Any] = {"prefetch": False, "spans": False, "takes_rng": False}
    arguments.update(takes_out=True, **how) if "takes_out" not in how else arguments.update(how)
    held_out = {"": test}
    return Stepper(model, train, held_out, batch_size=8, epochs=4, **arguments)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_step_is_one_round_trip(in_place: bool) -> None:
    train, test = blobs()
    model = Softmax((2,), 3) if in_place else Plain((2,), 3)
    script = [("train", [0, 1]), ("train", [2]), ("evaluate", [0, 1, 2]), ("train", [3])]
    worker = Scripted(model, script)
    stepper(model, train, test, takes_out=in_place).work(worker)
    push = "push_pull" if in_place else "push_pull grads"
    step = ["log", push]
    assert worker.calls[1:] == ["pull", *step, *step, "pinned", "pull", *step]
    asked = "{'epochs': 4, 'evaluate': (30, 64), 'prepare': None}"
    assert worker.calls[0] == f"tasks {len(train)} 8 {asked}"
    assert [logged["samples"] for logged in worker.logged[:-1]] == [2, 1, 1]
    assert worker.logged[-1].keys() == {"servers_s"}, "the last push's answer"
    assert [report["count"] for report in worker.reports] == [3]


def test_each_second_of_a_step_is_accounted_for() -> None:
    """The clock ticks once a look: what is logged and noted adds up to all that went by."""
    train, test = blobs()
    model = Softmax((2,), 3)
    script = [("train", [0, 1]), ("train", [2, 3]), ("evaluate", [0, 1]), ("train", [4])]
    worker = Scripted(model, script)
    stepper(model, train, test, spans=True).work(worker)
    logged = sum(one.get(name, 0.0) for one in worker.logged for name in TIMES)
    evaluating = sum(e - b for kind, b, e in worker.spans if kind is SpanKind.EVALUATE)
    waited = sum(e - b for kind, b, e in worker.spans if kind is SpanKind.LEASE)
    noted = sum(e - b for _, b, e in worker.spans)
    assert noted == worker.clock - 1.0, "from the first look to the last"
    first = worker.logged[0]
    assert (first["servers_s"], first["data_s"]) == (0.0, 0.0), "all were starting"
    start = 4.0  # the first lease, batch, pull and push
    assert logged == noted - start - evaluating - 1.0, "but the evaluation, and the wait for it"
    assert waited == len(script)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_models_randomness_does_not_depend_on_who_computes(prefetch: bool) -> None:
    train, test = blobs()
    drawn = []
    for workers in (1, 3):
        model = Blank((2,), 3)
        trainer(model, workers=workers, prefetch=prefetch, seed=3).fit(train, test)
        drawn.append(sorted(model.drawn))
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == len(drawn[0])


def test_the_best_parameters_on_the_validation_part_are_kept() -> None:
    """A rate that ruins the model in its last epochs: what is kept is from before."""
    train, test = blobs(240)
    train, validation = split(train, 0.2)
    steps = -(-len(train) // 8)

    def rate(step: int) -> float:
        return 0.1 if step < 2 * steps else -3.0 if step < 3 * steps else 0.0

    trained = trainer(optimizer=optim.SGD(lambda step: abs(rate(step)))).fit(
        train, test, validation
    )
    assert trained.best_epoch is not None
    best = trained.history[trained.best_epoch]
    assert best.best
    assert best.validation_accuracy == max(e.validation_accuracy or 0 for e in trained.history)
    assert trained.result.kept_version == best.evaluated_version
    assert trained.accuracy == pytest.approx(best.test_accuracy)


def test_early_stopping() -> None:
    train, test = blobs()
    train, validation = split(train, 0.2)
    subject = trainer(Blank((2,), 3), epochs=50, patience=3)
    trained = subject.fit(train, test, validation)
    assert trained.stopped_early
    assert trained.best_epoch == 0
    assert 4 <= len(trained.history) < 10
    with pytest.raises(ArgumentError, match="needs a validation part"):
        subject.fit(train, test)


def test_a_callback_may_end_the_training() -> None:
    train, test = blobs()
    trained = trainer(epochs=50, callbacks=[lambda epoch: epoch.epoch == 2]).fit(train, test)
    assert 3 <= len(trained.history) < 10
    assert not trained.stopped_early


def test_what_the_model_only_observes_is_averaged() -> None:
    class Observing(Plain):
        averages = {"seen": 0.5}  # noqa: RUF012

        def init(self, rng: np.random.Generator) -> dict[str, Any]:
            return {**super().init(rng), "seen": np.zeros(1, np.float32)}

        def loss_and_gradients(self, params: Any, x: Any, y: Any) -> tuple[float, dict[str, Any]]:
            loss, grads = super().loss_and_gradients(params, x, y)
            return loss, {**grads, "seen": np.full(1, 8.0, np.float32)}

    train, _ = blobs()
    trained = trainer(Observing((2,), 3), epochs=1, batch_size=45).fit(train)
    assert trained.result.params is not None
    np.testing.assert_array_equal(trained.result.params["seen"], [6.0])
