// Codes in tiles to the numbers they stand for.
//
// The numbers of 32 inputs of a column are one vector. Those of 4-bit codes are looked up among the
// sixteen that its group has: to make these for 32 codes is half as much work as to make each
// code's number.
#pragma once

#include "linear_codes.h"
#include "linear_fetch.h"
#include "simd_codes.h"
#include "simd_transpose.h"

#ifdef __AMX_BF16__

namespace pio {

// Codes in tiles are fetched from memory so far ahead, to the second cache: more requests are on their
// way at once than the first cache has room for.
inline void fetch_ahead(const std::byte* codes) { fetch_line(codes + 4096); }

// What the columns of one tile have in a group.
struct alignas(kLineBytes) TileTerms {
  float scales[kTileColumns];
  float zeros[kTileColumns];

  TileTerms(const GroupLayout& layout, const std::byte* group, int64_t first_column) {
    const std::byte* from = group + first_column * layout.scale_bytes;
    fetch_ahead(from);
    simd::store(scales, layout.scale_bytes == 2
                            ? simd::load_half(reinterpret_cast<const uint16_t*>(from))
                            : simd::load(reinterpret_cast<const float*>(from)));
    if (layout.zero_bytes != 0) {
      simd::store(zeros, simd::load_int8(group + layout.zeros_at() + first_column));
    }
    // They shall be broadcast by loads: the compiler would permute what it has in registers, on
    // the port that lookups and roundings need.
    asm volatile("" : "+m"(*this));
  }

  // Codes' numbers, less the zero point, times the scale.
  template <bool kHasZeros>
  PIO_INLINE simd::Floats finished(int column, simd::Floats x) const {
    if constexpr (kHasZeros) x = x - simd::filled(zeros[column]);
    return x * simd::filled(scales[column]);
  }
};

PIO_INLINE __m512i as_bf16(simd::Floats first, simd::Floats second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// The readers of a tile call take(column, numbers) for each of its columns.
template <bool kHasZeros>
class ByteTiles {
 public:
  explicit ByteTiles(const float* /*table*/) {}

  template <class Take>
  PIO_INLINE void read(const std::byte* codes, const TileTerms& terms, Take take) const {
#pragma GCC unroll 16
    for (int column = 0; column < kTileColumns; ++column, codes += kTileInputs) {
      if (column % 2 == 0) fetch_ahead(codes);
      const auto numbers = [&](int from) __attribute__((always_inline)) {
        return terms.finished<kHasZeros>(column, simd::load_int8(codes + from));
      };
      take(column, as_bf16(numbers(0), numbers(16)));
    }
  }
};

template <bool kHasZeros>
class NibbleTiles {
 public:
  explicit NibbleTiles(const float* table) : table_(simd::load(table)) {}

  template <class Take>
  PIO_INLINE void read(const std::byte* codes, const TileTerms& terms, Take take) const {
    const __m512i code = _mm512_set1_epi16(15), upper = _mm512_set1_epi16(16);
#pragma GCC unroll 4
    for (int column = 0; column < kTileColumns; column += 4, codes += kLineBytes) {
      fetch_ahead(codes);
      // Two columns' numbers are one table. A lookup sees five bits of each word: a code and which.
      const auto tables = [&](int low, int high) __attribute__((always_inline)) {
        return as_bf16(terms.finished<kHasZeros>(low, table_),
                       terms.finished<kHasZeros>(high, table_));
      };
      const __m512i first = tables(column, column + 1), second = tables(column + 3, column + 2);
      const __m512i words = _mm512_loadu_si512(codes);
      const auto in_upper = [&](__m512i shifted) __attribute__((always_inline)) {
        return _mm512_ternarylogic_epi32(shifted, code, upper, 0xea);  // (shifted & code) | upper
      };
      const __m512i codes_0 = _mm512_and_si512(words, code);
      const __m512i codes_1 = in_upper(_mm512_srli_epi16(words, 4));
      const __m512i codes_2 = in_upper(_mm512_srli_epi16(words, 8));
      const __m512i codes_3 = _mm512_srli_epi16(words, 12);
      take(column, _mm512_permutexvar_epi16(codes_0, first));
      take(column + 1, _mm512_permutexvar_epi16(codes_1, first));
      take(column + 2, _mm512_permutexvar_epi16(codes_2, second));
      take(column + 3, _mm512_permutexvar_epi16(codes_3, second));
    }
  }

 private:
  simd::Floats table_;
};

// The tiles of a panel one after the other: each is those of 64 columns, four.
class TileCursor {
 public:
  TileCursor(const GroupLayout& layout, const std::byte* panel, int64_t tile)
      : layout_(layout),
        tiles_(layout.inputs / kTileInputs),
        tile_bytes_(kTileInputs / kBlockInputs * layout.block_bytes),
        group_(panel + tile / tiles_ * layout.num_bytes()),
        tile_(tile % tiles_) {}

  void next() {
    if (++tile_ < tiles_) return;
    tile_ = 0;
    group_ += layout_.num_bytes();
  }

  // The 16 columns from `first_column` on.
  template <class Reader, class Take>
  PIO_INLINE void read(const Reader& reader, int64_t first_column, Take take) const {
    const std::byte* codes = group_ + layout_.codes_at() + tile_ * tile_bytes_ +
                             first_column / kTileColumns * (tile_bytes_ / kColumnTiles);
    reader.read(codes, TileTerms(layout_, group_, first_column), take);
  }

 private:
  static constexpr int64_t kColumnTiles = kPanelColumns / kTileColumns;

  const GroupLayout layout_;
  const int64_t tiles_;  // of a group
  const int64_t tile_bytes_;
  const std::byte* group_;
  int64_t tile_;
};

// Calls body(reader) with the reader of this layout.
template <class Body>
void with_tile_reader(const GroupLayout& layout, const float* table, Body body) {
  const bool has_zeros = layout.zero_bytes != 0;
  if (layout.block_bytes == kBlockCodes) {
    return has_zeros ? body(ByteTiles<true>(table)) : body(ByteTiles<false>(table));
  }
  has_zeros ? body(NibbleTiles<true>(table)) : body(NibbleTiles<false>(table));
}

// `tiles` tiles of a panel, from `tile` on, to the layout of a dense panel; see `Chunk`.
inline void widen_tiles(const GroupLayout& layout, const float* table, const std::byte* panel,
                        int64_t tile, int64_t tiles, bf16* out, int64_t strip_elements) {
  constexpr int64_t kSteps = kTileInputs / 2, kStepElements = kStripColumns * 2;
  with_tile_reader(layout, table, [&](const auto& reader) {
    TileCursor cursor(layout, panel, tile);
    for (int64_t t = 0; t < tiles; ++t, cursor.next()) {
      for (int64_t column = 0; column < kPanelColumns; column += kTileColumns) {
        __m512i pairs[kSteps];
        cursor.read(reader, column, [&](int i, __m512i numbers) __attribute__((always_inline)) {
          pairs[i] = numbers;
        });
        simd::transpose(pairs);
        bf16* to = out + column / kStripColumns * strip_elements + column % kStripColumns * 2 +
                   t * kSteps * kStepElements;
#pragma GCC unroll 16
        for (int64_t s = 0; s < kSteps; ++s) _mm512_storeu_si512(to + s * kStepElements, pairs[s]);
      }
    }
  });
}

}  // namespace pio

#endif
