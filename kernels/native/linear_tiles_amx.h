// Tiles of AMX: 16 rows by 16 columns by 16 steps at a time.
//
// All numbers of rows use them, one row too: reading weights is the limit there, and results then
// depend on no other rows.
#pragma once

#include <algorithm>

#include "linear_fetch.h"
#include "linear_pad.h"
#include "linear_tiles.h"
#include "simd.h"
#include "tile_configuration.h"

namespace pio {

// The intrinsics take nothing but digits.
#define PIO_TILE_PRODUCT(sums, x, weights)    \
  if constexpr (sizeof(X) == 1) {             \
    _tile_dpbssd(sums, x, weights);           \
  } else {                                    \
    _tile_dpbf16ps(sums, x, weights);         \
  }

// Which of the eight tile registers holds what.
//   up to 16 rows: sums 0 1 2 3 (one for each 16 columns of the panel), x 4, weights 6 7;
//                  of a strip, sums 0 1
//   up to 32 rows: sums 0 1 (rows 0-15), 2 3 (rows 16-31), x 4 5, weights 6 7; one strip at a time
// `X` is the type of activations and weights: bf16 with float32 sums, or int8 with int32 sums in
// their place.
template <class X>
class AMXTiles {
 public:
  static constexpr int64_t kRows = 32;
  static constexpr int64_t kBlockRows = 512;
  static constexpr int64_t kChunkSteps = 256;
  static constexpr bool kByStrips = true;
  static constexpr int64_t kStepGranule = 16;
  static constexpr int64_t kStreamSteps = 16;

  AMXTiles() = default;
  AMXTiles(const AMXTiles&) = delete;
  AMXTiles& operator=(const AMXTiles&) = delete;
  ~AMXTiles() {
    if (configured_rows_ != 0) _tile_release();
  }

  // Rows of int8 have codes for all steps of a panel.
  void prepare(View<const X> x, int64_t steps) {
    if constexpr (sizeof(X) == 1) {
      x_ = x;
    } else {
      x_ = padded_rows(x, steps * kElements);
    }
  }

  void multiply(int64_t first_row, int64_t rows, const Chunk& weights, int64_t step, int64_t steps,
                bool accumulate, float* out, Prefetch ahead) {
    const X* x = x_.row(first_row) + step * kElements;
    configure(rows);
    if (ahead.steps == steps) {
      multiply_panel<StreamFetch>(x, rows, weights, steps, accumulate, out, ahead);
    } else {
      multiply_panel<PartFetch>(x, rows, weights, steps, accumulate, out, ahead);
    }
  }

  template <class Other>
  void multiply_strip(int64_t first_row, int64_t rows, const std::byte* weights, int64_t step,
                      int64_t steps, bool accumulate, float* out, const BlockFetch<Other>& fetch) {
    const X* x = x_.row(first_row) + step * kElements;
    configure(rows);
    if (rows <= kTileRows) return one_by_two(x, weights, steps, accumulate, out, fetch);
    two_by_two<kPassing>(x, weights, steps, accumulate, out, fetch);
  }

 private:
  static constexpr int64_t kElements = 4 / sizeof(X);  // of a step
  static constexpr int64_t kTileRows = 16;
  static constexpr int64_t kTileSteps = 16;
  static constexpr int64_t kPanelOutBytes = kPanelColumns * sizeof(float);
  static constexpr int64_t kStripOutBytes = kStripColumns * sizeof(float);

  // Whether x is used again from the first cache, or must not push the weights out of it.
  enum Reuse { kKept, kPassing };

  // Tiles have as many rows as x has left, so that nothing is read or written behind its end.
  void configure(int64_t rows) {
    if (rows == configured_rows_) return;
    TileConfiguration configuration;
    if (rows <= kTileRows) {
      configuration.set({0, 1, 2, 3, 4}, rows, kLineBytes);
    } else {
      configuration.set({0, 1, 4}, kTileRows, kLineBytes);
      configuration.set({2, 3, 5}, rows - kTileRows, kLineBytes);
    }
    configuration.set({6, 7}, kTileSteps, kLineBytes);
    configuration.load();
    configured_rows_ = rows;
  }

  template <class Fetch>
  void multiply_panel(const X* x, int64_t rows, const Chunk& weights, int64_t steps,
                      bool accumulate, float* out, const Prefetch& ahead) const {
    if (rows <= kTileRows) return one_by_four<Fetch>(x, weights, steps, accumulate, out, ahead);
    for (int64_t strip = 0; strip < kStrips; ++strip) {
      const int64_t column = strip * kStripColumns;
      two_by_two<kKept>(x, weights.at(column), steps, accumulate, out + column,
                        Fetch(ahead, strip));
    }
  }

