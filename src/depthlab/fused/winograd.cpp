// 3x3 convolutions with padding 1, and their gradients: those of stride 1 by Winograd's F(m x m, 3x3), m = 2 or 4, with
// 2.25 or 4 times fewer multiplications (Lavin & Gray 2016), those of stride 2 as they stand. Compiled and called by
// winograd.py; no header of PyTorch.
//
//   Y  = A^T [ U . (B^T x B) ] A              per m x m output tile from its inputs (tiles.h); "." sums over channels
//   U  = G w G^T                              dx is the same with w turned around and its channels swapped
//   dw = G^T [ sum (B^T x B) (A dy A^T) ] G   over all tiles
//
// x, y (N, H, W, C or K) float or bf16, channels last, C and K multiples of 16; everything between is float, but for what
// is multiplied for bf16 (products.h): integers in training's forward pass, else bf16. A block of tiles goes through all
// three stages while it is in the cache, and in a chain a few images go through several layers.

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "products.h"
#include "tiles.h"

namespace {

constexpr int RUN = 32;  // channels that are summed one after the other: sums of sums round less
constexpr n64 TOGETHER = 64;  // channels whose products are summed as integers
constexpr n64 CHUNK = 1 << 16;  // numbers of dy that both gradients take at once

// A block of transformed tiles lies as (C/L, points, ROWS, L): whatever is read or written together is a constant apart;
// pairs of two points in a row of L.
// One row more than tiles: or all points of a tile would lie in a few sets of the first-level cache.
constexpr int BLOCK = 24, ROWS = BLOCK + 1, APART = ROWS * L;

// Integers: a transformed tile at a point times largest(point) / its image's range
template <class T> constexpr float largest(int point) { return LARGEST * .999f / T::bound(point); }
constexpr float SMALLEST = 1e-30f;  // instead of 0, to divide by

// ---- forward

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

// ---- the gradient of w

// u (R, W, L) at stride K += v^T (R, rows) d (W, rows, L), rows of v and d L apart, blocks of d `next`
template <Kind kind, int R, int W>
inline void outer(const float* v, const float* d, float* u, n64 rows, n64 next, n64 K) {
    V acc[R][W] = {};
#pragma GCC unroll 4
    for (n64 t = 0; t < rows; t++) add_product<kind, 1>(acc, v + t * L, d + t * L, next);
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) store(u + r * K + L * j, load(u + r * K + L * j) + acc[r][j]);
}

struct Weight {
    const void *x, *dy;
    float *dw, *db;  // dw at `strides` of k, c, row, column; db (K,) or null
    n64 N, H, W, P, Q, C, K, m, half;
    n64 strides[4];

    n64 rows() const { return C * K <= 64 * 64 ? m + 2 : 1; }  // of the transformed kernel at once: it stays in the cache
    n64 points() const { return rows() * (m + 2); }
    n64 work() const { return points() * (ROWS * (C + K) + C * K) + W * C; }  // of a thread
};

