// 3x3 convolutions of stride 1 and padding 1, and their gradients, by Winograd's F(m x m, 3x3), m = 2 or 4: 2.25 or 4
// times fewer multiplications (Lavin & Gray 2016). Compiled and called by winograd.py; no header of PyTorch.
//
//   Y  = A^T [ U . (B^T x B) ] A              per m x m output tile from its (m+2) x (m+2) inputs; "." sums over channels
//   U  = G w G^T                              dx is the same with w turned around and its channels swapped
//   dw = G^T [ sum (B^T x B) (A dy A^T) ] G   over all tiles
//
// x, y (N, H, W, C or K) float or bf16, channels last, C and K multiples of 16; everything between is float. A block of
// tiles goes through all three stages while it is in the cache, and in a chain a few images go through several layers.

#include <omp.h>

#include <algorithm>
#include <cstdlib>

#include "vectors.h"

namespace {

constexpr int RUN = 32;  // channels that are summed one after the other: sums of sums round less
constexpr int SUMS = L == 16 ? 24 : 12;  // registers that sums are kept in
typedef int64_t n64;

// ---- the transforms of one row or column: elements of `d` at distance S, of `o` at distance T

template <int m> struct Tile;

template <> struct Tile<2> {
    static constexpr int n = 4;
    static constexpr float G[4][3] = {{1, 0, 0}, {.5f, .5f, .5f}, {.5f, -.5f, .5f}, {0, 0, 1}};

    static void input(const V* d, int s, V* o) {  // B^T d
        o[0] = d[0] - d[2 * s];
        o[1] = d[s] + d[2 * s];
        o[2] = d[2 * s] - d[s];
        o[3] = d[s] - d[3 * s];
    }
    static void output(const V* d, int s, V* o) {  // A^T d
        o[0] = d[0] + d[s] + d[2 * s];
        o[1] = d[s] - d[2 * s] - d[3 * s];
    }
    static void spread(const V* d, int s, V* o) {  // A d
        o[0] = d[0];
        o[1] = d[0] + d[s];
        o[2] = d[0] - d[s];
        o[3] = -d[s];
    }
};

template <> struct Tile<4> {
    static constexpr int n = 6;
    static constexpr float G[6][3] = {{1 / 4.f, 0, 0},
                                      {-1 / 6.f, -1 / 6.f, -1 / 6.f},
                                      {-1 / 6.f, 1 / 6.f, -1 / 6.f},
                                      {1 / 24.f, 1 / 12.f, 1 / 6.f},
                                      {1 / 24.f, -1 / 12.f, 1 / 6.f},
                                      {0, 0, 1}};

    static void input(const V* d, int s, V* o) {
        const V a = d[4 * s] - 4 * d[2 * s], b = d[3 * s] - 4 * d[s];
        const V c = d[4 * s] - d[2 * s], e = 2 * (d[3 * s] - d[s]);
        o[0] = 4 * d[0] - 5 * d[2 * s] + d[4 * s];
        o[1] = a + b;
        o[2] = a - b;
        o[3] = c + e;
        o[4] = c - e;
        o[5] = 4 * d[s] - 5 * d[3 * s] + d[5 * s];
    }
    static void output(const V* d, int s, V* o) {
        const V a = d[s] + d[2 * s], b = d[s] - d[2 * s], c = d[3 * s] + d[4 * s], e = d[3 * s] - d[4 * s];
        o[0] = d[0] + a + c;
        o[1] = b + 2 * e;
        o[2] = a + 4 * c;
        o[3] = b + 8 * e + d[5 * s];
    }
    static void spread(const V* d, int s, V* o) {
        const V a = d[0] + d[2 * s], b = d[s] + d[3 * s], c = d[0] + 4 * d[2 * s], e = 2 * d[s] + 8 * d[3 * s];
        o[0] = d[0];
        o[1] = a + b;
        o[2] = a - b;
        o[3] = c + e;
        o[4] = c - e;
        o[5] = d[3 * s];
    }
};

// A block of transformed tiles lies as (C/L, points, ROWS, L): whatever is read or written together is a constant apart.
// One row more than tiles: or all points of a tile would lie in a few sets of the first-level cache.
constexpr int BLOCK = 48, ROWS = BLOCK + 1, APART = ROWS * L;

// Rows [first, first + count) of M^T d M, n numbers of each, APART floats apart from `to`; d is from x from numbers
template <int from, int n, int first, int count, class Transform>
inline void both(const V* d, Transform transform, float* to) {
    V half[count * from];
#pragma GCC unroll 8
    for (int b = 0; b < from; b++) {
        V column[n];
        transform(d + b, from, column);
#pragma GCC unroll 8
        for (int a = 0; a < count; a++) half[a * from + b] = column[first + a];
    }
#pragma GCC unroll 8
    for (int a = 0; a < count; a++) {
        V row[n];
        transform(half + a * from, 1, row);
#pragma GCC unroll 8
        for (int b = 0; b < n; b++) store(to + (a * n + b) * APART, row[b]);
    }
}

// N images cut into tiles of m x m, and a walk over them
template <int m> struct Cut {
    n64 H, W, image = 0, i = 0, j = 0;  // i, j: the first pixel of the tile

    Cut(n64 H, n64 W) : H(H), W(W) {}
    n64 tiles(n64 N) const { return N * ((H + m - 1) / m) * ((W + m - 1) / m); }
    Cut at(n64 tile) const {
        Cut to = *this;
        const n64 in_row = (W + m - 1) / m, in_image = tiles(1);
        to.image = tile / in_image, to.i = tile % in_image / in_row * m, to.j = tile % in_row * m;
        return to;
    }
    void next() {
        if ((j += m) < W) return;
        j = 0;
        if ((i += m) < H) return;
        i = 0;
        image++;
    }
};

// `size` x `size` pixels of C channels of x with the tile in the middle, zeros outside, as vectors of the channels from c
// on to body(vectors, c)
template <int m, int size, class E, class Body>
inline void each_group(const Cut<m>& cut, const E* x, n64 C, Body body) {
    static const E nothing[L] = {};
    constexpr int border = (size - m) / 2;
    const n64 i = cut.i - border, j = cut.j - border;
    const E* corner = x + ((cut.image * cut.H + i) * cut.W + j) * C;
    const bool inside = i >= 0 && j >= 0 && i + size <= cut.H && j + size <= cut.W;
    bool in_row[size], in_column[size];
    for (int a = 0; a < size; a++) {
        in_row[a] = i + a >= 0 && i + a < cut.H;
        in_column[a] = j + a >= 0 && j + a < cut.W;
    }
    for (n64 c = 0; c < C; c += L) {
        V d[size * size];
        if (inside)
#pragma GCC unroll 8
            for (int a = 0; a < size; a++)
#pragma GCC unroll 8
                for (int b = 0; b < size; b++) d[a * size + b] = load(corner + (a * cut.W + b) * C + c);
        else
#pragma GCC unroll 8
            for (int a = 0; a < size; a++)
#pragma GCC unroll 8
                for (int b = 0; b < size; b++)
                    d[a * size + b] = load(in_row[a] && in_column[b] ? corner + (a * cut.W + b) * C + c : nothing);
        body(d, c);
    }
}

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

// ---- forward

// acc (R, W) += x w^T: R numbers of x at distance `apart`, W vectors of w at distance `next`
template <int apart, int R, int W> inline void add_product(V (&acc)[R][W], const float* x, const float* w, n64 next) {
    V v[W];
#pragma GCC unroll 4
    for (int j = 0; j < W; j++) v[j] = load(w + j * next);
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) {
        const float a = x[r * apart];
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) acc[r][j] += a * v[j];
    }
}

