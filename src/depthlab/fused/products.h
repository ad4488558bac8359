// Sums of products of a broadcast number and a vector, in registers.

#pragma once
#include <type_traits>

#include "vectors.h"

namespace {

constexpr int SUMS = L == 16 ? 24 : 12;  // registers that sums are kept in

// What is multiplied is float, or, where gradients of bf16 may be (PAIRS), pairs of bf16 in the place of a float: the
// processor adds both products to a float. A pair are two channels that are summed over, or two tiles.
#ifdef __AVX512BF16__
constexpr bool PAIRS = true;
inline V product(V sum, float a, V b, std::true_type) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
}
inline V pair(V a, V b) {
    typedef uint16_t HH __attribute__((vector_size(4 * L)));
    constexpr HH order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (V)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#else
constexpr bool PAIRS = false;
inline V pair(V a, V) { return a; }
#endif
inline V product(V sum, float a, V b, std::false_type) { return sum + a * b; }

// acc (R, W) += x w^T: R numbers of x at distance `apart`, W vectors of w at distance `next`
template <bool pairs, int apart, int R, int W>
inline void add_product(V (&acc)[R][W], const float* x, const float* w, n64 next) {
    V v[W];
#pragma GCC unroll 4
    for (int j = 0; j < W; j++) v[j] = load(w + j * next);
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) {
        const float a = x[r * apart];
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) acc[r][j] = product(acc[r][j], a, v[j], std::bool_constant<pairs>());
    }
}

}  // namespace
