"""The CUDA C of what concerns images (c, n, h, w): patches as columns, pooling, transposition.

Every result is gathered by a thread of its own: where windows overlap, nothing is added to one
place by two, and sums have one order. One thread lays out a whole patch of a channel, so that the
place is divided into n, i and j once for its size^2 values, and neighbours write to neighbours.
"""

from __future__ import annotations

__all__ = ["IMAGES"]

# {name}, {type} and {read}: of what is laid out, a layer's input or the samples as they came.
_COLUMNS = """
/* columns[c, k, l, n, i, j] = x[c, n, stride i + k - padding, stride j + l - padding], or 0. */
KERNEL void {name}(const {type} *x, S *columns, long long n, long long h, long long w,
                   long long of_channel, long long of_image, long long size, long long stride,
                   long long padding, long long rows, long long across) {{
    const int area = (int)(rows * across), m = (int)n * area;
    const int c = blockIdx.y;
    S *place = columns + (long long)c * size * size * m;
    for (int at = HERE; at < m; at += STEP) {{
        const int image = at / area, inside = at % area;
        const int i = inside / (int)across * (int)stride - (int)padding;
        const int j = inside % (int)across * (int)stride - (int)padding;
        const {type} *from = x + c * of_channel + image * of_image;
        for (int k = 0; k < size; ++k) {{
            for (int l = 0; l < size; ++l) {{
                const int y = i + k, z = j + l;
                const int there = y >= 0 && y < h && z >= 0 && z < w;
                place[(long long)(k * (int)size + l) * m + at] =
                    there ? {read}(from[y * (int)w + z]) : store(0.0f);
            }}
        }}
    }}
}}
"""

_GATHER = """
/* dx[c, n, y, z] = the sum of columns over the patches that it is part of, in the order of k, l. */
KERNEL void from_columns(const S *columns, S *dx, long long n, long long h, long long w,
                         long long size, long long stride, long long padding, long long rows,
                         long long across, int *bad) {
    const int area = (int)(h * w), all = (int)n * area, m = (int)(n * rows * across);
    const int c = blockIdx.y, s = (int)stride;
    const S *own = columns + (long long)c * size * size * m;
    for (int at = HERE; at < all; at += STEP) {
        const int image = at / area, inside = at % area;
        const int y = inside / (int)w + (int)padding, z = inside % (int)w + (int)padding;
        float total = 0.0f;
        for (int k = 0; k < size; ++k) {
            const int i = (y - k) / s;
            if (y < k || i * s != y - k || i >= rows) continue;
            for (int l = 0; l < size; ++l) {
                const int j = (z - l) / s;
                if (z < l || j * s != z - l || j >= across) continue;
                total += load(own[(long long)(k * (int)size + l) * m
                                  + (image * (int)rows + i) * (int)across + j]);
            }
        }
        dx[(long long)c * all + at] = keep(total, bad);
    }
}

/* The largest value of each window, and the number of its place there, the first of equal ones. */
KERNEL void max_pool(const S *x, S *y, unsigned char *where, long long planes, long long h,
                     long long w, long long size, long long stride, long long rows,
                     long long across) {
    const int area = (int)(rows * across), all = (int)planes * area;
    for (int at = HERE; at < all; at += STEP) {
        const int inside = at % area;
        const int i = inside / (int)across * (int)stride, j = inside % (int)across * (int)stride;
        const S *from = x + (long long)(at / area) * h * w + i * (int)w + j;
        float most = load(from[0]);
        int place = 0;
        for (int k = 0; k < size; ++k) {
            for (int l = 0; l < size; ++l) {
                const float v = load(from[k * (int)w + l]);
                if (v > most || (v != v && most == most)) {
                    most = v;
                    place = k * (int)size + l;
                }
            }
        }
        y[at] = store(most);
        where[at] = (unsigned char)place;
    }
}

KERNEL void max_pool_gradient(const S *g, const unsigned char *where, S *dx, long long planes,
                              long long h, long long w, long long size, long long stride,
                              long long rows, long long across, int *bad) {
    const int area = (int)(h * w), all = (int)planes * area, s = (int)stride, width = (int)size;
    for (int at = HERE; at < all; at += STEP) {
        const int y = at % area / (int)w, z = at % area % (int)w;
        const int own = at / area * (int)(rows * across);
        const int top = y >= width ? (y - width) / s + 1 : 0;
        const int left = z >= width ? (z - width) / s + 1 : 0;
        float total = 0.0f;
        for (int i = top; i < rows && i * s <= y; ++i) {
            for (int j = left; j < across && j * s <= z; ++j) {
                const int window = own + i * (int)across + j;
                if (where[window] == (y - i * s) * width + (z - j * s)) total += load(g[window]);
            }
        }
        dx[at] = keep(total, bad);
    }
}

/* y[j, i, p] = x[i, j, p] for (a, b, m) values. */
KERNEL void swap_axes(const S *x, S *y, long long a, long long b, long long m, int *bad) {
    const int size = (int)(a * b * m);
    for (int at = HERE; at < size; at += STEP) {
        const int p = at % (int)m, row = at / (int)m;
        const int j = row / (int)a, i = row % (int)a;
        y[at] = keep(load(x[(i * (int)b + j) * (int)m + p]), bad);
    }
}

/* y[c, p] = y[c, p] + b[c], and its ReLU if `rectify`. */
KERNEL void bias_rows(S *y, const float *b, long long m, long long rectify) {
    const float bias = b[blockIdx.y];
    S *own = y + (long long)blockIdx.y * m;
    for (int i = HERE; i < m; i += STEP) {
        const float v = load(own[i]) + bias;
        own[i] = store(rectify && v <= 0.0f ? 0.0f : v);
    }
}

/* g = g [h > 0] unless h is null; partial[c, blockIdx.x] = the sum of a part of channel c. */
KERNEL void row_partials(S *g, const S *h, float *partial, long long m) {
    __shared__ float shared[THREADS];
    const long long begin = (long long)blockIdx.y * m + (long long)blockIdx.x * CHUNK;
    const int count = part_size(blockIdx.x, m);
    float total = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        if (h && !(load(h[begin + i]) > 0.0f)) g[begin + i] = store(0.0f);
        else total += load(g[begin + i]);
    }
    total = block_sum(total, shared);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = total;
}

/* A block a channel: out[c] = the sum of partial[c, :] without the loss scale. */
KERNEL void row_sums(const float *partial, float *out, long long parts, const float *state,
                     int *bad) {
    __shared__ float shared[THREADS];
    float total = 0.0f;
    for (int p = threadIdx.x; p < parts; p += blockDim.x) total += partial[blockIdx.x * parts + p];
    total = block_sum(total, shared) * state[1];
    if (threadIdx.x != 0) return;
    if (!(total - total == 0.0f)) *bad = 1;
    out[blockIdx.x] = total;
}
"""

IMAGES = (
    _COLUMNS.format(name="to_columns", type="S", read="")
    + _COLUMNS.format(name="samples_to_columns", type="float", read="store")
    + _GATHER
)
