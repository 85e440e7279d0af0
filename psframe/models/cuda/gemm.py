"""Matrix products by cuBLAS, in float32, TF32, or of halves with sums in float32.

CuPy's own `matmul` copies a transposed operand that it does not recognise, knows no bfloat16, and
its TF32 is one switch for the process. `cublasGemmEx` takes transposition, types and arithmetic
as arguments of each product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Gemm"]

# cublasOperation_t, cudaDataType_t, cublasComputeType_t, cublasPointerMode_t, cublasGemmAlgo_t.
_KEEP, _TRANSPOSE = 0, 1
_TYPES = {"f": 0, "e": 2, "H": 14}  # by character; bfloat16 is kept as uint16
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32 = 68, 77
_ON_HOST, _ON_DEVICE = 0, 1
_ALGORITHM = -1  # cuBLAS' choice


class Gemm:
    """out = op(a) op(b) of row-major matrices, on the current stream; allocates nothing.

    Args:
        xp: cupy.
        precision: "tf32", or anything else: then halves are multiplied as they are, and float32
            in float32.
        state: of the loss scale on the device; [1] is its inverse, and [3] is 0.
        scaled: whether there is one at all.
    """

    def __init__(self, xp: Any, precision: str, state: Any, *, scaled: bool) -> None:
        self._cublas = xp.cuda.cublas
        self._handle_of = xp.cuda.get_cublas_handle
        self._compute = _COMPUTE_32F_FAST_TF32 if precision == "tf32" else _COMPUTE_32F
        self._numbers = np.array([1.0, 0.0], np.float32)
        address = self._numbers.ctypes.data
        self._host = address, address + 4
        self._state = state  # kept, since its addresses are
        self._device = state.data.ptr + 4, state.data.ptr + 12
        self._scaled = scaled

    def __call__(
        self, a: Any, b: Any, out: Any, *, ta: bool = False, tb: bool = False, unscale: bool = False
    ) -> Any:
        """Multiply.

        Args:
            a, b: two-dimensional, contiguous; float32, float16, or bfloat16 as uint16.
            out: (rows of op(a), columns of op(b)), contiguous; not `a` or `b`.
            ta, tb: whether a, b are taken transposed.
            unscale: divide by the loss scale.
        """
        rows, columns = out.shape
        inner = a.shape[0] if ta else a.shape[1]
        handle = self._handle_of()
        on_device = unscale and self._scaled
        alpha, beta = self._device if on_device else self._host
        if on_device:
            self._cublas.setPointerMode(handle, _ON_DEVICE)
        # cuBLAS counts by columns: to it each of these is its transpose, and out^T = b^T a^T.
        self._cublas.gemmEx(
            *(handle, _TRANSPOSE if tb else _KEEP, _TRANSPOSE if ta else _KEEP),
            *(columns, rows, inner, alpha),
            *(b.data.ptr, _TYPES[b.dtype.char], b.shape[1]),
            *(a.data.ptr, _TYPES[a.dtype.char], a.shape[1], beta),
            *(out.data.ptr, _TYPES[out.dtype.char], columns, self._compute, _ALGORITHM),
        )
        if on_device:
            self._cublas.setPointerMode(handle, _ON_HOST)  # as CuPy expects it
        return out

    def in_parts(self, a: Any, b: Any, out: Any) -> None:
        """out[p] = a_p b_p^T with a, b cut along their columns into len(out) equal parts.

        Of a small product with a long inner dimension, which one block of threads would compute
        while the others idle, these are the parts of its sum.

        Args:
            a, b: (rows, inner) and (columns, inner).
            out: (parts, rows, columns); parts divides inner.
        """
        parts, rows, columns = out.shape
        inner = a.shape[1]
        alpha, beta = self._host
        self._cublas.gemmStridedBatchedEx(
            *(self._handle_of(), _TRANSPOSE, _KEEP, columns, rows, inner // parts, alpha),
            *(b.data.ptr, _TYPES[b.dtype.char], inner, inner // parts),
            *(a.data.ptr, _TYPES[a.dtype.char], inner, inner // parts, beta),
            *(out.data.ptr, _TYPES[out.dtype.char], columns, rows * columns),
            *(parts, self._compute, _ALGORITHM),
        )
