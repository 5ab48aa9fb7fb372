// Up to 32 rows with codes in tiles.
//
// The weights are the first operand of the tiles' product and x is the second, in pairs along k.
// The tiles' sums run over k as they do with x first, so the results are the same, bit for bit, as
// those of `LinearRun`. The weights of the next 32 inputs are made while the tiles multiply these:
// that takes the vector units nearly as long as the memory needs for the codes.
#pragma once

#include <algorithm>

#include "linear_code_tiles.h"
#include "linear_epilogue.h"
#include "linear_pad.h"
#include "linear_run.h"
#include "tile_configuration.h"

#ifdef __AMX_BF16__

namespace pio {

// Up to 16 rows of x: of each 32 inputs 16 pairs, each of all rows.
struct PairedRows {
  const bf16* data;
  int64_t rows;

  int64_t stride() const { return rows * 4; }  // bytes from pair to pair
  const bf16* at(int64_t tile) const { return data + tile * rows * kTileInputs; }
};

// Writes up to a vector more than it has. One row is what it shall be.
inline PairedRows pair_rows(View<const bf16> x, bf16* out) {
  if (x.rows == 1) return {x.data, 1};
  bf16* to = out;
  for (int64_t input = 0; input < x.cols; input += kTileInputs) {
    __m512i pairs[kTileColumns];
    for (int64_t r = 0; r < kTileColumns; ++r) {
      pairs[r] = r < x.rows ? _mm512_loadu_si512(x.row(r) + input) : _mm512_setzero_si512();
    }
    simd::transpose(pairs);
    for (const __m512i pair : pairs) {  // the next covers what this one has too much
      _mm512_storeu_si512(to, pair);
      to += x.rows * 2;
    }
  }
  return {out, x.rows};
}

class FewRowsRun {
 public:
  FewRowsRun(Worker& worker, const CodePanels<bf16>& weight, View<const bf16> x)
      : worker_(worker), weight_(weight), num_rows_(x.rows) {
    const int64_t cols = weight.shape.steps * 2;
    const View<const bf16> padded = padded_rows(x, cols);
    thread_local KeptBuffer<bf16> kept;
    bf16* pairs = kept.get(kMostRows * cols + kLineBytes);
    const auto part = [&](int64_t first) {
      const int64_t rows = std::min(x.rows - first, kTileColumns);
      return pair_rows({padded.row(first), rows, cols, padded.stride}, pairs + first * cols);
    };
    upper_ = part(0);
    if (x.rows > kTileColumns) lower_ = part(kTileColumns);
    configure();
  }
  FewRowsRun(const FewRowsRun&) = delete;
  FewRowsRun& operator=(const FewRowsRun&) = delete;
  ~FewRowsRun() { _tile_release(); }

  static constexpr int64_t kMostRows = 2 * kTileColumns;

  // Neighbouring panels for each worker, so that what is fetched ahead is its own, and at the end one
  // after the other for whoever is free.
  template <class Output>
  void operator()(const Output& to) {
    const int64_t panels = weight_.shape.num_panels;
    const int64_t own = panels * 3 / 4 / worker_.count, shared = own * worker_.count;
    with_tile_reader(weight_.group, weight_.table.data(), [&](const auto& reader) {
      const auto finish = [&](int64_t panel) {
        multiply(reader, panel);
        finish_panel(panel, to);
      };
      for (int64_t i = 0; i < own; ++i) finish(worker_.index * own + i);
      for (int64_t panel = shared + worker_.take(); panel < panels;
           panel = shared + worker_.take()) {
        finish(panel);
      }
    });
  }

 private:
  static constexpr int64_t kTileBytes = kTileColumns * kLineBytes;

  // Tiles 0 to 3: sums, 16 columns each; 4 and 5: x; 6 and 7: weights. With more than 16 rows, 0 and
  // 1 are the sums of the upper rows, 2 and 3 of the lower.
  void configure() const {
    TileConfiguration configuration;
    const bool has_lower = lower_.rows != 0;
    configuration.set({0, 1, 4}, kTileColumns, upper_.stride());
    configuration.set({2, 3}, kTileColumns, has_lower ? lower_.stride() : upper_.stride());
    if (has_lower) configuration.set({5}, kTileColumns, lower_.stride());
    configuration.set({6, 7}, kTileColumns, kLineBytes);
    configuration.load();
  }

  template <class Reader>
  void multiply(const Reader& reader, int64_t panel) {
    const std::byte* codes = weight_.data.data() + panel * weight_.panel_bytes();
    if (lower_.rows == 0) return four_by_one(reader, codes);
    for (int64_t column = 0; column < kPanelColumns; column += 2 * kTileColumns) {
      two_by_two(reader, codes, column);
    }
  }

  // The weights of 32 inputs, tile after tile.
  struct alignas(kLineBytes) Widened {
    static constexpr int kMostTiles = kPanelColumns / kTileColumns;

    std::byte data[kMostTiles * kTileBytes];
    // A load waits for stores to what differs in the upper bits of the address only: the tiles that
    // are loaded lie half a page off those that are stored.
    std::byte gap[2048];

    const std::byte* tile(int i) const { return data + i * kTileBytes; }

    template <class Reader>
    PIO_INLINE void widen(int i, const TileCursor& cursor, const Reader& reader, int64_t column) {
      std::byte* to = data + i * kTileBytes;
      cursor.read(reader, column + i * kTileColumns,
                  [&](int row, __m512i numbers) __attribute__((always_inline)) {
                    _mm512_store_si512(to + row * kLineBytes, numbers);
                  });
      // The compiler knows of no tile that reads them.
      asm volatile("" : : : "memory");
    }
  };

