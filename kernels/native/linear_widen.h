// Codes to the numbers they stand for, in the layout of a dense panel, with AVX-512.
#pragma once

#include "linear_codes.h"
#include "simd_codes.h"

#ifdef __AVX512F__

namespace pio {

// How far ahead codes are fetched from memory.
constexpr int64_t kCodesAhead = 4096;

// Where blocks are widened to: to both strips of a chunk.
template <class T>
struct BlockOut {
  T* data;
  int64_t strip_codes;  // from the first strip to the second

  // The place of a block's code.
  PIO_INLINE T* at(int64_t code) const {
    return data + code / kBlockStripCodes * strip_codes + code % kBlockStripCodes;
  }
  PIO_INLINE BlockOut behind(int64_t blocks) const {
    return {data + blocks * kBlockStripCodes, strip_codes};
  }
};

// The readers of a block call take(i, a, b) for each two vectors of numbers, the codes from i on.
class ByteCodes {
 public:
  template <class Take>
  PIO_INLINE void read(const std::byte* block, Take take) const {
    __builtin_prefetch(block + kCodesAhead);
    __builtin_prefetch(block + kCodesAhead + 64);
    each(block, take);
  }

  // Codes that stand for themselves.
  PIO_INLINE void widen(const std::byte* block, const BlockOut<float>& out) const {
    each(block, [&](int i, simd::Floats a, simd::Floats b) __attribute__((always_inline)) {
      simd::store_both(out.at(i), a, b);
    });
  }
  PIO_INLINE void widen(const std::byte* block, const BlockOut<bf16>& out) const {
#pragma GCC unroll 8
    for (int i = 0; i < kPanelColumns; i += simd::kLanes) {
      const std::byte* first = block + i / 16 * 32 + i % 16;
      simd::store_exact_pairs(out.at(2 * i), simd::load_int8(first), simd::load_int8(first + 16));
    }
  }

 private:
  template <class Take>
  static PIO_INLINE void each(const std::byte* block, Take take) {
#pragma GCC unroll 8
    for (int i = 0; i < kBlockCodes; i += 2 * simd::kLanes) {
      take(i, simd::load_int8(block + i), simd::load_int8(block + i + simd::kLanes));
    }
  }
};

class NibbleCodes {
 public:
  explicit NibbleCodes(const float* table) : table_(table) {}

  template <class Take>
  PIO_INLINE void read(const std::byte* block, Take take) const {
    __builtin_prefetch(block + kCodesAhead);
    simd::Words words = simd::load_words(block);
#pragma GCC unroll 4
    for (int i = 0; i < kBlockCodes; i += 2 * simd::kLanes) {
      const simd::Words next = simd::without_lowest_code(words);
      take(i, table_.at(words), table_.at(next));
      words = simd::without_lowest_code(next);
    }
  }

 private:
  simd::Table table_;
};

// What each column of a group has, once for every element of a block.
template <class T>
struct alignas(64) BlockTerms {
  float values[kBlockCodes];

  // `load(column)` gives a vector's columns from there on.
  template <class Load>
  explicit BlockTerms(Load load) {
    for (int64_t column = 0; column < kPanelColumns; column += simd::kLanes) {
      const simd::Floats x = load(column);
      if constexpr (sizeof(T) == 4) {
        float* first = values + column / kStripColumns * kBlockStripCodes + column % kStripColumns;
        simd::store(first, x);
        simd::store(first + kStripColumns, x);
      } else {
        simd::store_doubled(values + column * 2, x);
      }
    }
  }
};

template <class T>
BlockTerms<T> scales_of(const GroupLayout& layout, const std::byte* group) {
  return BlockTerms<T>([&](int64_t column) {
    const std::byte* from = group + column * layout.scale_bytes;
    return layout.scale_bytes == 2 ? simd::load_half(reinterpret_cast<const uint16_t*>(from))
                                   : simd::load(reinterpret_cast<const float*>(from));
  });
}

template <class T, class Codes>
void widen_scaled(const GroupLayout& layout, const Codes codes, const std::byte* group,
                  int64_t first, int64_t count, BlockOut<T> out) {
  const std::byte* block = group + layout.codes_at() + first * layout.block_bytes;
  // One loop for each kind of group: a test in it would cost as much as the rest.
  const auto for_blocks = [&](auto finished) __attribute__((always_inline)) {
    for (int64_t b = 0; b < count; ++b, block += layout.block_bytes, out = out.behind(1)) {
      codes.read(block, [&](int i, simd::Floats x, simd::Floats y) __attribute__((always_inline)) {
        simd::store_both(out.at(i), finished(i, x), finished(i + simd::kLanes, y));
      });
    }
  };
  const BlockTerms<T> scales = scales_of<T>(layout, group);
  if (layout.zero_bytes == 0) {
    return for_blocks([&](int i, simd::Floats x) { return x * simd::load(scales.values + i); });
  }
  const BlockTerms<T> zeros(
      [&](int64_t column) { return simd::load_int8(group + layout.zeros_at() + column); });
  for_blocks([&](int i, simd::Floats x) {
    return (x - simd::load(zeros.values + i)) * simd::load(scales.values + i);
  });
}

// `count` blocks of the group that begins at `group`, from block `first` on.
template <class T>
void widen(const GroupLayout& layout, const float* table, const std::byte* group, int64_t first,
           int64_t count, BlockOut<T> out) {
  if (layout.block_bytes != kBlockCodes) {
    widen_scaled(layout, NibbleCodes(table), group, first, count, out);
  } else if (layout.scale_bytes != 0) {
    widen_scaled(layout, ByteCodes(), group, first, count, out);
  } else {
    const std::byte* block = group + first * kBlockCodes;
    const std::byte* behind = block + count * kBlockCodes;  // half of it: see `CodePanels::ahead`
    for (int64_t b = 0; b < count; ++b) {
      __builtin_prefetch(behind + b * kBlockCodes / 2);
      ByteCodes().widen(block + b * kBlockCodes, out.behind(b));
    }
  }
}

}  // namespace pio

#endif
