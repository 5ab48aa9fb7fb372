#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "huge_buffer.h"
#include "sampling_draw.h"

namespace pio {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t fault_of(float best) {
  if (std::isnan(best)) return kFaultNaN;
  if (best == kInfinity) return kFaultInfinity;
  return best == -kInfinity ? kFaultNoToken : 0;
}

// Takes every row through four steps: its blocks are scanned, `settle(number, row, state)` says what
// it needs, its blocks are weighed where the state has a scale, and `finish(number, row, state)`
// ends it.
template <class Settle, class Finish>
void each_row(Worker& worker, const Logits& logits, const RowSlots& slots, Settle settle,
              Finish finish) {
  const int64_t num_rows = logits.rows.rows, num_blocks = logits.num_blocks();
  const auto row_in = [&](int64_t number, int64_t slot) {
    return LogitRow{logits.rows.row(number), logits.num_tokens, slots.maxima + slot * num_blocks,
                    slots.masses + slot * num_blocks};
  };
  const auto weigh_part = [&](const LogitRow& row, BlockRange part, const RowState& state) {
    if (state.fault == 0 && state.scale != 0.0) weigh(row, part, state.best, state.scale);
  };
  if (num_rows >= worker.count) {
    RowState& state = slots.states[worker.index];
    for (int64_t number = worker.take(); number < num_rows; number = worker.take()) {
      const LogitRow row = row_in(number, worker.index);
      scan(row, row.all());
      settle(number, row, state);
      weigh_part(row, row.all(), state);
      finish(number, row, state);
    }
    return;
  }
  const BlockRange part{num_blocks * worker.index / worker.count,
                        num_blocks * (worker.index + 1) / worker.count};
  for (int64_t number = 0; number < num_rows; ++number) scan(row_in(number, number), part);
  worker.barrier();
  if (worker.index < num_rows) {
    settle(worker.index, row_in(worker.index, worker.index), slots.states[worker.index]);
  }
  worker.barrier();
  for (int64_t number = 0; number < num_rows; ++number) {
    weigh_part(row_in(number, number), part, slots.states[number]);
  }
  worker.barrier();
  if (worker.index < num_rows) {
    finish(worker.index, row_in(worker.index, worker.index), slots.states[worker.index]);
  }
}

// Makes one edit of a row and marks the blocks that it touches.
void apply(const LogitRow& row, int64_t row_size, const Edit& edit, int64_t number,
           uint8_t* touched) {
  const int64_t begin = edit.starts[number], end = edit.starts[number + 1];
  if (begin == end) return;
  const int64_t* ids = edit.ids;
  float* logits = row.logits;
  if (edit.kind == EditKind::keep) {
    thread_local KeptBuffer<float> kept_values;
    float* kept = kept_values.get(static_cast<size_t>(end - begin));
    for (int64_t i = begin; i < end; ++i) kept[i - begin] = logits[ids[i]];
    std::fill(logits, logits + row_size, -kInfinity);
    std::fill(touched, touched + row.num_blocks(), uint8_t{1});
    for (int64_t i = begin; i < end; ++i) logits[ids[i]] = kept[i - begin];
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    float& logit = logits[ids[i]];
    if (edit.kind == EditKind::ban) {
      logit = -kInfinity;
    } else if (edit.kind == EditKind::add) {
      logit += edit.values[i];
    } else {
      logit = logit > 0 ? logit / edit.values[i] : logit * edit.values[i];
    }
    if (ids[i] < row.num_tokens) touched[ids[i] / kSampleBlock] = 1;
  }
}

// Makes the edits of a row; its maxima are right before and after.
void edit_row(const LogitRow& row, int64_t row_size, const Edit* edits, int64_t num_edits,
              int64_t number) {
  thread_local KeptBuffer<uint8_t> marks;
  uint8_t* touched = marks.get(static_cast<size_t>(row.num_blocks()));
  std::fill(touched, touched + row.num_blocks(), uint8_t{0});
  for (int64_t i = 0; i < num_edits; ++i) apply(row, row_size, edits[i], number, touched);
  for (int64_t block = 0; block < row.num_blocks(); ++block) {
    if (touched[block] != 0) scan(row, {block, block + 1});
  }
}

}  // namespace

bool Draw::unfiltered() const {
  return top_k == 0 && top_p >= 1.0 && floor == -std::numeric_limits<double>::infinity();
}

void sample(Worker& worker, const Logits& logits, const RowSlots& slots, const Draw* draws,
            const Edit* edits, int64_t num_edits, int64_t* tokens) {
  each_row(
      worker, logits, slots,
      [&](int64_t number, const LogitRow& row, RowState& state) {
        state.best = best_of(row);
        state.fault = fault_of(state.best);
        state.scale = draws[number].top_k == 0 ? draws[number].scale : 0.0;
        if (state.fault != 0 || num_edits == 0) return;
        edit_row(row, logits.rows.cols, edits, num_edits, number);
        state.best = best_of(row);
        state.fault = fault_of(state.best);
      },
      [&](int64_t number, const LogitRow& row, const RowState& state) {
        tokens[number] = state.fault != 0       ? state.fault
                         : draws[number].greedy() ? best_token(row, state.best)
                                                : draw_token(row, state.best, draws[number]);
      });
}

void log_sums(Worker& worker, const Logits& logits, const RowSlots& slots, double scale,
              float* best, int64_t* totals) {
  each_row(
      worker, logits, slots,
      [&](int64_t, const LogitRow& row, RowState& state) {
        state.best = best_of(row);
        state.fault = fault_of(state.best);
        state.scale = scale;
      },
      [&](int64_t number, const LogitRow& row, const RowState& state) {
        best[number] = state.best;
        totals[number] = state.fault != 0 ? 0
                                          : std::accumulate(row.masses,
                                                            row.masses + row.num_blocks(),
                                                            int64_t{0});
      });
}

void top_tokens(Worker& worker, const Logits& logits, const RowSlots& slots, int64_t count,
                float* values, int64_t* ids) {
  each_row(
      worker, logits, slots,
      [&](int64_t, const LogitRow& row, RowState& state) {
        state = {best_of(row), 0.0, 0};
      },
      [&](int64_t number, const LogitRow& row, const RowState& state) {
        float* row_values = values + number * count;
        int64_t* row_ids = ids + number * count;
        if (!std::isnan(state.best)) {
          return best_tokens(row, state.best, count, row_values, row_ids);
        }
        std::fill(row_values, row_values + count, state.best);
        std::iota(row_ids, row_ids + count, int64_t{0});
      });
}

}  // namespace pio
