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

PIO_INLINE void store_exact_pairs(bf16* to, Floats even, Floats odd) {
  const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(even), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_or_si256(low, _mm256_castps_si256(odd)));
}

PIO_INLINE Floats load_int8(const std::byte* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
PIO_INLINE Floats load_half(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

using Words = __m256i;
PIO_INLINE Words load_words(const std::byte* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
PIO_INLINE Words without_lowest_code(Words words) { return _mm256_srli_epi32(words, 4); }

class Table {
 public:
  PIO_INLINE explicit Table(const float* values) : low_(load(values)), high_(load(values + 8)) {}
  PIO_INLINE Floats at(Words words) const {
    // The lookups see three bits; the fourth, brought to the sign, chooses between them.
    const Floats high = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_, words),
                            _mm256_permutevar8x32_ps(high_, words), high);
  }

 private:
  Floats low_, high_;
};

PIO_INLINE void store_doubled(float* to, Floats x) {
  const Floats low = _mm256_unpacklo_ps(x, x), high = _mm256_unpackhi_ps(x, x);
  store(to, _mm256_permute2f128_ps(low, high, 0x20));
  store(to + kLanes, _mm256_permute2f128_ps(low, high, 0x31));
}

#endif

}  // namespace pio::simd
