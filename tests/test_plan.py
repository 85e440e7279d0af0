"""A run's arguments: what is refused, and the digests by which ranks compare them."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import psframe
from psframe import optim
from psframe.errors import ArgumentError
from psframe.plan import Plan, staleness_counts

PARAMS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.float32)}


def halving(step: int) -> float:
    return 0.5**step


def check(**changed: Any) -> Plan:
    arguments: dict[str, Any] = {
        "work": lambda worker: None,
        "params": PARAMS,
        "optimizer": optim.SGD(lr=0.1),
        "mode": psframe.Async(),
        "servers": 1,
        **changed,
    }
    return Plan.check(arguments.pop("work"), arguments.pop("params"), **arguments)


def test_what_is_checked_is_kept() -> None:
    plan = check(seed=np.int64(3), max_updates=7, clip_norm=2, device="cuda:1", servers=np.int32(2))
    assert plan.initial.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0]
    assert (plan.seed, plan.max_updates, plan.clip_norm) == (3, 7, 2.0)
    assert (plan.device, plan.servers, plan.mode) == ("cuda:1", 2, psframe.Async())
    assert not np.shares_memory(plan.initial, PARAMS["w"])


def test_arrays_of_a_gpu_are_brought_to_the_host() -> None:
    class OnGpu:
        dtype, shape = np.dtype(np.float32), (2,)

        def get(self) -> np.ndarray:
            return np.array([1, 2], np.float32)

    assert check(params={"w": OnGpu()}).initial.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"work": 3}, TypeError, "work: expected a function of one worker, got 3"),
        ({"work": lambda: None}, TypeError, "work: expected a function of one worker, .*takes"),
        ({"work": lambda a, b: None}, TypeError, "work: expected a function of one .*required"),
        ({"seed": 2**64}, ValueError, "seed: expected at most 4611686018427387904, got 184"),
        ({"params": {}}, ValueError, "params: expected at least one named array"),
        ({"optimizer": "adam"}, TypeError, "optimizer: expected one of psframe.optim"),
        ({"optimizer": optim.SGD}, TypeError, "optimizer: "),
        ({"mode": "async"}, TypeError, "mode: expected psframe.Async"),
        ({"mode": psframe.BSP}, TypeError, "mode: expected psframe.Async"),
        ({"servers": 0}, ValueError, "servers: expected at least 1, got 0"),
        ({"servers": 1.0}, TypeError, "servers: expected an integer, got 1.0"),
        ({"servers": True}, TypeError, "servers: expected an integer, got True"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"seed": None}, TypeError, "seed: expected an integer, got None"),
        ({"max_updates": -1}, ValueError, "max_updates: expected at least 0"),
        ({"max_updates": 1e3}, TypeError, "max_updates: expected an integer"),
        ({"device": None}, TypeError, "device: expected a string"),
        ({"clip_norm": 0}, ValueError, "clip_norm: expected a number above 0"),
        ({"clip_norm": float("inf")}, ValueError, "clip_norm: expected"),
        ({"clip_norm": float("nan")}, ValueError, "clip_norm: expected"),
        ({"clip_norm": "1"}, ValueError, "clip_norm: expected"),
        ({"timeout_s": 0}, ValueError, "timeout_s: expected 0.5 or more, got 0"),
        ({"timeout_s": float("nan")}, ValueError, "timeout_s: expected"),
        ({"respawn": -1}, ValueError, "respawn: expected at least 0, got -1"),
        ({"respawn": 1001}, ValueError, "respawn: expected at most 1000, got 1001"),
        ({"respawn": True}, TypeError, "respawn: expected an integer, got True"),
        ({"timeout_s": None}, TypeError, "timeout_s: expected a number of seconds, got None"),
    ],
)
def test_a_wrong_argument_is_named(
    changed: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        check(**changed)


def test_lost_workers_are_replaced_where_one_server_serves() -> None:
    assert check(respawn=2).placed((0,)).respawn == 2
    with pytest.raises(ArgumentError, match=r"respawn: .* one server serves, not 2; take one"):
        check(respawn=2).placed((0, 1))
    assert check().placed((0, 1)).servers == 2


def test_run_and_simulate_check_their_own() -> None:
    def work(worker: psframe.Worker) -> None:
        raise AssertionError("never called")

    sgd = optim.SGD(lr=0.1)
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        psframe.run(work, PARAMS, optimizer=sgd, workers=0)
    with pytest.raises(ValueError, match=r"workers: expected at most 1000 .*got 1001"):
        psframe.run(work, PARAMS, optimizer=sgd, workers=1001)
    with pytest.raises(ValueError, match="servers: expected at most 1000 in one process"):
        psframe.run(work, PARAMS, optimizer=sgd, servers=1001)
    with pytest.raises(TypeError, match="compute_time_s: expected a function"):
        psframe.simulate(work, PARAMS, optimizer=sgd, workers=1, compute_time_s=1.0)  # type: ignore[arg-type]


def test_equal_arguments_have_equal_digests() -> None:
    one, same = check().digests(run_dir="x"), check().digests(run_dir="x")
    assert one == same
    assert all(len(digest) == 16 for digest in one.values())


def test_values_of_params_do_not_count_but_their_layout_does() -> None:
    other_values = {name: array + 1 for name, array in PARAMS.items()}
    assert check(params=other_values).digests() == check().digests()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("params", {"params": {"w": np.zeros((3, 2), np.float32), "b": PARAMS["b"]}}),
        ("params", {"params": {"w": PARAMS["w"].astype("f8"), "b": PARAMS["b"].astype("f8")}}),
        ("params", {"params": {"b": PARAMS["b"], "w": PARAMS["w"]}}),
        ("optimizer", {"optimizer": optim.SGD(lr=0.1000001)}),
        ("optimizer", {"optimizer": optim.SGD(lr=0.1, momentum=0.5)}),
        ("optimizer", {"optimizer": optim.Adam(lr=0.1)}),
        ("optimizer", {"optimizer": optim.SGD(optim.schedules.Constant(0.1))}),
        ("optimizer", {"optimizer": optim.SGD(halving)}),
        ("mode", {"mode": psframe.SSP(1)}),
        ("servers", {"servers": 2}),
        ("device", {"device": "cpu"}),
        ("seed", {"seed": 1}),
        ("max_updates", {"max_updates": 5}),
        ("clip_norm", {"clip_norm": 1.0}),
    ],
)
def test_the_digest_that_differs_is_the_argument_s(name: str, changed: dict[str, Any]) -> None:
    one, other = check(device="auto").digests(), check(**{"device": "auto", **changed}).digests()
    assert [key for key in one if one[key] != other[key]] == [name]


def test_digests_are_the_same_in_every_process() -> None:
    """Hash seeds differ between processes, and so do the addresses of functions."""
    code = (
        "import test_plan as t; from psframe import optim;"
        "print([d.hex() for d in t.check(optimizer=optim.SGD(t.halving)).digests().values()])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.path.dirname(__file__), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_staleness_counts_are_dense() -> None:
    assert staleness_counts({}).tolist() == []
    assert staleness_counts({3: 2, 0: 5}).tolist() == [5, 0, 0, 2]
