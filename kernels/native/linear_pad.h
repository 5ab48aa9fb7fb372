// Rows of activations whose end a tile may read whole.
#pragma once

#include <algorithm>
#include <cstring>

#include "huge_buffer.h"
#include "simd.h"
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

// A copy of `x` in float32, with zeros behind each row's end up to column `cols`, in memory of this
// thread, which lives until the next call. A line more between the rows keeps the same k of all of
// them out of the same few sets of the caches.
template <class T>
View<const float> widened_rows(View<const T> x, int64_t cols) {
  constexpr int64_t kLanes = simd::kLanes;
  thread_local KeptBuffer<float> kept;
  const int64_t whole = (cols + kLanes - 1) / kLanes * kLanes;
  const int64_t stride = whole + 64 / int64_t{sizeof(float)};
  float* out = kept.get(x.rows * stride);
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t k = 0; k < whole; k += kLanes) {
      const auto count = static_cast<int>(std::clamp<int64_t>(x.cols - k, 0, kLanes));
      simd::store(out + r * stride + k, count == kLanes ? simd::load(x.row(r) + k)
                                                        : simd::load_part(x.row(r) + k, count));
    }
  }
  return {out, x.rows, x.cols, stride};
}

}  // namespace pio
