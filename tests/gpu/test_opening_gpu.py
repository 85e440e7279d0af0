"""Memory of a real card that another process opens; `test_gpu_direct_gpu` trains so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe.devices.opening import Lent, Opened, check_reach
from psframe.devices.sharing import identify

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
COUNT, SIZE = 3, 1_000_001
OTHER = """
import sys
import cupy
from psframe.devices.opening import Opened

opened = Opened("cuda:0", bytes.fromhex(sys.argv[1]), int(sys.argv[2]), "float32")
side = cupy.cuda.Stream(non_blocking=True)
runtime = cupy.cuda.runtime
ones = cupy.ones(int(sys.argv[2]), cupy.float32)
found = cupy.zeros(int(sys.argv[2]), cupy.float32)
cupy.cuda.get_current_stream().synchronize()
there, here = opened.array(1), opened.array(2)[5:9]
kind = runtime.memcpyDeviceToDevice
runtime.memcpyAsync(found.data.ptr, there.data.ptr, there.nbytes, kind, side.ptr)
runtime.memcpyAsync(here.data.ptr, ones.data.ptr, here.nbytes, kind, side.ptr)
side.synchronize()
print(float(found.min()), float(found.max()))
opened.close()
"""

# Lends, fills an array, says where it is, and waits to be killed, or for its parent's end.
LENDER = """
import sys
import cupy
from psframe.devices.opening import Lent

lent = Lent("cuda:0", int(sys.argv[1]), int(sys.argv[2]), "float32")
lent.array(1)[...] = 5
cupy.cuda.get_current_stream().synchronize()
print(lent.handle.hex(), flush=True)
sys.stdin.read()
"""
# Has the memory of one that dies open, before a copy from it or while many are under way.
HEIR = """
import subprocess, sys
import cupy
from psframe.devices.opening import Opened

count, size, copies = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
line = [sys.executable, "-c", sys.argv[1], count, str(size)]
lender = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
opened = Opened("cuda:0", bytes.fromhex(lender.stdout.readline()), size, "float32")
side = cupy.cuda.Stream(non_blocking=True)
runtime, there = cupy.cuda.runtime, opened.array(1)
found = cupy.zeros(size, cupy.float32)
cupy.cuda.get_current_stream().synchronize()

def copy():
    kind = runtime.memcpyDeviceToDevice
    runtime.memcpyAsync(found.data.ptr, there.data.ptr, there.nbytes, kind, side.ptr)

try:
    for _ in range(copies):
        copy()
    lender.kill()
    lender.wait()
    copy()
    side.synchronize()
    print("copied", float(found.min()), float(found.max()))
except RuntimeError as error:
    print("refused", str(error).partition(chr(10))[0])
print("computes", float((cupy.arange(10, dtype=cupy.float32) * 2).sum()))
opened.close()
print("computes", float((cupy.arange(10, dtype=cupy.float32) * 3).sum()))
"""
# Copies from what it has opened, and back, until it is killed.
READER = """
import sys
import cupy
from psframe.devices.opening import Opened

size = int(sys.argv[2])
opened = Opened("cuda:0", bytes.fromhex(sys.argv[1]), size, "float32")
side = cupy.cuda.Stream(non_blocking=True)
runtime, there = cupy.cuda.runtime, opened.array(1)
found = cupy.zeros(size, cupy.float32)
cupy.cuda.get_current_stream().synchronize()
print("open", flush=True)
while True:
    for _ in range(20):
        kind = runtime.memcpyDeviceToDevice
        runtime.memcpyAsync(found.data.ptr, there.data.ptr, there.nbytes, kind, side.ptr)
    side.synchronize()
"""


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


def test_another_process_reads_and_writes_what_is_lent(cupy: Any) -> None:
    lent = Lent("cuda:0", COUNT, SIZE, np.float32)
    for index in range(COUNT):
        lent.array(index)[...] = index
    cupy.cuda.get_current_stream().synchronize()
    line = [sys.executable, "-c", OTHER, lent.handle.hex(), str(SIZE)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0", "1.0"]
    assert lent.array(2)[3:11].get().tolist() == [2, 2, 1, 1, 1, 1, 2, 2]
    assert (lent.array(0).get() == 0).all()


@pytest.mark.parametrize("copies", [0, 200], ids=["before", "meanwhile"])
def test_a_process_that_dies_leaves_its_bytes_or_an_error_that_breaks_nothing(
    cupy: Any, copies: int
) -> None:
    """What a server needs that has a worker's gradient open: CUDA does not promise it.

    It gets what was there, or a RuntimeError after which it computes, and closes, as before.
    """
    line = [sys.executable, "-c", HEIR, LENDER, str(COUNT), str(SIZE), str(copies)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    first, *rest = done.stdout.splitlines()
    assert first == "copied 5.0 5.0" or first.startswith("refused ")
    assert rest == ["computes 90.0", "computes 135.0"]


def test_a_process_that_dies_while_it_reads_breaks_nothing_for_the_owner(cupy: Any) -> None:
    """As a worker that holds a snapshot."""
    lent = Lent("cuda:0", COUNT, SIZE, np.float32)
    lent.array(1)[...] = 7
    cupy.cuda.get_current_stream().synchronize()
    line = [sys.executable, "-c", READER, lent.handle.hex(), str(SIZE)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as reader:
        try:
            assert reader.stdout is not None
            said = reader.stdout.readline()
        finally:
            reader.kill()
    assert said == "open\n"
    assert (lent.array(1).get() == 7).all()
    lent.array(1)[...] = 8
    assert (lent.array(1).get() == 8).all()


def test_what_cannot_be_opened_is_a_runtime_error(cupy: Any) -> None:
    lent = Lent("cuda:0", 1, 10, np.float64)
    with pytest.raises(RuntimeError):  # in the process that lends it
        Opened("cuda:0", lent.handle, 10, np.float64)
    with pytest.raises(RuntimeError):
        Opened("cuda:0", bytes(64), 10, np.float64)
    cupy.cuda.get_current_stream().synchronize()  # and nothing is broken by it


def test_a_card_reaches_itself(cupy: Any) -> None:
    check_reach("cuda:0", identify("cuda:0"))
    check_reach("cuda:0", bytes(16))  # one that is not seen here
