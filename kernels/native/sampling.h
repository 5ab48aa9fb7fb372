// From logits to tokens: edits, faults, filters and the draw; kernels/sampling/api.py says what each
// means. A row's result depends on nothing but the row.
//
// Many rows are shared out whole. With fewer rows than workers, all of them scan and weigh a part of
// each row, and one finishes it: maxima and sums of whole numbers do not depend on the parts.
#pragma once

#include <cstdint>

#include "sampling_row.h"
#include "team.h"
#include "types.h"

namespace pio {

// Why a row gives no token: `Fault` in api.py.
constexpr int64_t kFaultNaN = -1, kFaultInfinity = -2, kFaultNoToken = -3;

// See `Draw` in api.py; the order is that of its fields.
struct Draw {
  double scale;
  double top_k;
  double top_p;
  double floor;
  double uniform;

  bool greedy() const { return scale == 0.0; }
  bool unfiltered() const;
};

enum class EditKind : int64_t { penalise = 0, add = 1, keep = 2, ban = 3 };

// See `Edit` in api.py. The ids are known to be in the row.
struct Edit {
  EditKind kind;
  const int64_t* starts;
  const int64_t* ids;
  const float* values;
};

// What a row needs while it is worked on.
struct RowState {
  float best;
  double scale;   // 0: no masses are needed
  int64_t fault;  // 0: none
};

// Memory for the rows in work: a slot for each worker.
struct RowSlots {
  float* maxima;    // [slots, num_blocks]
  int64_t* masses;  // [slots, num_blocks]
  RowState* states;
};

struct Logits {
  View<float> rows;
  int64_t num_tokens;

  int64_t num_blocks() const { return (num_tokens + kSampleBlock - 1) / kSampleBlock; }
};

// `tokens[r]` is the token of row r, or its fault.
void sample(Worker& worker, const Logits& logits, const RowSlots& slots, const Draw* draws,
            const Edit* edits, int64_t num_edits, int64_t* tokens);

// The best logit of each row, not finite where it is at fault, and the sum of its weights.
void log_sums(Worker& worker, const Logits& logits, const RowSlots& slots, double scale,
              float* best, int64_t* totals);

// The `count` best tokens of each row, [rows, count].
void top_tokens(Worker& worker, const Logits& logits, const RowSlots& slots, int64_t count,
                float* values, int64_t* ids);

}  // namespace pio