// m (W, R, L) = v (C/L, R, L) u (W, C, L): R tiles, W neighbouring blocks of L outputs; blocks of v and m are `next` apart
template <int R, int W> inline void multiply(const float* v, const float* u, float* m, n64 C, n64 next, n64 begin) {
    V acc[R][W] = {};
    v += begin / L * next, u += begin * L;
    for (n64 group = begin; group < std::min(begin + RUN, C); group += L, v += next, u += L * L)
#pragma GCC unroll 16
        for (int c = 0; c < L; c++) add_product<L>(acc, v + c, u + c * L, C * L);
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) {
            float* to = m + j * next + r * L;
            store(to, begin ? load(to) + acc[r][j] : acc[r][j]);
        }
}

template <int W> void multiply_all(const float* v, const float* u, float* m, n64 rows, n64 C, n64 next) {
    constexpr int R = SUMS / (W + 1) / 4 * 4;
    for (n64 c = 0; c < C; c += RUN) {
        n64 r = 0;
        for (; r + R <= rows; r += R) multiply<R, W>(v + r * L, u, m + r * L, C, next, c);
        for (; r + 4 <= rows; r += 4) multiply<4, W>(v + r * L, u, m + r * L, C, next, c);
        for (; r < rows; r++) multiply<1, W>(v + r * L, u, m + r * L, C, next, c);
    }
}

