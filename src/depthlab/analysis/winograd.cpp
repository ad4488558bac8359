// 3x3 convolution of stride 1 and padding 1 by Winograd's F(4x4, 3x3): 4 times fewer multiplications (Lavin & Gray 2016).
//
//   Y = A^T [ (G w G^T) . (B^T x B) ] A        per 4x4 output tile from a 6x6 input tile; "." sums over channels
//
// x, y, other (N, H, W, C or K) float, channels last, C and K multiples of 16; u (36, K/16, C, 16) as winograd.py lays
// it out; y = [relu](conv + bias [+ other]). A block of tiles goes through all three stages while it is in the cache,
// and a few images through several layers.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int64_t n64;

// Tiles of a block: they stay in the second-level cache; u of many channels does not and wants long blocks
static inline n64 length(n64 C) { return C <= 64 ? 24 : C / 2; }

static inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }

// B^T of six numbers
static inline void input1(const vec* d, vec* o, int s) {
    vec a = d[4 * s] - 4 * d[2 * s], b = d[3 * s] - 4 * d[s];
    vec c = d[4 * s] - d[2 * s], e = 2 * (d[3 * s] - d[s]);
    o[0] = 4 * d[0] - 5 * d[2 * s] + d[4 * s];
    o[s] = a + b;
    o[2 * s] = a - b;
    o[3 * s] = c + e;
    o[4 * s] = c - e;
    o[5 * s] = 4 * d[s] - 5 * d[3 * s] + d[5 * s];
}

// A^T of six numbers, read at distance s, written at distance t
static inline void output1(const vec* m, vec* o, int s, int t) {
    vec a = m[s] + m[2 * s], b = m[s] - m[2 * s], c = m[3 * s] + m[4 * s], e = m[3 * s] - m[4 * s];
    o[0] = m[0] + a + c;
    o[t] = b + 2 * e;
    o[2 * t] = a + 4 * c;
    o[3 * t] = b + 8 * e + m[5 * s];
}

// B^T d B of the 6x6 numbers that `at` points to, one every `apart` from `to`
template <class At>
static inline void input(At at, float* to, n64 apart) {
    vec o[6][6];
    for (int b = 0; b < 6; b++) {
        vec d[6], column[6];
        for (int a = 0; a < 6; a++) d[a] = load(at(a, b));
        input1(d, column, 1);
        for (int a = 0; a < 6; a++) o[a][b] = column[a];
    }
    for (int a = 0; a < 6; a++) {
        vec row[6];
        input1(o[a], row, 1);
        for (int b = 0; b < 6; b++) store(to + (6 * a + b) * apart, row[b]);
    }
}

