// What the codes of one part of a head's keys and values are multiplied with.
//
// Key scales go into scores and value scales into the softmax's weights, so that engines compute
// with codes as they are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_plan.h"
#include "kv_codes.h"
#include "simd.h"

namespace pio {

// Of numbers that are no codes: nothing.
template <class E>
class PartScales {
 public:
  void prefetch(KVLayer<const E>, const E*, int64_t, int) {}
  PIO_INLINE simd::Floats of_score(int, simd::Floats score) const { return score; }
  PIO_INLINE simd::Floats of_weight(int, simd::Floats weight) const { return weight; }
};

template <class E>
  requires kIsCode<E>
class PartScales<E> {
 public:
  // Those of the head whose keys lie at `keys` will be taken from row `first` on.
  void prefetch(KVLayer<const E> cache, const E* keys, int64_t value_offset, int first) {
    simd::fetch(cache.scales(keys) + first);
    simd::fetch(cache.scales(keys + value_offset) + first);
  }
  // Scales of the part's keys from `key` on: `count` rows from `first` on of the head whose keys lie
  // at `keys`, and whose values `value_offset` behind.
  void take(int key, KVLayer<const E> cache, const E* keys, int64_t value_offset, int first,
            int count) {
    const float* of_keys = cache.scales(keys) + first;
    const float* of_values = cache.scales(keys + value_offset) + first;
    for (int i = 0; i < count; ++i) {
      keys_[key + i] = of_keys[i] * Codes<E>::kUnit;
      values_[key + i] = of_values[i] * Codes<E>::kUnit;
    }
  }
  // The part has `count` keys.
  void end(int count) {
    std::fill_n(keys_ + count, simd::kLanes, 0.0f);
    std::fill_n(values_ + count, simd::kLanes, 0.0f);
  }
  // Of the keys from `key` on.
  PIO_INLINE simd::Floats of_score(int key, simd::Floats score) const {
    return score * simd::load(keys_ + key);
  }
  PIO_INLINE simd::Floats of_weight(int key, simd::Floats weight) const {
    return weight * simd::load(values_ + key);
  }

 private:
  alignas(64) float keys_[kPartKeys + simd::kLanes];
  alignas(64) float values_[kPartKeys + simd::kLanes];
};

}  // namespace pio
