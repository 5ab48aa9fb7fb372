// Codes to the numbers they stand for, in the layout of a dense panel.
#pragma once

#include "linear_codes.h"
#include "simd_codes.h"

namespace pio {

// How far ahead codes are fetched from memory.
constexpr int64_t kCodesAhead = 2048;

// The readers of a block call take(i, codes i, i + 1, ... as float32) for each vector of codes.
class ByteCodes {
 public:
  explicit ByteCodes(const float*) {}

  template <class Take>
  PIO_INLINE void read(const std::byte* block, Take take) const {
    __builtin_prefetch(block + kCodesAhead);
    __builtin_prefetch(block + kCodesAhead + 64);
#pragma GCC unroll 16
    for (int i = 0; i < kBlockCodes; i += simd::kLanes) take(i, simd::load_int8(block + i));
  }
};

class NibbleCodes {
 public:
  explicit NibbleCodes(const float* table) : table_(table) {}

  template <class Take>
  PIO_INLINE void read(const std::byte* block, Take take) const {
    __builtin_prefetch(block + kCodesAhead);
#pragma GCC unroll 2
    for (int lane = 0; lane < 16; lane += simd::kLanes) {
      simd::Words words = simd::load_words(block + lane * 4);
#pragma GCC unroll 8
      for (int field = 0; field < 8; ++field) {
        take(field * 16 + lane, table_.at(words));
        words = simd::without_lowest_code(words);
      }
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
        simd::store(values + column, x);
        simd::store(values + kPanelColumns + column, x);
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
void widen_codes(const GroupLayout& layout, const float* table, const std::byte* group,
                 int64_t first, int64_t count, T* out) {
  const Codes codes(table);
  const std::byte* block = group + layout.codes_at() + first * layout.block_bytes;
  // One loop for each kind of group: a test in it would cost as much as the rest.
  const auto for_blocks = [&](auto finished) __attribute__((always_inline)) {
    for (int64_t b = 0; b < count; ++b, block += layout.block_bytes, out += kBlockCodes) {
      codes.read(block, [&](int i, simd::Floats x) __attribute__((always_inline)) {
        simd::store(out + i, finished(i, x));
      });
    }
  };
  if (layout.scale_bytes == 0) return for_blocks([](int, simd::Floats x) { return x; });
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
           int64_t count, T* out) {
  if (layout.block_bytes == kBlockCodes) {
    widen_codes<T, ByteCodes>(layout, table, group, first, count, out);
  } else {
    widen_codes<T, NibbleCodes>(layout, table, group, first, count, out);
  }
}

}  // namespace pio
