// A convolution of winograd.cpp, or dx of one: transforms of its kernel and its inputs, products, transform to outputs.

#pragma once
#include <omp.h>

#include <vector>

#include "products.h"
#include "tiles.h"

namespace {

constexpr int RUN = 32;  // channels that are summed one after the other: sums of sums round less
constexpr n64 TOGETHER = 64;  // channels whose products are summed as integers

// A block of transformed tiles lies as (C/L, points, ROWS, L): whatever is read or written together is a constant apart;
// pairs of two points in a row of L.
// One row more than tiles: or all points of a tile would lie in a few sets of the first-level cache.
constexpr int BLOCK = 24, ROWS = BLOCK + 1, APART = ROWS * L;

// Integers: a transformed tile at a point times largest(point) / its image's range
template <class T> constexpr float largest(int point) { return LARGEST * .999f / T::bound(point); }
constexpr float SMALLEST = 1e-30f;  // instead of 0, to divide by

// Pixels that block after block of tiles takes, fetched into the cache a part at a time while products are made
template <bool write, class E> struct Ahead {
    const char* at;
    n64 part;

    Ahead(const E* x, n64 elements, int parts) : at(reinterpret_cast<const char*>(x)) {
        part = elements * sizeof(E) / 64 / parts + 1;
    }
    void fetch() {
        for (n64 i = 0; i < part; i++, at += 64) __builtin_prefetch(at, write, 2);
    }
};

// m (W, R, L) = v (C/S, R, L) u (W, C, L): R tiles, W neighbouring blocks of L outputs; `vs` and `ms` between blocks. S
// numbers of a row of v count; C counts what stands in the place of a float. Integers' sums are multiplied by `unit` (W, L).
template <Kind kind, int R, int W>
inline void multiply(const float* v, const float* u, const float* unit, float* m, n64 C, n64 vs, n64 ms, n64 begin, n64 end) {
    constexpr int S = kind == FLOATS ? L : L / 2;
    V acc[R][W] = {};
    v += begin / S * vs, u += begin * L;
    for (n64 c = begin; c < end; c += S, v += vs, u += S * L)
#pragma GCC unroll 16
        for (int i = 0; i < S; i++) add_product<kind, L>(acc, v + i, u + i * L, C * L);
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) {
            float* to = m + j * ms + r * L;
            if constexpr (kind == INT16) acc[r][j] = to_float(acc[r][j]) * load(unit + j * L);
            store(to, begin ? load(to) + acc[r][j] : acc[r][j]);
        }
}

template <Kind kind, int W>
void multiply_all(const float* v, const float* u, const float* unit, float* m, n64 rows, n64 C, n64 vs, n64 ms) {
    constexpr int R = SUMS / (W + 1) / 4 * 4;
    const n64 run = kind == BF16 ? C : kind == INT16 ? TOGETHER / 2 : RUN;
    for (n64 c = 0; c < C; c += run) {
        const n64 end = std::min(c + run, C);
        n64 r = 0;
        for (; r + R <= rows; r += R) multiply<kind, R, W>(v + r * L, u, unit, m + r * L, C, vs, ms, c, end);
        for (; r + 4 <= rows; r += 4) multiply<kind, 4, W>(v + r * L, u, unit, m + r * L, C, vs, ms, c, end);
        for (; r < rows; r++) multiply<kind, 1, W>(v + r * L, u, unit, m + r * L, C, vs, ms, c, end);
    }
}

struct Layer {  // y = [relu](conv + bias [+ other]), or dx of dy
    const void *x, *other;
    void* y;
    const float *w, *bias;
    n64 H, W, P, Q, C, K;  // x (N, H, W, C), y (N, P, Q, K)
    n64 m, half, pairs, turned, relu;  // m = 1: of stride 2. half: bf16, pairs: multiplied as such. turned: dx
    n64 shared[3];  // whether x, other, y hold all images, or a thread's batch each, used again and again
    n64 strides[4];  // of w: of y's channel, x's channel, row, column

    n64 points() const { return (m + 2) * (m + 2); }
    n64 kernel() const { return points() * C * K; }  // floats for U
    n64 work() const { return points() * ROWS * (C + K) + W * C; }
};

template <Kind kind> using Multiplied = std::integral_constant<Kind, kind>;

// f with the tile, the type of x and y, and what is multiplied
template <class F> void choose(const Layer& l, F f) {
    using Yes = Multiplied<PAIRS>;
    using No = Multiplied<FLOATS>;
    if (l.m == 2)
        f(Winograd<2>(), float(), No());
    else if (l.m == 4 && !l.half)
        f(Winograd<4>(), float(), No());
    else if (l.m == 4)
        l.pairs ? f(Winograd<4>(), bf16(), Yes()) : f(Winograd<4>(), bf16(), Multiplied<INTEGERS>());
    else if (l.half)
        l.turned ? f(Spreading(), bf16(), Yes()) : f(Strided(), bf16(), Yes());
    else
        l.turned ? f(Spreading(), float(), No()) : f(Strided(), float(), No());
}

