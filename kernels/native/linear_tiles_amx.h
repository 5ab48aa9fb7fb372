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

namespace pio {

// Which of the eight tile registers holds what.
//   up to 16 rows: sums 0 1 2 3 (one for each 16 columns of the panel), x 4, weights 6 7;
//                  of a strip, sums 0 1
//   up to 32 rows: sums 0 1 (rows 0-15), 2 3 (rows 16-31), x 4 5, weights 6 7; one strip at a time
template <>
class Tiles<bf16> {
 public:
  static constexpr int64_t kRows = 32;
  static constexpr int64_t kBlockRows = 512;
  static constexpr int64_t kChunkSteps = 256;
  static constexpr bool kByStrips = true;
  static constexpr int64_t kStepGranule = 16;
  static constexpr int64_t kStreamSteps = 16;

  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (configured_rows_ != 0) _tile_release();
  }

  void prepare(View<const bf16> x, int64_t steps) { x_ = padded_rows(x, steps * 2); }

  void multiply(int64_t first_row, int64_t rows, const Chunk& weights, int64_t step, int64_t steps,
                bool accumulate, float* out, Prefetch ahead) {
    const bf16* x = x_.row(first_row) + step * 2;
    configure(rows);
    if (rows <= kTileRows) return one_by_four(x, weights, steps, accumulate, out, ahead);
    for (int64_t strip = 0; strip < kStrips; ++strip) {
      const int64_t column = strip * kStripColumns;
      two_by_two<kKept>(x, weights.at(column), steps, accumulate, out + column,
                        StreamFetch(ahead, strip));
    }
  }

  template <class Other>
  void multiply_strip(int64_t first_row, int64_t rows, const std::byte* weights, int64_t step,
                      int64_t steps, bool accumulate, float* out, const BlockFetch<Other>& fetch) {
    const bf16* x = x_.row(first_row) + step * 2;
    configure(rows);
    if (rows <= kTileRows) return one_by_two(x, weights, steps, accumulate, out, fetch);
    two_by_two<kPassing>(x, weights, steps, accumulate, out, fetch);
  }

 private:
  static constexpr int64_t kTileRows = 16;
  static constexpr int64_t kTileSteps = 16;
  static constexpr int64_t kPanelOutBytes = kPanelColumns * sizeof(float);
  static constexpr int64_t kStripOutBytes = kStripColumns * sizeof(float);

  // Whether x is used again from the first cache, or must not push the weights out of it.
  enum Reuse { kKept, kPassing };

  // As the LDTILECFG instruction reads it.
  struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(std::initializer_list<int> tiles, int64_t count) {
      for (const int tile : tiles) {
        row_bytes[tile] = kLineBytes;
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
    } else {
      configuration.set({0, 1, 4}, kTileRows);
      configuration.set({2, 3, 5}, rows - kTileRows);
    }
    configuration.set({6, 7}, kTileSteps);
    // GCC's intrinsic reads 8 bytes as far as its optimizer knows.
    asm volatile("ldtilecfg %0" : : "m"(configuration));
    configured_rows_ = rows;
  }

  void one_by_four(const bf16* x, const Chunk& weights, int64_t steps, bool accumulate, float* out,
                   Prefetch ahead) const {
    const int64_t x_bytes = x_.stride * sizeof(bf16);
    const std::byte* first = weights.at(0);
    const std::byte* second = weights.at(kStripColumns);
    StreamFetch first_ahead(ahead, 0), second_ahead(ahead, 1);
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
      _tile_loadd(4, x + s * 2, x_bytes);
      _tile_loadd(6, first + s * kStepBytes, kStepBytes);
      _tile_dpbf16ps(0, 4, 6);
      first_ahead.before(0);
      _tile_loadd(7, first + s * kStepBytes + kLineBytes, kStepBytes);
      _tile_dpbf16ps(1, 4, 7);
      first_ahead.before(1);
      _tile_loadd(6, second + s * kStepBytes, kStepBytes);
      _tile_dpbf16ps(2, 4, 6);
      second_ahead.before(0);
      _tile_loadd(7, second + s * kStepBytes + kLineBytes, kStepBytes);
      _tile_dpbf16ps(3, 4, 7);
      second_ahead.before(1);
    }
    _tile_stored(0, out, kPanelOutBytes);
    _tile_stored(1, out + 16, kPanelOutBytes);
    _tile_stored(2, out + 32, kPanelOutBytes);
    _tile_stored(3, out + 48, kPanelOutBytes);
  }

  template <class Fetch>
  void one_by_two(const bf16* x, const std::byte* strip, int64_t steps, bool accumulate, float* out,
                  Fetch fetch) const {
    const int64_t x_bytes = x_.stride * sizeof(bf16);
    if (accumulate) {
      _tile_loadd(0, out, kStripOutBytes);
      _tile_loadd(1, out + 16, kStripOutBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (int64_t s = 0; s < steps; s += kTileSteps) {
      const std::byte* weights = strip + s * kStepBytes;
      _tile_loadd(4, x + s * 2, x_bytes);
      _tile_loadd(6, weights, kStepBytes);
      _tile_dpbf16ps(0, 4, 6);
      fetch.before(0);
      _tile_loadd(7, weights + kLineBytes, kStepBytes);
      _tile_dpbf16ps(1, 4, 7);
      fetch.before(1);
    }
    _tile_stored(0, out, kStripOutBytes);
    _tile_stored(1, out + 16, kStripOutBytes);
  }

  template <Reuse reuse, class Fetch>
  void two_by_two(const bf16* x, const std::byte* strip, int64_t steps, bool accumulate, float* out,
                  Fetch fetch) const {
    const int64_t x_bytes = x_.stride * sizeof(bf16);
    // Sums of a panel or of a strip.
    constexpr int64_t kOutBytes = reuse == kKept ? kPanelOutBytes : kStripOutBytes;
    const bf16* lower = x + kTileRows * x_.stride;
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
        _tile_stream_loadd(4, x + s * 2, x_bytes);
      } else {
        _tile_loadd(4, x + s * 2, x_bytes);
      }
      _tile_loadd(6, weights, kStepBytes);
      _tile_dpbf16ps(0, 4, 6);
      fetch.before(0);
      _tile_loadd(7, weights + kLineBytes, kStepBytes);
      _tile_dpbf16ps(1, 4, 7);
      fetch.before(1);
      if constexpr (reuse == kPassing) {
        _tile_stream_loadd(5, lower + s * 2, x_bytes);
      } else {
        _tile_loadd(5, lower + s * 2, x_bytes);
      }
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, kOutBytes);
    _tile_stored(1, out + 16, kOutBytes);
    _tile_stored(2, lower_out, kOutBytes);
    _tile_stored(3, lower_out + 16, kOutBytes);
  }

  View<const bf16> x_{};
  int64_t configured_rows_ = 0;
};

}  // namespace pio
