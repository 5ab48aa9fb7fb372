// Vectors of float32, as wide as this build's instruction set has them, and bf16 in and out.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "types.h"

#if !defined(__AVX2__) || !defined(__FMA__)
#error "the native kernels need AVX2 and FMA"
#endif

#define PIO_INLINE inline __attribute__((always_inline))

namespace pio::simd {

// Brings a line of memory to the second cache. Not the compiler's builtin: g++ takes a function that
// does nothing else for one without effects, and leaves its calls out.
PIO_INLINE void fetch(const void* line) {
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(line)));
}

#ifdef __AVX512F__

constexpr int kLanes = 16;
using Floats = __m512;

PIO_INLINE Floats zeros() { return _mm512_setzero_ps(); }
PIO_INLINE Floats filled(float x) { return _mm512_set1_ps(x); }
PIO_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
PIO_INLINE void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
PIO_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// c - a * b
PIO_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
// sum += a * b
PIO_INLINE void add_product(Floats& sum, Floats a, Floats b) { sum = fma(a, b, sum); }

// A NaN in `a` is passed over: the result is `b`.
PIO_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
PIO_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }

PIO_INLINE Floats widened(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
PIO_INLINE Floats load(const bf16* from) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Rounds to nearest, ties to even; a NaN stays one.
PIO_INLINE __m256i narrowed(Floats x) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(_mm512_add_epi32(bits, half), nan, bits,
                                               _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
PIO_INLINE void store(bf16* to, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(x));
}

// The first `count` elements, zeros behind them; memory behind them is not touched.
PIO_INLINE Floats load_part(const float* from, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
PIO_INLINE Floats load_part(const bf16* from, int count) {
  return widened(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from));
}
PIO_INLINE void store_part(float* to, Floats x, int count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), x);
}
PIO_INLINE void store_part(bf16* to, Floats x, int count) {
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), narrowed(x));
}

// x in the first `count` lanes, `other` in the rest.
PIO_INLINE Floats first_lanes(Floats x, int count, float other) {
  return _mm512_mask_mov_ps(filled(other), static_cast<__mmask16>((1u << count) - 1), x);
}

// Whether a lane of either is NaN.
PIO_INLINE bool any_nan(Floats a, Floats b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0;
}
// A bit for each lane: whether x is at `limit` or above.
PIO_INLINE uint32_t at_least(Floats x, Floats limit) {
  return _mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ);
}

PIO_INLINE float sum(Floats x) { return _mm512_reduce_add_ps(x); }
PIO_INLINE float largest(Floats x) { return _mm512_reduce_max_ps(x); }

PIO_INLINE Floats rounded(Floats x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x * 2 ** n for a whole n.
PIO_INLINE Floats scaled(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
// x where y >= limit or y is NaN, else 0.
PIO_INLINE Floats unless_below(Floats x, Floats y, Floats limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, limit, _CMP_NLT_UQ), x);
}

// Lane i of the result is the sum of x[i]'s lanes; every sum runs in the same order.
PIO_INLINE Floats sums_of_each(const Floats* x) {
  Floats pairs[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const Floats a = x[2 * i], b = x[2 * i + 1];
    pairs[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  }
  Floats fours[4];  // every 128 bits hold one partial sum of each of four vectors
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) +
               _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  Floats halves[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Floats a = fours[2 * i], b = fours[2 * i + 1];
    halves[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  }
  return _mm512_shuffle_f32x4(halves[0], halves[1], 0x88) +
         _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd);
}

// Four neighbouring lanes, from lane 4 * group.
PIO_INLINE __m128 four_lanes(Floats x, int group) {
  switch (group) {
    case 0: return _mm512_castps512_ps128(x);
    case 1: return _mm512_extractf32x4_ps(x, 1);
    case 2: return _mm512_extractf32x4_ps(x, 2);
    default: return _mm512_extractf32x4_ps(x, 3);
  }
}

#else

constexpr int kLanes = 8;
using Floats = __m256;

PIO_INLINE Floats zeros() { return _mm256_setzero_ps(); }
PIO_INLINE Floats filled(float x) { return _mm256_set1_ps(x); }
PIO_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
PIO_INLINE void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
PIO_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
// c - a * b
PIO_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
// sum += a * b. By hand: with all registers in use, g++ would put a sum where the factors were, and
// move it back through memory.
PIO_INLINE void add_product(Floats& sum, Floats a, Floats b) {
  Floats in_register = sum;
  asm("vfmadd231ps %2, %1, %0" : "+x"(in_register) : "x"(a), "x"(b));
  sum = in_register;
}