// `count` images through one layer; u holds U, work l.work() floats
template <class T, class E, Kind kind>
void convolve(const Layer& l, const float* u, const E* x, const E* other, E* y, n64 N, float* work) {
    constexpr int n = T::n, m = T::m, points = n * n, S = kind == FLOATS ? L : L / 2, ms = points * APART;
    constexpr int vs = kind == FLOATS ? ms : (points + 1) / 2 * APART;
    const auto at = [](int q) { return kind == FLOATS ? q * APART : q / 2 * APART + q % 2 * S; };  // point q in v
    const n64 C = l.C, K = l.K, image = l.H * l.W * C;
    Cut<m> in(l.P, l.Q), out = in;
    const n64 tiles = in.tiles(N), from_x = BLOCK * T::step * T::step * C, to_y = BLOCK * m * m * K;
    float *v = work, *p = v + points * ROWS * C;
    const float* units = u + points * C * K / 2;
    E* nothing = reinterpret_cast<E*>(p + points * ROWS * K);
    std::fill(nothing, nothing + l.W * C, E());
    std::vector<float> ranges, scales(kind == INT16 ? points : 0);  // of images, of an image's integers
    for (n64 first = 0; first < tiles; first += BLOCK) {
        const n64 count = std::min<n64>(BLOCK, tiles - first);
        each_tile<T, 0, n>(x, in, count, l.H, l.W, C, nothing, [&](n64 t, n64 c) {
            if constexpr (kind == INT16)
                if (n64(ranges.size()) <= in.image) {
                    ranges.push_back(std::max(range(x + in.image * image, image), SMALLEST));
                    for (int q = 0; q < points; q++) scales[q] = largest<T>(q) / ranges.back();
                }
            return [=, to = v + c / L * vs + t * L, scale = scales.data()](int q, const V* row) {
#pragma GCC unroll 8
                for (int b = 0; b < n; b++)
                    if constexpr (kind == FLOATS) {
                        store(to + at(q + b), row[b]);
                    } else if constexpr (kind == BF16) {
                        store(reinterpret_cast<bf16*>(to + at(q + b)), row[b]);
                    } else if (b % 2 == 0) {
                        const float* s = scale + q + b;
                        store(to + at(q + b), beside(row[b] * s[0] + FAR, row[b + 1] * s[1] + FAR));
                    }
            };
        });
        Ahead<false, E> coming(x + (first / BLOCK + 1) * from_x, from_x, points);
        Ahead<true, E> leaving(y + first / BLOCK * to_y, to_y, points);
        for (int q = 0; q < points; q++) {
            coming.fetch(), leaving.fetch();
            const n64 summed = C * S / L;
            const float *uq = u + q * summed * K, *from = v + at(q), *unit = units + q * K;
            float* to = p + q * APART;
            n64 k = 0;
            for (; k + 2 * L <= K; k += 2 * L)
                multiply_all<kind, 2>(from, uq + k * summed, unit + k, to + k / L * ms, count, summed, vs, ms);
            if (k < K) multiply_all<kind, 1>(from, uq + k * summed, unit + k, to + k / L * ms, count, summed, vs, ms);
        }
        for (n64 t = 0; t < count; t++, out.next())
            for (n64 k = 0, i = out.row * m, j = out.column * m; k < K; k += L) {
                const float* from = p + k / L * ms + t * L;
                V half[m * n];
#pragma GCC unroll 8
                for (int b = 0; b < n; b++) {
                    V d[n], column[m];
#pragma GCC unroll 8
                    for (int a = 0; a < n; a++) d[a] = load(from + (a * n + b) * APART);
                    T::output(d, 1, column);
#pragma GCC unroll 8
                    for (int a = 0; a < m; a++) half[a * n + b] = column[a];
                }
                const V bias = l.bias ? load(l.bias + k) : V{};
#pragma GCC unroll 8
                for (int a = 0; a < m; a++) {
                    if (i + a >= l.P) break;
                    V row[m];
                    T::output(half + a * n, 1, row);
                    const n64 at = ((out.image * l.P + i + a) * l.Q + j) * K + k;
#pragma GCC unroll 8
                    for (int b = 0; b < m; b++) {
                        if (j + b >= l.Q) break;
                        V o = (kind == INT16 ? row[b] * ranges[out.image] : row[b]) + bias;
                        if (other) o += load(other + at + b * K);
                        if (l.relu) o = relu(o);
                        store(y + at + b * K, o);
                    }
                }
            }
    }
}

