"""The CUDA C of batch normalisation, with the ReLU that follows it.

The i-th of m values of feature f is at f * across + i * along: (m, 1) in images, whose features are
channels, and (1, features) in flat samples. Variances are made of the parts' own means and squared
deviations (Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample
variances, 1979), so that x is read once and nothing cancels. xhat and the ReLU's mask are computed
again in the backward pass, which costs less than to store and read them.
"""

from __future__ import annotations

__all__ = ["NORMALIZATION"]

NORMALIZATION = """
DEVICE float bn_value(float xhat, float gamma, float beta) { return fmaf(xhat, gamma, beta); }

DEVICE int part_size(int part, long long m) {
    const long long left = m - (long long)part * CHUNK;
    return left < CHUNK ? (int)left : CHUNK;
}

KERNEL void bn_moments(const S *x, float *means, float *squares, long long m, long long across,
                       long long along) {
    __shared__ float shared[THREADS];
    const int part = blockIdx.x, feature = blockIdx.y;
    const int count = part_size(part, m);
    const S *values = x + feature * across + (long long)part * CHUNK * along;
    float kept[EACH];
    float total = 0.0f;
    #pragma unroll
    for (int r = 0; r < EACH; ++r) {
        const int i = r * THREADS + threadIdx.x;
        kept[r] = i < count ? load(values[i * along]) : 0.0f;
        total += kept[r];
    }
    const float mean = block_sum(total, shared) / count;
    float square = 0.0f;
    #pragma unroll
    for (int r = 0; r < EACH; ++r) {
        const float d = r * THREADS + (int)threadIdx.x < count ? kept[r] - mean : 0.0f;
        square += d * d;
    }
    square = block_sum(square, shared);
    if (threadIdx.x == 0) {
        means[feature * (int)gridDim.x + part] = mean;
        squares[feature * (int)gridDim.x + part] = square;
    }
}

/* A block a feature: the batch's mean and variance from those of its parts. */
KERNEL void bn_statistics(const float *means, const float *squares, float *mean, float *variance,
                          long long parts, long long m) {
    __shared__ float shared[THREADS];
    const int feature = blockIdx.x;
    const float *own = means + feature * parts;
    float total = 0.0f;
    for (int p = threadIdx.x; p < parts; p += blockDim.x) total += own[p] * part_size(p, m);
    const float middle = block_sum(total, shared) / m;
    float square = 0.0f;
    for (int p = threadIdx.x; p < parts; p += blockDim.x) {
        const float d = own[p] - middle;
        square += squares[feature * parts + p] + d * d * part_size(p, m);
    }
    square = block_sum(square, shared);
    if (threadIdx.x == 0) {
        mean[feature] = middle;
        variance[feature] = square / m;
    }
}

KERNEL void bn_apply(const S *x, S *y, const float *mean, const float *variance,
                     const float *gamma, const float *beta, long long features, long long m,
                     float eps, long long images, long long rectify) {
    const unsigned size = (unsigned)(features * m);
    for (unsigned i = HERE; i < size; i += STEP) {
        const unsigned f = images ? i / (unsigned)m : i % (unsigned)features;
        const float xhat = (load(x[i]) - mean[f]) * (1.0f / sqrtf(variance[f] + eps));
        const float v = bn_value(xhat, gamma[f], beta[f]);
        y[i] = store(rectify && v <= 0.0f ? 0.0f : v);
    }
}

/* The sums of g and g xhat over the parts of a feature, g masked by the ReLU's derivative. */
KERNEL void bn_gradient_partials(const S *g, const S *x, const float *mean, const float *variance,
                                 const float *gamma, const float *beta, float *sums,
                                 float *products, long long m, long long across, long long along,
                                 float eps, long long rectify) {
    __shared__ float shared[THREADS];
    const int part = blockIdx.x, f = blockIdx.y;
    const int count = part_size(part, m);
    const long long begin = f * across + (long long)part * CHUNK * along;
    const float middle = mean[f], inverse = 1.0f / sqrtf(variance[f] + eps);
    float sum = 0.0f, product = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const float xhat = (load(x[begin + i * along]) - middle) * inverse;
        const float v = load(g[begin + i * along]);
        if (!rectify || bn_value(xhat, gamma[f], beta[f]) > 0.0f) {
            sum += v;
            product += v * xhat;
        }
    }
    sum = block_sum(sum, shared);
    product = block_sum(product, shared);
    if (threadIdx.x == 0) {
        sums[f * (int)gridDim.x + part] = sum;
        products[f * (int)gridDim.x + part] = product;
    }
}

/* A block a feature: both sums, with the loss scale in `total` (2, features) and without it as the
   gradients; and what the batch has shown of mean and variance, or what was known if m is 1. */
KERNEL void bn_gradient_sums(const float *sums, const float *products, float *total, float *dgamma,
                             float *dbeta, const float *mean, const float *variance,
                             const float *known_mean, const float *known_variance, float *seen_mean,
                             float *seen_variance, long long parts, long long m,
                             const float *state, int *bad) {
    __shared__ float shared[THREADS];
    const int f = blockIdx.x, features = gridDim.x;
    float sum = 0.0f, product = 0.0f;
    for (int p = threadIdx.x; p < parts; p += blockDim.x) {
        sum += sums[f * parts + p];
        product += products[f * parts + p];
    }
    sum = block_sum(sum, shared);
    product = block_sum(product, shared);
    if (threadIdx.x != 0) return;
    total[f] = sum;
    total[features + f] = product;
    dbeta[f] = sum * state[1];
    dgamma[f] = product * state[1];
    if (!(sum - sum + (product - product) == 0.0f)) *bad = 1;
    seen_mean[f] = m > 1 ? mean[f] : known_mean[f];
    seen_variance[f] = m > 1 ? variance[f] * ((float)m / (float)(m - 1)) : known_variance[f];
}

KERNEL void bn_input_gradient(const S *g, const S *x, S *dx, const float *mean,
                              const float *variance, const float *gamma, const float *beta,
                              const float *total, long long features, long long m, float eps,
                              long long images, long long rectify, int *bad) {
    const unsigned size = (unsigned)(features * m);
    for (unsigned i = HERE; i < size; i += STEP) {
        const unsigned f = images ? i / (unsigned)m : i % (unsigned)features;
        const float inverse = 1.0f / sqrtf(variance[f] + eps);
        const float xhat = (load(x[i]) - mean[f]) * inverse;
        const int zero = rectify && !(bn_value(xhat, gamma[f], beta[f]) > 0.0f);
        const float v = zero ? 0.0f : load(g[i]);
        const float rest = (total[f] + xhat * total[features + f]) / (float)m;
        dx[i] = keep((v - rest) * gamma[f] * inverse, bad);
    }
}
"""