// Tiles [begin, end): rows [first, first + count) of sum (B^T x B) (A dy A^T) added to u (count n, C, K); bias += dy
template <class T, class E, int first, int count>
void gather(const Weight& w, n64 begin, n64 end, float* work, float* u, double* bias) {
    constexpr Kind kind = std::is_same_v<E, bf16> ? PAIRS : FLOATS;
    constexpr int n = T::n, m = T::m, next = count * n * APART, tiles = kind == BF16 ? 2 : 1;
    const n64 C = w.C, K = w.K;
    Cut<m> in = Cut<m>(w.P, w.Q).at(begin), cut = in;
    constexpr n64 x_pixels = BLOCK * tiles * T::step * T::step, y_pixels = BLOCK * tiles * m * m;
    const E *x = static_cast<const E*>(w.x), *dy = static_cast<const E*>(w.dy);
    const E* from_x = x + begin * T::step * T::step * C;  // about
    const E* from_dy = dy + begin * m * m * K;
    float *v = work, *d = v + C / L * next;
    E* nothing = reinterpret_cast<E*>(d + K / L * next);
    std::fill(nothing, nothing + w.W * C, E());
    std::vector<float> of_block(bias ? K : 0);
    for (n64 start = begin; start < end; start += BLOCK * tiles) {
        const n64 length = std::min<n64>(BLOCK * tiles, end - start), rows = (length + tiles - 1) / tiles;
        const auto put = [=](float* block, n64 t) {
            const bool second = t % tiles, last = t + 1 == length;
            return [=, to = block + t / tiles * L](int q, const V* row, int numbers = T::n) {
#pragma GCC unroll 8
                for (int b = 0; b < numbers; b++) {
                    float* at = to + (q + b) * APART;
                    V values = row[b];
                    if constexpr (kind == BF16)
                        if (second || last) values = second ? pair(load(at), values) : pair(values, V{});
                    store(at, values);
                }
            };
        };
        each_tile<T, first, count>(x, in, length, w.H, w.W, C, nothing, [=](n64 t, n64 c) {
            return put(v + c / L * next, t);
        });
        for (n64 t = 0; t < length; t++, cut.next())
            each_group<m>(dy, cut.image, cut.row * m, cut.column * m, w.P, w.Q, K, [&](const V* e, n64 k) {
                const auto to = put(d + k / L * next, t);
                if constexpr (m == 1)
                    to(0, e, 1);  // what all points multiply
                else
                    both<m, n, first, count>(e, T::spread, to);
                if (bias) {
                    V sum = load(&of_block[k]);
                    for (int i = 0; i < m * m; i++) sum += e[i];
                    store(&of_block[k], sum);
                }
            });
        for (n64 k = 0; bias && k < K; k++) bias[k] += of_block[k], of_block[k] = 0;
        const n64 block = (start - begin) / (BLOCK * tiles) + 1;
        Ahead<false, E> next_x(from_x + block * x_pixels * C, x_pixels * C, count * n);
        Ahead<false, E> next_dy(from_dy + block * y_pixels * K, y_pixels * K, count * n);
        for (int q = 0; q < count * n; q++) {
            next_x.fetch(), next_dy.fetch();
            for (n64 c = 0; c < C; c += L) {
                const float *vq = v + c / L * next + q * APART, *dq = d + (m == 1 ? 0 : q * APART);
                float* to = u + (q * C + c) * K;
                constexpr int R = SUMS / 3;
                n64 k = 0;
                for (; k + 2 * L <= K; k += 2 * L, dq += 2 * next)
                    for (int r = 0; r < L; r += R) outer<kind, R, 2>(vq + r, dq, to + r * K + k, rows, next, K);
                if (k < K) outer<kind, L, 1>(vq, dq, to + k, rows, next, K);
            }
        }
    }
}

template <class T, class E, int first>
void gather_from(const Weight& w, n64 row, n64 begin, n64 end, float* work, float* u, double* bias) {
    if (w.rows() > 1)
        gather<T, E, 0, T::n>(w, begin, end, work, u, bias);
    else if (row == first)
        gather<T, E, first, 1>(w, begin, end, work, u, bias);
    else if constexpr (first + 1 < T::n)
        gather_from<T, E, first + 1>(w, row, begin, end, work, u, bias);
}

// A thread's part of the gradient of w, of images [begin, end), `few` at a time, each after before(first, count); work:
// `all` times w.work() floats, sum (9, C, K), bias (all, K), zero
template <class T, class E, class Before>
void weight(const Weight& w, int me, int all, n64 begin, n64 end, n64 few, Before before, float* work, float* sum,
            double* bias) {
    constexpr int n = T::n;
    const n64 C = w.C, K = w.K, tiles = Cut<T::m>(w.P, w.Q).tiles(1), room = w.work(), rows = w.rows();
    float* own = work + me * room;
    for (n64 row = 0; row < n; row += rows) {
        std::fill(own, own + w.points() * C * K, 0.f);
        for (n64 at = begin; at < end; at += few) {
            const n64 next = std::min(at + few, end);
            if (row == 0) before(at, next - at);
            gather_from<T, E, 0>(w, row, at * tiles, next * tiles, own + w.points() * C * K, own,
                                 w.db && row == 0 ? bias + me * K : nullptr);
        }
#pragma omp barrier
#pragma omp for
        for (n64 c = 0; c < C; c++)
            for (n64 k = 0; k < K; k += L) {
                for (n64 a = 0; a < rows; a++) {
                    V right[3] = {};  // a row of U times G
                    for (int b = 0; b < n; b++) {
                        V u = {};
                        for (int i = 0; i < all; i++) u += load(work + i * room + ((a * n + b) * C + c) * K + k);
                        for (int j = 0; j < 3; j++) right[j] += u * T::G[b][j];
                    }
                    for (int i = 0; i < 3; i++)
                        for (int j = 0; j < 3; j++) {
                            float* to = sum + ((3 * i + j) * C + c) * K + k;
                            store(to, load(to) + T::G[row + a][i] * right[j]);
                        }
                }
            }
    }
#pragma omp for collapse(2)
    for (n64 k = 0; k < K; k += L)  // L x L numbers at once: dw may lie the other way round
        for (n64 c = 0; c < C; c += L)
            for (int i = 0; i < 9; i++) {
                const float* from = sum + (i * C + c) * K + k;
                float* to = w.dw + k * w.strides[0] + c * w.strides[1] + i / 3 * w.strides[2] + i % 3 * w.strides[3];
                for (int a = 0; a < L; a++)
                    for (int b = 0; b < L; b++) to[a * w.strides[0] + b * w.strides[1]] = from[b * K + a];
            }
    if (w.db && me == 0)
        for (n64 k = 0; k < K; k++) {
            double total = 0;
            for (int i = 0; i < all; i++) total += bias[i * K + k];
            w.db[k] = static_cast<float>(total);
        }
}

