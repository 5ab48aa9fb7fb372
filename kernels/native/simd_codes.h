// Small codes to vectors of float32, and float16 scales.
#pragma once

#include <cstddef>

#include "simd.h"

namespace pio::simd {

#ifdef __AVX512F__

// Lane after lane, `even` before `odd`; both are numbers that bf16 holds exactly.
PIO_INLINE void store_exact_pairs(bf16* to, Floats even, Floats odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_castps_si512(odd)));
}

// One code a byte, signed.
PIO_INLINE Floats load_int8(const std::byte* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
PIO_INLINE Floats load_half(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Eight codes of 4 bits in each lane.
using Words = __m512i;
PIO_INLINE Words load_words(const std::byte* from) { return _mm512_loadu_si512(from); }
PIO_INLINE Words without_lowest_code(Words words) { return _mm512_srli_epi32(words, 4); }

// Sixteen values; `at` gives each lane the one that the lane's lowest 4 bits number.
class Table {
 public:
  PIO_INLINE explicit Table(const float* values) : values_(load(values)) {}
  PIO_INLINE Floats at(Words words) const { return _mm512_permutexvar_ps(words, values_); }

 private:
  Floats values_;
};

// Every lane twice: to[0] and to[1] are lane 0.
PIO_INLINE void store_doubled(float* to, Floats x) {
  const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  store(to, _mm512_permutexvar_ps(low, x));
  store(to + kLanes, _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), x));
}

#else

PIO_INLINE Floats load_int8(const std::byte* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
PIO_INLINE Floats load_half(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Of 16 numbers, one vector behind the other.
struct FloatPair {
  Floats first, second;
};

// Sixteen values, looked up by codes of 4 bits, each in a byte of its own. A lookup gives one byte of
// each code's number; the bytes of a number are then put together.
class Table {
 public:
  PIO_INLINE explicit Table(const float* values) {
    const __m256i low = _mm256_castps_si256(load(values));
    const __m256i high = _mm256_castps_si256(load(values + 8));
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto byte = [&](__m256i bits) __attribute__((always_inline)) {
        return _mm256_and_si256(_mm256_srli_epi32(bits, 8 * i), _mm256_set1_epi32(0xff));
      };
      const __m256i words = _mm256_packus_epi32(byte(low), byte(high));
      bytes_[i] = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), in_order);
    }
  }

  // Of 8 bytes in each half of `codes`, the first or the last: what the first 4 of each number, then
  // the others.
  PIO_INLINE FloatPair at(__m256i codes, bool is_last) const {
    const auto pairs = [&](int byte) __attribute__((always_inline)) {
      const __m256i even = _mm256_shuffle_epi8(bytes_[byte], codes);
      const __m256i odd = _mm256_shuffle_epi8(bytes_[byte + 1], codes);
      return is_last ? _mm256_unpackhi_epi8(even, odd) : _mm256_unpacklo_epi8(even, odd);
    };
    const __m256i low = pairs(0), high = pairs(2);
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high))};
  }

 private:
  __m256i bytes_[4];
};

// The lower or the upper 4 bits of 32 bytes.
PIO_INLINE __m256i load_nibbles(const std::byte* from, bool is_upper) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_and_si256(is_upper ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}

// The lower or the upper 16 bits of 8 words; the rest is not zero.
PIO_INLINE __m256i load_half_words(const std::byte* from, bool is_upper) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return is_upper ? _mm256_srli_epi32(words, 16) : words;
}
// Code `field` of 4 bits in each word, times 16 ** field.
PIO_INLINE Floats scaled_code(__m256i words, int64_t field) {
  const __m256i mask = _mm256_set1_epi32(15 << (4 * static_cast<int>(field)));
  return _mm256_cvtepi32_ps(_mm256_and_si256(words, mask));
}

#endif

}  // namespace pio::simd
