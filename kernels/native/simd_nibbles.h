// Sums of products of unsigned codes of 4 bits with int8 codes, four neighbours along k in each
// lane, over the 32 k of a group; exact in int32.
#pragma once

#include "simd_int8.h"

namespace pio::simd {

#ifdef __AVX512F__

PIO_INLINE Ints low_halves(Ints bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
PIO_INLINE Ints high_halves(Ints bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }

#else

PIO_INLINE Ints low_halves(Ints bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
PIO_INLINE Ints high_halves(Ints bytes) { return low_halves(_mm256_srli_epi16(bytes, 4)); }

#endif

#ifndef __AVX512VNNI__
// The compiler would add up pairs of products first, and has no registers for them.
PIO_INLINE Ints in_this_order(Ints products) {
  asm("" : "+v"(products));
  return products;
}
#endif

// `add_codes` adds a step's products to a group's; `whole_sum` adds what it has to `begin`. Without
// VNNI each lane has two sums of int16: eight steps of at most 2 * 15 * 127 do not reach 2 ** 15.
#if defined(__AVX512VNNI__)

PIO_INLINE Ints add_codes(Ints products, Ints codes, Ints activations) {
  return _mm512_dpbusd_epi32(products, codes, activations);
}
PIO_INLINE Ints whole_sum(Ints products, Ints begin) { return _mm512_add_epi32(products, begin); }

#elif defined(__AVX512F__)

PIO_INLINE Ints add_codes(Ints products, Ints codes, Ints activations) {
  return in_this_order(_mm512_add_epi16(products, _mm512_maddubs_epi16(codes, activations)));
}
PIO_INLINE Ints whole_sum(Ints products, Ints begin) {
  return _mm512_add_epi32(_mm512_madd_epi16(products, _mm512_set1_epi16(1)), begin);
}

#else

PIO_INLINE Ints add_codes(Ints products, Ints codes, Ints activations) {
  return in_this_order(_mm256_add_epi16(products, _mm256_maddubs_epi16(codes, activations)));
}
PIO_INLINE Ints whole_sum(Ints products, Ints begin) {
  return _mm256_add_epi32(_mm256_madd_epi16(products, _mm256_set1_epi16(1)), begin);
}

#endif

}  // namespace pio::simd
