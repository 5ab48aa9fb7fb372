// Sums of products of int8 codes, four neighbours along k in each lane, exact in int32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace pio::simd {

#ifdef __AVX512F__

using Ints = __m512i;
PIO_INLINE Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
PIO_INLINE void store_ints(void* to, Ints x) { _mm512_storeu_si512(to, x); }
PIO_INLINE Ints filled_ints(int32_t x) { return _mm512_set1_epi32(x); }
PIO_INLINE Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

// To nearest, ties to even.
PIO_INLINE void store_rounded(int8_t* to, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

#else

using Ints = __m256i;
PIO_INLINE Ints load_ints(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
PIO_INLINE void store_ints(void* to, Ints x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), x);
}
PIO_INLINE Ints filled_ints(int32_t x) { return _mm256_set1_epi32(x); }
PIO_INLINE Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }

PIO_INLINE void store_rounded(int8_t* to, Floats x) {
  const __m256i ints = _mm256_cvtps_epi32(x);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(halves, halves));
}

#endif

// The same 32 bits in every lane.
PIO_INLINE Ints filled_four(const void* from) {
  int32_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return filled_ints(bits);
}

#ifdef __AVX512VNNI__

// The instruction multiplies unsigned by signed: weights are 128 too large, and every sum begins 128
// activations below zero.
using Weights = Ints;
using Activations = Ints;
PIO_INLINE Weights weights_of(Ints codes) {
  return _mm512_xor_si512(codes, filled_ints(static_cast<int32_t>(0x80808080)));
}

// What tiles read activations from: the codes themselves.
using LaidOut = int8_t;
PIO_INLINE Activations load_activations(const LaidOut* four) { return filled_four(four); }
PIO_INLINE Ints add_products(Ints sum, Weights weights, Activations activations) {
  return _mm512_dpbusd_epi32(sum, weights, activations);
}

// Where the sums of a row begin. `count` is a multiple of 4.
inline int32_t first_sum(const int8_t* codes, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += codes[i];
  return -128 * sum;
}

#else

// Of a lane's four codes, as int16: the first and third, and the second and fourth.
struct Pairs {
  Ints even, odd;
};
using Weights = Pairs;
using Activations = Pairs;

// What tiles read activations from: all four, in this order.
using LaidOut = int16_t;
PIO_INLINE Activations load_activations(const LaidOut* four) {
  return {filled_four(four), filled_four(four + 2)};
}
// Of 16 codes.
PIO_INLINE void lay_out(LaidOut* to, const int8_t* codes) {
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order)));
}

#ifdef __AVX512F__
PIO_INLINE Weights weights_of(Ints codes) {
  return {_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 8), _mm512_srai_epi16(codes, 8)};
}
PIO_INLINE Ints add_products(Ints sum, const Weights& weights, const Activations& activations) {
  const Ints even = _mm512_madd_epi16(weights.even, activations.even);
  const Ints odd = _mm512_madd_epi16(weights.odd, activations.odd);
  return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
}
#else
PIO_INLINE Weights weights_of(Ints codes) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8), _mm256_srai_epi16(codes, 8)};
}
PIO_INLINE Ints add_products(Ints sum, const Weights& weights, const Activations& activations) {
  const Ints even = _mm256_madd_epi16(weights.even, activations.even);
  const Ints odd = _mm256_madd_epi16(weights.odd, activations.odd);
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
#endif
inline int32_t first_sum(const LaidOut*, int64_t) { return 0; }

#endif

}  // namespace pio::simd