// Images [at, at + count) through a layer; where they are not shared, they are from `own` on
void through(const Layer& l, const float* u, n64 own, n64 at, n64 count, float* work) {
    const n64 in = l.H * l.W * l.C, out = l.P * l.Q * l.K;
    choose(l, [&](auto tile, auto e, auto kind) {
        using E = decltype(e);
        const E *x = static_cast<const E*>(l.x), *other = static_cast<const E*>(l.other);
        convolve<decltype(tile), E, kind>(l, u, x + (l.shared[0] ? at : own) * in,
                                           other ? other + (l.shared[1] ? at : own) * out : nullptr,
                                           static_cast<E*>(l.y) + (l.shared[2] ? at : own) * out, count, work);
    });
}

// ---- its kernel, U = G w G^T, (points, K/L, C, L)

template <class T> void kernel_group(const float* w, const n64* stride, V* u) {  // of L neighbouring outputs
    V right[3][T::n] = {};
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) {
            const float* at = w + i * stride[2] + j * stride[3];
            V v;
            if (stride[0] == 1)
                v = load(at);
            else
                for (int l = 0; l < L; l++) v[l] = at[l * stride[0]];
            for (int b = 0; b < T::n; b++) right[i][b] += v * T::G[b][j];
        }
    for (int a = 0; a < T::n; a++)
        for (int b = 0; b < T::n; b++) {
            u[a * T::n + b] = V{};
            for (int i = 0; i < 3; i++) u[a * T::n + b] += right[i][b] * T::G[a][i];
        }
}

// In a parallel region; pairs are of inputs
template <class T, Kind kind> void kernel(const Layer& l, float* u) {
    constexpr int points = T::n * T::n, inputs = kind == FLOATS ? 1 : 2;
    const n64 C = l.C / inputs, *s = l.strides;
#pragma omp for collapse(2)
    for (n64 k = 0; k < l.K / L; k++)
        for (n64 c = 0; c < C; c++) {
            V group[inputs][points];
            for (int i = 0; i < inputs; i++)
                kernel_group<T>(l.w + k * L * s[0] + (c * inputs + i) * s[1], s, group[i]);
            for (int q = 0; q < points; q++)
                store(u + ((q * (l.K / L) + k) * C + c) * L,
                      kind == FLOATS ? group[0][q] : pair(group[0][q], group[inputs - 1][q]));
        }
}

// The same as integers, and after them (points, K) by what their sums of products are multiplied. They are as large as
// sums of TOGETHER channels allow: made once to see how large that is, and once more to be stored.
template <class T> void kernel_of_integers(const Layer& l, float* u) {
    constexpr int points = T::n * T::n;
    const n64 C = l.C, *s = l.strides;
#pragma omp for
    for (n64 k = 0; k < l.K / L; k++) {
        const float* w = l.w + k * L * s[0];
        V total[points] = {}, sum[points], norm[points] = {}, most[points] = {}, scale[points], group[2][points];
        const auto larger = [](V a, V b) { return a > b ? a : b; };
        for (n64 c = 0; c < C; c++) {
            kernel_group<T>(w + c * s[1], s, group[0]);
            for (int q = 0; q < points; q++) {
                const V size = (V)((U)group[0][q] & 0x7fffffff);
                sum[q] = c % TOGETHER ? sum[q] + size : size, total[q] += size;
                norm[q] = larger(sum[q], norm[q]), most[q] = larger(size, most[q]);
            }
        }
        for (int q = 0; q < points; q++) {
            scale[q] = 1 / larger(V{} + SMALLEST, larger(norm[q] / (2147483648.f / LARGEST * .99f), most[q] / LARGEST));
            store(u + points * C * l.K / 2 + q * l.K + k * L, 1 / (scale[q] * largest<T>(q)) + 0 * total[q]);  // NaN stays
        }
        for (n64 c = 0; c < C; c += 2) {
            for (int i = 0; i < 2; i++) kernel_group<T>(w + (c + i) * s[1], s, group[i]);
            for (int q = 0; q < points; q++)
                store(u + ((q * (l.K / L) + k) * C + c) / 2 * L,
                      merged(group[0][q] * scale[q] + FAR, group[1][q] * scale[q] + FAR));
        }
    }
}

void transform(const Layer& l, float* u) {
    choose(l, [&](auto tile, auto, auto kind) {
        if constexpr (kind == INT16)
            kernel_of_integers<decltype(tile)>(l, u);
        else
            kernel<decltype(tile), kind>(l, u);
    });
}

}  // namespace
