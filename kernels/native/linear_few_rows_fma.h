// Codes without AVX-512: they become float32, and so do the rows that they are multiplied with.
//
// With up to 4 rows numbers go from the codes into the products without a way through memory, which
// would take as long as the products themselves. The sums run over k as those of the tiles do, so
// the results are the same, bit for bit, as those of `LinearRun`.
#pragma once

#include <algorithm>
#include <type_traits>

#include "linear_codes_fma.h"
#include "linear_pad.h"
#include "linear_run.h"

#ifndef __AVX512F__

namespace pio {

class WidenedTiles : public FMATiles<float> {
 public:
  void prepare(View<const bf16> x, int64_t steps) {
    FMATiles<float>::prepare(widened_rows(x, steps), steps);
  }
};

template <>
struct TilesOf<bf16, CodePanels<float>> {
  using Type = WidenedTiles;
};

class FewRowsRun {
 public:
  static constexpr int64_t kMostRows = 4;

  template <class T>
  FewRowsRun(Worker& worker, const CodePanels<float>& weight, View<const T> x)
      : worker_(worker),
        weight_(weight),
        blocks_(ceil_div(weight.shape.steps, kBlockInputs)),
        x_(widened_rows(x, blocks_ * kBlockInputs)) {}

  template <class Output>
  void operator()(const Output& to) {
    with_codes(weight_.group, weight_.table.data(), [&]<class Terms>(const auto& codes) {
      switch (x_.rows) {
        case 1: return run<1, Terms>(codes, to);
        case 2: return run<2, Terms>(codes, to);
        case 3: return run<3, Terms>(codes, to);
        default: return run<4, Terms>(codes, to);
      }
    });
  }

 private:
  // So many blocks go past one part of the columns after the other: they stay in the first cache.
  static constexpr int64_t kPieceBlocks = 32;

  // Vectors of columns whose sums fit into the registers, beside what the reader has there.
  template <int kRows, class Codes>
  static constexpr int64_t kVectors = kRows == 1   ? (std::is_same_v<Codes, ByteCodes> ? 8 : 4)
                                      : kRows == 2 ? (std::is_same_v<Codes, WordCodes> ? 2 : 4)
                                                   : 2;

  // Neighbouring panels for each worker, so that what is fetched ahead is its own, and at the end one
  // after the other for whoever is free.
  template <int kRows, class Terms, class Codes, class Output>
  void run(const Codes& codes, const Output& to) {
    const auto finish = [&](int64_t panel) {
      multiply<kRows, Terms>(codes, panel);
      for (int64_t row = 0; row < kRows; ++row) finish_row(row, panel, to);
    };
    const int64_t panels = weight_.shape.num_panels;
    const int64_t own = panels * 3 / 4 / worker_.count, shared = own * worker_.count;
    for (int64_t i = 0; i < own; ++i) finish(worker_.index * own + i);
    for (int64_t panel = shared + worker_.take(); panel < panels;
         panel = shared + worker_.take()) {
      finish(panel);
    }
  }

  template <int kRows, class Terms, class Codes>
  void multiply(const Codes& codes, int64_t panel) {
    const GroupLayout& layout = weight_.group;
    const int64_t group_blocks = layout.blocks();
    const std::byte* group = weight_.data.data() + panel * weight_.panel_bytes();
    std::fill_n(sums_, kRows * kPanelColumns, 0.0f);
    for (int64_t first = 0; first < blocks_; first += group_blocks, group += layout.num_bytes()) {
      fetch_ahead(group, layout.codes_at());
      const Terms terms(layout, group, codes);
      const int64_t end = std::min(blocks_, first + group_blocks);
      const std::byte* block = group + layout.codes_at();
      for (int64_t b = first; b < end; b += kPieceBlocks) {
        const int64_t count = std::min(kPieceBlocks, end - b);
        multiply_piece<kRows>(codes, terms, block, count, x_.data + b * kBlockInputs);
        block += count * Codes::kBlockBytes;
      }
    }
  }

