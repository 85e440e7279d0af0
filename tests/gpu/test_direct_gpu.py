"""What a worker on a real GPU gives to MPI, and takes from it: another stream plays MPI's part.

And what another process finds that has opened its memory.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe.devices import DirectDevice
from psframe.devices.opening import Lent
from psframe.layout import Layout
from psframe.packing import GradientSlot

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
N = 4_000_000
LAYOUT = Layout.of({"w": np.zeros((N - 3,), np.float32), "b": np.zeros(3, np.float32)})
# Reads slot 0 of what another process has lent, each time it is told to, and says what is there.
TOLD = """
import sys
import cupy
from psframe.devices.opening import Opened

size = int(sys.argv[2])
opened = Opened("cuda:0", bytes.fromhex(sys.argv[1]), size, "float32")
side = cupy.cuda.Stream(non_blocking=True)
runtime, found, slot = cupy.cuda.runtime, cupy.zeros(size, cupy.float32), opened.array(0)
cupy.cuda.get_current_stream().synchronize()
print("open", flush=True)
for line in sys.stdin:
    kind = runtime.memcpyDeviceToDevice
    runtime.memcpyAsync(found.data.ptr, slot.data.ptr, slot.nbytes, kind, side.ptr)
    side.synchronize()
    print(float(found.min()), float(found.max()), flush=True)
opened.close()
"""


class Hatch:
    """A worker's end of MPI that only notes what it is told."""

    def __init__(self, near: Sequence[tuple[int, int]] = ()) -> None:
        self.near = near
        self.leaving: dict[int, Any] = {}
        self.empty: Callable[[int], Any] = lambda size: None

    def leave_from(self, slot: int, array: Any) -> None:
        self.leaving[slot] = array

    def land_in(self, empty: Callable[[int], Any]) -> None:
        self.empty = empty


def slot_of(layout: Layout) -> GradientSlot:
    return GradientSlot(layout, np.full(layout.size, np.nan, layout.dtype))


def read(cupy: Any, array: Any) -> Any:
    """Read device memory at once, behind nothing."""
    with cupy.cuda.Stream(non_blocking=True):
        return array.get()


@pytest.mark.parametrize("own", [False, True])
def test_a_gradient_is_whole_when_mpi_is_told_of_it(cupy: Any, slow: Any, own: bool) -> None:
    hatch, slot = Hatch(near=[(100, 5000)]), slot_of(LAYOUT)
    device = DirectDevice(0, LAYOUT, hatch, gradients=True, parameters=True)
    grads = device.staging(0, slot.arrays) if own else None
    for step in range(4):
        slow()
        given = grads
        if given is None:
            given = {name: cupy.empty(v.shape, np.float32) for name, v in slot.arrays.items()}
        for array in given.values():
            array[...] = step + 1
        finite, norm = device.fetch(0, given, slot, True, None)
        if not own:
            for array in given.values():
                array[...] = -1.0  # it has been copied
        assert (read(cupy, hatch.leaving[0]) == step + 1).all()
        assert (slot.flat[100:5000] == step + 1).all()
        assert finite
        assert norm == pytest.approx((step + 1) * math.sqrt(N), rel=1e-12)
    device.close()


@pytest.mark.parametrize("own", [False, True])
def test_a_gradient_is_whole_when_a_process_that_has_opened_it_is_told(
    cupy: Any, slow: Any, own: bool
) -> None:
    """Though the kernels that make it are late; a process is told sooner than they are done."""
    lent, hatch, slot = Lent("cuda:0", 2, N, np.float32), Hatch(), slot_of(LAYOUT)
    device = DirectDevice(
        0, LAYOUT, hatch, gradients=True, parameters=False, slots=lambda index: lent.array(index)
    )
    staging = device.staging(0, slot.arrays)
    line = [sys.executable, "-c", TOLD, lent.handle.hex(), str(N)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, **pipes) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        for step in range(4):
            given = {name: cupy.empty(v.shape, np.float32) for name, v in slot.arrays.items()}
            given = staging if own else given
            slow()
            for array in given.values():
                array[...] = step + 1
            assert device.fetch(0, given, slot, False, None) == (True, 0.0)
            assert hatch.leaving[0] is not None
            other.stdin.write("now\n")
            other.stdin.flush()
            assert other.stdout.readline().split() == [f"{step + 1:.1f}"] * 2
    device.close()


def test_what_needs_a_cast_or_is_strided_or_changes_places(cupy: Any) -> None:
    layout = Layout.of({"a": np.zeros((2, 3), np.float32), "b": np.zeros(6, np.float32)})
    hatch, slot = Hatch(), slot_of(layout)
    device = DirectDevice(0, layout, hatch, gradients=True, parameters=False)
    wide = cupy.arange(12.0).reshape(2, 6)
    device.fetch(0, {"a": wide[:, ::2], "b": wide.reshape(-1)[::2]}, slot, True, None)
    expected = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert read(cupy, hatch.leaving[0]).tolist() == 2 * expected
    own = device.staging(0, slot.arrays)
    own["a"][...] = 1.0
    own["b"][...] = 2.0
    swapped = {"a": own["b"].reshape(2, 3), "b": own["a"].reshape(-1)}
    device.fetch(0, swapped, slot, False, None)
    assert read(cupy, hatch.leaving[0]).tolist() == [2.0] * 6 + [1.0] * 6
    device.close()


def test_what_is_not_finite_or_partly_on_the_host_leaves_from_the_host(cupy: Any) -> None:
    hatch, slot = Hatch(), slot_of(LAYOUT)
    device = DirectDevice(0, LAYOUT, hatch, gradients=True, parameters=False)
    grads: dict[str, Any] = {"w": cupy.ones(N - 3, np.float32), "b": cupy.ones(3, np.float32)}
    grads["b"][1:2] = np.inf
    assert not device.fetch(0, grads, slot, True, None)[0]
    assert hatch.leaving[0] is None
    grads["b"] = np.ones(3, np.float32)
    finite, norm = device.fetch(0, grads, slot, True, None)
    assert finite
    assert norm == pytest.approx(math.sqrt(N), rel=1e-6)
    assert hatch.leaving[0] is None
    assert (slot.flat == 1.0).all()
    device.close()


def test_parameters_that_have_landed_are_there_for_the_current_stream(cupy: Any, slow: Any) -> None:
    hatch, half = Hatch(), N // 2
    device = DirectDevice(0, LAYOUT, hatch, gradients=False, parameters=True)
    landings = [(hatch.empty(half), hatch.empty(N - half)) for _ in range(2)]
    results = []
    for step in range(6):
        device.copied(waits=True)
        arriving = cupy.cuda.Stream(non_blocking=True)
        with arriving:
            for landing in landings[step % 2]:
                landing[...] = step
        arriving.synchronize()
        slow()  # the parameters before are still read behind it
        params = device.params(landings[step % 2])
        results.append(params["w"] * 1.0)
    for step, result in enumerate(results):
        assert (result.get() == step).all()
    device.close()
