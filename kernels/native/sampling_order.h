// Candidates in canonical order (best first, equals by id), without sorting them all.
#pragma once

#include <cstdint>

namespace pio {

// The key is smaller the better the token.
struct Candidate {
  uint64_t key;
  int64_t weight;
};

uint64_t candidate_key(float logit, int32_t id);
inline int32_t id_of(uint64_t key) { return static_cast<int32_t>(key & 0xffffffffu); }

// Where a running sum of weights in canonical order passes a mass.
struct Crossing {
  int32_t id;
  int64_t mass;  // the sum up to this token, and with it
};

// The first token whose running sum is above `mass`; the whole sum is. `spare` has room for as many
// candidates. Few candidates change places.
Crossing find_crossing(Candidate* candidates, int64_t count, int64_t mass, Candidate* spare);

}  // namespace pio