struct Layer {  // y = [relu](conv + bias [+ other])
    const void *x, *other;
    void* y;
    const float *u, *bias;  // u (n n, K/L, C, L)
    n64 H, W, C, K, relu, m, half;
    n64 shared[3];  // whether x, other, y hold all images, or a thread's batch each, used again and again

    n64 points() const { return (m + 2) * (m + 2); }
    n64 work() const { return points() * ROWS * (C + K); }
};

// `count` images through one layer; work holds l.work() floats
template <int m, class E>
void convolve(const Layer& l, const E* x, const E* other, E* y, n64 N, float* work) {
    constexpr int n = Tile<m>::n, points = n * n, next = points * APART;
    const n64 C = l.C, K = l.K, tiles = Cut<m>(l.H, l.W).tiles(N);
    Cut<m> in(l.H, l.W), out = in;
    float *v = work, *p = v + points * ROWS * C;
    for (n64 first = 0; first < tiles; first += BLOCK) {
        const n64 count = std::min<n64>(BLOCK, tiles - first);
        for (n64 t = 0; t < count; t++, in.next())
            each_group<m, n>(in, x, C, [&](const V* d, n64 c) {
                both<n, n, 0, n>(d, Tile<m>::input, v + c / L * next + t * L);
            });
        const n64 pixels = BLOCK * m * m;
        Ahead<false, E> coming(x + (first + BLOCK) * m * m * C, pixels * C, points);
        Ahead<true, E> leaving(y + first * m * m * K, pixels * K, points);
        for (int q = 0; q < points; q++) {
            coming.fetch(), leaving.fetch();
            const float *u = l.u + q * C * K, *from = v + q * APART;
            float* to = p + q * APART;
            n64 k = 0;
            for (; k + 2 * L <= K; k += 2 * L) multiply_all<2>(from, u + k * C, to + k / L * next, count, C, next);
            if (k < K) multiply_all<1>(from, u + k * C, to + k / L * next, count, C, next);
        }
        for (n64 t = 0; t < count; t++, out.next())
            for (n64 k = 0; k < K; k += L) {
                const float* from = p + k / L * next + t * L;
                V half[m * n];
#pragma GCC unroll 8
                for (int b = 0; b < n; b++) {
                    V d[n], column[m];
#pragma GCC unroll 8
                    for (int a = 0; a < n; a++) d[a] = load(from + (a * n + b) * APART);
                    Tile<m>::output(d, 1, column);
#pragma GCC unroll 8
                    for (int a = 0; a < m; a++) half[a * n + b] = column[a];
                }
                const V bias = l.bias ? load(l.bias + k) : V{};
#pragma GCC unroll 8
                for (int a = 0; a < m; a++) {
                    if (out.i + a >= l.H) break;
                    V row[m];
                    Tile<m>::output(half + a * n, 1, row);
                    const n64 at = ((out.image * l.H + out.i + a) * l.W + out.j) * K + k;
#pragma GCC unroll 8
                    for (int b = 0; b < m; b++) {
                        if (out.j + b >= l.W) break;
                        V o = row[b] + bias;
                        if (other) o += load(other + at + b * K);
                        if (l.relu) o = relu(o);
                        store(y + at + b * K, o);
                    }
                }
            }
    }
}