// A NaN in `a` is passed over: the result is `b`.
PIO_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
PIO_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }

PIO_INLINE Floats widened(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
PIO_INLINE Floats load(const bf16* from) {
  return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Rounds to nearest, ties to even; a NaN stays one.
PIO_INLINE __m128i narrowed(Floats x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i wide = _mm256_srli_epi32(
      _mm256_blendv_epi8(_mm256_add_epi32(bits, half), quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
PIO_INLINE void store(bf16* to, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrowed(x));
}

// The first `count` elements, zeros behind them; memory behind them is not touched.
template <class T>
PIO_INLINE Floats load_part(const T* from, int count) {
  T part[kLanes] = {};
  std::memcpy(part, from, sizeof(T) * static_cast<size_t>(count));
  return load(part);
}
template <class T>
PIO_INLINE void store_part(T* to, Floats x, int count) {
  T part[kLanes];
  store(part, x);
  std::memcpy(to, part, sizeof(T) * static_cast<size_t>(count));
}

// x in the first `count` lanes, `other` in the rest.
PIO_INLINE Floats first_lanes(Floats x, int count, float other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
  return _mm256_blendv_ps(filled(other), x, _mm256_castsi256_ps(inside));
}

// Whether a lane of either is NaN.
PIO_INLINE bool any_nan(Floats a, Floats b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0;
}
// A bit for each lane: whether x is at `limit` or above.
PIO_INLINE uint32_t at_least(Floats x, Floats limit) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GE_OQ)));
}

PIO_INLINE float sum(Floats x) {
  const __m128 four = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return _mm_cvtss_f32(two + _mm_movehdup_ps(two));
}
PIO_INLINE float largest(Floats x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ps(two, _mm_movehdup_ps(two)));
}

PIO_INLINE Floats rounded(Floats x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x * 2 ** n for a whole n in [-126, 127].
PIO_INLINE Floats scaled(Floats x, Floats n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
// x where y >= limit or y is NaN, else 0.
PIO_INLINE Floats unless_below(Floats x, Floats y, Floats limit) {
  return _mm256_and_ps(x, _mm256_cmp_ps(y, limit, _CMP_NLT_UQ));
}

// Lane i of the result is the sum of x[i]'s lanes; every sum runs in the same order.
PIO_INLINE Floats sums_of_each(const Floats* x) {
  const Floats a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const Floats b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
}

// Four neighbouring lanes, from lane 4 * group.
PIO_INLINE __m128 four_lanes(Floats x, int group) {
  return group == 0 ? _mm256_castps256_ps128(x) : _mm256_extractf128_ps(x, 1);
}

#endif

// e ** x for x <= 88, to one unit in the last place; 0 below -87.3, where float32 has no normal
// numbers left. A NaN stays one.
PIO_INLINE Floats exp(Floats x) {
  const Floats n = rounded(x * filled(1.44269504f));
  // ln 2 in two parts: the first has so few bits that n times it is exact.
  const Floats r = fnma(n, filled(-2.12194440e-4f), fnma(n, filled(0.693359375f), x));
  // 1 + r + r * r * q(r); q is a fit of least relative error over |r| <= ln(2) / 2.
  Floats q = filled(0.001381454f);
  q = fma(q, r, filled(0.00836874512f));
  q = fma(q, r, filled(0.0416683908f));
  q = fma(q, r, filled(0.166665204f));
  q = fma(q, r, filled(0.499999934f));
  const Floats power = fma(q, r * r, r) + filled(1.0f);
  return unless_below(scaled(power, n), x, filled(-87.3f));
}

// Two vectors, one behind the other.
PIO_INLINE void store_both(float* to, Floats first, Floats second) {
  store(to, first);
  store(to + kLanes, second);
}
PIO_INLINE void store_both(bf16* to, Floats first, Floats second) {
#ifdef __AVX512BF16__
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
#else
  store(to, first);
  store(to + kLanes, second);
#endif
}

// x as an element of type T would hold it.
template <class T>
PIO_INLINE Floats rounded_to(Floats x);
template <>
PIO_INLINE Floats rounded_to<float>(Floats x) {
  return x;
}
template <>
PIO_INLINE Floats rounded_to<bf16>(Floats x) {
  return widened(narrowed(x));
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace pio::simd
