// The softmax of one row over one part of its keys, and how parts are joined.
#pragma once

#include <algorithm>

#include "simd.h"

namespace pio {

// What joins the weighted sums of values: weights are exp(score - max), `sum` is theirs.
struct SoftmaxState {
  float max;
  float sum;
};

// Weights of the first `visible` keys (at least one), zeros behind them up to `width`, a multiple
// of 16. `scores` behind the visible ones may hold anything. `scales` are the part's own: the state
// knows none of those that the weights get.
template <class Scales, class Weight>
inline SoftmaxState softmax(const float* scores, const Scales& scales, int visible, int width,
                            Weight* weights) {
  using simd::Floats, simd::kLanes;
  const int whole = visible / kLanes * kLanes, rest = visible - whole;
  const auto score = [&](int i) { return scales.of_score(i, simd::load(scores + i)); };
  const Floats last = rest == 0 ? simd::filled(-simd::kInfinity)
                                : simd::first_lanes(score(whole), rest, -simd::kInfinity);
  Floats highest = last;
  for (int i = 0; i < whole; i += kLanes) highest = simd::max(score(i), highest);
  const float max = simd::largest(highest);

  const Floats shift = simd::filled(max);
  Floats sum = simd::zeros();
  int i = 0;
  for (; i < whole; i += kLanes) {
    const Floats weight = simd::exp(score(i) - shift);
    sum = sum + weight;
    simd::store(weights + i, scales.of_weight(i, weight));
  }
  if (rest != 0) {
    const Floats weight = simd::exp(last - shift);
    sum = sum + weight;
    simd::store(weights + i, scales.of_weight(i, weight));
    i += kLanes;
  }
  for (; i < width; i += kLanes) simd::store(weights + i, simd::zeros());
  return {max, simd::sum(sum)};
}

inline float exp_of(float x) {
  return _mm_cvtss_f32(simd::four_lanes(simd::exp(simd::filled(x)), 0));
}

// Takes a further part's weighted values into those of the parts before it.
inline void join(SoftmaxState& state, float* values, const SoftmaxState& part,
                 const float* part_values, int head_dim) {
  const float max = std::max(state.max, part.max);
  const float keep = exp_of(state.max - max), add = exp_of(part.max - max);
  state = {max, state.sum * keep + part.sum * add};
  using simd::kLanes;
  for (int i = 0; i < head_dim; i += kLanes) {  // rows are padded to whole vectors
    const simd::Floats kept = simd::load(values + i) * simd::filled(keep);
    simd::store(values + i, simd::fma(simd::load(part_values + i), simd::filled(add), kept));
  }
}

// out = values / sum, rounded to T.
template <class T>
inline void finish(const SoftmaxState& state, const float* values, int head_dim, T* out) {
  using simd::kLanes;
  const simd::Floats sum = simd::filled(state.sum);
  for (int i = 0; i < head_dim; i += kLanes) {
    const simd::Floats row = simd::load(values + i) / sum;
    if (i + kLanes <= head_dim) {
      simd::store(out + i, row);
    } else {
      simd::store_part(out + i, row, head_dim - i);
    }
  }
}

}  // namespace pio