  template <int kRows, class Codes, class Terms>
  void multiply_piece(const Codes& codes, const Terms& terms, const std::byte* block,
                      int64_t count, const float* x) {
    constexpr int64_t kColumns = kVectors<kRows, Codes> * simd::kLanes;
    constexpr int64_t kAtOnce = std::max(kColumns, kStripColumns);
    // What is fetched meanwhile is shared out evenly: the queue of missed lines is short.
    const int64_t part = count * Codes::kBlockBytes / (kPanelColumns / kColumns);
    const std::byte* next = block;
    for (int64_t column = 0; column < kPanelColumns; column += kAtOnce) {
      const std::byte* strip = block + column / kStripColumns * (Codes::kBlockBytes / kStrips);
      fetch_ahead(next, part);
      add<kRows, kColumns, 0>(codes, terms, strip, count, column, x, x_.stride, sums_);
      next += part;
      if constexpr (kColumns < kAtOnce) {
        fetch_ahead(next, part);
        add<kRows, kColumns, kColumns>(codes, terms, strip, count, column, x, x_.stride, sums_);
        next += part;
      }
    }
  }

  // Products with `count` blocks of the strip that has column `column` are added to the sums of
  // some columns, from `kFirst` columns behind it on. A function of its own: the compiler shall
  // have the registers for its loop alone.
  template <int kRows, int kColumns, int kFirst, class Codes, class Terms>
  [[gnu::noinline]] static void add(const Codes& codes, const Terms& terms, const std::byte* strip,
                                    int64_t count, int64_t column, const float* x, int64_t stride,
                                    float* sums_at) {
    constexpr int kPairs = kColumns / (2 * simd::kLanes);
    column += kFirst;
    sums_at += column;
    simd::Floats sums[kRows][2 * kPairs];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < 2 * kPairs; ++v) {
        sums[r][v] = simd::load(sums_at + r * kPanelColumns + v * simd::kLanes);
      }
    }
    for (int64_t b = 0; b < count; ++b, strip += Codes::kBlockBytes, x += kBlockInputs) {
#pragma GCC unroll 2
      for (int64_t input = 0; input < kBlockInputs; ++input) {
#pragma GCC unroll 4
        for (int p = 0; p < kPairs; ++p) {
          const int64_t offset = p * 2 * simd::kLanes;
          const simd::FloatPair numbers = codes.at(strip, kFirst + offset, input);
          const simd::Floats low = terms.finished(column + offset, numbers.first);
          const simd::Floats high = terms.finished(column + offset + simd::kLanes, numbers.second);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const simd::Floats element = simd::filled(x[r * stride + input]);
            simd::add_product(sums[r][2 * p], low, element);
            simd::add_product(sums[r][2 * p + 1], high, element);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < 2 * kPairs; ++v) {
        simd::store(sums_at + r * kPanelColumns + v * simd::kLanes, sums[r][v]);
      }
    }
  }

  template <class Output>
  void finish_row(int64_t row, int64_t panel, const Output& to) {
    const PanelShape& shape = weight_.shape;
    const Product product{sums_ + row * kPanelColumns, kStripColumns};
    apply(weight_.terms, panel, product);
    finish(to, row, panel * shape.panel_columns, shape.columns_of(panel), product);
  }

  Worker& worker_;
  const CodePanels<float>& weight_;
  const int64_t blocks_;  // of a panel
  const View<const float> x_;
  alignas(kLineBytes) float sums_[kMostRows * kPanelColumns];
};

// `LinearOfPanels` finds it.
template <class T, class Output>
void multiply(Worker& worker, const CodePanels<float>& weight, View<const T> x, const Output& to) {
  if (x.rows != 0 && x.rows <= FewRowsRun::kMostRows) return FewRowsRun(worker, weight, x)(to);
  LinearRun<T, CodePanels<float>>(worker, weight, x)(to);
}

}  // namespace pio

#endif
