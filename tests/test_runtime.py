"""`psframe.run` in one process: what it raises, and that it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import psframe
from psframe import BSP, SSP, Async, Worker, roles, threaded
from psframe.events import HostEvent, Logged
from psframe.host import Host

PARAMS = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float32)}
ONES = {name: np.ones_like(p) for name, p in PARAMS.items()}
SGD = psframe.optim.SGD(lr=0.5)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def run(work: Any, **kwargs: Any) -> psframe.Result:
    return psframe.run(work, kwargs.pop("params", PARAMS), optimizer=SGD, **kwargs)


def forever(worker: Worker) -> None:
    while True:
        worker.push_pull(ONES)


def status(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "status.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP(), BSP(1)], ids=str)
def test_a_run_to_its_last_update(mode: Any, servers: int, tmp_path: Path) -> None:
    result = run(
        forever, mode=mode, servers=servers, workers=3, max_updates=11, run_dir=tmp_path / "run"
    )
    assert (result.version, result.is_root, result.run_dir) == (11, True, tmp_path / "run")
    assert result.params is not None
    for array in result.params.values():
        np.testing.assert_array_equal(array, -0.5 * 11)
    assert status(tmp_path / "run")["state"] == "completed"
    assert status(tmp_path / "run")["updates"] == 11


def test_pushes_before_the_return_are_drained() -> None:
    def work(worker: Worker) -> None:
        worker.push(ONES)
        worker.push(ONES)

    assert run(work, workers=2).version == 4


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize(
    "error", [ValueError("boom"), Odd(), SystemExit(3), MemoryError()], ids=repr
)
def test_an_exception_of_work_comes_out(error: BaseException, servers: int, tmp_path: Path) -> None:
    def work(worker: Worker) -> None:
        if worker.index:
            worker.pull()
            raise error
        forever(worker)

    with pytest.raises(type(error)) as caught:
        run(work, workers=2, servers=servers, run_dir=tmp_path / "run")
    assert caught.value is error
    assert status(tmp_path / "run")["state"] == "failed"
    assert status(tmp_path / "run")["reason"].startswith(type(error).__name__)


def test_who_does_not_come_back_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure beside a computation that never calls psframe comes out all the same."""
    monkeypatch.setattr(roles, "_GRACE_S", 0.05)
    release = threading.Event()

    def work(worker: Worker) -> None:
        worker.pull()
        if worker.index:
            raise ValueError("boom")
        release.wait(60.0)

    try:
        with pytest.raises(ValueError, match="boom"):
            run(work, workers=2)
    finally:
        release.set()
    assert "workers [0] did not come back" in caplog.text


def test_a_device_without_room_is_a_failure_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    make_device = threaded.make_device
    opened = []

    def full(name: str, layout: Any) -> Any:
        opened.append(name)
        if threading.current_thread().name == "psframe-worker-1":
            raise MemoryError("the device is full")
        return make_device(name, layout)

    monkeypatch.setattr(threaded, "make_device", full)
    with pytest.raises(MemoryError, match="is full"):
        run(forever, workers=2, servers=2)
    assert len(opened) == 2


def test_an_observer_that_raises_ends_the_run(tmp_path: Path) -> None:
    def observer(event: HostEvent) -> None:
        if isinstance(event, Logged):
            raise OSError("no room")

    def work(worker: Worker) -> None:
        worker.log(loss=1.0)
        for _ in worker.leases(10, 1):
            worker.push_pull(ONES)

    with pytest.raises(OSError, match="no room"):
        run(work, observer=observer, workers=2, run_dir=tmp_path / "run")
    assert status(tmp_path / "run")["reason"] == "OSError: no room"


def test_ctrl_c_while_the_run_directory_is_opened_leaves_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = Host.open

    def interrupted(*args: Any, **keywords: Any) -> Host:
        host = open_(*args, **keywords)
        signal.raise_signal(signal.SIGINT)  # status.json says "running", and nobody has the host
        return host

    monkeypatch.setattr(Host, "open", interrupted)
    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        run(lambda worker: None, run_dir=tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "interrupted"


def test_diverged(tmp_path: Path) -> None:
    nan = {name: np.full_like(p, np.nan) for name, p in PARAMS.items()}

    def work(worker: Worker) -> None:
        while True:
            worker.push(nan).wait()

    with pytest.raises(psframe.Diverged, match="the last 20 pushes"):
        run(work, workers=2, run_dir=tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_runs_threads_end_with_it() -> None:
    before = threading.active_count()
    run(forever, workers=3, servers=2, max_updates=3)
    assert threading.active_count() <= before  # another test's may have ended meanwhile


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("work", None, TypeError),
        ("params", {}, ValueError),
        ("optimizer", "sgd", TypeError),
        ("mode", Async, TypeError),
        ("servers", 0, ValueError),
        ("workers", 0, ValueError),
        ("workers", 1.5, TypeError),
        ("seed", True, TypeError),
        ("max_updates", -1, ValueError),
        ("device", "tpu", ValueError),
        ("device", 1, TypeError),
        ("clip_norm", 0.0, ValueError),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: Any, kind: Any) -> None:
    arguments: dict[str, Any] = {"work": forever, "params": PARAMS, "optimizer": SGD}
    arguments.update({"max_updates": 0, name: value})
    with pytest.raises(kind, match=name):
        psframe.run(arguments.pop("work"), arguments.pop("params"), **arguments)


def test_nothing_of_mpi_is_imported_without_a_launcher() -> None:
    program = (
        "import sys, numpy as np, psframe\n"
        "psframe.run(lambda w: w.pull() and None, {'w': np.zeros(2)},"
        " optimizer=psframe.optim.SGD(0.1), workers=2)\n"
        "assert not [m for m in sys.modules if m.startswith('mpi4py')]\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI", "SLURM_"))}
    subprocess.run([sys.executable, "-c", program], check=True, env=clean, timeout=50)


def test_nothing_is_logged_of_a_run_that_goes_well(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "psframe"):
        run(forever, workers=2, max_updates=2)
    assert not caplog.records


def test_a_work_function_that_changes_the_folder_moves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def work(worker: psframe.Worker) -> None:
        os.chdir(tmp_path / "elsewhere")
        for _ in range(4):
            worker.push_pull({"w": np.ones(3)})

    result = psframe.run(
        work,
        {"w": np.zeros(3)},
        optimizer=psframe.optim.SGD(0.1),
        run_dir="run",
        checkpoint_every=2,
    )
    assert result.run_dir == tmp_path / "run"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert '"completed"' in (tmp_path / "run" / "status.json").read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("v*/manifest.json"))
