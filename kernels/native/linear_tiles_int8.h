// Tiles of int8 by int8 in vector registers. `out` has int32 sums in its floats' place.
#pragma once

#include "linear_tiles.h"
#include "simd_int8.h"

namespace pio {

// How many vectors of columns fit into the registers beside the weights and the activations.
template <int Rows>
constexpr int int8_vectors() {
#if defined(__AVX512VNNI__)
  return 4;
#elif defined(__AVX512F__)
  return 2;
#else
  return Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
#endif
}

template <int Rows, int Vectors>
[[gnu::always_inline]] inline void int8_columns(View<const int8_t> x, int64_t step,
                                                const Chunk& panel, int64_t first, int64_t steps,
                                                bool accumulate, float* out, Prefetch ahead) {
  constexpr int64_t kLanes = simd::kLanes;
  out += first;
  const std::byte* columns[Vectors];
  for (int v = 0; v < Vectors; ++v) columns[v] = panel.at(first + v * kLanes);
  simd::Ints sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    const int32_t begin = accumulate ? 0 : simd::first_sum(x.row(r), x.cols);
    for (int v = 0; v < Vectors; ++v) {
      sums[r][v] = accumulate ? simd::load_ints(out + r * kPanelColumns + v * kLanes)
                              : simd::filled_ints(begin);
    }
  }
  const int8_t* rows = x.data + step * 4;
  const auto add = [&](int64_t s) __attribute__((always_inline)) {
    simd::Weights weights[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      weights[v] = simd::weights_of(simd::load_ints(columns[v] + s * kStepBytes));
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      std::memcpy(&four, rows + r * x.stride + s * 4, sizeof four);
      const simd::Activations codes = simd::activations_of(simd::filled_ints(four));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        sums[r][v] = simd::add_products(sums[r][v], weights[v], codes);
      }
    }
  };
  int64_t s = 0;
  for (; s < ahead.steps; ++s) {
    prefetch_step(ahead, s);
    add(s);
  }
  for (; s < steps; ++s) add(s);
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      simd::store_ints(out + r * kPanelColumns + v * kLanes, sums[r][v]);
    }
  }
}

template <int Rows>
void int8_tile(View<const int8_t> x, int64_t step, const Chunk& panel, int64_t steps,
               bool accumulate, float* out, Prefetch ahead) {
  constexpr int kVectors = int8_vectors<Rows>();
  for (int64_t column = 0; column < kPanelColumns; column += kVectors * simd::kLanes) {
    int8_columns<Rows, kVectors>(x, step, panel, column, steps, accumulate, out, ahead);
    ahead = {};
  }
}

template <>
class Tiles<int8_t> {
 public:
  static constexpr int64_t kRows = 6;
  static constexpr int64_t kBlockRows = 96;
  static constexpr int64_t kChunkSteps = 128;
  static constexpr bool kByStrips = false;
  static constexpr int64_t kStepGranule = 1;
  static constexpr int64_t kStreamSteps = 4;

  // Rows have codes for all steps of a panel.
  void prepare(View<const int8_t> x, int64_t /*steps*/) { x_ = x; }

  void multiply(int64_t first_row, int64_t rows, const Chunk& panel, int64_t step, int64_t steps,
                bool accumulate, float* out, Prefetch ahead) {
    const View<const int8_t> x{x_.row(first_row), rows, x_.cols, x_.stride};
    switch (rows) {
      case 1: return int8_tile<1>(x, step, panel, steps, accumulate, out, ahead);
      case 2: return int8_tile<2>(x, step, panel, steps, accumulate, out, ahead);
      case 3: return int8_tile<3>(x, step, panel, steps, accumulate, out, ahead);
      case 4: return int8_tile<4>(x, step, panel, steps, accumulate, out, ahead);
      case 5: return int8_tile<5>(x, step, panel, steps, accumulate, out, ahead);
      default: return int8_tile<6>(x, step, panel, steps, accumulate, out, ahead);
    }
  }

 private:
  View<const int8_t> x_{};
};

}  // namespace pio