template <int m, class E>
void layer(const Layer& l, n64 own, n64 at, n64 count, float* work) {
    const n64 in = l.H * l.W * l.C, out = l.H * l.W * l.K;
    const E *x = static_cast<const E*>(l.x), *other = static_cast<const E*>(l.other);
    convolve<m, E>(l, x + (l.shared[0] ? at : own) * in, other ? other + (l.shared[1] ? at : own) * out : nullptr,
                   static_cast<E*>(l.y) + (l.shared[2] ? at : own) * out, count, work);
}

// ---- the gradient of w

// u (R, W, L) at stride K += v^T (R, rows) d (W, rows, L), rows of v and d L apart, blocks of d `next`
template <int R, int W>
inline void outer(const float* v, const float* d, float* u, n64 rows, n64 next, n64 K) {
    V acc[R][W] = {};
#pragma GCC unroll 4
    for (n64 t = 0; t < rows; t++) add_product<1>(acc, v + t * L, d + t * L, next);
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) store(u + r * K + L * j, load(u + r * K + L * j) + acc[r][j]);
}

struct Weight {
    const void *x, *dy;
    float *dw, *db;  // dw at `strides` of k, c, row, column; db (K,) or null
    n64 N, H, W, C, K, m, half;
    n64 strides[4];

    n64 rows() const { return C * K <= 64 * 64 ? m + 2 : 1; }  // of the transformed kernel at once: it stays in the cache
    n64 points() const { return rows() * (m + 2); }
    n64 work() const { return points() * (ROWS * (C + K) + C * K); }  // of a thread
};

// Tiles [begin, end): rows [first, first + count) of sum (B^T x B) (A dy A^T) added to u (count n, C, K); bias += dy
template <int m, class E, int first, int count>
void gather(const Weight& w, n64 begin, n64 end, float* work, float* u, double* bias) {
    constexpr int n = Tile<m>::n, next = count * n * APART;
    const n64 C = w.C, K = w.K;
    Cut<m> cut = Cut<m>(w.H, w.W).at(begin);
    const E *x = static_cast<const E*>(w.x), *dy = static_cast<const E*>(w.dy);
    float *v = work, *d = v + C / L * next;
    for (n64 start = begin; start < end; start += BLOCK) {
        const n64 length = std::min<n64>(BLOCK, end - start);
        for (n64 t = 0; t < length; t++, cut.next()) {
            each_group<m, n>(cut, x, C, [&](const V* e, n64 c) {
                both<n, n, first, count>(e, Tile<m>::input, v + c / L * next + t * L);
            });
            each_group<m, m>(cut, dy, K, [&](const V* e, n64 k) {
                both<m, n, first, count>(e, Tile<m>::spread, d + k / L * next + t * L);
                if (bias) {
                    V sum = {};
                    for (int i = 0; i < m * m; i++) sum += e[i];
                    for (int i = 0; i < L; i++) bias[k + i] += sum[i];
                }
            });
        }
        const n64 pixels = BLOCK * m * m;
        Ahead<false, E> next_x(x + (start + BLOCK) * m * m * C, pixels * C, count * n);
        Ahead<false, E> next_dy(dy + (start + BLOCK) * m * m * K, pixels * K, count * n);
        for (int q = 0; q < count * n; q++) {
            next_x.fetch(), next_dy.fetch();
            for (n64 c = 0; c < C; c += 8) {
                const float *vq = v + c / L * next + q * APART + c % L, *dq = d + q * APART;
                float* to = u + (q * C + c) * K;
                n64 k = 0;
                for (; k + 2 * L <= K; k += 2 * L, dq += 2 * next)
                    if constexpr (SUMS >= 24) {
                        outer<8, 2>(vq, dq, to + k, length, next, K);
                    } else {
                        outer<4, 2>(vq, dq, to + k, length, next, K);
                        outer<4, 2>(vq + 4, dq, to + 4 * K + k, length, next, K);
                    }
                if (k < K) outer<8, 1>(vq, dq, to + k, length, next, K);
            }
        }
    }
}

