"""Whole runs on a GPU that is none: the bits of the same run on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from fake_cupy import FakeCupy

import psframe
from psframe import BSP, SSP, Async, optim

N = 300_000
START = {
    "w": np.linspace(-1.0, 1.0, N, dtype=np.float32).reshape(1000, 300),
    "b": np.linspace(0.5, 2.0, 70, dtype=np.float32),
}
MODES = pytest.mark.parametrize("mode", [Async(), SSP(1), BSP()], ids=repr)


def gradients(params: Any, worker: int, step: int) -> dict[str, Any]:
    """Of a bowl, with a slope that is the worker's own; arithmetic of NumPy and CuPy alike."""
    slope = np.float32(0.25 * worker + 0.125 * step)
    return {name: params[name] * np.float32(0.5) + slope for name in params}


def run(device: str, mode: Any, how: str, workers: int, **options: Any) -> psframe.Result:
    seen = set()

    def work(worker: psframe.Worker) -> None:
        seen.add(worker.device)
        params = worker.pull()
        for step in range(5):
            if how == "prefetch":
                pending = worker.pull_async()
                worker.push(gradients(params, worker.index, step))
                params = pending.wait()
                continue
            if how == "own":
                made = gradients(params, worker.index, step)
                for name, array in worker.gradients().items():
                    array[...] = made[name]
                worker.push(None).wait()
                params = worker.pull()
            else:
                params = worker.push_pull(gradients(params, worker.index, step))

    options.setdefault("optimizer", optim.SGD(0.1, momentum=0.5))
    result = psframe.run(work, START, mode=mode, device=device, workers=workers, **options)
    assert {name.partition(":")[0] for name in seen} == {device.partition(":")[0]}
    assert result.devices == (device.partition(":")[0],) * workers
    return result


def assert_equal(first: psframe.Result, second: psframe.Result) -> None:
    assert first.params is not None
    assert second.params is not None
    for name, array in first.params.items():
        np.testing.assert_array_equal(array, second.params[name], err_msg=name)
    assert first.version == second.version
    assert first.ledger == second.ledger


@MODES
@pytest.mark.parametrize("how", ["push_pull", "own", "prefetch"])
def test_one_worker_gives_the_bits_of_the_cpu(cupy: FakeCupy, mode: Any, how: str) -> None:
    if how == "prefetch" and not isinstance(mode, Async):
        pytest.skip("its pull would wait for its own push")
    assert_equal(run("cuda", mode, how, 1), run("cpu", mode, how, 1))


@pytest.mark.parametrize("servers", [1, 3])
def test_bsp_of_several_workers_on_two_gpus_gives_the_bits_of_the_cpu(
    cupy: FakeCupy, servers: int
) -> None:
    options = {"servers": servers, "workers": 3, "mode": BSP(), "how": "own"}
    assert_equal(run("cuda", **options), run("cpu", **options))  # type: ignore[arg-type]
    assert cupy.kernels == 3 * 5, "a round is judged before it is summed"


@pytest.mark.parametrize("mode", [Async(), SSP(1)], ids=repr)
def test_several_workers_out_of_step_are_all_applied(cupy: FakeCupy, mode: Any) -> None:
    """Integers, whose sums are exact in any order."""

    def work(worker: psframe.Worker) -> None:
        ones = {n: worker.pull()[n] * np.float32(0) + np.float32(1) for n in START}
        for _ in range(6):
            params = worker.push_pull(ones)
            found = params["w"].get() if worker.device != "cpu" else params["w"]
            assert len({float(v) for v in found.flat[::9973]}) == 1, "two versions in one pull"

    start = {name: np.zeros_like(array) for name, array in START.items()}
    result = psframe.run(work, start, optimizer=optim.SGD(1.0), mode=mode, device="cuda", workers=3)
    assert result.params is not None
    assert all((array == -18.0).all() for array in result.params.values())


def test_clipping_a_codec_and_averaged_tensors(cupy: FakeCupy) -> None:
    """What needs the norm, what needs the slot, and what is left out of the norm."""
    grouped = optim.Grouped(optim.SGD(0.1), {"b": optim.Average(0.9)})
    for options in (
        {"clip_norm": 1.0},
        {"codec": psframe.codecs.Float16()},
        {"clip_norm": 2.0, "optimizer": grouped},
    ):
        on_gpu = run("cuda:1", Async(), "push_pull", 1, **options)
        on_cpu = run("cpu", Async(), "push_pull", 1, **options)
        assert on_gpu.params is not None
        assert on_cpu.params is not None
        for name, array in on_gpu.params.items():  # the norm differs in its last bits
            np.testing.assert_allclose(array, on_cpu.params[name], rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_not_finite_is_refused(cupy: FakeCupy) -> None:
    def work(worker: psframe.Worker) -> None:
        for mode_value in (1.0, np.inf, 1.0):
            grads = gradients(worker.pull(), 0, 0)
            grads["b"][3:4] = np.full(1, mode_value, np.float32)
            receipt = worker.push(grads).wait()
            assert receipt.applied == np.isfinite(mode_value)

    for mode in (Async(), BSP()):
        result = psframe.run(work, START, optimizer=optim.SGD(0.1), mode=mode, device="cuda")
        assert (result.ledger.applied, result.ledger.refused) == (2, 1)


@pytest.mark.parametrize("pushes", [False, True])
def test_what_work_raises_is_raised_though_the_device_fails_from_then_on(
    cupy: FakeCupy, pushes: bool
) -> None:
    start = {"w": np.zeros(8, np.float32)}  # too small to be registered

    def work(worker: psframe.Worker) -> None:
        params = worker.pull()
        if pushes:
            worker.push({"w": params["w"] * np.float32(0.5)})
            worker.pull()
        cupy.cuda.broken = True
        raise ValueError("a kernel of mine has failed")

    with pytest.raises(ValueError, match="a kernel of mine has failed"):
        psframe.run(work, start, optimizer=optim.SGD(0.1), device="cuda")


def test_cuda_without_a_gpu_is_an_error_and_auto_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ValueError, match="needs a GPU that CuPy can use"):
        run("cuda", Async(), "own", 1)

    def work(worker: psframe.Worker) -> None:
        assert (worker.device, worker.xp) == ("cpu", np)
        worker.push_pull(gradients(worker.pull(), 0, 0))

    result = psframe.run(work, START, optimizer=optim.SGD(0.1), device="auto")
    assert result.version == 1
    assert result.devices == ("cpu",)