// m (rows, 16 W) at stride K = v (rows, C) u (C, 16) for W neighbouring blocks of 16 outputs
template <int R, int W>
static inline void multiply(const float* v, const float* u, float* m, n64 C, n64 K) {
    vec acc[R][W] = {};
#pragma GCC unroll 8
    for (n64 c = 0; c < C; c++) {
        vec w[W];
        for (int j = 0; j < W; j++) w[j] = load(u + (j * C + c) * 16);
        for (int r = 0; r < R; r++) {
            const float x = v[r * C + c];
            for (int j = 0; j < W; j++) acc[r][j] += x * w[j];
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < W; j++) store(m + r * K + 16 * j, acc[r][j]);
}

template <int W>
static void multiply_all(const float* v, const float* u, float* m, n64 rows, n64 C, n64 K) {
    const int R = 24 / (W + 1);
    n64 r = 0;
    for (; r + R <= rows; r += R) multiply<R, W>(v + r * C, u, m + r * K, C, K);
    for (; r + 4 <= rows; r += 4) multiply<4, W>(v + r * C, u, m + r * K, C, K);
    for (; r < rows; r++) multiply<1, W>(v + r * C, u, m + r * K, C, K);
}

struct Layer {
    const float *x, *u, *bias, *other;
    float* y;
    n64 H, W, C, K, relu;
    n64 shared[3];  // whether x, other, y hold all images, or a thread's batch each, used again and again
};

// `count` images through one layer; work holds 36 T (C + K) + C floats
static void convolve(const Layer& l, const float* x, const float* other, float* y, n64 N, float* work) {
    const n64 H = l.H, W = l.W, C = l.C, K = l.K, th = (H + 3) / 4, tw = (W + 3) / 4, tiles = N * th * tw;
    const n64 T = std::min(tiles, length(C));
    float *V = work, *M = V + 36 * T * C, *zeros = M + 36 * T * K;
    std::fill(zeros, zeros + C, 0.f);
    for (n64 first = 0; first < tiles; first += T) {
        const n64 count = std::min(T, tiles - first);
        for (n64 t = 0; t < count; t++) {
            const n64 tile = first + t, n = tile / (th * tw), i = tile / tw % th * 4 - 1, j = tile % tw * 4 - 1;
            const float* corner = x + ((n * H + i) * W + j) * C;
            if (i >= 0 && j >= 0 && i + 6 <= H && j + 6 <= W) {
                for (n64 c = 0; c < C; c += 16)
                    input([=](n64 a, n64 b) { return corner + (a * W + b) * C + c; }, V + t * C + c, T * C);
                continue;
            }
            const float* p[6][6];
            for (n64 a = 0; a < 6; a++)
                for (n64 b = 0; b < 6; b++) {
                    const bool inside = i + a >= 0 && i + a < H && j + b >= 0 && j + b < W;
                    p[a][b] = inside ? corner + (a * W + b) * C : zeros;
                }
            for (n64 c = 0; c < C; c += 16)
                input([&](n64 a, n64 b) { return p[a][b] + c; }, V + t * C + c, T * C);
        }
        for (int q = 0; q < 36; q++) {
            const float *v = V + q * T * C, *uq = l.u + q * C * K;
            float* m = M + q * T * K;
            n64 k = 0;
            for (; k + 32 <= K; k += 32) multiply_all<2>(v, uq + k * C, m + k, count, C, K);
            if (k < K) multiply_all<1>(v, uq + k * C, m + k, count, C, K);
        }
        for (n64 t = 0; t < count; t++) {
            const n64 tile = first + t, n = tile / (th * tw), i = tile / tw % th * 4, j = tile % tw * 4;
            for (n64 k = 0; k < K; k += 16) {
                vec m[36], h[24], o[16];
                for (int q = 0; q < 36; q++) m[q] = load(M + (q * T + t) * K + k);
                for (int b = 0; b < 6; b++) output1(m + b, h + b, 6, 6);
                for (int a = 0; a < 4; a++) output1(h + 6 * a, o + 4 * a, 1, 1);
                const vec bk = l.bias ? load(l.bias + k) : (vec){};
                for (n64 a = 0; a < 4 && i + a < H; a++)
                    for (n64 b = 0; b < 4 && j + b < W; b++) {
                        const n64 at = ((n * H + i + a) * W + j + b) * K + k;
                        vec v = o[4 * a + b] + bk;
                        if (other) v += load(other + at);
                        if (l.relu) v = v < 0 ? (vec){} : v;  // NaN stays NaN
                        store(y + at, v);
                    }
            }
        }
    }
}

// N images through `count` layers, `batch` at a time: what lies between two layers stays in the cache
extern "C" void depthlab_winograd(const Layer* layers, n64 count, n64 N, n64 batch, int threads) {
    n64 room = 0;
    for (n64 i = 0; i < count; i++)
        room = std::max(room, 36 * length(layers[i].C) * (layers[i].C + layers[i].K) + layers[i].C);
    const n64 parts = (N + batch - 1) / batch;
#pragma omp parallel num_threads(threads)
    {
        float* work = static_cast<float*>(std::aligned_alloc(64, (room * 4 + 63) / 64 * 64));
#pragma omp for schedule(static)
        for (n64 part = 0; part < parts; part++) {
            const n64 n = part * batch;
            for (n64 i = 0; i < count; i++) {
                const Layer& l = layers[i];
                const n64 in = l.H * l.W * l.C, out = l.H * l.W * l.K, own = omp_get_thread_num() * batch;
                convolve(l, l.x + (l.shared[0] ? n : own) * in,
                         l.other ? l.other + (l.shared[1] ? n : own) * out : nullptr,
                         l.y + (l.shared[2] ? n : own) * out, std::min(batch, N - n), work);
            }
        }
        std::free(work);
    }
}
