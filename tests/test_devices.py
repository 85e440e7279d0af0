"""Which device a worker gets, how a card's memory is shared, and what may be pushed.

There is no GPU here: `fake_cupy` stands in. What CuPy itself does, tests/gpu would say.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cupy import FakeArray, FakeCupy, ForeignArray, installed

from psframe.devices import CudaDevice, HostDevice, choose_device, make_device, sharing
from psframe.devices.behind import Behind
from psframe.devices.intake import Accepted
from psframe.layout import Layout
from psframe.packing import check_gradients
from psframe.replacement import _open_device

LAYOUT = Layout.of({"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)})


@pytest.fixture
def cupy() -> Iterator[FakeCupy]:
    with installed(FakeCupy()) as fake:
        yield fake


# ---- which --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "worker", "visible", "chosen"),
    [
        ("cpu", 0, 4, "cpu"),
        ("auto", 0, 0, "cpu"),
        ("auto", 0, 4, "cuda:0"),
        ("auto", 5, 4, "cuda:1"),  # GPUs are given out in turn
        ("cuda", 3, 4, "cuda:3"),
        ("cuda", 3, 1, "cuda:0"),
        ("cuda:2", 0, 4, "cuda:2"),
        ("cuda:02", 0, 4, "cuda:2"),
    ],
)
def test_the_device_that_is_chosen(device: str, worker: int, visible: int, chosen: str) -> None:
    assert choose_device(device, worker, visible) == chosen


@pytest.mark.parametrize("device", ["gpu", "", "cuda:", "auto:0", "cpu:0", "cuda:x", "cuda:²"])
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(ValueError, match="device: expected 'auto', 'cpu', 'cuda' or 'cuda:k'"):
        choose_device(device, 0, 1)


@pytest.mark.parametrize(
    ("device", "visible", "error"),
    [
        ("cuda", 0, "needs a GPU that CuPy can use, and there is none"),
        ("cuda:0", 0, "needs a GPU"),
        ("cuda:2", 2, "'cuda:2', but the visible GPUs are cuda:0 to cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there(device: str, visible: int, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        choose_device(device, 0, visible)


def test_cupy_is_asked_how_many_gpus_there_are(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_device("auto", 3) == "cuda:1"
    cupy.is_available = lambda: False  # CuPy is installed, a driver is not
    assert choose_device("auto", 3) == "cpu"
    monkeypatch.setitem(sys.modules, "cupy", None)  # the import fails
    assert choose_device("auto", 3) == "cpu"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise ValueError('numpy.dtype size changed')", "ValueError: numpy.dtype size changed"),
        ("raise OSError('libnvrtc.so: cannot open')", "OSError: libnvrtc.so: cannot open"),
        ("raise ImportError('\\n====\\nbroken:\\n  no _core\\n====\\n')", "broken: no _core"),
        ("", "AttributeError: module 'cupy' has no attribute 'is_available'"),
    ],
)
def test_cupy_that_is_broken_is_no_gpu_and_says_why(
    text: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "cupy.py").write_text(text, encoding="ascii")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "cupy", None)  # whatever is there then is undone at the end
    del sys.modules["cupy"]
    with caplog.at_level(logging.WARNING, "psframe"):
        assert choose_device("auto", 0) == choose_device("auto", 1) == "cpu"
    (line,) = caplog.messages
    assert why in line
    with pytest.raises(ValueError, match=r"'cuda' needs a GPU .* there is none") as raised:
        choose_device("cuda", 0)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)


# ---- sharing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "processes", "limit"),
    [
        (8 << 30, 1, None),  # alone
        (8 << 30, 2, (7 << 30) // 2),  # 512 MiB each beside the pools
        (80 << 30, 5, ((80 << 30) - 5 * (512 << 20)) // 5),
        (1 << 30, 8, (1 << 30) // 16),  # the margin is half the card at most
    ],
)
def test_each_process_may_take_its_share(total: int, processes: int, limit: int | None) -> None:
    assert sharing.memory_limit(total, processes) == limit
    if limit is not None:
        assert 0 < limit * processes < total


def test_what_is_lent_beside_the_pools_is_nobody_s_share(cupy: FakeCupy) -> None:
    lent = 3 << 30
    limit = sharing.memory_limit(16 << 30, 4, lent)
    assert limit is not None
    assert 4 * limit == (16 << 30) - lent - 4 * (512 << 20)
    assert sharing.memory_limit(16 << 30, 1, lent) is None
    assert sharing.fit_memory("cuda:0", 2, {}, lent_bytes=1 << 30) == 3 << 30
    smallest = sharing.memory_limit(1 << 30, 100, (1 << 30) // sharing.LENT_PARTS)
    assert smallest is not None
    assert smallest > 0  # CuPy takes 0 for no limit


@pytest.mark.parametrize(
    ("lent", "total", "free", "said"),
    [
        (0, 0, 0, ""),
        (20, 80, 20, ""),
        (21, 80, 80, "21 MiB would be lent on one GPU, more than a quarter of its 80 MiB"),
        (20, 80, 19, "20 MiB would be lent on one GPU, of which 19 MiB are free"),
    ],
)
def test_how_much_may_be_lent(lent: int, total: int, free: int, said: str) -> None:
    assert sharing.too_much_to_lend(lent << 20, total << 20, free << 20) == said


def test_memory_that_the_pool_keeps_can_be_had(cupy: FakeCupy) -> None:
    cupy.cuda.runtime.free, cupy.cuda.runtime.kept = 2 << 30, 1 << 30
    assert sharing.memory_of("cuda:1") == (8 << 30, 3 << 30)
    assert cupy.cuda.current_device() == 0


def test_the_pool_is_limited_unless_the_user_has_said_how_much(cupy: FakeCupy) -> None:
    set_by_user = {"CUPY_GPU_MEMORY_LIMIT": "30%"}
    assert sharing.fit_memory("cuda:0", 2, set_by_user) is None
    assert sharing.fit_memory("cuda:0", 1, {}) is None
    assert cupy.pool.limits == {}
    limit = sharing.fit_memory("cuda:1", 2, {})  # a server's, which is not the current one
    assert limit == (7 << 30) // 2
    assert cupy.pool.limits == {1: limit}
    assert cupy.cuda.current_device() == 0


def test_who_shares_a_gpu_is_found_by_its_id_and_node(cupy: FakeCupy) -> None:
    """Each rank may call its own GPU cuda:0."""
    a, b = sharing.identify("cuda:0"), sharing.identify("cuda:1")
    assert len(a) == len(b) == 16
    assert len({a, b, sharing.identify("cpu")}) == 3
    ids = [sharing.NO_GPU, a, b, a, a]
    nodes, names = ["m", "m", "m", "m", "n"], [0, 4, 3, 2, 1]
    assert sharing.Sharing.of("cuda:0", 3, ids, nodes, names).users == (2, 4)
    assert sharing.Sharing.of("cuda:0", 4, ids, nodes, names).users == (1,)


@pytest.mark.parametrize(("server_device", "users"), [("cpu", 2), ("cuda", 3)])
def test_a_replacement_has_the_share_of_all_on_its_gpu(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, server_device: str, users: int
) -> None:
    """Of three workers two are on the first GPU, with the server if that has one."""
    monkeypatch.delenv("CUPY_GPU_MEMORY_LIMIT", raising=False)
    plan: Any = SimpleNamespace(device="cuda", server_device=server_device, layout=LAYOUT)
    end: Any = SimpleNamespace(local_worker=2, ranks_here=4)
    _open_device(plan, end).close()
    assert cupy.pool.limits == {0: sharing.memory_limit(8 << 30, users)}


@pytest.mark.parametrize("mps", [False, True])
def test_the_first_of_those_that_share_says_so(
    mps: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if mps:
        (tmp_path / "control").touch()
    environ = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    with caplog.at_level(logging.INFO, "psframe"):
        for here in (3, 5):
            sharing.announce(sharing.Sharing("cuda:1", (3, 5), here), 2 << 30, environ)
        sharing.announce(sharing.Sharing("cuda:0", (7,), 7), None, environ)  # alone
    (line,) = caplog.messages
    assert "ranks 3, 5 share one GPU (cuda:1 in rank 3): each may take 2.0 GiB" in line
    assert ("MPS runs" in line) == mps
    assert ("MPS does not run" in line) == (not mps)


def test_threads_that_share_a_gpu_are_told_so(
    cupy: FakeCupy, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "psframe"):
        sharing.announce_threads("cuda", ["cuda:0", "cuda:1"])
        assert caplog.messages == []
        sharing.announce_threads("cuda", ["cuda:0", "cuda:1", "cuda:0"])
        sharing.announce_threads("auto", ["cpu"])
    shared, fallen_back = caplog.messages
    assert "2 workers of this process share cuda:0" in shared
    assert "sees no GPU" in fallen_back


# ---- what is taken in -----------------------------------------------------------------------


class OnHost:
    """Another library's array in host memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = "float32 of another library"

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)


