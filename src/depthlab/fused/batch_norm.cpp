// y = relu(residual + h BN(f(x))) over the batch, or with running statistics, and the former's gradient, for images in
// channels_last or in planes; f is the identity or ReLU. Called by batch_norm.py; no header of PyTorch.
//
// Two passes over memory each way. Sums are of differences from a value of the same column, fp32 over at most RUN rows,
// then double. The sizes alone say how rows are cut into tiles: the bits do not depend on the number of threads.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int K = 64 / L;
constexpr int64_t BLOCK = L * K, RUN = 32, TILE = 16384, MOST_TILES = 64;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline void add_to(double* sums, V v) {
    for (int i = 0; i < L; i++) sums[i] += v[i];
}

// x as blocks of BLOCK columns and some rows. Every column has coefficients and sums of its own; there are `width`, and w
// belongs to channel(w).
//   plane = 0: channels_last. x has rows of `width` elements, a multiple of C and of BLOCK; a tile is some of them.
//   plane > 0: C planes of `plane` elements an image, a multiple of BLOCK, each a matrix of BLOCK columns; a tile is some
//              channels of all images, so that tiles share no sums.
struct Matrix {
    int64_t channels, plane, width, n, tiles;
    int threads;

    Matrix(int64_t n, int64_t width, int64_t channels, int64_t plane, int threads)
        : channels(channels), plane(plane), width(width), n(n), threads(threads) {
        tiles = std::max<int64_t>(1, std::min({n / TILE, lines(), MOST_TILES}));
    }

    int64_t lines() const { return plane ? channels : n / width; }  // that are dealt to the tiles
    int64_t first(int64_t tile) const { return lines() * tile / tiles; }
    int64_t channel(int64_t w) const { return plane ? w / BLOCK : w % channels; }
    double count() const { return double(n) / channels; }  // elements of a channel

    // sums: sets() times `width`; a tile adds to those from at(tile) on
    int64_t sets() const { return plane ? 1 : tiles; }
    int64_t at(int64_t tile) const { return plane ? 0 : tile * width; }

    // body(sum, its channel, how many elements are in it)
    template <class Body> void each_sum(Body body) const {
        for (int64_t set = 0; set < sets(); set++) {
            double rows = plane ? double(n) / width : double(first(set + 1) - first(set));
            for (int64_t w = 0, c = 0; w < width; w++) {
                body(set * width + w, c, rows);
                c = plane ? (w + 1) / BLOCK : c + 1 == channels ? 0 : c + 1;
            }
        }
    }

    // body(tile); backwards: a thread begins with the tile that it has touched last
    template <class Body> void each_tile(bool backwards, Body body) const {
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
            int64_t begin = tiles * me / all, end = tiles * (me + 1) / all;
            for (int64_t i = begin; i < end; i++) body(backwards ? begin + end - 1 - i : i);
        }
    }

    // body(column, first element, stride, rows), at most `most` rows at once
    template <class Body> void each_block(int64_t tile, int64_t most, Body body) const {
        int64_t begin = first(tile), end = first(tile + 1);
        if (plane) {
            for (int64_t c = begin; c < end; c++)
                for (int64_t e = c * plane; e < n; e += channels * plane)
                    for (int64_t r = 0; r < plane / BLOCK; r += most)
                        body(c * BLOCK, e + r * BLOCK, BLOCK, std::min(most, plane / BLOCK - r));
        } else {
            for (int64_t j = 0; j < width; j += BLOCK)
                for (int64_t r = begin; r < end; r += most) body(j, r * width + j, width, std::min(most, end - r));
        }
    }

    Floats wide(const Doubles& values) const {  // a value per channel -> per column
        Floats out(width);
        for (int64_t w = 0; w < width; w++) out[w] = values[channel(w)];
        return out;
    }
};

struct Norm {
    const float *gamma, *beta;
    double h, eps, momentum;
    float *running_mean, *running_var;
    int training;
};

// h BN(x) = scale x + shift
void coefficients(const Matrix& m, const Norm& bn, const double* mean, const double* invstd, Floats& scale, Floats& shift) {
    Doubles a(m.channels), b(m.channels);
    for (int64_t c = 0; c < m.channels; c++) {
        a[c] = bn.h * bn.gamma[c] * invstd[c];
        b[c] = bn.h * bn.beta[c] - mean[c] * a[c];
    }
    scale = m.wide(a), shift = m.wide(b);
}

// k: the vector in the row; i: its first element
#define EACH_VECTOR(k, i)                                   \
    for (int64_t r = 0; r < n; r++)                         \
        _Pragma("GCC unroll 4") for (int k = 0; k < K; k++) \
            if (const int64_t i = begin + r * stride + k * L; true)

