"""The sum of a gradient's squares on the GPU: its norm, and whether it is finite, in one kernel.

Squares are summed in float64. For float32 they cannot overflow, so the sum is finite exactly if
every element is. The order of the sum depends on the lengths of the runs alone: equal gradients
have equal norms. With n terms a thread its relative error is below (n + 20) * 2**-53.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

__all__ = ["BLOCKS_MAX", "blocks_for", "norm_of", "squares_kernel"]

THREADS = 256  # a power of two, and the length of `sums` below
# On the largest cards (132 multiprocessors of 2048 threads) as many run at once.
BLOCKS_MAX = 1024
_ELEMENTS_A_THREAD = 4

_SOURCE = r"""
extern "C" __global__ void psframe_squares(
    const long long* table, int runs, double* partial)
{
    __shared__ double sums[256];
    const long long stride = (long long)gridDim.x * blockDim.x;
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    double sum = 0.0;
    for (int run = 0; run < runs; ++run) {
        const REAL* x = (const REAL*)table[2 * run];
        const long long size = table[2 * run + 1];
        for (long long k = first; k < size; k += stride) {
            const double value = (double)x[k];
            sum += value * value;
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int width = blockDim.x / 2; width > 0; width /= 2) {
        if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
        __syncthreads();
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}
"""


def source_for(dtype: Any) -> str:
    """Write the kernel for float32 or float64.

    Its arguments: runs of elements as pairs of an address and a length, how many there are, and
    where each block writes its part of the sum.
    """
    real = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}[np.dtype(dtype)]
    return _SOURCE.replace("REAL", real)


@functools.cache
def squares_kernel(dtype: np.dtype[Any]) -> Any:
    """Make the kernel; NVRTC compiles it at its first call on each device."""
    import cupy

    return cupy.RawKernel(source_for(dtype), "psframe_squares")


def blocks_for(size: int) -> int:
    """Choose how many blocks sum a gradient of `size` elements."""
    return min(BLOCKS_MAX, max(1, -(-size // (THREADS * _ELEMENTS_A_THREAD))))


def norm_of(partial: Any) -> float | None:
    """Give the norm that the blocks' sums make; None if that is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(np.asarray(partial).sum())
    return math.sqrt(total) if math.isfinite(total) else None