// ---- U = G w G^T, (points, K/L, C, L)

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
// sums of TOGETHER channels allow.
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

// dy where y > 0, else 0, of `count` numbers from `first` on
template <class E> void mask(const void* dy, const void* y, void* to, n64 first, n64 count) {
    for (n64 i = first; i < first + count; i += L)
        store(static_cast<E*>(to) + i,
              zero_where(load(static_cast<const E*>(y) + i) <= 0.f, load(static_cast<const E*>(dy) + i)));
}

float* floats(n64 count) { return static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64)); }

}  // namespace

// N images through `count` layers, `batch` at a time: what lies between two layers stays in the cache
extern "C" void depthlab_winograd(const Layer* layers, n64 count, n64 N, n64 batch, int threads) {
    n64 room = 0, kernels = 0;
    for (n64 i = 0; i < count; i++) room = std::max(room, layers[i].work()), kernels += layers[i].kernel();
    const n64 parts = (N + batch - 1) / batch;
    float* u = floats(kernels);
#pragma omp parallel num_threads(threads)
    {
        float *work = floats(room), *to = u;
        for (n64 i = 0; i < count; to += layers[i++].kernel()) transform(layers[i], to);
#pragma omp for schedule(static)
        for (n64 part = 0; part < parts; part++) {
            const float* from = u;
            for (n64 i = 0; i < count; from += layers[i++].kernel())
                through(layers[i], from, omp_get_thread_num() * batch, part * batch, std::min(batch, N - part * batch), work);
        }
        std::free(work);
    }
    std::free(u);
}

// All gradients of a convolution; dx and w may be null. With y, what its ReLU stops is taken out of dy first, on its way to
// `masked`, which dx and w have for dy. In one parallel region: to wake a thread costs as much as a small layer's work.
extern "C" void depthlab_winograd_backward(const Layer* dx, const Weight* w, n64 N, const void* dy, const void* y,
                                           void* masked, n64 image, int half, int threads) {
    float *work = w ? floats(threads * w->work()) : nullptr, *sum = w ? floats(9 * w->C * w->K) : nullptr;
    float* u = dx ? floats(dx->kernel()) : nullptr;
    double* bias = w ? static_cast<double*>(std::calloc(threads * w->K, sizeof(double))) : nullptr;
    if (w) std::fill(sum, sum + 9 * w->C * w->K, 0.f);
#pragma omp parallel num_threads(threads)
    {
        const n64 me = omp_get_thread_num(), all = omp_get_num_threads(), begin = N * me / all, end = N * (me + 1) / all;
        float* own = dx ? floats(dx->work()) : nullptr;
        if (dx) transform(*dx, u);
        const auto before = [&](n64 at, n64 count) {
            if (y) (half ? mask<bf16> : mask<float>)(dy, y, masked, at * image, count * image);
            if (dx) through(*dx, u, 0, at, count, own);
        };
        if (w) {
            const auto run = [&](auto tile, auto e) {
                const n64 few = w->rows() > 1 ? std::max<n64>(1, CHUNK / image) : N;
                weight<decltype(tile), decltype(e)>(*w, me, all, begin, end, few, before, work, sum, bias);
            };
            w->m == 2 ? run(Winograd<2>(), float()) : w->m == 4 ? run(Winograd<4>(), bf16())
            : w->half ? run(Strided(), bf16()) : run(Strided(), float());
        } else if (begin < end)
            before(begin, end - begin);
        std::free(own);
    }
    std::free(work);
    std::free(sum);
    std::free(u);
    std::free(bias);
}