// mean and biased variance of each channel
template <bool before, class T> void statistics(const Matrix& m, const T* x, double* mean, double* variance) {
    const int64_t W = m.width;
    Doubles s(m.sets() * W), q(m.sets() * W);
    Floats origin(m.sets() * W);
    m.each_tile(false, [&](int64_t t) {
        double *S = &s[m.at(t)], *Q = &q[m.at(t)];
        float* O = &origin[m.at(t)];
        if (m.plane)
            for (int64_t w = m.first(t) * BLOCK; w < m.first(t + 1) * BLOCK; w += L)
                store(O + w, relu<before>(load(x + m.channel(w) * m.plane + w % BLOCK)));
        else
            for (int64_t w = 0; w < W; w += L) store(O + w, relu<before>(load(x + m.first(t) * W + w)));
        m.each_block(t, RUN, [=](int64_t j, int64_t begin, int64_t stride, int64_t n) {
            V sum[K] = {}, square[K] = {}, o[K];
            for (int k = 0; k < K; k++) o[k] = load(O + j + k * L);
            EACH_VECTOR(k, i) {
                V d = relu<before>(load(x + i)) - o[k];
                sum[k] += d;
                square[k] += d * d;
            }
            for (int k = 0; k < K; k++) add_to(S + j + k * L, sum[k]), add_to(Q + j + k * L, square[k]);
        });
    });
    std::fill(mean, mean + m.channels, 0);
    std::fill(variance, variance + m.channels, 0);
    m.each_sum([&](int64_t w, int64_t c, double rows) { mean[c] += s[w] + rows * origin[w]; });
    for (int64_t c = 0; c < m.channels; c++) mean[c] /= m.count();
    m.each_sum([&](int64_t w, int64_t c, double rows) {
        double d = origin[w] + s[w] / rows - mean[c];
        variance[c] += q[w] - s[w] * s[w] / rows + rows * d * d;
    });
    for (int64_t c = 0; c < m.channels; c++) variance[c] = (variance[c] < 0 ? 0 : variance[c]) / m.count();  // NaN stays
}

template <bool before, bool after, bool add, class T>
void forward(const Matrix& m, const Norm& bn, const T* x, const T* residual, T* y, double* stats) {
    double *mean = stats, *invstd = stats + m.channels;
    if (bn.training) {
        statistics<before>(m, x, mean, invstd);
    } else {
        std::copy(bn.running_mean, bn.running_mean + m.channels, mean);
        std::copy(bn.running_var, bn.running_var + m.channels, invstd);
    }
    for (int64_t c = 0; c < m.channels; c++) {
        double variance = invstd[c], unbiased = variance * m.count() / (m.count() - 1);
        if (bn.training && bn.running_mean) {
            bn.running_mean[c] = (1 - bn.momentum) * bn.running_mean[c] + bn.momentum * mean[c];
            bn.running_var[c] = (1 - bn.momentum) * bn.running_var[c] + bn.momentum * unbiased;
        }
        invstd[c] = 1 / std::sqrt(variance + bn.eps);
    }
    Floats scale, shift;
    coefficients(m, bn, mean, invstd, scale, shift);
    m.each_tile(true, [&](int64_t t) {
        const float *A = scale.data(), *B = shift.data();
        m.each_block(t, INT64_MAX, [=](int64_t j, int64_t begin, int64_t stride, int64_t n) {
            V a[K], b[K];
            for (int k = 0; k < K; k++) a[k] = load(A + j + k * L), b[k] = load(B + j + k * L);
            EACH_VECTOR(k, i) {
                V z = relu<before>(load(x + i)) * a[k] + b[k];
                store(y + i, relu<after>(add ? z + load(residual + i) : z));
            }
        });
    });
}

