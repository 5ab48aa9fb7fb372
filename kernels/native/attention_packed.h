// Scores and weighted values of many bf16 rows as two products of matrices: keys and values are
// laid out for them once for each part and tile.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention_dot.h"
#include "simd.h"
#include "simd_transpose.h"
#include "tile_configuration.h"

namespace pio {

#ifdef __AVX512BF16__

// Panels of 64 columns; a panel's row holds a pair of neighbours along the sum for each column.
constexpr int kPanelWidth = 64;

// product = a @ panel, for `steps` times 32 elements along the sum.
// `a` has kBlockRows rows, those behind `rows` may hold anything; likewise `product`.
class PanelProduct {
 public:
#ifdef __AMX_BF16__
  static constexpr int kBlockRows = 32;

  PanelProduct() {
    TileConfiguration all;
    all.set({0, 1, 2, 3, 4, 5, 6, 7}, kTileRows, kTileRowBytes);
    all.load();
  }
  ~PanelProduct() { _tile_release(); }

  void operator()(const bf16* a, int64_t a_stride, int rows, const uint32_t* panel, int steps,
                  float* product, int64_t stride) const {
    for (int column = 0; column < kPanelWidth; column += 32) {
      if (rows > 16) {
        two_by_two(a, a_stride, panel + column, steps, product + column, stride);
      } else {
        one_by_two(a, a_stride, panel + column, steps, product + column, stride);
      }
    }
  }

 private:
  static constexpr int64_t kTileRows = 16;
  static constexpr int64_t kTileRowBytes = 64;
  static constexpr int64_t kPanelBytes = kPanelWidth * sizeof(uint32_t);

  // Tiles 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 columns of the panel.
  static void two_by_two(const bf16* a, int64_t a_stride, const uint32_t* panel, int steps,
                         float* product, int64_t stride) {
    const int64_t a_bytes = a_stride * int64_t{sizeof(bf16)};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < steps; ++step, a += 32, panel += 16 * kPanelWidth) {
      _tile_loadd(6, panel, kPanelBytes);
      _tile_loadd(7, panel + 16, kPanelBytes);
      _tile_loadd(4, a, a_bytes);
      _tile_loadd(5, a + 16 * a_stride, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    const int64_t bytes = stride * int64_t{sizeof(float)};
    _tile_stored(0, product, bytes);
    _tile_stored(1, product + 16, bytes);
    _tile_stored(2, product + 16 * stride, bytes);
    _tile_stored(3, product + 16 * stride + 16, bytes);
  }

  static void one_by_two(const bf16* a, int64_t a_stride, const uint32_t* panel, int steps,
                         float* product, int64_t stride) {
    const int64_t a_bytes = a_stride * int64_t{sizeof(bf16)};
    _tile_zero(0);
    _tile_zero(1);
    for (int step = 0; step < steps; ++step, a += 32, panel += 16 * kPanelWidth) {
      _tile_loadd(6, panel, kPanelBytes);
      _tile_loadd(7, panel + 16, kPanelBytes);
      _tile_loadd(4, a, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    const int64_t bytes = stride * int64_t{sizeof(float)};
    _tile_stored(0, product, bytes);
    _tile_stored(1, product + 16, bytes);
  }
#else
  static constexpr int kBlockRows = 24;

  PanelProduct() {}

  void operator()(const bf16* a, int64_t a_stride, int rows, const uint32_t* panel, int steps,
                  float* product, int64_t stride) const {
    for (int row = 0; row < rows; row += kTileRows) {
      multiply(a + row * a_stride, a_stride, panel, steps, product + row * stride, stride);
    }
  }

 private:
  static constexpr int kTileRows = 6;  // 24 sums, 4 columns and a pair: all but 3 registers

  static void multiply(const bf16* a, int64_t a_stride, const uint32_t* panel, int steps,
                       float* product, int64_t stride) {
    constexpr int kVectors = kPanelWidth / simd::kLanes;
    simd::Floats sums[kTileRows][kVectors];
    // Sums stay in registers only where all loops over them are unrolled.
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = simd::zeros();
    }
    for (int pair = 0; pair < steps * 16; ++pair, a += 2, panel += kPanelWidth) {
      __m512bh columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        columns[v] = reinterpret_cast<__m512bh>(_mm512_load_si512(panel + v * simd::kLanes));
      }
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        int32_t both;
        std::memcpy(&both, a + r * a_stride, sizeof both);
        const auto element = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = _mm512_dpbf16_ps(sums[r][v], element, columns[v]);
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        simd::store(product + r * stride + v * simd::kLanes, sums[r][v]);
      }
    }
  }
#endif
};

// Of keys and values in bf16, or in codes: bf16 holds the numbers of all codes exactly.
template <class E>
class PackedAttention {
 public:
  using Query = bf16;
  using Weight = bf16;
  static constexpr int kBlockRows = PanelProduct::kBlockRows;

  static int64_t memory_bytes(int head_dim) {
    return (key_pairs(head_dim) + value_panels(head_dim) * kValuePanel) * int64_t{sizeof(uint32_t)};
  }
  // `memory` is aligned to 64 bytes.
  PackedAttention(int head_dim, std::byte* memory)
      : head_dim_(head_dim),
        keys_(reinterpret_cast<uint32_t*>(memory)),
        values_(keys_ + key_pairs(head_dim)) {}