def accepted(device: CudaDevice | HostDevice, **grads: object) -> Accepted:
    layout = Layout.of({name: np.zeros(3, np.float32) for name in grads})
    found: Accepted = device.accept(grads, "push from worker 3")
    check_gradients(layout, found, "push from worker 3")
    return found


def test_the_host_copies_nothing() -> None:
    device = make_device("cpu", LAYOUT)
    assert isinstance(device, HostDevice)
    views = LAYOUT.views(np.arange(9, dtype=np.float32))
    assert device.accept(views, "") is views
    assert all(device.staging(0, views)[name] is view for name, view in views.items())
    device.close()


def test_what_is_no_mapping_is_left_to_the_check(cupy: FakeCupy) -> None:
    for device in (HostDevice(), CudaDevice(0, LAYOUT)):
        assert device.accept([1], "") == [1]
        mixed = {"w": object(), "b": 3}
        assert device.accept(mixed, "") == mixed
        device.close()


@pytest.mark.parametrize("name", ["cpu", "cuda:0"])
def test_host_memory_of_another_library_is_read_where_it_is(cupy: FakeCupy, name: str) -> None:
    device = make_device(name, LAYOUT)
    array = np.arange(3, dtype=np.float32)
    found = accepted(device, w=OnHost(array))
    assert isinstance(found["w"], np.ndarray)
    assert np.shares_memory(found["w"], array)
    with pytest.raises(TypeError, match="gradient 'w' has dtype int64"):
        accepted(device, w=OnHost(np.arange(3)))
    device.close()