template <int m, class E, int first>
void gather_from(const Weight& w, n64 row, n64 begin, n64 end, float* work, float* u, double* bias) {
    if (w.rows() > 1)
        gather<m, E, 0, m + 2>(w, begin, end, work, u, bias);
    else if (row == first)
        gather<m, E, first, 1>(w, begin, end, work, u, bias);
    else if constexpr (first + 1 < m + 2)
        gather_from<m, E, first + 1>(w, row, begin, end, work, u, bias);
}

// A thread's part of the gradient of w; work: `all` times w.work() floats, sum (9, C, K), bias (all, K), zero
template <int m, class E>
void weight(const Weight& w, int me, int all, float* work, float* sum, double* bias) {
    constexpr int n = Tile<m>::n;
    const n64 C = w.C, K = w.K, tiles = Cut<m>(w.H, w.W).tiles(w.N), room = w.work(), rows = w.rows();
    float* own = work + me * room;
    for (n64 row = 0; row < n; row += rows) {
        std::fill(own, own + w.points() * C * K, 0.f);
        gather_from<m, E, 0>(w, row, tiles * me / all, tiles * (me + 1) / all, own + w.points() * C * K, own,
                             w.db && row == 0 ? bias + me * K : nullptr);
#pragma omp barrier
#pragma omp for
        for (n64 c = 0; c < C; c++)
            for (n64 k = 0; k < K; k += L) {
                for (n64 a = 0; a < rows; a++) {
                    V right[3] = {};  // a row of U times G
                    for (int b = 0; b < n; b++) {
                        V u = {};
                        for (int i = 0; i < all; i++) u += load(work + i * room + ((a * n + b) * C + c) * K + k);
                        for (int j = 0; j < 3; j++) right[j] += u * Tile<m>::G[b][j];
                    }
                    for (int i = 0; i < 3; i++)
                        for (int j = 0; j < 3; j++) {
                            float* to = sum + ((3 * i + j) * C + c) * K + k;
                            store(to, load(to) + Tile<m>::G[row + a][i] * right[j]);
                        }
                }
                if (row + rows == n)
                    for (int i = 0; i < 9; i++) {
                        float* to = w.dw + k * w.strides[0] + c * w.strides[1] + i / 3 * w.strides[2] + i % 3 * w.strides[3];
                        for (int l = 0; l < L; l++) to[l * w.strides[0]] = sum[(i * C + c) * K + k + l];
                    }
            }
    }
    if (w.db && me == 0)
        for (n64 k = 0; k < K; k++) {
            double total = 0;
            for (int i = 0; i < all; i++) total += bias[i * K + k];
            w.db[k] = static_cast<float>(total);
        }
}

// ---- U = G w G^T of the inputs [c, c + L) and the output k

