// Tiles of plain float32 FMAs; bf16 weights and activations are widened.
#pragma once

#include <algorithm>

#include "linear_pad.h"
#include "linear_tiles.h"
#include "simd.h"

namespace pio {

// One of the neighbours along k that a step of W has: the only one, or the even or the odd bf16.
template <class W>
PIO_INLINE simd::Floats load_neighbour(const std::byte* from, int which) {
  if constexpr (sizeof(W) == 4) {
    return simd::load(reinterpret_cast<const float*>(from));
  } else {
#ifdef __AVX512F__
    const __m512i pairs = _mm512_loadu_si512(from);
    return _mm512_castsi512_ps(which == 0
                                   ? _mm512_slli_epi32(pairs, 16)
                                   : _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
#else
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_castsi256_ps(which == 0
                                   ? _mm256_slli_epi32(pairs, 16)
                                   : _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
#endif
  }
}

// Registers hold the sums of `Rows` rows by `Vectors` vectors of columns, from column `first` on.
template <class W, int Rows, int Vectors>
[[gnu::always_inline]] inline void fma_columns(const float* x, int64_t stride, const Chunk& panel,
                                               int64_t first, int64_t steps, bool accumulate,
                                               float* out, const Prefetch& ahead) {
  constexpr int64_t kLanes = simd::kLanes;
  constexpr int kNeighbours = 4 / sizeof(W);
  constexpr int64_t kPassStrips = ceil_div(Vectors * kLanes, kStripColumns);
  constexpr int64_t kPassLines = std::min(Vectors * kLanes, kStripColumns) * 4;
  out += first;
  simd::Floats sums[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      sums[r][v] = accumulate ? simd::load(out + r * kPanelColumns + v * kLanes) : simd::zeros();
    }
  }
  const std::byte* columns[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) columns[v] = panel.at(first + v * kLanes);
  const float* upper = x + (Rows > 3 ? 3 * stride : 0);  // few addresses stay in registers
  const auto add = [&](int64_t s, int which) __attribute__((always_inline)) {
    const auto weight_at = [&](int v) __attribute__((always_inline)) {
      return load_neighbour<W>(columns[v] + s * kStepBytes, which);
    };
    const auto element_at = [&](int r) __attribute__((always_inline)) {
      return simd::filled((r < 3 ? x + r * stride : upper + (r - 3) * stride)[which]);
    };
    // What there is less of waits in registers for the others.
    if constexpr (Rows < Vectors) {
      simd::Floats elements[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) elements[r] = element_at(r);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const simd::Floats weight = weight_at(v);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) simd::add_product(sums[r][v], weight, elements[r]);
      }
    } else {
      simd::Floats weights[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) weights[v] = weight_at(v);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const simd::Floats element = element_at(r);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) simd::add_product(sums[r][v], weights[v], element);
      }
    }
  };
  const auto step = [&](int64_t s) __attribute__((always_inline)) {
    add(s, 0);
    if constexpr (kNeighbours == 2) {
      // The weights are loaded anew: kept for both, they would push sums out of registers.
      asm volatile("" : : : "memory");
      add(s, 1);
    }
    x += kNeighbours;
    upper += kNeighbours;
  };
  // Every pass along the steps fetches a part of them, from each strip in the order of memory.
  const std::byte* next[kPassStrips];
#pragma GCC unroll 2
  for (int64_t strip = 0; strip < kPassStrips; ++strip) {
    next[strip] = ahead.weights.at(first / kStripColumns * kStripColumns + strip * kStripColumns) +
                  first % kStripColumns * 4 * ahead.steps;
  }
  int64_t s = 0;
  for (; s < ahead.steps; ++s) {
#pragma GCC unroll 2
    for (int64_t strip = 0; strip < kPassStrips; ++strip) {
#pragma GCC unroll 2
      for (int64_t line = 0; line < kPassLines; line += kLineBytes) {
        simd::fetch(next[strip] + s * kPassLines + line);
      }
    }
    step(s);
  }
  for (; s < steps; ++s) step(s);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) simd::store(out + r * kPanelColumns + v * kLanes, sums[r][v]);
  }
}

// How many vectors of columns fit into the registers beside the weights and one element.
template <int Rows>
constexpr int vectors_at_once() {
  if (simd::kLanes == 16) return 4;            // 32 registers: up to 6 rows of all 64 columns
  return Rows == 1 ? 8 : Rows <= 3 ? 4 : 2;      // 16 registers
}

// So many steps of a panel stay in the first cache while pass after pass reads its own columns.
constexpr int64_t kPassSteps = 64;

template <class W, int Rows>
void fma_tile(const float* x, int64_t stride, const Chunk& panel, int64_t steps,
              bool accumulate, float* out, const Prefetch& ahead) {
  constexpr int kVectors = vectors_at_once<Rows>();
  // One pass over both strips is left to the hardware, which fetches too little before several.
  if constexpr (kVectors * simd::kLanes == kPanelColumns) {
    return fma_columns<W, Rows, kVectors>(x, stride, panel, 0, steps, accumulate, out, {});
  }
  for (int64_t first = 0; first < steps; first += kPassSteps) {
    const auto from_first = [&](const Chunk& chunk) {
      return Chunk{chunk.data + first * kStepBytes, chunk.strip_bytes};
    };
    const int64_t count = std::min(kPassSteps, steps - first);
    Prefetch part;
    if (first < ahead.steps) {
      part = {from_first(ahead.weights), std::min(count, ahead.steps - first)};
    }
    for (int64_t column = 0; column < kPanelColumns; column += kVectors * simd::kLanes) {
      fma_columns<W, Rows, kVectors>(x + first * int64_t{4 / sizeof(W)}, stride,
                                     from_first(panel), column, count, accumulate || first > 0,
                                     out, part);
    }
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
  static constexpr int64_t kStreamSteps = 32;

  void prepare(View<const W> x, int64_t steps) {
    if constexpr (sizeof(W) == 4) {
      x_ = x;
    } else {
      x_ = widened_rows(x, steps * 2);
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
  View<const float> x_{};
};

template <>
class Tiles<float> : public FMATiles<float> {};

#if !defined(__AVX512BF16__)
template <>
class Tiles<bf16> : public FMATiles<bf16> {};
#endif

}  // namespace pio
