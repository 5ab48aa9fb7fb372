// Tiles of AMX: 16 rows by 16 columns by 16 steps at a time.
//
// All numbers of rows use them, one row too: reading weights is the limit there, and results then
// depend on no other rows.
#pragma once

#include <algorithm>

#include "linear_pad.h"
#include "linear_tiles.h"
#include "simd.h"

namespace pio {

// Which of the eight tile registers holds what.
//   up to 16 rows: sums 0 1 2 3 (one for each quarter of the panel), x 4, weights 5 6
//   up to 32 rows: sums 0 1 (rows 0-15), 2 3 (rows 16-31), x 4 5, weights 6 7; half a panel at once
template <>
class Tiles<bf16> {
 public:
  static constexpr int64_t kRows = 32;
  static constexpr int64_t kBlockRows = 512;
  static constexpr int64_t kStepGranule = 16;
  static constexpr int64_t kStreamSteps = 8;

  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (configured_rows_ != 0) _tile_release();
  }

  void prepare(View<const bf16> x, int64_t steps) { x_ = padded_rows(x, steps * 2); }

  void multiply(int64_t first_row, int64_t rows, const std::byte* panel, int64_t step,
                int64_t steps, bool accumulate, float* out, Prefetch ahead) {
    const bf16* x = x_.row(first_row) + step * 2;
    configure(rows);
    if (rows <= kTileRows) {
      one_by_four(x, panel, steps, accumulate, out, ahead);
    } else {
      two_by_two(x, panel, steps, accumulate, out, ahead);
      ahead.steps = 0;
      two_by_two(x, panel + kStepBytes / 2, steps, accumulate, out + kPanelColumns / 2, ahead);
    }
  }

 private:
  static constexpr int64_t kTileRows = 16;
  static constexpr int64_t kTileSteps = 16;
  static constexpr int64_t kLine = 64;  // bytes of a tile's row
  static constexpr int64_t kOutBytes = kPanelColumns * sizeof(float);

  // As the LDTILECFG instruction reads it.
  struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(std::initializer_list<int> tiles, int64_t count) {
      for (const int tile : tiles) {
        row_bytes[tile] = kLine;
        rows[tile] = static_cast<uint8_t>(count);
      }
    }
  };

  // Tiles have as many rows as x has left, so that nothing is read or written behind its end.
  void configure(int64_t rows) {
    if (rows == configured_rows_) return;
    Configuration configuration;
    if (rows <= kTileRows) {
      configuration.set({0, 1, 2, 3, 4}, rows);
      configuration.set({5, 6}, kTileSteps);
    } else {
      configuration.set({0, 1, 4}, kTileRows);
      configuration.set({2, 3, 5}, rows - kTileRows);
      configuration.set({6, 7}, kTileSteps);
    }
    _tile_loadconfig(&configuration);
    configured_rows_ = rows;
  }

  void one_by_four(const bf16* x, const std::byte* panel, int64_t steps, bool accumulate,
                   float* out, Prefetch ahead) const {
    const int64_t x_bytes = x_.stride * sizeof(bf16);
    if (accumulate) {
      _tile_loadd(0, out, kOutBytes);
      _tile_loadd(1, out + 16, kOutBytes);
      _tile_loadd(2, out + 32, kOutBytes);
      _tile_loadd(3, out + 48, kOutBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s += kTileSteps) {
      const std::byte* weights = panel + s * kStepBytes;
      _tile_loadd(4, x + s * 2, x_bytes);
      _tile_loadd(5, weights, kStepBytes);
      _tile_dpbf16ps(0, 4, 5);
      read_ahead(ahead, s + 0, 4);
      _tile_loadd(6, weights + kLine, kStepBytes);
      _tile_dpbf16ps(1, 4, 6);
      read_ahead(ahead, s + 4, 4);
      _tile_loadd(5, weights + 2 * kLine, kStepBytes);
      _tile_dpbf16ps(2, 4, 5);
      read_ahead(ahead, s + 8, 4);
      _tile_loadd(6, weights + 3 * kLine, kStepBytes);
      _tile_dpbf16ps(3, 4, 6);
      read_ahead(ahead, s + 12, 4);
    }
    _tile_stored(0, out, kOutBytes);
    _tile_stored(1, out + 16, kOutBytes);
    _tile_stored(2, out + 32, kOutBytes);
    _tile_stored(3, out + 48, kOutBytes);
  }

  // `panel` and `out` begin at the first of 32 columns.
  void two_by_two(const bf16* x, const std::byte* panel, int64_t steps, bool accumulate, float* out,
                  Prefetch ahead) const {
    const int64_t x_bytes = x_.stride * sizeof(bf16);
    const bf16* lower = x + kTileRows * x_.stride;
    float* lower_out = out + kTileRows * kPanelColumns;
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
      const std::byte* weights = panel + s * kStepBytes;
      _tile_loadd(4, x + s * 2, x_bytes);
      _tile_loadd(6, weights, kStepBytes);
      _tile_dpbf16ps(0, 4, 6);
      read_ahead(ahead, s + 0, 4);
      _tile_loadd(7, weights + kLine, kStepBytes);
      _tile_dpbf16ps(1, 4, 7);
      read_ahead(ahead, s + 4, 4);
      _tile_loadd(5, lower + s * 2, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      read_ahead(ahead, s + 8, 4);
      _tile_dpbf16ps(3, 5, 7);
      read_ahead(ahead, s + 12, 4);
    }
    _tile_stored(0, out, kOutBytes);
    _tile_stored(1, out + 16, kOutBytes);
    _tile_stored(2, lower_out, kOutBytes);
    _tile_stored(3, lower_out + 16, kOutBytes);
  }

  // A part of what belongs to 16 steps at a time: a burst would fill the queue of missed lines.
  static void read_ahead(Prefetch ahead, int64_t first, int64_t count) {
    const int64_t end = std::min(first + count, ahead.steps);
    for (int64_t step = first; step < end; ++step) prefetch_step(ahead.data + step * kStepBytes);
  }

  View<const bf16> x_{};
  int64_t configured_rows_ = 0;
};

}  // namespace pio