template <int m>
void kernel_group(const float* w, const n64* stride, bool turned, n64 c, n64 k, V* out) {
    constexpr int n = Tile<m>::n;
    V right[3][n] = {};
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) {
            V v;
            const float* at = w + k * stride[0] + c * stride[1] + (turned ? 2 - i : i) * stride[2] +
                              (turned ? 2 - j : j) * stride[3];
            if (stride[1] == 1)
                v = load(at);
            else
                for (int l = 0; l < L; l++) v[l] = at[l * stride[1]];
            for (int b = 0; b < n; b++) right[i][b] += v * Tile<m>::G[b][j];
        }
    for (int a = 0; a < n; a++)
        for (int b = 0; b < n; b++) {
            V v = {};
            for (int i = 0; i < 3; i++) v += right[i][b] * Tile<m>::G[a][i];
            out[a * n + b] = v;
        }
}

template <int m>
void kernel(const float* w, const n64* stride, n64 C, n64 K, bool turned, float* u, int threads) {
    constexpr int points = Tile<m>::n * Tile<m>::n;
#pragma omp parallel for num_threads(threads) if (C * K > 128 * 128)
    for (n64 k = 0; k < K; k++)
        for (n64 c = 0; c < C; c += L) {
            V out[points];
            kernel_group<m>(w, stride, turned, c, k, out);
            for (int q = 0; q < points; q++)
                if (turned)  // u (points, C/L, K, L)
                    store(u + ((q * (C / L) + c / L) * K + k) * L, out[q]);
                else  // u (points, K/L, C, L)
                    for (int i = 0; i < L; i++) u[((q * (K / L) + k / L) * C + c + i) * L + k % L] = out[q][i];
        }
}

}  // namespace

// w at `stride`s of k, c, row, column; u as Layer has it, for dx if `turned`
extern "C" void depthlab_winograd_kernel(const float* w, const n64* stride, n64 C, n64 K, n64 m, int turned, float* u,
                                         int threads) {
    (m == 2 ? kernel<2> : kernel<4>)(w, stride, C, K, turned, u, threads);
}

static void through(const Layer& l, n64 own, n64 at, n64 count, float* work) {
    const auto run = l.m == 2 ? l.half ? layer<2, bf16> : layer<2, float> : l.half ? layer<4, bf16> : layer<4, float>;
    run(l, own, at, count, work);
}

static float* floats(n64 count) { return static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64)); }

// N images through `count` layers, `batch` at a time: what lies between two layers stays in the cache
extern "C" void depthlab_winograd(const Layer* layers, n64 count, n64 N, n64 batch, int threads) {
    n64 room = 0;
    for (n64 i = 0; i < count; i++) room = std::max(room, layers[i].work());
    const n64 parts = (N + batch - 1) / batch;
#pragma omp parallel num_threads(threads)
    {
        float* work = floats(room);
#pragma omp for schedule(static)
        for (n64 part = 0; part < parts; part++)
            for (n64 i = 0; i < count; i++)
                through(layers[i], omp_get_thread_num() * batch, part * batch, std::min(batch, N - part * batch), work);
        std::free(work);
    }
}

// All gradients of a convolution; dx and w may be null. In one parallel region: to wake a thread costs as much as a
// small layer's work.
extern "C" void depthlab_winograd_backward(const Layer* dx, const Weight* w, n64 N, int threads) {
    float *work = w ? floats(threads * w->work()) : nullptr, *sum = w ? floats(9 * w->C * w->K) : nullptr;
    double* bias = w ? static_cast<double*>(std::calloc(threads * w->K, sizeof(double))) : nullptr;
    if (w) std::fill(sum, sum + 9 * w->C * w->K, 0.f);
#pragma omp parallel num_threads(threads)
    {
        const n64 me = omp_get_thread_num(), all = omp_get_num_threads();
        if (dx) {
            float* own = floats(dx->work());
            through(*dx, 0, N * me / all, N * (me + 1) / all - N * me / all, own);
            std::free(own);
        }
        if (w) {
            const auto run = w->m == 2 ? w->half ? weight<2, bf16> : weight<2, float>
                                       : w->half ? weight<4, bf16> : weight<4, float>;
            run(*w, me, all, work, sum, bias);
        }
    }
    std::free(work);
    std::free(sum);
    std::free(bias);
}
