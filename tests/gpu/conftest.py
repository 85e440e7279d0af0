"""What the tests on a GPU have in common.

Under compute-sanitizer each array has an allocation of its own: a pool would hide overruns.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

_SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
    const long long begin = clock64();
    while (clock64() - begin < cycles) { }
}
"""
_CYCLES = 20_000_000  # 10 to 20 ms


def pytest_sessionstart() -> None:
    """Take CuPy's pool away, if the tests run under compute-sanitizer."""
    if os.environ.get("PSFRAME_TEST_NO_POOL"):
        import cupy

        cupy.cuda.set_allocator(None)


@pytest.fixture
def cupy() -> Any:
    """CuPy itself."""
    return pytest.importorskip("cupy")


@pytest.fixture
def slow(cupy: Any) -> Callable[..., None]:
    """Keep a stream, the current one unless told, busy for a while."""
    kernel = cupy.RawKernel(_SPIN, "spin")

    def spin(stream: Any = None) -> None:
        with cupy.cuda.get_current_stream() if stream is None else stream:
            kernel((1,), (1,), (np.int64(_CYCLES),))

    spin()
    return spin
