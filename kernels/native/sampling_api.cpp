// The C interface of sampling.
#include <cstdint>

#include "api.h"
#include "huge_buffer.h"
#include "indices.h"
#include "sampling.h"
#include "team.h"

namespace {

using namespace pio;

// In the order of the arguments.
struct Matrix {
  float* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;
  int64_t num_tokens;

  Logits logits() const { return {{data, rows, cols, stride}, num_tokens}; }
};

// The calling thread's memory for the rows in work.
RowSlots slots_for(const Team& team, const Logits& logits) {
  thread_local KeptBuffer<float> maxima;
  thread_local KeptBuffer<int64_t> masses;
  thread_local KeptBuffer<RowState> states;
  const auto count = static_cast<size_t>(team.size());
  const size_t blocks = count * static_cast<size_t>(logits.num_blocks());
  return {maxima.get(blocks), masses.get(blocks), states.get(count)};
}

template <class Kernel>
const char* run(void* team_address, const Matrix& matrix, Kernel kernel) {
  return guarded([&] {
    auto& team = *static_cast<Team*>(team_address);
    const Logits logits = matrix.logits();
    const RowSlots slots = slots_for(team, logits);
    team.run([&](Worker& worker) { kernel(worker, logits, slots); });
  });
}

}  // namespace

// `logits` float32 [rows, cols]; `draws` float64 [rows, 5]; `tokens` [rows].
PIO_API const char* pio_sample(void* team, float* logits, int64_t rows, int64_t cols,
                               int64_t stride, int64_t num_tokens, const Draw* draws,
                               const Edit* edits, int64_t num_edits, int64_t* tokens) {
  const char* refusal = guarded([&] {
    for (int64_t i = 0; i < num_edits; ++i) {
      check_indices("edited token", edits[i].ids, edits[i].starts[rows], cols);
    }
  });
  if (refusal != nullptr) return refusal;
  return run(team, {logits, rows, cols, stride, num_tokens},
             [&](Worker& worker, const Logits& all, const RowSlots& slots) {
               sample(worker, all, slots, draws, edits, num_edits, tokens);
             });
}

// `best` and `totals` [rows].
PIO_API const char* pio_log_sums(void* team, float* logits, int64_t rows, int64_t cols,
                                 int64_t stride, int64_t num_tokens, double scale, float* best,
                                 int64_t* totals) {
  return run(team, {logits, rows, cols, stride, num_tokens},
             [&](Worker& worker, const Logits& all, const RowSlots& slots) {
               log_sums(worker, all, slots, scale, best, totals);
             });
}

// `values` and `ids` [rows, count], count in [1, num_tokens].
PIO_API const char* pio_top_tokens(void* team, float* logits, int64_t rows, int64_t cols,
                                   int64_t stride, int64_t num_tokens, int64_t count,
                                   float* values, int64_t* ids) {
  return run(team, {logits, rows, cols, stride, num_tokens},
             [&](Worker& worker, const Logits& all, const RowSlots& slots) {
               top_tokens(worker, all, slots, count, values, ids);
             });
}