  void prepare(const PartRows<E>& part, const PartRows<E>* /*next*/) {
    for (int key = 0; key < part.count; key += 16) pack_keys(part, key);
    for (int panel = 0; panel < value_panels(head_dim_); ++panel) pack_values(part, panel);
  }

  void scores(const Query* queries, int64_t query_stride, int rows, const int* visible,
              float* scores, int64_t stride) const {
    const int count = visible[rows - 1], steps = key_steps(head_dim_);
    const uint32_t* panel = keys_;
    for (int key = 0; key < count; key += kPanelWidth, panel += steps * 16 * kPanelWidth) {
      product_(queries, query_stride, rows, panel, steps, scores + key, stride);
    }
  }

  void values(const Weight* weights, int64_t weight_stride, int rows, int count, float* out,
              int64_t out_stride) const {
    const int steps = (count + 31) / 32;
    for (int panel = 0; panel < value_panels(head_dim_); ++panel) {
      product_(weights, weight_stride, rows, values_ + panel * kValuePanel, steps,
               out + panel * kPanelWidth, out_stride);
    }
  }

 private:
  static constexpr int64_t kValuePanel = int64_t{kPartKeys} / 2 * kPanelWidth;

  static int64_t key_pairs(int head_dim) { return int64_t{kPartKeys} * key_steps(head_dim) * 16; }
  static int key_steps(int head_dim) { return (head_dim + 31) / 32; }
  static int value_panels(int head_dim) { return (head_dim + kPanelWidth - 1) / kPanelWidth; }

  // Of 32 elements those that lie before the end, `count` elements away; it may be behind us.
  static __mmask32 inside(int count) {
    return static_cast<__mmask32>((uint64_t{1} << std::clamp(count, 0, 32)) - 1);
  }

  // Those of 32 elements that `mask` has, zeros for the others.
  static PIO_INLINE __m512i load_bf16(__mmask32 mask, const E* from) {
    if constexpr (kIsCode<E>) {
      const __m256i codes = _mm256_maskz_loadu_epi8(mask, from);
      const simd::Floats low = simd::widened(from, _mm256_castsi256_si128(codes));
      const simd::Floats high = simd::widened(from, _mm256_extracti128_si256(codes, 1));
      return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    } else {
      return _mm512_maskz_loadu_epi16(mask, from);
    }
  }

  // Sixteen keys, as pairs along head_dim; zeros behind its end.
  void pack_keys(const PartRows<E>& part, int key) {
    const int steps = key_steps(head_dim_);
    uint32_t* to = keys_ + key / kPanelWidth * int64_t{steps} * 16 * kPanelWidth +
                   key % kPanelWidth;
    for (int step = 0; step < steps; ++step) {
      const __mmask32 mask = inside(head_dim_ - step * 32);
      __m512i rows[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) {
        rows[k] = load_bf16(mask, part.keys[key + k] + step * 32);
      }
      simd::transpose(rows);
#pragma GCC unroll 16
      for (int pair = 0; pair < 16; ++pair) _mm512_store_si512(to + pair * kPanelWidth, rows[pair]);
      to += 16 * kPanelWidth;
    }
  }

  // Pairs of neighbouring keys' values in 64 columns; zeros behind the last key and column.
  void pack_values(const PartRows<E>& part, int panel) {
    alignas(64) uint16_t index[64];  // where the pairs' elements come from: key 0, key 1, key 0, ...
    for (uint16_t i = 0; i < 64; ++i) index[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    const __m512i low = _mm512_load_si512(index), high = _mm512_load_si512(index + 32);
    const int column = panel * kPanelWidth;
    const __mmask32 left = inside(head_dim_ - column), right = inside(head_dim_ - column - 32);

    uint32_t* to = values_ + panel * kValuePanel;
    const auto pack_pair = [&](const E* first, const E* second, bool whole) {
      for (const int half : {0, 32}) {
        const __mmask32 mask = half == 0 ? left : right;
        const __m512i a = load_bf16(mask, first + half);
        const __m512i b = load_bf16(whole ? mask : 0, second + half);
        _mm512_store_si512(to + half, _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(to + half + 16, _mm512_permutex2var_epi16(a, high, b));
      }
      to += kPanelWidth;
    };
    const int64_t offset = part.value_offset + column;
    int key = 0;
    for (; key + 2 <= part.count; key += 2) {
      pack_pair(part.keys[key] + offset, part.keys[key + 1] + offset, true);
    }
    if (key < part.count) {
      const E* last = part.keys[key] + offset;
      pack_pair(last, last, false);
      key += 2;
    }
    for (; key % 32 != 0; key += 2, to += kPanelWidth) {
      for (int i = 0; i < kPanelWidth; i += 16) _mm512_store_si512(to + i, _mm512_setzero_si512());
    }
  }

  const int head_dim_;
  uint32_t* const keys_;
  uint32_t* const values_;
  const PanelProduct product_;
};
#endif

}  // namespace pio