@pytest.mark.parametrize("protocol", ["dlpack", "interface"])
def test_a_gpu_s_array_is_no_gradient_of_a_worker_on_the_cpu(cupy: FakeCupy, protocol: str) -> None:
    array = ForeignArray(cupy.empty(3, "f4"), cupy.cuda.default, protocol)
    with pytest.raises(TypeError, match="worker 3: gradient 'w' is on a GPU, and this worker"):
        accepted(HostDevice(), w=array)


@pytest.mark.parametrize("protocol", ["dlpack", "interface"])
def test_another_library_s_array_is_taken_as_it_is(cupy: FakeCupy, protocol: str) -> None:
    device = CudaDevice(0, LAYOUT)
    array = cupy.empty(3, "f4")
    found = accepted(
        device, w=ForeignArray(array, cupy.cuda.default, protocol), b=cupy.empty(3, "f4")
    )
    assert found["w"] is array
    assert found.foreign
    assert not accepted(device, w=cupy.empty(3, "f4"), b=np.zeros(3, "f4")).foreign
    device.close()


@pytest.mark.parametrize("protocol", ["dlpack", "interface", "cupy"])
def test_an_array_on_another_gpu_is_refused(cupy: FakeCupy, protocol: str) -> None:
    device = CudaDevice(0, LAYOUT)
    array = FakeArray(cupy, np.zeros(3, "f4"), ordinal=1)
    foreign = ForeignArray(array, cupy.cuda.default, protocol, ordinal=1)
    with pytest.raises(ValueError, match="'w' is on cuda:1, and this worker computes on cuda:0"):
        accepted(device, w=array if protocol == "cupy" else foreign)
    device.close()


def test_what_cannot_be_read_is_refused_with_the_reason(cupy: FakeCupy) -> None:
    device = CudaDevice(0, LAYOUT)
    array = ForeignArray(cupy.empty(3, "f4"), cupy.cuda.default, "dlpack")

    def refuse(**options: object) -> None:
        raise BufferError("it requires a gradient")

    array.__dlpack__ = refuse
    with pytest.raises(
        TypeError, match=r"'w' cannot be read here: it requires a gradient; .*\.grad"
    ):
        accepted(device, w=array)
    elsewhere = ForeignArray(cupy.empty(3, "f4"), cupy.cuda.default, "dlpack", kind=4)
    with pytest.raises(TypeError, match="'w' is on a device of DLPack's type 4"):
        accepted(device, w=elsewhere)
    for dtype in (np.int32, np.complex64):
        with pytest.raises(TypeError, match="gradient 'w' has dtype"):
            accepted(device, w=FakeArray(cupy, np.zeros(3, dtype)))
    device.close()


def test_a_thread_that_cannot_take_its_device_says_so_at_every_job() -> None:
    def begin() -> None:
        raise RuntimeError("no such device")

    done: list[int] = []
    behind = Behind(begin)
    jobs = [behind.start(lambda: done.append(1)) for _ in range(2)]
    for job in jobs:
        with pytest.raises(RuntimeError, match="no such device"):
            job.wait()
    behind.close()
    assert not done
