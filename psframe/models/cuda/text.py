"""The CUDA C of the models' kernels: what begins each source, and what is not about images.

A source is the prelude of a storage type S, and the bodies. Activations and their gradients are
stored as S; every sum, mean and parameter is float32. The bodies are C as well as CUDA C, so that
a C compiler can run them thread by thread.

Sums are made in two stages, partial sums of fixed parts and then their sum, without atomics: the
same input gives the same bits. A gradient that is stored as S, and is not finite then, sets *bad.
`state` is what `Scaler` keeps: the loss scale, and its inverse. No kernel takes more than 2^31
elements of one array.
"""

from __future__ import annotations

from psframe.models.cuda.images import IMAGES
from psframe.models.cuda.normalization import NORMALIZATION

__all__ = ["BODIES", "CHUNK", "THREADS", "source"]

THREADS = 256  # in a block; a power of two, since `block_sum` halves it
CHUNK = 4096  # values that one block reduces, of which each thread holds CHUNK / THREADS

_CUDA = """\
#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif
"""

_STORAGE = {
    "float32": """\
typedef float S;
DEVICE float load(S x) { return x; }
DEVICE S store(float x) { return x; }
""",
    # The conversions are instructions since compute capability 5.3; no header is needed for them.
    "float16": """\
typedef unsigned short S;
DEVICE float load(S x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
DEVICE S store(float x) { S y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
""",
    # The upper half of a float32, rounded to even; a NaN stays one.
    "bfloat16": """\
typedef unsigned short S;
DEVICE float load(S x) { return __uint_as_float((unsigned)x << 16); }
DEVICE S store(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return (S)((bits >> 16) | 64u);
    return (S)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
""",
}

_BASE = """\
#ifndef THREADS
#define THREADS 256
#define CHUNK 4096
#endif
#define EACH (CHUNK / THREADS)
#define HERE ((int)(blockIdx.x * blockDim.x + threadIdx.x))
#define STEP ((int)(gridDim.x * blockDim.x))

DEVICE S keep(float value, int *bad) {
    const S stored = store(value);
    const float z = load(stored);
    if (bad && !(z - z == 0.0f)) *bad = 1;
    return stored;
}

DEVICE float block_sum(float value, float *shared) {
    const int t = threadIdx.x;
    shared[t] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (t < half) shared[t] += shared[t + half];
        __syncthreads();
    }
    value = shared[0];
    __syncthreads();
    return value;
}

DEVICE float block_max(float value, float *shared) {
    const int t = threadIdx.x;
    shared[t] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (t < half) shared[t] = fmaxf(shared[t], shared[t + half]);
        __syncthreads();
    }
    value = shared[0];
    __syncthreads();
    return value;
}
"""

