// Probabilities as whole numbers, in vectors: kernels/sampling/weights.py bit for bit.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd.h"

namespace pio {

constexpr int kUnitBits = 44;
constexpr double kVanishing = -64.0;
// A token with a lower exponent has no weight.
constexpr double kWeightless = -46.0;

namespace weights {

// Added, it rounds a number to a whole one, which stands in its low bits with kUnitBits on top.
constexpr double kToWhole = 0x1.8p52 + kUnitBits;
constexpr double kPower[] = {1.0,
                             0.6931471807045332,
                             0.24022651066562742,
                             0.05550410365988618,
                             0.009618038131863205,
                             0.0013333935057464252,
                             0.00015466756371314627,
                             1.5196156172870026e-05};
constexpr int kDegree = 7;

#ifdef __AVX512F__

constexpr int kLanes = 8;
using Doubles = __m512d;
using Longs = __m512i;

PIO_INLINE Doubles filled(double x) { return _mm512_set1_pd(x); }
PIO_INLINE Doubles widened(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
PIO_INLINE Doubles max(Doubles a, Doubles b) { return _mm512_max_pd(a, b); }
PIO_INLINE Longs add(Longs a, Longs b) { return _mm512_add_epi64(a, b); }
PIO_INLINE Longs none() { return _mm512_setzero_si512(); }
PIO_INLINE int64_t sum(Longs x) { return _mm512_reduce_add_epi64(x); }
PIO_INLINE void store(int64_t* to, Longs x) { _mm512_storeu_si512(to, x); }
// x * 2 ** n for the whole number n in the low bits of `shifted`.
PIO_INLINE Doubles scaled(Doubles x, Doubles shifted) {
  const Longs exponent = _mm512_slli_epi64(_mm512_castpd_si512(shifted), 52);
  return _mm512_castsi512_pd(add(_mm512_castpd_si512(x), exponent));
}
// To nearest, ties to even; x lies in [0, 2 ** 51).
PIO_INLINE Longs rounded(Doubles x) { return _mm512_cvtpd_epi64(x); }

#else

constexpr int kLanes = 4;
using Doubles = __m256d;
using Longs = __m256i;

PIO_INLINE Doubles filled(double x) { return _mm256_set1_pd(x); }
PIO_INLINE Doubles widened(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
PIO_INLINE Doubles max(Doubles a, Doubles b) { return _mm256_max_pd(a, b); }
PIO_INLINE Longs add(Longs a, Longs b) { return _mm256_add_epi64(a, b); }
PIO_INLINE Longs none() { return _mm256_setzero_si256(); }
PIO_INLINE void store(int64_t* to, Longs x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
}
PIO_INLINE int64_t sum(Longs x) {
  int64_t lanes[kLanes];
  store(lanes, x);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}
// x * 2 ** n for the whole number n in the low bits of `shifted`.
PIO_INLINE Doubles scaled(Doubles x, Doubles shifted) {
  const Longs exponent = _mm256_slli_epi64(_mm256_castpd_si256(shifted), 52);
  return _mm256_castsi256_pd(add(_mm256_castpd_si256(x), exponent));
}
// To nearest, ties to even; x lies in [0, 2 ** 51).
PIO_INLINE Longs rounded(Doubles x) {
  const Doubles shift = filled(0x1p52);
  return _mm256_xor_si256(_mm256_castpd_si256(x + shift), _mm256_castpd_si256(shift));
}

#endif

}  // namespace weights

// The exponent of a logit: 0 for the row's best, negative below it.
PIO_INLINE double exponent_of(float logit, float best, double scale) {
  return (static_cast<double>(logit) - static_cast<double>(best)) * scale;
}

// The weights of logits that are not above `best`. Nothing here may be contracted or reordered.
class Weigher {
 public:
  Weigher(float best, double scale)
      : best_(weights::filled(best)), scale_(weights::filled(scale)) {}

  // Of `weights::kLanes` logits.
  PIO_INLINE weights::Longs operator()(const float* logits) const {
    using namespace weights;
    const Doubles y = max((widened(logits) - best_) * scale_, filled(kVanishing));
    const Doubles shifted = y + filled(kToWhole);
    const Doubles rest = y - (shifted - filled(kToWhole));
    Doubles power = filled(kPower[kDegree]) * rest;
#pragma GCC unroll 8
    for (int i = kDegree - 1; i > 0; --i) power = (power + filled(kPower[i])) * rest;
    return rounded(scaled(power + filled(kPower[0]), shifted));
  }

 private:
  weights::Doubles best_, scale_;
};

}  // namespace pio
