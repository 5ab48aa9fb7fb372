#include "sampling_order.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace pio {
namespace {

constexpr int64_t kFew = 64;  // so many are sorted
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

bool is_better(const Candidate& a, const Candidate& b) { return a.key < b.key; }

}  // namespace

uint64_t candidate_key(float logit, int32_t id) {
  logit += 0.0f;  // zero has two signs, and one place in the order
  uint32_t bits;
  std::memcpy(&bits, &logit, sizeof bits);
  const uint32_t ascending = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return (uint64_t{~ascending} << 32) | static_cast<uint32_t>(id);
}

// Each round sums up the candidates by the leading digit of their distance to the best and keeps
// those of the digit in which the sum passes the mass.
Crossing find_crossing(Candidate* candidates, int64_t count, int64_t mass, Candidate* spare) {
  Candidate* from = candidates;
  int64_t before = 0;
  while (count > kFew) {
    uint64_t least = from[0].key, most = from[0].key;
    for (int64_t i = 1; i < count; ++i) {
      least = std::min(least, from[i].key);
      most = std::max(most, from[i].key);
    }
    // Keys differ, so the first and the last are of different digits and each round keeps fewer.
    const int width = static_cast<int>(std::bit_width(most - least));
    const int shift = std::max(width - kDigitBits, 0);
    int64_t masses[kDigits] = {};
    for (int64_t i = 0; i < count; ++i) masses[(from[i].key - least) >> shift] += from[i].weight;
    uint64_t digit = 0;
    while (before + masses[digit] <= mass) before += masses[digit++];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      spare[kept] = from[i];
      kept += (from[i].key - least) >> shift == digit ? 1 : 0;
    }
    from = spare;
    count = kept;
  }
  std::sort(from, from + count, is_better);
  const Candidate* found = from;
  while (before + found->weight <= mass) before += (found++)->weight;
  return {id_of(found->key), before + found->weight};
}

}  // namespace pio
