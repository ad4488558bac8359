// The gradient of w of winograd.cpp: outer products of transformed inputs and transformed dy, summed over all tiles.

#pragma once
#include "convolution.h"

namespace {

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

}  // namespace
