// 3x3 convolutions with padding 1, and their gradients: those of stride 1 by Winograd's F(m x m, 3x3), m = 2 or 4, with
// 2.25 or 4 times fewer multiplications (Lavin & Gray 2016), those of stride 2 as they stand. Compiled and called by
// winograd.py; no header of PyTorch.
//
//   Y  = A^T [ U . (B^T x B) ] A              per m x m output tile from its inputs (tiles.h); "." sums over channels
//   U  = G w G^T                              dx is the same with w turned around, its channels swapped: convolution.h
//   dw = G^T [ sum (B^T x B) (A dy A^T) ] G   over all tiles: weight.h
//
// x, y (N, H, W, C or K) float or bf16, channels last, C and K multiples of 16; everything between is float, but for what
// is multiplied for bf16 (products.h): integers in training's forward pass, else bf16. A block of tiles goes through all
// three stages while it is in the cache, and in a chain a few images go through several layers.

#include <omp.h>

#include <cstdlib>

#include "convolution.h"
#include "weight.h"

namespace {

constexpr n64 CHUNK = 1 << 16;  // numbers of dy that both gradients take at once

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
