// The codes of a quantized cache: made of float32 numbers, and widened again.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "simd.h"
#include "simd_codes.h"

namespace pio {

// `kLargest` is the number of the largest code; `round` takes numbers up to it. Loads give numbers
// in units of `kUnit`, which goes into the scales: e4m3 is brought to float16's exponents so.
template <class E>
struct Codes;

// Adding it leaves a number below 2 ** 22, rounded to a whole one, in the lowest bits.
constexpr float kRounding = 12582912.0f;

template <>
struct Codes<Int8Code> {
  static constexpr float kLargest = 127.0f;
  static constexpr float kUnit = 1.0f;

  static Int8Code round(float x) {
    return {static_cast<uint8_t>(std::bit_cast<uint32_t>(x + kRounding))};
  }
};

template <>
struct Codes<Fp8Code> {
  static constexpr float kLargest = 448.0f;
  static constexpr float kUnit = 256.0f;

  // To nearest, ties to even. Below 2 ** -6 numbers are multiples of 2 ** -9.
  static Fp8Code round(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    const uint32_t normal =
        ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - ((127u - 7u) << 3);
    const uint32_t small = std::bit_cast<uint32_t>(std::fabs(x) * 512.0f + kRounding) & 0xfu;
    const uint32_t code = magnitude < 0x3c800000u ? small : normal;
    return {static_cast<uint8_t>(code | (bits >> 31 << 7))};
  }
};

namespace simd {

#ifdef __AVX512F__

PIO_INLINE Floats widened(const Int8Code*, __m128i codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}
// To float16 by shifts: it has the same mantissa, and exponents larger by 8.
PIO_INLINE Floats widened(const Fp8Code*, __m128i codes) {
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(-0x4080)));
}
template <class E>
  requires kIsCode<E>
PIO_INLINE Floats load(const E* from) {
  return widened(from, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
template <class E>
  requires kIsCode<E>
PIO_INLINE Floats load_part(const E* from, int count) {
  return widened(from, _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from));
}

#else

PIO_INLINE Floats load(const Int8Code* from) {
  return load_int8(reinterpret_cast<const std::byte*>(from));
}
PIO_INLINE Floats load(const Fp8Code* from) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7);
  return _mm256_cvtph_ps(_mm_and_si128(shifted, _mm_set1_epi16(-0x4080)));
}
template <class E>
  requires kIsCode<E>
PIO_INLINE Floats load_part(const E* from, int count) {
  E part[kLanes] = {};
  std::memcpy(part, from, static_cast<size_t>(count));
  return load(part);
}

#endif

}  // namespace simd

// The codes of `count` numbers; gives their scale. A NaN or an infinity makes it NaN.
template <class E>
float encode(const float* numbers, int64_t count, E* codes) {
  using simd::Floats, simd::kLanes;
  Floats highest = simd::zeros(), poison = simd::zeros();
  const auto take = [&](Floats x) {
    highest = simd::max(simd::max(x, simd::zeros() - x), highest);
    poison = simd::fma(x, simd::zeros(), poison);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) take(simd::load(numbers + i));
  if (i < count) take(simd::load_part(numbers + i, static_cast<int>(count - i)));

  constexpr float kSmallestMax = 1e-30f;  // below, the inverse of the scale is no float32
  const float max = std::max(simd::largest(highest), kSmallestMax) + simd::sum(poison);
  const float inverse = Codes<E>::kLargest / max;
  for (i = 0; i < count; ++i) codes[i] = Codes<E>::round(numbers[i] * inverse);
  return max / Codes<E>::kLargest;
}

}  // namespace pio
