// Tiles of int4 in groups by int8 activations. A step is a group.
#pragma once

#include <algorithm>

#include "huge_buffer.h"
#include "linear_nibble_groups.h"
#include "linear_tiles.h"
#include "simd_codes.h"
#include "simd_nibbles.h"

namespace pio {

// An activation's code, whose weights are in groups.
struct GroupedCode {
  int8_t code;
};

// Rows with the number that each group's sum begins with: products have codes that are 8 too large.
struct GroupedRows {
  const GroupedCode* codes;
  int64_t codes_stride;
  const int32_t* begins;
  int64_t begins_stride;

  GroupedRows from(int64_t row, int64_t step) const {
    return {codes + row * codes_stride + step * kGroupInputs, codes_stride,
            begins + row * begins_stride + step, begins_stride};
  }
};

// Registers hold the products of `Rows` rows by `Vectors` vectors of columns in one group.
template <int Rows, int Vectors>
[[gnu::always_inline]] inline void grouped_columns(const GroupedRows& x, const std::byte* group,
                                                   int64_t first, float* out) {
  constexpr int64_t kLanes = simd::kLanes;
  simd::Ints products[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) products[r][v] = simd::filled_ints(0);
  }
  const std::byte* pair = group + kGroupScaleBytes + first * 4;
#pragma GCC unroll 4
  for (int64_t p = 0; p < kPairs; ++p, pair += kPairBytes) {
    simd::Ints low[Vectors], high[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const simd::Ints bytes = simd::load_ints(pair + v * kLanes * 4);
      low[v] = simd::low_halves(bytes);
      high[v] = simd::high_halves(bytes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const GroupedCode* codes = x.codes + r * x.codes_stride + p * kPairInputs;
      const simd::Ints x_low = simd::filled_four(codes), x_high = simd::filled_four(codes + 4);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        products[r][v] = simd::add_codes(products[r][v], low[v], x_low);
        products[r][v] = simd::add_codes(products[r][v], high[v], x_high);
      }
    }
  }
  out += first;
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) {
    const auto* scale_bits = reinterpret_cast<const uint16_t*>(group) + first + v * kLanes;
    const simd::Floats scales = simd::load_half(scale_bits);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const simd::Ints begin = simd::filled_ints(x.begins[r * x.begins_stride]);
      const simd::Floats sum = simd::to_floats(simd::whole_sum(products[r][v], begin));
      float* at = out + r * kPanelColumns + v * kLanes;
      simd::store(at, simd::fma(sum, scales, simd::load(at)));
    }
  }
}

template <int Rows>
void grouped_tile(GroupedRows x, const std::byte* group, int64_t steps, bool accumulate, float* out,
                  const Prefetch& ahead) {
  // As many vectors as fit into the registers beside the weights and the activations.
  constexpr int kMost = kPanelColumns / simd::kLanes;
  constexpr int kVectors = simd::kLanes == 16 ? kMost : Rows == 1 ? 4 : 2;
  if (!accumulate) std::fill(out, out + Rows * kPanelColumns, 0.0f);
  const std::byte* fetched = ahead.weights.data;
  for (int64_t s = 0; s < steps; ++s) {
    if (s < ahead.steps) {
      for (int64_t line = 0; line < kGroupBytes; line += kLineBytes) simd::fetch(fetched + line);
      fetched += kGroupBytes;
    }
    for (int64_t column = 0; column < kPanelColumns; column += kVectors * simd::kLanes) {
      grouped_columns<Rows, kVectors>(x, group, column, out);
    }
    group += kGroupBytes;
    x = x.from(0, 1);
  }
}

template <>
class Tiles<GroupedCode> {
 public:
  static constexpr int64_t kRows = 4;
  static constexpr int64_t kBlockRows = 96;
  static constexpr int64_t kChunkSteps = 16;
  static constexpr bool kByStrips = false;
  static constexpr int64_t kStepGranule = 1;
  static constexpr int64_t kStreamSteps = 1;

  // Rows have codes for all groups of a panel.
  void prepare(View<const GroupedCode> x, int64_t steps) {
    thread_local KeptBuffer<int32_t> kept;
    int32_t* begins = kept.get(x.rows * steps);
    for (int64_t r = 0; r < x.rows; ++r) {
      const GroupedCode* codes = x.row(r);
      for (int64_t s = 0; s < steps; ++s, codes += kGroupInputs) {
        int32_t sum = 0;
        for (int64_t k = 0; k < kGroupInputs; ++k) sum += codes[k].code;
        begins[r * steps + s] = -8 * sum;
      }
    }
    x_ = {x.data, x.stride, begins, steps};
  }

  void multiply(int64_t first_row, int64_t rows, const Chunk& panel, int64_t step, int64_t steps,
                bool accumulate, float* out, const Prefetch& ahead) {
    const GroupedRows x = x_.from(first_row, step);
    switch (rows) {
      case 1: return grouped_tile<1>(x, panel.data, steps, accumulate, out, ahead);
      case 2: return grouped_tile<2>(x, panel.data, steps, accumulate, out, ahead);
      case 3: return grouped_tile<3>(x, panel.data, steps, accumulate, out, ahead);
      default: return grouped_tile<4>(x, panel.data, steps, accumulate, out, ahead);
    }
  }

 private:
  GroupedRows x_{};
};

}  // namespace pio
