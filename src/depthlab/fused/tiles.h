// How winograd.cpp cuts images into tiles, and the transforms of a row or column of a tile.
//
//   Winograd<m>  y of a convolution of stride 1: m outputs from m + 2 inputs by m + 2 products (Lavin & Gray 2016)
//   Strided      y of one of stride 2: an output from 3 inputs by 3 products
//   Spreading    dx of one of stride 2: 2 outputs from 2 inputs by 3 products
//
// Elements of `d` are at distance S, of `o` next to one another; G takes a row of the kernel to what is multiplied.
// A tile of outputs begins at a multiple of m; its inputs at as many multiples of `step`, less `border`.

#pragma once
#include <algorithm>

#include "vectors.h"

namespace {

template <int m> struct Winograd;

template <> struct Winograd<2> {
    static constexpr int n = 4, inputs = 4, m = 2, step = 2, border = 1;
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

// At 0, +-p, +-q and infinity. Products of numbers rounded alike err least near +-2/3 and +-3/2: by the sum over points of
// (A^T)^2 |B^T|^2 |G|^2, squared for both directions, 2.3 times less than at the usual +-1 and +-2.
template <> struct Winograd<4> {
    static constexpr int n = 6, inputs = 6, m = 4, step = 4, border = 1;
    static constexpr float p = 2 / 3.f, q = 3 / 2.f, pp = p * p, qq = q * q;
    static constexpr float P = 2 * pp * (pp - qq), Q = 2 * qq * (qq - pp);
    static constexpr float G[6][3] = {{1, 0, 0},
                                      {1 / P, p / P, pp / P},
                                      {1 / P, -p / P, pp / P},
                                      {1 / Q, q / Q, qq / Q},
                                      {1 / Q, -q / Q, qq / Q},
                                      {0, 0, 1}};

    // Sums of the positive and of the negative coefficients of B^T
    static constexpr float SIGNED[6][2] = {{2, pp + qq},       {1 + p, qq + p * qq}, {1 + p * qq, qq + p},
                                           {1 + q, pp + q * pp}, {1 + q * pp, pp + q}, {2, pp + qq}};
    // The most that B^T d B is at a point, of d that differ by 1 at most, 0 among them
    static constexpr float bound(int point) {
        const float *a = SIGNED[point / n], *b = SIGNED[point % n];
        return std::max(a[0] * b[0] + a[1] * b[1], a[0] * b[1] + a[1] * b[0]);
    }

    static void input(const V* d, int s, V* o) {
        const V a = d[4 * s] - qq * d[2 * s], b = d[3 * s] - qq * d[s];
        const V c = d[4 * s] - pp * d[2 * s], e = d[3 * s] - pp * d[s];
        o[0] = d[0] + (d[4 * s] - (pp + qq) * d[2 * s]);
        o[1] = a + p * b;
        o[2] = a - p * b;
        o[3] = c + q * e;
        o[4] = c - q * e;
        o[5] = d[s] + (d[5 * s] - (pp + qq) * d[3 * s]);
    }
    static void output(const V* d, int s, V* o) {
        const V a = d[s] + d[2 * s], b = d[s] - d[2 * s], c = d[3 * s] + d[4 * s], e = d[3 * s] - d[4 * s];
        o[0] = d[0] + a + c;
        o[1] = p * b + q * e;
        o[2] = pp * a + qq * c;
        o[3] = p * pp * b + q * qq * e + d[5 * s];
    }
    static void spread(const V* d, int s, V* o) {
        const V a = d[0] + pp * d[2 * s], b = d[s] + pp * d[3 * s];
        const V c = d[0] + qq * d[2 * s], e = d[s] + qq * d[3 * s];
        o[0] = d[0];
        o[1] = a + p * b;
        o[2] = a - p * b;
        o[3] = c + q * e;
        o[4] = c - q * e;
        o[5] = d[3 * s];
    }
};

struct Strided {
    static constexpr int n = 3, inputs = 3, m = 1, step = 2, border = 1;
    static constexpr float G[3][3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};

    static void input(const V* d, int s, V* o) { o[0] = d[0], o[1] = d[s], o[2] = d[2 * s]; }
    static void output(const V* d, int s, V* o) { o[0] = d[0] + d[s] + d[2 * s]; }
};

struct Spreading {  // dx[2i] = w[1] dy[i], dx[2i + 1] = w[2] dy[i] + w[0] dy[i + 1]; w turned around
    static constexpr int n = 3, inputs = 2, m = 2, step = 1, border = 0;
    static constexpr float G[3][3] = {{0, 1, 0}, {1, 0, 0}, {0, 0, 1}};

    static void input(const V* d, int s, V* o) { o[0] = o[1] = d[0], o[2] = d[s]; }
    static void output(const V* d, int s, V* o) { o[0] = d[0], o[1] = d[s] + d[2 * s]; }
};

// Rows [first, first + count) of M^T d M, n numbers of each, to put(index of the first, numbers); d is from x from numbers
template <int from, int n, int first, int count, class Transform, class Put>
inline void both(const V* d, Transform transform, Put put) {
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
        put(a * n, row);
    }
}

// Images of H x W outputs cut into tiles of m x m, and a walk over them
template <int m> struct Cut {
    n64 rows, columns, image = 0, row = 0, column = 0;

    Cut(n64 H, n64 W) : rows((H + m - 1) / m), columns((W + m - 1) / m) {}
    n64 tiles(n64 N) const { return N * rows * columns; }
    Cut at(n64 tile) const {
        Cut to = *this;
        to.image = tile / tiles(1), to.row = tile % tiles(1) / columns, to.column = tile % columns;
        return to;
    }
    void next() { skip(1); }
    void skip(n64 tiles) {  // of this row
        if ((column += tiles) < columns) return;
        column = 0;
        if (++row < rows) return;
        row = 0;
        image++;
    }
};

// B^T d B of the inputs of `tiles` tiles from `cut` on, rows [first, first + count): n numbers of each to put(tile, c)(index
// of the first, numbers) for the channels from c on; zeros outside the image, `nothing` has W * C of them. Up to STRIP neighbours of a
// row go together: what two of them share is transformed in one direction once, and only rows have to mind the border.
constexpr int STRIP = 8;

template <class T, int first, int count, class E, class Put>
inline void each_tile(const E* x, Cut<T::m>& cut, n64 tiles, n64 H, n64 W, n64 C, const E* nothing, Put put) {
    constexpr int n = T::n, inputs = T::inputs, width = (STRIP - 1) * T::step + inputs;
    for (n64 tile = 0, strip; tile < tiles; tile += strip, cut.skip(strip)) {
        strip = std::min<n64>({STRIP, tiles - tile, cut.columns - cut.column});
        const n64 i = cut.row * T::step - T::border, j = cut.column * T::step - T::border;
        const n64 all = (strip - 1) * T::step + inputs, begin = std::max<n64>(0, -j), end = std::min(W - j, all);
        const E* from[inputs];
        for (int a = 0; a < inputs; a++)
            from[a] = (i + a >= 0 && i + a < H ? x + (cut.image * H + i + a) * W * C : nothing) + j * C;
        for (n64 c = 0; c < C; c += L) {
            V half[count * width];
            const auto zeros = [&](n64 from, n64 to) {
                for (n64 b = from; b < to; b++)
                    for (int a = 0; a < count; a++) half[a * width + b] = V{};
            };
            zeros(0, begin), zeros(end, all);
            for (n64 b = begin; b < end; b++) {
                V d[inputs], column[n];
#pragma GCC unroll 8
                for (int a = 0; a < inputs; a++) d[a] = load(from[a] + b * C + c);
                T::input(d, 1, column);
#pragma GCC unroll 8
                for (int a = 0; a < count; a++) half[a * width + b] = column[first + a];
            }
            for (n64 t = 0; t < strip; t++) {
                const auto to = put(tile + t, c);
#pragma GCC unroll 8
                for (int a = 0; a < count; a++) {
                    V row[n];
                    T::input(half + a * width + t * T::step, 1, row);
                    to(a * n, row);
                }
            }
        }
    }
}

// `size` x `size` pixels of C channels of x (N, H, W, C) from pixel i, j >= 0 of an image on, zeros beyond, as vectors of
// the channels from c on to body(vectors, c)
template <int size, class E, class Body>
inline void each_group(const E* x, n64 image, n64 i, n64 j, n64 H, n64 W, n64 C, Body body) {
    static const E nothing[L] = {};
    const E* corner = x + ((image * H + i) * W + j) * C;
    const bool inside = i + size <= H && j + size <= W;
    for (n64 c = 0; c < C; c += L) {
        V d[size * size];
        if (inside)
#pragma GCC unroll 8
            for (int a = 0; a < size; a++)
#pragma GCC unroll 8
                for (int b = 0; b < size; b++) d[a * size + b] = load(corner + (a * W + b) * C + c);
        else
#pragma GCC unroll 8
            for (int a = 0; a < size; a++)
#pragma GCC unroll 8
                for (int b = 0; b < size; b++)
                    d[a * size + b] = load(i + a < H && j + b < W ? corner + (a * W + b) * C + c : nothing);
        body(d, c);
    }
}

}  // namespace