_FLAT = """
KERNEL void cast(const float *x, S *y, long long size) {
    for (int i = HERE; i < size; i += STEP) y[i] = store(x[i]);
}

KERNEL void cast_gradient(const float *g, S *y, long long size, int *bad) {
    for (int i = HERE; i < size; i += STEP) y[i] = keep(g[i], bad);
}

KERNEL void uncast(const S *x, float *y, long long size, int *bad) {
    for (int i = HERE; i < size; i += STEP) {
        y[i] = load(x[i]);
        if (!(y[i] - y[i] == 0.0f)) *bad = 1;
    }
}

KERNEL void relu(const S *x, S *y, long long size) {
    for (int i = HERE; i < size; i += STEP) {
        const float v = load(x[i]);
        y[i] = v > 0.0f || v != v ? x[i] : store(0.0f);
    }
}

KERNEL void relu_gradient(S *g, const S *y, long long size, int *bad) {
    for (int i = HERE; i < size; i += STEP) {
        g[i] = keep(load(y[i]) > 0.0f ? load(g[i]) : 0.0f, bad);
    }
}

KERNEL void dropout(const S *x, const unsigned char *mask, S *y, long long size, float scale,
                    int *bad) {
    for (int i = HERE; i < size; i += STEP) y[i] = keep(load(x[i]) * (mask[i] ? scale : 0.0f), bad);
}

/* y[i, j] = y[i, j] + b[j], and its ReLU if `rectify`: rows blockIdx.y * each ... of a column. */
KERNEL void bias_columns(S *y, const float *b, long long rows, long long columns, long long each,
                         long long rectify) {
    const int j = HERE;
    if (j >= columns) return;
    const float bias = b[j];
    const int begin = blockIdx.y * (int)each;
    const int end = begin + each < rows ? begin + (int)each : (int)rows;
    for (int i = begin; i < end; ++i) {
        const int at = i * (int)columns + j;
        const float v = load(y[at]) + bias;
        y[at] = store(rectify && v <= 0.0f ? 0.0f : v);
    }
}

/* g = g [h > 0] unless h is null; partial[blockIdx.y, j] = the sum of the block's rows of g. */
KERNEL void column_partials(S *g, const S *h, float *partial, long long rows, long long columns,
                            long long each) {
    const int j = HERE;
    if (j >= columns) return;
    const int begin = blockIdx.y * (int)each;
    const int end = begin + each < rows ? begin + (int)each : (int)rows;
    float total = 0.0f;
    #pragma unroll 8
    for (int i = begin; i < end; ++i) {
        const int at = i * (int)columns + j;
        if (h && !(load(h[at]) > 0.0f)) g[at] = store(0.0f);
        else total += load(g[at]);
    }
    partial[blockIdx.y * (int)columns + j] = total;
}

/* out[j] = the sum of partial[:, j] without the loss scale. */
KERNEL void column_sums(const float *partial, float *out, long long parts, long long columns,
                        const float *state, int *bad) {
    const int j = HERE;
    if (j >= columns) return;
    float total = 0.0f;
    #pragma unroll 8
    for (int i = 0; i < parts; ++i) total += partial[i * (int)columns + j];
    total *= state[1];
    if (!(total - total == 0.0f)) *bad = 1;
    out[j] = total;
}

/* Of row i, a block: the cross-entropy of softmax(z + b) with label y[i], whether the first of the
   largest values is the label's, and the gradient of weight * loss scale * cross-entropy. */
KERNEL void cross_entropy(const float *z, const float *b, const long long *y, S *g, float *losses,
                          float *hits, long long k, float weight, const float *state, int *bad) {
    __shared__ float shared[THREADS];
    const int t = threadIdx.x;
    const int row = blockIdx.x;
    const float *values = z + (long long)row * k;
    const long long label = y[row];
    float most = -INFINITY;
    for (int j = t; j < k; j += blockDim.x) most = fmaxf(most, values[j] + (b ? b[j] : 0.0f));
    most = block_max(most, shared);
    float total = 0.0f;
    float first = -INFINITY;
    for (int j = t; j < k; j += blockDim.x) {
        const float v = values[j] + (b ? b[j] : 0.0f);
        total += expf(v - most);
        if (v == most) first = fmaxf(first, -(float)j);
    }
    total = block_sum(total, shared);
    first = block_max(first, shared);
    /* A label that is none makes a loss and gradients that are no numbers, which are refused. */
    const int known = label >= 0 && label < k;
    if (t == 0) {
        const float of_label = known ? values[label] + (b ? b[label] : 0.0f) - most : NAN;
        losses[row] = logf(total) - of_label;
        if (hits) hits[row] = known && first == -(float)label ? 1.0f : 0.0f;
    }
    if (!g) return;
    const float factor = known ? weight * state[0] : NAN;
    for (int j = t; j < k; j += blockDim.x) {
        const float p = expf(values[j] + (b ? b[j] : 0.0f) - most) / total;
        g[row * (int)k + j] = keep((p - (j == label ? 1.0f : 0.0f)) * factor, bad);
    }
}

/* One block: out[0] = factor * the sum of a; out[1] = the sum of b, unless that is null. */
KERNEL void two_sums(const float *a, const float *b, float *out, long long size, float factor) {
    __shared__ float shared[THREADS];
    float first = 0.0f, second = 0.0f;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        first += a[i];
        if (b) second += b[i];
    }
    first = block_sum(first, shared);
    second = block_sum(second, shared);
    if (threadIdx.x == 0) {
        out[0] = first * factor;
        out[1] = second;
    }
}

/* One thread: state = (scale, 1 / scale, finite steps since it changed), after a step. */
KERNEL void next_scale(float *state, int *bad, float growth, float backoff, float interval,
                       float least, float most) {
    float scale = state[0], finite = state[2] + 1.0f;
    if (*bad) {
        scale = fmaxf(scale * backoff, least);
        finite = 0.0f;
    } else if (finite >= interval) {
        scale = fminf(scale * growth, most);
        finite = 0.0f;
    }
    state[0] = scale;
    state[1] = 1.0f / scale;
    state[2] = finite;
    *bad = 0;
}
"""

BODIES = _BASE + _FLAT + NORMALIZATION + IMAGES


def source(storage: str) -> str:
    """Write the CUDA C of all kernels for one storage type: float32, float16 or bfloat16."""
    return _CUDA + _STORAGE[storage] + BODIES
