#include "sampling_draw.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "huge_buffer.h"
#include "sampling_order.h"
#include "sampling_weights.h"

namespace pio {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// In exponents: more than the polynomial of the weights is off.
constexpr double kSlack = 1e-6;

// One thread's memory, kept between steps.
struct Scratch {
  KeptBuffer<float> values, copy;
  KeptBuffer<int32_t> ids;
  KeptBuffer<int64_t> weights;
  KeptBuffer<uint64_t> keys;
  FieldOrder::Scratch order;
};

Scratch& scratch() {
  thread_local Scratch kept;
  return kept;
}

// The tokens at `lowest` or above, without weights yet.
Field collect_field(const LogitRow& row, float best, float lowest) {
  const auto room = static_cast<size_t>(row.num_tokens + kCollectSlack);
  Field field{scratch().values.get(room), scratch().ids.get(room), nullptr, 0, best, lowest};
  field.count = collect(row, lowest, field.values, field.ids);
  return field;
}

// The k-th largest of `count` values, k in [1, count].
float kth_largest(const float* values, int64_t count, int64_t k) {
  float* copy = scratch().copy.get(static_cast<size_t>(count));
  std::copy(values, values + count, copy);
  std::nth_element(copy, copy + k - 1, copy + count, std::greater<>());
  return copy[k - 1];
}

// No token below it is among the `count` best.
float below_the_best(const LogitRow& row, int64_t count) {
  if (count > row.num_blocks()) return -kInfinity;
  return kth_largest(row.maxima, row.num_blocks(), count);
}

// A logit that is not above any whose exponent is `exponent` or more.
float logit_at(double exponent, float best, double scale) {
  const double distance = exponent / scale;
  const double rounding = 1e-9 * (std::abs(static_cast<double>(best)) + std::abs(distance));
  return std::nextafter(static_cast<float>(best + distance - rounding), -kInfinity);
}

// The mass from which on top-p drops tokens.
int64_t top_p_limit(int64_t total, double top_p) {
  const double limit = std::ceil(static_cast<double>(total) * top_p);
  return std::clamp<int64_t>(static_cast<int64_t>(limit), 1, total);
}

// The mass that lies before the drawn token's last unit.
int64_t drawn_mass(int64_t kept, double uniform) {
  return std::min(static_cast<int64_t>(static_cast<double>(kept) * uniform), kept - 1);
}

// The `top_k` best tokens and all equals of the last; tokens without weight may be missing.
Field top_k_field(const LogitRow& row, float best, double scale, int64_t top_k) {
  const float with_weight = logit_at(kWeightless, best, scale);
  Field field = collect_field(row, best, std::max(below_the_best(row, top_k), with_weight));
  if (field.count <= top_k) return field;
  const float kth = kth_largest(field.values, field.count, top_k);
  int64_t kept = 0;
  for (int64_t i = 0; i < field.count; ++i) {
    field.values[kept] = field.values[i];
    field.ids[kept] = field.ids[i];
    kept += field.values[i] >= kth ? 1 : 0;
  }
  field.count = kept;
  field.lowest = kth;
  return field;
}

// All tokens of a row that top-p and min-p may leave.
Field nucleus_field(const LogitRow& row, float best, const Draw& draw, int64_t total) {
  double reach = kWeightless;
  if (draw.top_p < 1.0) {
    // Tokens of this weight or less have less than what top-p drops together.
    const int64_t lightest = (total - top_p_limit(total, draw.top_p)) / row.num_tokens - 1;
    if (lightest > 0) reach = std::log2(static_cast<double>(lightest)) - kUnitBits - kSlack;
  }
  return collect_field(row, best, logit_at(std::max(reach, draw.floor), best, draw.scale));
}

// The mass of a field's tokens that min-p leaves, of `mass` in all.
int64_t min_p_mass(const Field& field, const Draw& draw, int64_t mass) {
  if (draw.floor == -std::numeric_limits<double>::infinity()) return mass;
  int64_t left = 0;
  for (int64_t i = 0; i < field.count; ++i) {
    const bool stays = exponent_of(field.values[i], field.best, draw.scale) >= draw.floor;
    left += stays ? field.weights[i] : 0;
  }
  return left;
}

int64_t draw_unfiltered(const LogitRow& row, float best, const Draw& draw, int64_t total) {
  int64_t mass = drawn_mass(total, draw.uniform), block = 0;
  while (row.masses[block] <= mass) mass -= row.masses[block++];
  int64_t weights[kSampleBlock];
  weigh(row.block(block), row.block_size(block), best, draw.scale, weights);
  int64_t place = 0;
  while (weights[place] <= mass) mass -= weights[place++];
  return block * kSampleBlock + place;
}

}  // namespace

int64_t best_token(const LogitRow& row, float best) {
  const int64_t block = std::find(row.maxima, row.maxima + row.num_blocks(), best) - row.maxima;
  const float* logits = row.block(block);
  return block * kSampleBlock + (std::find(logits, logits + row.block_size(block), best) - logits);
}

int64_t draw_token(const LogitRow& row, float best, const Draw& draw) {
  int64_t total = 0;
  if (draw.top_k == 0) total = std::accumulate(row.masses, row.masses + row.num_blocks(), total);
  if (draw.unfiltered()) return draw_unfiltered(row, best, draw, total);
  const auto top_k = static_cast<int64_t>(draw.top_k);
  Field field = top_k == 0 ? nucleus_field(row, best, draw, total)
                           : top_k_field(row, best, draw.scale, top_k);
  field.weights = scratch().weights.get(static_cast<size_t>(field.count));
  weigh(field.values, field.count, best, draw.scale, field.weights);
  FieldOrder order(field, scratch().order);
  // Each filter leaves the beginning of the canonical order, so its mass tells all about it.
  const int64_t mass = std::accumulate(field.weights, field.weights + field.count, int64_t{0});
  int64_t kept = min_p_mass(field, draw, mass);
  if (draw.top_p < 1.0) {
    const int64_t limit = top_p_limit(top_k == 0 ? total : mass, draw.top_p);
    // Where min-p leaves less, it decides.
    if (limit <= kept) kept = std::min(kept, order.find(limit - 1).mass);
  }
  return order.find(drawn_mass(kept, draw.uniform)).id;
}

void best_tokens(const LogitRow& row, float best, int64_t count, float* values, int64_t* ids) {
  const Field field = collect_field(row, best, below_the_best(row, count));
  uint64_t* keys = scratch().keys.get(static_cast<size_t>(field.count));
  for (int64_t i = 0; i < field.count; ++i) keys[i] = order_key(field.values[i], field.ids[i]);
  std::nth_element(keys, keys + count - 1, keys + field.count);
  std::sort(keys, keys + count);
  for (int64_t i = 0; i < count; ++i) {
    ids[i] = id_of(keys[i]);
    values[i] = row.logits[ids[i]];
  }
}

}  // namespace pio
