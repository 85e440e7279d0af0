"""The CUDA C of TopK's encoder.

The k-th largest magnitude is found digit by digit, from counts of the values of each digit, as
`Selection` does; then elements are counted in chunks, so that each chunk knows where in the payload
its own begin. All of that is integers: which elements are chosen depends on no order of threads.
"""

from __future__ import annotations

__all__ = ["BODIES", "CHUNK"]

CHUNK = 4096  # elements that a block chooses from

BODIES = """\
/* The digits that are found so far, how many elements are wanted of those that begin so, and the
   counts of the next digit's values. */
typedef struct { u64 found; u64 wanted; u32 counts[COUNTS]; } Found;

KERNEL void squares(const T *grad, i64 size, double *sums) {
    __shared__ double y[THREADS];
    const i64 step = (i64)gridDim.x * blockDim.x;
    double total = 0.0;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step)
        total += widen(grad[i]) * widen(grad[i]);
    y[threadIdx.x] = total;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half) y[threadIdx.x] += y[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = y[0];
}

/* One thread. */
KERNEL void clip_scale(const double *sums, int count, double limit, T *scale) {
    double total = 0.0;
    for (int i = 0; i < count; ++i) total += sums[i];
    const double norm = sqrt(total);
    *scale = norm > limit && total - total == 0.0 ? narrow(limit / norm) : (T)1;
}

/* u = momentum u + scale g, v = v + u, or v = g; and count the highest digits of v. */
KERNEL void advance(const T *grad, const T *old_v, const T *old_u, T *new_v, T *new_u, int has,
                    int has_u, double momentum, const T *scale, int shift, Found *found,
                    int *verdict, i64 size) {
    __shared__ u32 counts[COUNTS];
    for (int i = threadIdx.x; i < COUNTS; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        const T g = grad[i];
        T v = g;
        if (has) {
            T u = mul(*scale, g);
            if (has_u) {
                u = add(mul(narrow(momentum), old_u[i]), u);
                new_u[i] = u;
                judge(g, u, verdict);
            }
            v = add(old_v[i], u);
            new_v[i] = v;
        }
        judge(g, v, verdict);
        atomicAdd(counts + (magnitude(v) >> shift), 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COUNTS; i += blockDim.x)
        if (counts[i]) atomicAdd(found->counts + i, counts[i]);
}

/* Count the values of the digit at `shift`, where those above are as found. */
KERNEL void count_digit(const T *x, int shift, Found *found, i64 size) {
    __shared__ u32 counts[COUNTS];
    for (int i = threadIdx.x; i < COUNTS; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    const i64 step = (i64)gridDim.x * blockDim.x;
    const B above = (B)found->found;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        const B m = magnitude(x[i]) >> shift;
        if (m >> DIGIT_BITS == above) atomicAdd(counts + (m & (COUNTS - 1)), 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COUNTS; i += blockDim.x)
        if (counts[i]) atomicAdd(found->counts + i, counts[i]);
}

/* In place of each thread's number, the sum of all up to it. */
DEVICE void block_scan(u32 *sums) {
    sums += threadIdx.x;
    for (int gap = 1; gap < blockDim.x; gap *= 2) {
        const u32 before = threadIdx.x >= gap ? sums[-gap] : 0;
        __syncthreads();
        *sums += before;
        __syncthreads();
    }
}

/* One block: find the digit, and leave no counts behind. Its threads have runs of values in turn,
   the first one the largest. */
KERNEL void pick_digit(Found *found, int first, i64 keep) {
    __shared__ u32 sums[THREADS];
    const int run = COUNTS / blockDim.x, top = COUNTS - 1 - threadIdx.x * run;
    u64 wanted = first ? (u64)keep : found->wanted;
    const u64 above = first ? 0 : found->found << DIGIT_BITS;
    u32 mine = 0;
    for (int i = 0; i < run; ++i) mine += found->counts[top - i];
    sums[threadIdx.x] = mine;
    __syncthreads();
    block_scan(sums);
    const u64 upto = sums[threadIdx.x], larger = upto - mine;
    if (larger < wanted && wanted <= upto) {  /* of one thread */
        int digit = top;
        for (wanted -= larger; found->counts[digit] < wanted; --digit)
            wanted -= found->counts[digit];
        found->found = above | (u64)digit;
        found->wanted = wanted;
    }
    for (int i = 0; i < run; ++i) found->counts[top - i] = 0;
}

/* A block a chunk: how many of its elements are above what was found, and how many are that. */
KERNEL void count_chunk(const T *x, const Found *found, u32 *chunks, i64 size) {
    __shared__ u32 above, equal;
    if (threadIdx.x == 0) above = equal = 0;
    __syncthreads();
    const B least = (B)found->found;
    const i64 begin = (i64)blockIdx.x * CHUNK, end = begin + CHUNK < size ? begin + CHUNK : size;
    u32 more = 0, same = 0;
    for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const B m = magnitude(x[i]);
        more += m > least;
        same += m == least;
    }
    if (more) atomicAdd(&above, more);
    if (same) atomicAdd(&equal, same);
    __syncthreads();
    if (threadIdx.x == 0) {
        chunks[2 * blockIdx.x] = above;
        chunks[2 * blockIdx.x + 1] = equal;
    }
}

/* One block: in place of each chunk's counts, those of all before it. */
KERNEL void sum_chunks(u32 *chunks, i64 count) {
    __shared__ u32 above[THREADS];
    __shared__ u32 equal[THREADS];
    u32 more = 0, same = 0;  /* before these */
    for (i64 begin = 0; begin < count; begin += blockDim.x) {
        u32 *mine = chunks + 2 * (begin + threadIdx.x);
        const int is_there = begin + threadIdx.x < count;
        const u32 a = is_there ? mine[0] : 0, b = is_there ? mine[1] : 0;
        above[threadIdx.x] = a;
        equal[threadIdx.x] = b;
        __syncthreads();
        block_scan(above);
        block_scan(equal);
        if (is_there) {
            mine[0] = more + above[threadIdx.x] - a;
            mine[1] = same + equal[threadIdx.x] - b;
        }
        more += above[blockDim.x - 1];
        same += equal[blockDim.x - 1];
        __syncthreads();
    }
}

/* A block a chunk: write what is chosen, ascending, and clear it where it is kept. */
KERNEL void take(T *x, T *velocity, int has, const T *scale, const Found *found,
                 const u32 *chunks, i64 keep, u64 *head, T *values, u32 *indices, i64 size) {
    __shared__ T part[CHUNK];
    __shared__ u32 above[THREADS];
    __shared__ u32 equal[THREADS];
    const i64 begin = (i64)blockIdx.x * CHUNK;
    const int length = size - begin < CHUNK ? (int)(size - begin) : CHUNK;
    const int run = CHUNK / blockDim.x, mine = threadIdx.x * run;
    const B least = (B)found->found;
    const u64 wanted = found->wanted;
    if (blockIdx.x == 0 && threadIdx.x == 0) *head = (u64)keep;
    for (int i = threadIdx.x; i < length; i += blockDim.x) part[i] = x[begin + i];
    __syncthreads();
    u32 more = 0, same = 0;
    for (int i = mine; i < mine + run && i < length; ++i) {
        more += magnitude(part[i]) > least;
        same += magnitude(part[i]) == least;
    }
    above[threadIdx.x] = more;
    equal[threadIdx.x] = same;
    __syncthreads();
    block_scan(above);
    block_scan(equal);
    u64 place = (u64)chunks[2 * blockIdx.x] + above[threadIdx.x] - more;
    u64 ties = (u64)chunks[2 * blockIdx.x + 1] + equal[threadIdx.x] - same;
    for (int i = mine; i < mine + run && i < length; ++i) {
        const B m = magnitude(part[i]);
        if (m > least || (m == least && ties < wanted)) {
            const u64 at = place + (ties < wanted ? ties : wanted);
            values[at] = is_finite(part[i]) ? mul(part[i], has ? (T)1 : *scale) : part[i];
            indices[at] = (u32)(begin + i);
            if (has) x[begin + i] = 0;
            if (velocity) velocity[begin + i] = 0;
        }
        place += m > least;
        ties += m == least;
    }
}
"""
