// Rows of activations whose end a tile may read whole.
#pragma once

#include <cstring>

#include "huge_buffer.h"
#include "types.h"

namespace pio {

// `x` itself where its rows have `cols` elements; else a copy in memory of this thread, with zeros
// behind each row's end, which lives until the next call. The panel is padded with zeros, but a
// product with what lies behind a row could be NaN.
inline View<const bf16> padded_rows(View<const bf16> x, int64_t cols) {
  if (x.cols == cols) return x;
  thread_local KeptBuffer<bf16> kept;
  bf16* out = kept.get(x.rows * cols);
  for (int64_t r = 0; r < x.rows; ++r) {
    std::memcpy(out + r * cols, x.row(r), x.cols * sizeof(bf16));
    std::memset(out + r * cols + x.cols, 0, (cols - x.cols) * sizeof(bf16));
  }
  return {out, x.rows, cols, cols};
}

}  // namespace pio
