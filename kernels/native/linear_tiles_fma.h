// Tiles of plain float32 FMAs; bf16 weights and activations are widened.
#pragma once

#include <algorithm>

#include "linear_tiles.h"
#include "simd.h"

namespace pio {

// Splits neighbours: `even` gets from[0], from[2], ... and `odd` from[1], from[3], ...
inline void load_pairs(const bf16* from, simd::Floats& even, simd::Floats& odd) {
#ifdef __AVX512F__
  const __m512i pairs = _mm512_loadu_si512(from);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
#else
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
#endif
}

// Registers hold the sums of `Rows` rows by `Vectors` vectors of columns, from column `first` on.
template <class W, int Rows, int Vectors>
[[gnu::always_inline]] inline void fma_columns(const float* x, int64_t stride, const Chunk& panel,
                                               int64_t first, int64_t steps, bool accumulate,
                                               float* out, Prefetch ahead) {
  constexpr int64_t kLanes = simd::kLanes;
  out += first;
  const std::byte* columns[Vectors];
  for (int v = 0; v < Vectors; ++v) columns[v] = panel.at(first + v * kLanes);
  simd::Floats sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      sums[r][v] = accumulate ? simd::load(out + r * kPanelColumns + v * kLanes) : simd::zeros();
    }
  }
  const auto add = [&](const simd::Floats(&weights)[Vectors], int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const simd::Floats element = simd::filled(x[r * stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[r][v] = simd::fma(weights[v], element, sums[r][v]);
    }
  };
  const auto step = [&](int64_t s) __attribute__((always_inline)) {
    const auto at = [&](int v) __attribute__((always_inline)) {
      return reinterpret_cast<const W*>(columns[v] + s * kStepBytes);
    };
    simd::Floats weights[Vectors];
    if constexpr (sizeof(W) == 4) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) weights[v] = simd::load(at(v));
      add(weights, s);
    } else {
      simd::Floats odd[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) load_pairs(at(v), weights[v], odd[v]);
      add(weights, s * 2);
      add(odd, s * 2 + 1);
    }
  };
  int64_t s = 0;
  for (; s < ahead.steps; ++s) {
    prefetch_step(ahead, s);
    step(s);
  }
  for (; s < steps; ++s) step(s);
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) simd::store(out + r * kPanelColumns + v * kLanes, sums[r][v]);
  }
}

// How many vectors of columns fit into the registers beside the weights and one element.
template <int Rows>
constexpr int vectors_at_once() {
  if (simd::kLanes == 16) return 4;            // 32 registers: up to 6 rows of all 64 columns
  return Rows == 1 ? 8 : Rows <= 3 ? 4 : 2;      // 16 registers
}

template <class W, int Rows>
void fma_tile(const float* x, int64_t stride, const Chunk& panel, int64_t steps,
              bool accumulate, float* out, Prefetch ahead) {
  constexpr int kVectors = vectors_at_once<Rows>();
  for (int64_t column = 0; column < kPanelColumns; column += kVectors * simd::kLanes) {
    fma_columns<W, Rows, kVectors>(x, stride, panel, column, steps, accumulate, out, ahead);
    ahead = {};
  }
}

// The tiles of one worker for weights of type W.
template <class W>
class FMATiles {
 public:
  static constexpr int64_t kRows = 6;
  static constexpr int64_t kBlockRows = 96;
  static constexpr int64_t kChunkSteps = 128;
  static constexpr bool kByStrips = false;
  static constexpr int64_t kStepGranule = 1;
  static constexpr int64_t kStreamSteps = 4;

  void prepare(View<const W> x, int64_t steps) {
    if constexpr (sizeof(W) == 4) {
      x_ = x;
    } else {
      widen(x, steps * 2);
    }
  }

  void multiply(int64_t first_row, int64_t rows, const Chunk& panel, int64_t step,
                int64_t steps, bool accumulate, float* out, Prefetch ahead) {
    const float* x = x_.row(first_row) + step * (4 / sizeof(W));
    switch (rows) {
      case 1: return fma_tile<W, 1>(x, x_.stride, panel, steps, accumulate, out, ahead);
      case 2: return fma_tile<W, 2>(x, x_.stride, panel, steps, accumulate, out, ahead);
      case 3: return fma_tile<W, 3>(x, x_.stride, panel, steps, accumulate, out, ahead);
      case 4: return fma_tile<W, 4>(x, x_.stride, panel, steps, accumulate, out, ahead);
      case 5: return fma_tile<W, 5>(x, x_.stride, panel, steps, accumulate, out, ahead);
      default: return fma_tile<W, 6>(x, x_.stride, panel, steps, accumulate, out, ahead);
    }
  }

 private:
  // Zeros behind the end: the panel is padded there with zeros, and a product with what lies behind
  // a row could be NaN.
  void widen(View<const W> x, int64_t padded) {
    thread_local KeptBuffer<float> kept;
    const int64_t stride = ceil_div(padded, simd::kLanes) * simd::kLanes;
    float* out = kept.get(x.rows * stride);
    for (int64_t r = 0; r < x.rows; ++r) {
      for (int64_t k = 0; k < stride; k += simd::kLanes) {
        const auto count = static_cast<int>(std::clamp<int64_t>(x.cols - k, 0, simd::kLanes));
        simd::store(out + r * stride + k, count == simd::kLanes
                                              ? simd::load(x.row(r) + k)
                                              : simd::load_part(x.row(r) + k, count));
      }
    }
    x_ = {out, x.rows, x.cols, stride};
  }

  View<const float> x_{};
};

template <>
class Tiles<float> : public FMATiles<float> {};

#if !defined(__AVX512BF16__)
template <>
class Tiles<bf16> : public FMATiles<bf16> {};
#endif

}  // namespace pio
