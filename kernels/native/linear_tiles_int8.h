// Tiles of int8 by int8 in vector registers. `out` has int32 sums in its floats' place.
#pragma once

#include "huge_buffer.h"
#include "linear_tiles.h"
#include "simd_int8.h"

namespace pio {

#ifdef __AVX512F__
constexpr int kInt8Rows = 6;
#else
constexpr int kInt8Rows = 4;
#endif

// How many vectors of columns fit into the registers beside the weights and the activations.
template <int Rows>
constexpr int int8_vectors() {
#if defined(__AVX512VNNI__)
  return 4;
#elif defined(__AVX512F__)
  return 2;
#else
  return Rows == 1 ? 8 : Rows == 2 ? 4 : 2;
#endif
}

template <int Rows, int Vectors>
[[gnu::always_inline]] inline void int8_columns(View<const simd::LaidOut> x, int64_t step,
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
  const simd::LaidOut* rows = x.data + step * 4;
  const auto add = [&](int64_t s) __attribute__((always_inline)) {
    const auto weights_at = [&](int v) __attribute__((always_inline)) {
      return simd::weights_of(simd::load_ints(columns[v] + s * kStepBytes));
    };
    const auto activations_at = [&](int r) __attribute__((always_inline)) {
      return simd::load_activations(rows + r * x.stride + s * 4);
    };
    // What there is less of waits in registers for the others.
    if constexpr (Rows < Vectors) {
      simd::Activations codes[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) codes[r] = activations_at(r);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const simd::Weights weights = weights_at(v);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          sums[r][v] = simd::add_products(sums[r][v], weights, codes[r]);
        }
      }
    } else {
      simd::Weights weights[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) weights[v] = weights_at(v);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const simd::Activations codes = activations_at(r);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          sums[r][v] = simd::add_products(sums[r][v], weights[v], codes);
        }
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
void int8_tile(View<const simd::LaidOut> x, int64_t step, const Chunk& panel, int64_t steps,
               bool accumulate, float* out, Prefetch ahead) {
  constexpr int kVectors = int8_vectors<Rows>();
  for (int64_t column = 0; column < kPanelColumns; column += kVectors * simd::kLanes) {
    int8_columns<Rows, kVectors>(x, step, panel, column, steps, accumulate, out, ahead);
    ahead = {};
  }
}

// `codes` of each row as tiles read them.
#ifdef __AVX512VNNI__
inline View<const int8_t> laid_out(View<const int8_t> x, int64_t /*codes*/) { return x; }
#else
// In memory of this thread until the next call. Rows have memory for a vector behind their codes.
inline View<const simd::LaidOut> laid_out(View<const int8_t> x, int64_t codes) {
  constexpr int64_t kAtOnce = 16;
  thread_local KeptBuffer<simd::LaidOut> kept;
  // A cache line more keeps the same columns of all rows out of the same few sets of the caches.
  const int64_t stride = ceil_div(codes, kAtOnce) * kAtOnce + 2 * kAtOnce;
  simd::LaidOut* out = kept.get(x.rows * stride);
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t k = 0; k < codes; k += kAtOnce) simd::lay_out(out + r * stride + k, x.row(r) + k);
  }
  return {out, x.rows, codes, stride};
}
#endif

template <>
class Tiles<int8_t> {
 public:
  static constexpr int64_t kRows = kInt8Rows;
  static constexpr int64_t kBlockRows = 96;
  static constexpr int64_t kChunkSteps = 64;
  static constexpr bool kByStrips = false;
  static constexpr int64_t kStepGranule = 1;
  static constexpr int64_t kStreamSteps = 4;

  // Rows have codes for all steps of a panel.
  void prepare(View<const int8_t> x, int64_t steps) { x_ = laid_out(x, steps * 4); }

  void multiply(int64_t first_row, int64_t rows, const Chunk& panel, int64_t step, int64_t steps,
                bool accumulate, float* out, Prefetch ahead) {
    const View<const simd::LaidOut> x{x_.row(first_row), rows, x_.cols, x_.stride};
    switch (rows) {
      case 1: return int8_tile<1>(x, step, panel, steps, accumulate, out, ahead);
      case 2: return int8_tile<2>(x, step, panel, steps, accumulate, out, ahead);
      case 3: return int8_tile<3>(x, step, panel, steps, accumulate, out, ahead);
#ifdef __AVX512F__
      case 4: return int8_tile<4>(x, step, panel, steps, accumulate, out, ahead);
      case 5: return int8_tile<5>(x, step, panel, steps, accumulate, out, ahead);
#endif
      default: return int8_tile<kInt8Rows>(x, step, panel, steps, accumulate, out, ahead);
    }
  }

 private:
  View<const simd::LaidOut> x_{};
};

}  // namespace pio
