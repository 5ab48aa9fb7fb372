// Tokens in canonical order (best first, equals by id), without sorting them all.
#pragma once

#include <cstdint>
#include <cstring>

#include "huge_buffer.h"

namespace pio {

// The tokens of one row that may come. Ids ascend.
struct Field {
  float* values;
  int32_t* ids;
  int64_t* weights;
  int64_t count;
  float best;    // no value is above it
  float lowest;  // or below that
};

// A place in the canonical order: the smaller, the better.
inline uint64_t order_key(float logit, int32_t id) {
  logit += 0.0f;  // zero has two signs, and one place in the order
  uint32_t bits;
  std::memcpy(&bits, &logit, sizeof bits);
  const uint32_t ascending = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return (uint64_t{~ascending} << 32) | static_cast<uint32_t>(id);
}
inline int32_t id_of(uint64_t key) { return static_cast<int32_t>(key & 0xffffffffu); }

// Where a running sum of weights in canonical order passes a mass.
struct Crossing {
  int32_t id;
  int64_t mass;  // the sum up to this token, and with it
};

// Finds places in a field's order. Many values are counted into bins of equal width, which are in
// order among themselves; only the bin that holds the place is looked into.
class FieldOrder {
 public:
  // One thread's memory, kept between rows.
  struct Candidate {
    uint64_t key;
    int64_t weight;
  };
  struct Scratch {
    KeptBuffer<int32_t> bins;
    KeptBuffer<Candidate> candidates;
  };

  FieldOrder(const Field& field, Scratch& scratch);

  // The first token whose running sum is above `mass`; the sum of all is.
  Crossing find(int64_t mass);

 private:
  static constexpr int kBins = 2048;

  Candidate candidate(int64_t i) const {
    return {order_key(field_.values[i], field_.ids[i]), field_.weights[i]};
  }
  int64_t gather(int32_t bin);
  static Crossing find_among(Candidate* candidates, int64_t count, int64_t before, int64_t mass);

  const Field& field_;
  int32_t* bins_ = nullptr;
  Candidate* candidates_;
  int64_t masses_[kBins];
};

}  // namespace pio
