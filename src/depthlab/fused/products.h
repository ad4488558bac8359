// Sums of products of a broadcast number and a vector, in registers.

#pragma once
#include <algorithm>

#include "vectors.h"

namespace {

constexpr int SUMS = L == 16 ? 24 : 12;  // registers that sums are kept in

// What is multiplied: floats; or two numbers at a time in the place of a float, whose products the processor adds both:
// bf16 to a float, or integers of 16 bits to one of 32. Two are channels that are summed over, or tiles.
enum Kind { FLOATS, BF16, INT16 };

template <Kind kind> inline V product(V sum, float a, V b) { return sum + a * b; }

#ifdef __AVX512BF16__
constexpr Kind PAIRS = BF16;
template <> inline V product<BF16>(V sum, float a, V b) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
}
inline V pair(V a, V b) {  // a[0], b[0], a[1], ...
    typedef uint16_t HH __attribute__((vector_size(4 * L)));
    constexpr HH order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (V)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#else
constexpr Kind PAIRS = FLOATS;
inline V pair(V a, V) { return a; }
#endif

// Integers are numbers times a scale, rounded, in the lower halves of floats that are FAR larger
#ifdef __AVX512VNNI__
constexpr Kind INTEGERS = INT16;
template <> inline V product<INT16>(V sum, float a, V b) {
    return (V)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)_mm512_set1_ps(a), (__m512i)b);
}
constexpr float FAR = 3 << 22, LARGEST = 32767;
inline V beside(V a, V b) {  // all of a, all of b
    typedef uint16_t HH __attribute__((vector_size(4 * L)));
    constexpr HH lower = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                          32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    return (V)_mm512_permutex2var_epi16((__m512i)a, (__m512i)lower, (__m512i)b);
}
inline V merged(V a, V b) { return (V)(((U)a & 0xffff) | ((U)b << 16)); }  // a[0], b[0], a[1], ...
inline V to_float(V integers) { return (V)_mm512_cvtepi32_ps((__m512i)integers); }

// The largest number less the smallest, of `count` and 0
inline float range(const bf16* x, n64 count) {
    __m512i most = _mm512_setzero_si512(), least = most;  // as integers bf16 are in order, negative ones backwards
    for (n64 i = 0; i < count; i += 32) {
        const __mmask32 there = count - i < 32 ? (1u << (count - i)) - 1 : ~0u;
        const __m512i v = _mm512_maskz_loadu_epi16(there, x + i);
        most = _mm512_max_epi16(most, v), least = _mm512_max_epu16(least, v);
    }
    alignas(64) bf16 up[32], down[32];
    _mm512_store_si512(up, most), _mm512_store_si512(down, least);
    bf16 high = 0, low = 0x8000;
    for (int i = 0; i < 32; i++) high = std::max(high, up[i]), low = std::max(low, down[i]);
    const auto number = [](bf16 b) {
        const uint32_t bits = static_cast<uint32_t>(b) << 16;
        float f;
        std::memcpy(&f, &bits, sizeof f);
        return f;
    };
    return number(high) - number(low);
}
#else
constexpr Kind INTEGERS = FLOATS;
constexpr float FAR = 0, LARGEST = 1;
inline V beside(V a, V) { return a; }
inline V merged(V a, V) { return a; }
inline V to_float(V v) { return v; }
inline float range(const bf16*, n64) { return 1; }
#endif

// acc (R, W) += x w^T: R numbers of x at distance `apart`, W vectors of w at distance `next`
template <Kind kind, int apart, int R, int W>
inline void add_product(V (&acc)[R][W], const float* x, const float* w, n64 next) {
    V v[W];
#pragma GCC unroll 4
    for (int j = 0; j < W; j++) v[j] = load(w + j * next);
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) {
        const float a = x[r * apart];
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) acc[r][j] = product<kind>(acc[r][j], a, v[j]);
    }
}

}  // namespace