  // Calls step(tile, weights, widen) for each 32 inputs; widen(i) makes tile i of the next ones.
  template <int kTiles, class Reader, class Step>
  PIO_INLINE void for_inputs(const Reader reader, const std::byte* codes, int64_t column,
                             Step step) const {
    const int64_t tiles = weight_.shape.steps * 2 / kTileInputs;
    Widened widened[2];
    TileCursor cursor(weight_.group, codes, 0);
    for (int i = 0; i < kTiles; ++i) widened[0].widen(i, cursor, reader, column);
    for (int64_t tile = 0; tile + 1 < tiles; ++tile) {
      cursor.next();
      step(tile, widened[tile % 2], [&](int i) __attribute__((always_inline)) {
        widened[(tile + 1) % 2].widen(i, cursor, reader, column);
      });
    }
    step(tiles - 1, widened[(tiles - 1) % 2], [](int) {});
  }

  template <class Reader>
  void four_by_one(const Reader& reader, const std::byte* codes) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for_inputs<4>(reader, codes, 0,
                  [&](int64_t tile, const auto& weights, auto widen) __attribute__((always_inline)) {
                    _tile_loadd(4, upper_.at(tile), upper_.stride());
                    widen(0);
                    _tile_loadd(6, weights.tile(0), kLineBytes);
                    _tile_dpbf16ps(0, 6, 4);
                    widen(1);
                    _tile_loadd(7, weights.tile(1), kLineBytes);
                    _tile_dpbf16ps(1, 7, 4);
                    widen(2);
                    _tile_loadd(6, weights.tile(2), kLineBytes);
                    _tile_dpbf16ps(2, 6, 4);
                    widen(3);
                    _tile_loadd(7, weights.tile(3), kLineBytes);
                    _tile_dpbf16ps(3, 7, 4);
                  });
    if (num_rows_ == 1) {
      _tile_stored(0, out_, sizeof(float));
      _tile_stored(1, out_ + 16, sizeof(float));
      _tile_stored(2, out_ + 32, sizeof(float));
      _tile_stored(3, out_ + 48, sizeof(float));
      asm volatile("" : : : "memory");
      return;
    }
    _tile_stored(0, sums_[0], kLineBytes);
    _tile_stored(1, sums_[1], kLineBytes);
    _tile_stored(2, sums_[2], kLineBytes);
    _tile_stored(3, sums_[3], kLineBytes);
    asm volatile("" : : : "memory");
    for (int i = 0; i < 4; ++i) turn(sums_[i], upper_.rows, out_ + i * kTileColumns);
  }

  template <class Reader>
  void two_by_two(const Reader& reader, const std::byte* codes, int64_t column) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for_inputs<2>(reader, codes, column,
                  [&](int64_t tile, const auto& weights, auto widen) __attribute__((always_inline)) {
                    _tile_loadd(4, upper_.at(tile), upper_.stride());
                    _tile_loadd(5, lower_.at(tile), lower_.stride());
                    widen(0);
                    _tile_loadd(6, weights.tile(0), kLineBytes);
                    _tile_dpbf16ps(0, 6, 4);
                    _tile_dpbf16ps(2, 6, 5);
                    widen(1);
                    _tile_loadd(7, weights.tile(1), kLineBytes);
                    _tile_dpbf16ps(1, 7, 4);
                    _tile_dpbf16ps(3, 7, 5);
                  });
    _tile_stored(0, sums_[0], kLineBytes);
    _tile_stored(1, sums_[1], kLineBytes);
    _tile_stored(2, sums_[2], kLineBytes);
    _tile_stored(3, sums_[3], kLineBytes);
    asm volatile("" : : : "memory");
    float* lower_out = out_ + kTileColumns * kPanelColumns;
    for (int i = 0; i < 2; ++i) {
      turn(sums_[i], upper_.rows, out_ + column + i * kTileColumns);
      turn(sums_[2 + i], lower_.rows, lower_out + column + i * kTileColumns);
    }
  }

  // Sums of 16 columns by rows to rows of a panel's products.
  static void turn(const float* sums, int64_t rows, float* out) {
    __m512i turned[kTileColumns];
    for (int64_t c = 0; c < kTileColumns; ++c) {
      turned[c] = _mm512_load_si512(sums + c * kTileColumns);
    }
    simd::transpose(turned);
    for (int64_t r = 0; r < rows; ++r) _mm512_store_si512(out + r * kPanelColumns, turned[r]);
  }

  template <class Output>
  void finish_panel(int64_t panel, const Output& to) {
    const PanelShape& shape = weight_.shape;
    for (int64_t row = 0; row < num_rows_; ++row) {
      const Product product{out_ + row * kPanelColumns, kStripColumns};
      apply(weight_.terms, panel, product);
      finish(to, row, panel * shape.panel_columns, shape.columns_of(panel), product);
    }
  }

  Worker& worker_;
  const CodePanels<bf16>& weight_;
  const int64_t num_rows_;
  PairedRows upper_{}, lower_{};
  alignas(kLineBytes) float sums_[4][kTileColumns * kTileColumns];
  alignas(kLineBytes) float out_[kMostRows * kPanelColumns];
};

// `LinearOfPanels` finds it.
template <class Output>
void multiply(Worker& worker, const CodePanels<bf16>& weight, View<const bf16> x,
              const Output& to) {
  if (weight.group.in_tiles && x.rows != 0 && x.rows <= FewRowsRun::kMostRows) {
    return FewRowsRun(worker, weight, x)(to);
  }
  LinearRun<bf16, CodePanels<bf16>>(worker, weight, x)(to);
}

}  // namespace pio

#endif
