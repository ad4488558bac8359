// A network's first convolution: 3x3 over images of 3 channels, stride 1, padding 1. Compiled and called by stem.py; no
// header of PyTorch.
//
//   y = [relu](x * w + bias [+ other])     dw = sum of x dy, db = sum of dy; with y, dy counts where y > 0: a ReLU made it
//
// x (N, H, W, 3) float, y, other, dy (N, H, W, K) float or bf16; channels last, K a multiple of 16. Sums of an image are
// float, of all images double. Its pixels are copied into a frame of zeros: a row of the kernel takes nine neighbours.

#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "products.h"

namespace {

constexpr int ROW = 9, TAPS = 3 * ROW, PIXELS = SUMS / 3;  // numbers of x for a row of the kernel, for all; outputs at once

struct Stem {
    const float *x, *w, *bias;
    const void* other;
    void* y;
    float *dw, *db;
    const void* dy;
    n64 N, H, W, K, half, relu, strides[4];  // of w and dw: of y's channel, x's channel, row, column

    n64 wide() const { return 3 * (W + 2); }  // numbers in a row of the frame
    n64 place(n64 tap, n64 k) const {  // in w
        return k * strides[0] + tap % 3 * strides[1] + tap / ROW * strides[2] + tap % ROW / 3 * strides[3];
    }
    std::vector<float> frame() const { return std::vector<float>((H + 2) * wide() + 3 * PIXELS); }
    void fill(std::vector<float>& frame, n64 image) const {
        for (n64 i = 0; i < H; i++)
            std::copy_n(x + (image * H + i) * W * 3, W * 3, frame.data() + (i + 1) * wide() + 3);
    }
};

// f(k, groups): all outputs k, `groups` times L at once
template <class F> inline void each_output(n64 K, F f) {
    n64 k = 0;
    if (L == 16)
        for (; k + 2 * L <= K; k += 2 * L) f(k, std::integral_constant<int, 2>());
    for (; k < K; k += L) f(k, std::integral_constant<int, 1>());
}

template <class E> void forward(const Stem& s, const float* u, const float* frame, n64 image) {
    for (n64 i = 0; i < s.H; i++)
        for (n64 j = 0; j < s.W; j += PIXELS)
            each_output(s.K, [&](n64 k, auto groups) {
                V sum[PIXELS][groups];
                for (auto& pixel : sum)
                    for (int g = 0; g < groups; g++) pixel[g] = s.bias ? load(s.bias + k + g * L) : V{};
                for (int a = 0; a < 3; a++)
#pragma GCC unroll 9
                    for (int t = 0; t < ROW; t++)
                        add_product<FLOATS, 3>(sum, frame + (i + a) * s.wide() + 3 * j + t, u + (a * ROW + t) * s.K + k, L);
                const n64 at = ((image * s.H + i) * s.W + j) * s.K + k;
                for (int r = 0; r < std::min<n64>(PIXELS, s.W - j); r++)
                    for (int g = 0; g < groups; g++) {
                        const n64 here = at + r * s.K + g * L;
                        V o = sum[r][g];
                        if (s.other) o += load(static_cast<const E*>(s.other) + here);
                        store(static_cast<E*>(s.y) + here, s.relu ? relu(o) : o);
                    }
            });
}

// sum (TAPS + 1, K), the last for the bias, of an image; d is room for (K / L, W, L)
template <class E> void backward(const Stem& s, const float* frame, n64 image, float* d, float* sum) {
    for (n64 i = 0; i < s.H; i++) {
        for (n64 k = 0; k < s.K; k += L) {
            V all = {};
            for (n64 j = 0; j < s.W; j++) {
                const n64 at = ((image * s.H + i) * s.W + j) * s.K + k;
                V v = load(static_cast<const E*>(s.dy) + at);
                if (s.y) v = zero_where(load(static_cast<const E*>(s.y) + at) <= 0.f, v);
                store(d + k * s.W + j * L, v);
                all += v;
            }
            store(sum + TAPS * s.K + k, load(sum + TAPS * s.K + k) + all);
        }
        for (int a = 0; a < 3; a++)
            each_output(s.K, [&](n64 k, auto groups) {
                V acc[ROW][groups] = {};
                for (n64 j = 0; j < s.W; j++)
                    add_product<FLOATS, 1>(acc, frame + (i + a) * s.wide() + 3 * j, d + k * s.W + j * L, s.W * L);
                for (int t = 0; t < ROW; t++)
                    for (int g = 0; g < groups; g++) {
                        float* to = sum + (a * ROW + t) * s.K + k + g * L;
                        store(to, load(to) + acc[t][g]);
                    }
            });
    }
}

}  // namespace

extern "C" void depthlab_stem(const Stem* stem, int threads) {
    const Stem& s = *stem;
    std::vector<float> u(TAPS * s.K);
    for (n64 t = 0; t < TAPS; t++)
        for (n64 k = 0; k < s.K; k++) u[t * s.K + k] = s.w[s.place(t, k)];
#pragma omp parallel num_threads(threads)
    {
        auto frame = s.frame();
#pragma omp for schedule(static)
        for (n64 image = 0; image < s.N; image++) {
            s.fill(frame, image);
            (s.half ? forward<bf16> : forward<float>)(s, u.data(), frame.data(), image);
        }
    }
}

extern "C" void depthlab_stem_backward(const Stem* stem, int threads) {
    const Stem& s = *stem;
    const n64 sums = (TAPS + 1) * s.K;
    std::vector<double> total(threads * sums);
#pragma omp parallel num_threads(threads)
    {
        auto frame = s.frame();
        std::vector<float> d(s.K * s.W), sum(sums);
        double* own = total.data() + omp_get_thread_num() * sums;
#pragma omp for schedule(static)
        for (n64 image = 0; image < s.N; image++) {
            s.fill(frame, image);
            (s.half ? backward<bf16> : backward<float>)(s, frame.data(), image, d.data(), sum.data());
            for (n64 i = 0; i < sums; i++) own[i] += sum[i], sum[i] = 0;
        }
    }
    for (n64 i = 0; i < sums; i++) {
        for (int t = 1; t < threads; t++) total[i] += total[t * sums + i];
        const n64 tap = i / s.K, k = i % s.K;
        if (tap < TAPS)
            s.dw[s.place(tap, k)] = static_cast<float>(total[i]);
        else if (s.db)
            s.db[k] = static_cast<float>(total[i]);
    }
}
