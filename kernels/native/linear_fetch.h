// What AMX tiles bring nearer while they compute. Each of their steps along k (16 of a panel's) has
// two places for a part of it: in one burst it would fill the queue of missed lines.
#pragma once

#include <algorithm>

#include "linear_panels.h"

namespace pio {

// Between the tile instructions that it stands between: the compiler would move a prefetch of its own.
inline void fetch_line(const std::byte* line) {
  asm volatile("prefetcht1 %0" : : "m"(*line));
}

// The weights that the same tile reads a few steps later; see `Prefetch`. Nothing looks for their
// end: one more branch in the tile's loop costs a tenth of the memory's rate.
class StreamFetch {
 public:
  StreamFetch(const Prefetch& ahead, int64_t strip)
      : next_(ahead.weights.at(strip * kStripColumns)) {}

  void before(int /*half*/) {
#pragma GCC unroll 16
    for (int64_t line = 0; line < kHalfLines; ++line) fetch_line(next_ + line * kLineBytes);
    next_ += kHalfLines * kLineBytes;
  }

 private:
  static constexpr int64_t kHalfLines = 16;  // half of 16 steps of a strip

  const std::byte* next_;
};

// Likewise, of fewer steps than the tile has.
class PartFetch {
 public:
  PartFetch(const Prefetch& ahead, int64_t strip)
      : fetch_(ahead, strip), left_(ceil_div(ahead.steps, kHalfSteps)) {}

  void before(int half) {
    if (left_ == 0) return;
    --left_;
    fetch_.before(half);
  }

 private:
  static constexpr int64_t kHalfSteps = 8;

  StreamFetch fetch_;
  int64_t left_;
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
      fetch_line(next_);
    }
  }

 private:
  const std::byte* next_;
  int64_t lines_;  // in each step
  Other other_;
};

}  // namespace pio
