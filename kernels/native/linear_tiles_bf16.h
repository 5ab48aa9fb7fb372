// Tiles of AVX512_BF16's dot products of pairs.
#pragma once

#include "linear_pad.h"
#include "linear_tiles.h"
#include "simd.h"

namespace pio {

template <int Rows>
void dot_tile(const bf16* x, int64_t stride, const Chunk& panel, int64_t steps,
              bool accumulate, float* out, Prefetch ahead) {
  __m512 sums[Rows][4];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < 4; ++v) {
      sums[r][v] = accumulate ? _mm512_loadu_ps(out + r * kPanelColumns + v * 16)
                              : _mm512_setzero_ps();
    }
  }
  const auto step = [&](int64_t s) __attribute__((always_inline)) {
    __m512bh weights[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const std::byte* columns = panel.at(v * simd::kLanes) + s * kStepBytes;
      weights[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(columns));
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * stride + s * 2, sizeof pair);
      const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], weights[v], both);
    }
  };
  int64_t s = 0;
  for (; s < ahead.steps; ++s) {
    prefetch_step(ahead, s);
    step(s);
  }
  for (; s < steps; ++s) step(s);
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < 4; ++v) _mm512_storeu_ps(out + r * kPanelColumns + v * 16, sums[r][v]);
  }
}

template <>
class Tiles<bf16> {
 public:
  static constexpr int64_t kRows = 6;
  static constexpr int64_t kBlockRows = 96;
  static constexpr int64_t kChunkSteps = 128;
  static constexpr bool kByStrips = false;
  static constexpr int64_t kStepGranule = 1;
  static constexpr int64_t kStreamSteps = 4;

  void prepare(View<const bf16> x, int64_t steps) { x_ = padded_rows(x, steps * 2); }

  void multiply(int64_t first_row, int64_t rows, const Chunk& panel, int64_t step,
                int64_t steps, bool accumulate, float* out, Prefetch ahead) {
    const bf16* x = x_.row(first_row) + step * 2;
    switch (rows) {
      case 1: return dot_tile<1>(x, x_.stride, panel, steps, accumulate, out, ahead);
      case 2: return dot_tile<2>(x, x_.stride, panel, steps, accumulate, out, ahead);
      case 3: return dot_tile<3>(x, x_.stride, panel, steps, accumulate, out, ahead);
      case 4: return dot_tile<4>(x, x_.stride, panel, steps, accumulate, out, ahead);
      case 5: return dot_tile<5>(x, x_.stride, panel, steps, accumulate, out, ahead);
      default: return dot_tile<6>(x, x_.stride, panel, steps, accumulate, out, ahead);
    }
  }

 private:
  View<const bf16> x_{};
};

}  // namespace pio
