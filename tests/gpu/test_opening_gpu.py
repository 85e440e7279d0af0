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
