// Vectors of L floats, read from and written to float or bf16.

#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int L = 16;
#else
constexpr int L = 8;
#endif
typedef float V __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));
typedef uint16_t H __attribute__((vector_size(2 * L)));
using bf16 = uint16_t;
typedef int64_t n64;

inline V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline V load(const bf16* p) {
    H h;
    std::memcpy(&h, p, sizeof h);
#ifdef __AVX512F__  // what the general form means, which gcc 12 makes five instructions of
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
    return (V)(__builtin_convertvector(h, U) << 16);
#endif
}

inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, V v) {  // to the nearest, ties to even; NaN stays NaN
#ifdef __AVX512BF16__
    auto h = _mm512_cvtneps_pbh((__m512)v);
#else
    U u = (U)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = (U)(v != v);
    H h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), H);
#endif
    std::memcpy(p, &h, sizeof h);
}

inline V zero_where(I condition, V v) { return (V)((I)v & ~condition); }
template <bool on = true> inline V relu(V v) { return on ? zero_where(v < 0.f, v) : v; }  // NaN passes, as in PyTorch

}  // namespace
