#include "sampling_order.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace pio {
namespace {

constexpr int64_t kFew = 64;  // so many are sorted

}  // namespace

FieldOrder::FieldOrder(const Field& field, Scratch& scratch) : field_(field) {
  const auto room = static_cast<size_t>(field.count);
  candidates_ = scratch.candidates.get(room);
  if (field.count <= kFew) return;
  bins_ = scratch.bins.get(room);
  // Where values are equal, or farther apart than a float tells, one bin holds them all.
  float bins_per_unit = (kBins - 1) / (field.best - field.lowest);
  if (!std::isfinite(bins_per_unit)) bins_per_unit = 0.0f;
  const float* values = field.values;
  for (int64_t i = 0; i < field.count; ++i) {
    // Rounding may lift the last a little; it never turns an order round.
    const float place = std::min((field.best - values[i]) * bins_per_unit, float{kBins - 1});
    bins_[i] = static_cast<int32_t>(place);
  }
  std::fill(masses_, masses_ + kBins, int64_t{0});
  for (int64_t i = 0; i < field.count; ++i) masses_[bins_[i]] += field.weights[i];
}

Crossing FieldOrder::find(int64_t mass) {
  if (field_.count <= kFew) {
    for (int64_t i = 0; i < field_.count; ++i) candidates_[i] = candidate(i);
    return find_among(candidates_, field_.count, 0, mass);
  }
  int64_t before = 0;
  int32_t bin = 0;
  while (before + masses_[bin] <= mass) before += masses_[bin++];
  return find_among(candidates_, gather(bin), before, mass);
}

// The tokens of one bin, into `candidates_`; how many there are.
int64_t FieldOrder::gather(int32_t bin) {
  constexpr int64_t kRun = 32;
  int64_t count = 0;
  for (int64_t begin = 0; begin < field_.count; begin += kRun) {
    const int64_t end = std::min(begin + kRun, field_.count);
    bool any = false;
    for (int64_t i = begin; i < end; ++i) any |= bins_[i] == bin;
    if (!any) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (bins_[i] == bin) candidates_[count++] = candidate(i);
    }
  }
  return count;
}

// Each round sums up the candidates by the leading digit of their distance to the best and keeps
// those of the digit in which the sum passes the mass.
Crossing FieldOrder::find_among(Candidate* candidates, int64_t count, int64_t before,
                                int64_t mass) {
  while (count > kFew) {
    uint64_t least = candidates[0].key, most = candidates[0].key;
    for (int64_t i = 1; i < count; ++i) {
      least = std::min(least, candidates[i].key);
      most = std::max(most, candidates[i].key);
    }
    // Keys differ, so the first and the last are of different digits and each round keeps fewer.
    const int shift = static_cast<int>(std::bit_width((most - least) / kBins));
    int64_t masses[kBins] = {};
    for (int64_t i = 0; i < count; ++i) {
      masses[(candidates[i].key - least) >> shift] += candidates[i].weight;
    }
    uint64_t digit = 0;
    while (before + masses[digit] <= mass) before += masses[digit++];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool same = (candidates[i].key - least) >> shift == digit;
      candidates[kept] = candidates[i];
      kept += same ? 1 : 0;
    }
    count = kept;
  }
  std::sort(candidates, candidates + count,
            [](const Candidate& a, const Candidate& b) { return a.key < b.key; });
  const Candidate* found = candidates;
  while (before + found->weight <= mass) before += (found++)->weight;
  return {id_of(found->key), before + found->weight};
}

}  // namespace pio
