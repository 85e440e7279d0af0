"""The CUDA C of PowerSGD's encoder.

`matrices` has FIELDS numbers for each matrix, `pieces` those of all tensors or parts of them; both
are in the order of the shard. A `line` is one column of one matrix's P, and that of its Q. Sums are
made in a fixed order, so that the same input gives the same bits; but they are not the CPU's, whose
order is its BLAS's.
"""

from __future__ import annotations

__all__ = ["BODIES", "CHUNK", "FIELDS", "SLAB", "TILE"]

FIELDS = 8
CHUNK = 4096  # elements of a piece that a block finishes
SLAB, TILE = 128, 256  # rows and columns of a matrix that a block multiplies by P

BODIES = """\
/* Of a matrix: where it is in the shard, and its P in the payload, which its Q follows; where its
   starts are; rows and tiles of those before it; where its partial sums are. */
enum { BEGIN, ROWS, COLUMNS, AT, START, ROW, FIRST_TILE, PART };
/* Of a piece: as above; ROWS is 0 if it travels as it is. */
enum { END = 4, FIRST_CHUNK = 5 };

DEVICE int find(const i64 *table, int count, int field, i64 index) {
    int low = 0;
    for (int high = count; high - low > 1;) {
        const int middle = (low + high) / 2;
        if (table[middle * FIELDS + field] <= index) low = middle; else high = middle;
    }
    return low;
}

DEVICE double block_sum(double value, double *y) {
    y[threadIdx.x] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half) y[threadIdx.x] += y[threadIdx.x + half];
        __syncthreads();
    }
    const double all = y[0];
    __syncthreads();
    return all;
}

DEVICE double block_max(double value, double *y) {
    y[threadIdx.x] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half && y[threadIdx.x + half] > y[threadIdx.x])
            y[threadIdx.x] = y[threadIdx.x + half];
        __syncthreads();
    }
    const double largest = y[0];
    __syncthreads();
    return largest;
}

DEVICE u64 mixed(u64 z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

/* A normal number, by Box and Muller. */
DEVICE double normal(u64 key, i64 index) {
    const u64 z = mixed(key + (u64)(index + 1) * 0x9e3779b97f4a7c15ull);
    const double first = ((double)(u32)z + 1.0) * 0x1p-32, turn = (double)(u32)(z >> 32) * 0x1p-32;
    return sqrt(-2.0 * log(first)) * cos(6.283185307179586 * turn);
}

/* x = gradient + residual. */
KERNEL void add_all(const T *grad, const T *old, T *fresh, int has, int *bad, int count,
                    int *verdict, i64 size) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    const i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (i64 i = first; i < count; i += step) bad[i] = 0;
    for (i64 i = first; i < size; i += step) {
        const T g = grad[i], x = has ? add(old[i], g) : g;
        judge(g, x, verdict);
        if (has) fresh[i] = x;
    }
}

/* A block a row: M Q, of the Q before. */
KERNEL void project(const T *x, const T *starts, T *raw, const i64 *matrices, int count) {
    __shared__ T sums[4 * THREADS];
    const i64 *m = matrices + FIELDS * find(matrices, count, ROW, blockIdx.x);
    const i64 row = blockIdx.x - m[ROW], columns = m[COLUMNS];
    const T *line = x + m[BEGIN] + row * columns, *q = starts + m[START];
    const int t = threadIdx.x, threads = blockDim.x;
    for (int r = 0; r < RANK; r += 4) {
        T s[4] = {0, 0, 0, 0};
        for (i64 j = t; j < columns; j += threads)
            for (int k = 0; k < 4 && r + k < RANK; ++k)
                s[k] = add(s[k], mul(line[j], q[(r + k) * columns + j]));
        for (int k = 0; k < 4; ++k) sums[k * threads + t] = s[k];
        __syncthreads();
        for (int half = threads / 2; half; half /= 2) {
            if (t < half)
                for (T *sum = sums + t; sum < sums + 4 * threads; sum += threads)
                    *sum = add(sum[0], sum[half]);
            __syncthreads();
        }
        if (t < 4 && r + t < RANK) raw[blockIdx.x * (i64)RANK + r + t] = sums[t * threads];
        __syncthreads();
    }
}

/* A block a matrix: P, as `_orthonormal` in psframe.codecs.powersgd. */
KERNEL void orthonormalise(const T *raw, double *basis, T *elements, const i64 *matrices) {
    __shared__ double y[THREADS];
    __shared__ double shares[RANK];
    const i64 *m = matrices + FIELDS * blockIdx.x;
    const i64 rows = m[ROWS], first = m[ROW] * RANK;
    double *all = basis + first, largest = 0.0;
    for (i64 i = threadIdx.x; i < rows; i += blockDim.x)
        for (int r = 0; r < RANK; ++r) {
            const double value = widen(raw[first + i * RANK + r]);
            all[r * rows + i] = value;
            if (fabs(value) > largest) largest = fabs(value);
        }
    largest = block_max(largest, y);
    for (int j = 0; j < RANK; ++j) {
        double *row = all + j * rows, sum = 0.0;
        for (i64 i = threadIdx.x; i < rows; i += blockDim.x) {
            if (largest > 0.0) row[i] /= largest;
            sum += row[i] * row[i];
        }
        const double before = sqrt(block_sum(sum, y));
        for (int twice = 0; twice < 2; ++twice) {
            for (int k = 0; k < j; ++k) {
                sum = 0.0;
                for (i64 i = threadIdx.x; i < rows; i += blockDim.x)
                    sum += all[k * rows + i] * row[i];
                sum = block_sum(sum, y);
                if (threadIdx.x == 0) shares[k] = sum;
            }
            __syncthreads();
            for (i64 i = threadIdx.x; i < rows; i += blockDim.x) {
                sum = 0.0;
                for (int k = 0; k < j; ++k) sum += shares[k] * all[k * rows + i];
                row[i] -= sum;
            }
            __syncthreads();
        }
        sum = 0.0;
        for (i64 i = threadIdx.x; i < rows; i += blockDim.x) sum += row[i] * row[i];
        const double after = sqrt(block_sum(sum, y));
        for (i64 i = threadIdx.x; i < rows; i += blockDim.x) {
            row[i] = after > EPS * before ? row[i] / after : 0.0;
            elements[m[AT] + i * RANK + j] = narrow(row[i]);
        }
    }
}

/* A block a tile: the sums of M^T P over a slab of rows. */
KERNEL void multiply_slabs(const T *x, const T *elements, T *partial, const i64 *matrices,
                           int count) {
    __shared__ T p[4 * SLAB];
    const i64 *m = matrices + FIELDS * find(matrices, count, FIRST_TILE, blockIdx.x);
    const i64 columns = m[COLUMNS], wide = (columns + TILE - 1) / TILE;
    const i64 slab = (blockIdx.x - m[FIRST_TILE]) / wide, begin = slab * SLAB;
    const i64 left = (blockIdx.x - m[FIRST_TILE]) % wide * TILE;
    const int height = m[ROWS] - begin < SLAB ? (int)(m[ROWS] - begin) : SLAB;
    for (int r = 0; r < RANK; r += 4) {
        for (int i = threadIdx.x; i < 4 * height; i += blockDim.x)
            p[i] = r + i % 4 < RANK ? elements[m[AT] + (begin + i / 4) * RANK + r + i % 4] : (T)0;
        __syncthreads();
        for (i64 c = left + threadIdx.x; c < left + TILE && c < columns; c += blockDim.x) {
            T s[4] = {0, 0, 0, 0};
            for (int i = 0; i < height; ++i) {
                const T value = x[m[BEGIN] + (begin + i) * columns + c];
                for (int k = 0; k < 4; ++k) s[k] = add(s[k], mul(p[4 * i + k], value));
            }
            for (int k = 0; k < 4 && r + k < RANK; ++k)
                partial[m[PART] + (slab * RANK + r + k) * columns + c] = s[k];
        }
        __syncthreads();
    }
}

/* A block a line: a row of the transposed Q. */
KERNEL void sum_slabs(const T *partial, T *elements, int *bad, const i64 *matrices) {
    const int matrix = blockIdx.x / RANK, r = blockIdx.x % RANK;
    const i64 *m = matrices + FIELDS * matrix;
    const i64 columns = m[COLUMNS], slabs = (m[ROWS] + SLAB - 1) / SLAB;
    T *q = elements + m[AT] + m[ROWS] * RANK + r * columns;
    for (i64 c = threadIdx.x; c < columns; c += blockDim.x) {
        T sum = 0;
        for (i64 slab = 0; slab < slabs; ++slab)
            sum = add(sum, partial[m[PART] + (slab * RANK + r) * columns + c]);
        q[c] = sum;
        /* Elements of P are 1 at most: what is decoded from it and Q is finite then, too. */
        if (!is_finite(mul(sum, (T)(2 * RANK)))) atomicOr(bad + matrix, 1);
    }
}

/* A block a line: what is above the range of T is not sent (without a residual, where it would be
   lost, the gradient is refused), and the next push begins with Q's rows, or anew where there are
   none. */
KERNEL void begin_next(T *elements, const int *bad, int has, T *next, u64 key, const i64 *matrices,
                       int *verdict) {
    __shared__ double y[THREADS];
    const int matrix = blockIdx.x / RANK, r = blockIdx.x % RANK, lost = bad[matrix];
    const i64 *m = matrices + FIELDS * matrix;
    const i64 columns = m[COLUMNS];
    T *q = elements + m[AT] + m[ROWS] * RANK + r * columns, *to = next + m[START] + r * columns;
    if (lost && !has && threadIdx.x == 0) atomicOr(verdict, 1);
    if (lost) {
        for (i64 c = threadIdx.x; c < columns; c += blockDim.x)
            q[c] = has ? (T)0 : from_bits(QUIET_NAN);
        for (i64 i = threadIdx.x; has && i < m[ROWS]; i += blockDim.x)
            elements[m[AT] + i * RANK + r] = 0;
    }
    double largest = 0.0;
    for (i64 c = threadIdx.x; c < columns && !lost; c += blockDim.x) {
        const double value = fabs(widen(q[c]));
        if (value > largest) largest = value;
    }
    largest = block_max(largest, y);
    const int anew = !(largest > 0.0);
    const u64 mine = mixed(key + blockIdx.x);
    if (anew) largest = 1.0;
    double sum = 0.0;
    for (i64 c = threadIdx.x; c < columns; c += blockDim.x) {
        const double value = (anew ? normal(mine, c) : widen(q[c])) / largest;
        sum += value * value;
    }
    const double scale = 2.0 * sqrt((double)columns) * sqrt(block_sum(sum, y));
    for (i64 c = threadIdx.x; c < columns; c += blockDim.x)
        to[c] = narrow((anew ? normal(mine, c) : widen(q[c])) / largest / scale);
}

/* As `_product` in psframe.codecs.powersgd: the residual lacks what is decoded, to the bit. */
DEVICE T product(const T *p, const T *q, i64 columns) {
    T y = 0;
    int r = 0;
    for (; r + 4 <= RANK; r += 4) {
        const T *a = q + r * columns, *c = a + 2 * columns;
        const T low = add(mul(p[r], a[0]), mul(p[r + 1], a[columns]));
        y = add(y, add(low, add(mul(p[r + 2], c[0]), mul(p[r + 3], c[columns]))));
    }
    for (; r < RANK; ++r) y = add(y, mul(p[r], q[r * columns]));
    return y;
}

/* A block a chunk of a piece: what the payload lacks of it; what travels as it is lacks nothing. */
KERNEL void leave(const T *x, T *fresh, int has, T *elements, const i64 *pieces, int count) {
    const i64 *piece = pieces + FIELDS * find(pieces, count, FIRST_CHUNK, blockIdx.x);
    const i64 begin = piece[BEGIN] + (blockIdx.x - piece[FIRST_CHUNK]) * CHUNK;
    const i64 end = begin + CHUNK < piece[END] ? begin + CHUNK : piece[END];
    const i64 columns = piece[COLUMNS];
    const T *p = elements + piece[AT], *q = p + piece[ROWS] * RANK;
    for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const i64 at = i - piece[BEGIN];
        if (!piece[ROWS]) {
            elements[piece[AT] + at] = x[i];
            if (has) fresh[i] = 0;
        } else if (has) {
            fresh[i] = sub(x[i], product(p + at / columns * RANK, q + at % columns, columns));
        }
    }
}

/* Of what is not finite nothing may be taken for a gradient. */
KERNEL void spoil(T *elements, const int *verdict, i64 count) {
    if (!*verdict) return;
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
        elements[i] = from_bits(QUIET_NAN);
}
"""