// What the last ReLU let through is seen in y where something was added, else in x (y <= 0 stops, as in PyTorch); with
// something added, dresidual is dy after that ReLU.
template <bool before, bool after, bool add, class T>
void backward(const Matrix& m, const Norm& bn, const T* dy, const T* x, const T* y, const double* stats, T* dx,
              T* dresidual, float* dgamma, float* dbeta) {
    const double *mean = stats, *invstd = stats + m.channels;
    const int64_t W = m.width;
    Floats scale, shift, middle = m.wide(Doubles(mean, mean + m.channels));
    coefficients(m, bn, mean, invstd, scale, shift);
    Doubles s(m.sets() * W), q(m.sets() * W);
    m.each_tile(false, [&](int64_t t) {
        double *S = &s[m.at(t)], *Q = &q[m.at(t)];
        const float *A = scale.data(), *B = shift.data(), *M = middle.data();
        m.each_block(t, RUN, [=](int64_t j, int64_t begin, int64_t stride, int64_t n) {
            V sum[K] = {}, product[K] = {}, o[K], a[K], b[K];
            for (int k = 0; k < K; k++)
                o[k] = load(M + j + k * L), a[k] = load(A + j + k * L), b[k] = load(B + j + k * L);
            EACH_VECTOR(k, i) {
                V v = relu<before>(load(x + i)), g = load(dy + i);
                if (after) g = zero_where((add ? load(y + i) : v * a[k] + b[k]) <= 0.f, g);
                if (after && add) store(dresidual + i, g);
                sum[k] += g;
                product[k] += g * (v - o[k]);
            }
            for (int k = 0; k < K; k++) add_to(S + j + k * L, sum[k]), add_to(Q + j + k * L, product[k]);
        });
    });
    Doubles by_g(m.channels), by_x(m.channels), constant(m.channels);
    Doubles totals(m.channels), inners(m.channels);
    m.each_sum([&](int64_t w, int64_t c, double) { totals[c] += s[w], inners[c] += q[w]; });
    for (int64_t c = 0; c < m.channels; c++) {
        double total = totals[c], inner = inners[c] + (double(float(mean[c])) - mean[c]) * total;
        dbeta[c] = bn.h * total;
        dgamma[c] = bn.h * inner * invstd[c];
        by_g[c] = bn.h * bn.gamma[c] * invstd[c];
        by_x[c] = -by_g[c] * inner * invstd[c] * invstd[c] / m.count();
        constant[c] = -by_g[c] * total / m.count();
    }
    Floats wide_g = m.wide(by_g), wide_x = m.wide(by_x), wide_constant = m.wide(constant);
    const T* through = after && add ? dresidual : dy;
    m.each_tile(true, [&](int64_t t) {
        const float *G = wide_g.data(), *X = wide_x.data(), *C = wide_constant.data(), *M = middle.data();
        const float *A = scale.data(), *B = shift.data();
        m.each_block(t, INT64_MAX, [=](int64_t j, int64_t begin, int64_t stride, int64_t n) {
            V o[K], a[K], b[K], by_g[K], by_x[K], c[K];
            for (int k = 0; k < K; k++) {
                o[k] = load(M + j + k * L), a[k] = load(A + j + k * L), b[k] = load(B + j + k * L);
                by_g[k] = load(G + j + k * L), by_x[k] = load(X + j + k * L), c[k] = load(C + j + k * L);
            }
            EACH_VECTOR(k, i) {
                V raw = load(x + i), v = relu<before>(raw), g = load(through + i);
                if (after && !add) g = zero_where(v * a[k] + b[k] <= 0.f, g);
                V out = g * by_g[k] + ((v - o[k]) * by_x[k] + c[k]);
                store(dx + i, before ? zero_where(raw <= 0.f, out) : out);
            }
        });
    });
}

template <class F> void flags(F f) { f(); }
// f(flag...) with each flag as a type
template <class F, class... Flags> void flags(F f, bool flag, Flags... more) {
    flag ? flags([&](auto... rest) { f(std::true_type{}, rest...); }, more...)
         : flags([&](auto... rest) { f(std::false_type{}, rest...); }, more...);
}

}  // namespace

// half: the type of x, residual, y and their gradients, 0 fp32, 1 bf16; before, after: a ReLU before and after; add: there
// is a residual. stats: (2, C) mean and 1/sqrt(variance + eps). residual, y and dresidual may be null without `add`,
// running_* always. y and dresidual are used with `after` only.

extern "C" void depthlab_forward(int half, int before, int after, int add, int64_t n, int64_t width, int64_t channels,
                                 int64_t plane, int threads, const void* x, const void* residual, const float* gamma,
                                 const float* beta, double h, double eps, double momentum, float* running_mean,
                                 float* running_var, int training, void* y, double* stats) {
    Matrix m(n, width, channels, plane, threads);
    Norm bn{gamma, beta, h, eps, momentum, running_mean, running_var, training};
    flags(
        [&](auto half, auto before, auto after, auto add) {
            using T = std::conditional_t<half, bf16, float>;
            forward<before, after, add>(m, bn, (const T*)x, (const T*)residual, (T*)y, stats);
        },
        half, before, after, add);
}

extern "C" void depthlab_backward(int half, int before, int after, int add, int64_t n, int64_t width, int64_t channels,
                                  int64_t plane, int threads, const void* dy, const void* x, const void* y, const float* gamma,
                                  const float* beta, double h, const double* stats, void* dx, void* dresidual,
                                  float* dgamma, float* dbeta) {
    Matrix m(n, width, channels, plane, threads);
    Norm bn{gamma, beta, h, 0, 0, nullptr, nullptr, 1};
    flags(
        [&](auto half, auto before, auto after, auto add) {
            using T = std::conditional_t<half, bf16, float>;
            backward<before, after, add>(m, bn, (const T*)dy, (const T*)x, (const T*)y, stats, (T*)dx, (T*)dresidual,
                                         dgamma, dbeta);
        },
        half, before, after, add);
}
