// What AMX tiles bring nearer while they compute. Each of their steps along k (16 of a panel's) has
// two places for a part of it: in one burst it would fill the queue of missed lines.
#pragma once

#include <algorithm>

#include "linear_panels.h"

namespace pio {

// The weights that the same tile reads a few steps later; see `Prefetch`.
class StreamFetch {
 public:
  StreamFetch(const Prefetch& ahead, int64_t strip)
      : next_(ahead.weights.at(strip * kStripColumns)),
        end_(next_ + ahead.steps * kStepBytes),
        then_(ahead.then.at(strip * kStripColumns)),
        end_of_all_(then_ + ahead.num_then * kStepBytes) {}

  void before(int /*half*/) {
    if (next_ >= end_) {
      next_ = then_;
      end_ = then_ = end_of_all_;
    }
    for (int64_t line = 0; line < kHalfLines && next_ < end_; ++line, next_ += kLineBytes) {
      __builtin_prefetch(next_, 0, 2);
    }
  }

 private:
  static constexpr int64_t kHalfLines = 16;  // half of 16 steps of a strip

  const std::byte* next_;
  const std::byte* end_;
  const std::byte* then_;
  const std::byte* end_of_all_;
};

// The weights that all rows go past next, a part in each tile of rows, and what `Other` does: work
// that the vector units have time for while the tiles are multiplied.
template <class Other>
class BlockFetch {
 public:
  // `tile_steps`: how often the tile calls.
  BlockFetch(Span weights, int64_t tile_steps, Other other)
      : next_(weights.data),
        lines_((weights.num_bytes / kLineBytes + tile_steps - 1) / tile_steps),
        other_(other) {}

  void before(int half) {
    if (half != 0) return other_();
    for (int64_t line = 0; line < lines_; ++line, next_ += kLineBytes) {
      __builtin_prefetch(next_, 0, 2);
    }
  }

 private:
  const std::byte* next_;
  int64_t lines_;  // in each step
  Other other_;
};

}  // namespace pio