  template <class Fetch>
  void one_by_four(const X* x, const Chunk& weights, int64_t steps, bool accumulate, float* out,
                   const Prefetch& ahead) const {
    const int64_t x_bytes = x_.stride * sizeof(X);
    const std::byte* first = weights.at(0);
    const std::byte* second = weights.at(kStripColumns);
    Fetch first_ahead(ahead, 0), second_ahead(ahead, 1);
    if (accumulate) {
      _tile_loadd(0, out, kPanelOutBytes);
      _tile_loadd(1, out + 16, kPanelOutBytes);
      _tile_loadd(2, out + 32, kPanelOutBytes);
      _tile_loadd(3, out + 48, kPanelOutBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s += kTileSteps) {
      _tile_loadd(4, x + s * kElements, x_bytes);
      _tile_loadd(6, first + s * kStepBytes, kStepBytes);
      PIO_TILE_PRODUCT(0, 4, 6)
      first_ahead.before(0);
      _tile_loadd(7, first + s * kStepBytes + kLineBytes, kStepBytes);
      PIO_TILE_PRODUCT(1, 4, 7)
      first_ahead.before(1);
      _tile_loadd(6, second + s * kStepBytes, kStepBytes);
      PIO_TILE_PRODUCT(2, 4, 6)
      second_ahead.before(0);
      _tile_loadd(7, second + s * kStepBytes + kLineBytes, kStepBytes);
      PIO_TILE_PRODUCT(3, 4, 7)
      second_ahead.before(1);
    }
    _tile_stored(0, out, kPanelOutBytes);
    _tile_stored(1, out + 16, kPanelOutBytes);
    _tile_stored(2, out + 32, kPanelOutBytes);
    _tile_stored(3, out + 48, kPanelOutBytes);
  }

  template <class Fetch>
  void one_by_two(const X* x, const std::byte* strip, int64_t steps, bool accumulate, float* out,
                  Fetch fetch) const {
    const int64_t x_bytes = x_.stride * sizeof(X);
    if (accumulate) {
      _tile_loadd(0, out, kStripOutBytes);
      _tile_loadd(1, out + 16, kStripOutBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (int64_t s = 0; s < steps; s += kTileSteps) {
      const std::byte* weights = strip + s * kStepBytes;
      _tile_loadd(4, x + s * kElements, x_bytes);
      _tile_loadd(6, weights, kStepBytes);
      PIO_TILE_PRODUCT(0, 4, 6)
      fetch.before(0);
      _tile_loadd(7, weights + kLineBytes, kStepBytes);
      PIO_TILE_PRODUCT(1, 4, 7)
      fetch.before(1);
    }
    _tile_stored(0, out, kStripOutBytes);
    _tile_stored(1, out + 16, kStripOutBytes);
  }

  template <Reuse reuse, class Fetch>
  void two_by_two(const X* x, const std::byte* strip, int64_t steps, bool accumulate, float* out,
                  Fetch fetch) const {
    const int64_t x_bytes = x_.stride * sizeof(X);
    // Sums of a panel or of a strip.
    constexpr int64_t kOutBytes = reuse == kKept ? kPanelOutBytes : kStripOutBytes;
    const X* lower = x + kTileRows * x_.stride;
    float* lower_out = out + kTileRows * kOutBytes / static_cast<int64_t>(sizeof(float));
    if (accumulate) {
      _tile_loadd(0, out, kOutBytes);
      _tile_loadd(1, out + 16, kOutBytes);
      _tile_loadd(2, lower_out, kOutBytes);
      _tile_loadd(3, lower_out + 16, kOutBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s += kTileSteps) {
      const std::byte* weights = strip + s * kStepBytes;
      if constexpr (reuse == kPassing) {
        _tile_stream_loadd(4, x + s * kElements, x_bytes);
      } else {
        _tile_loadd(4, x + s * kElements, x_bytes);
      }
      _tile_loadd(6, weights, kStepBytes);
      PIO_TILE_PRODUCT(0, 4, 6)
      fetch.before(0);
      _tile_loadd(7, weights + kLineBytes, kStepBytes);
      PIO_TILE_PRODUCT(1, 4, 7)
      fetch.before(1);
      if constexpr (reuse == kPassing) {
        _tile_stream_loadd(5, lower + s * kElements, x_bytes);
      } else {
        _tile_loadd(5, lower + s * kElements, x_bytes);
      }
      PIO_TILE_PRODUCT(2, 5, 6)
      PIO_TILE_PRODUCT(3, 5, 7)
    }
    _tile_stored(0, out, kOutBytes);
    _tile_stored(1, out + 16, kOutBytes);
    _tile_stored(2, lower_out, kOutBytes);
    _tile_stored(3, lower_out + 16, kOutBytes);
  }

  View<const X> x_{};
  int64_t configured_rows_ = 0;
};

#undef PIO_TILE_PRODUCT

template <>
class Tiles<bf16> : public AMXTiles<bf16> {};
template <>
class Tiles<int8_t> : public AMXTiles<int8_t> {};

}  // namespace pio
