// Codes to float32, without AVX-512: for the layout of a dense panel, or for products at once.
#pragma once

#include <algorithm>

#include "linear_codes.h"
#include "simd_codes.h"

#ifndef __AVX512F__

namespace pio {

// A reader gives the numbers of 16 columns for one k of a block, before zero points and scales. They
// are `unit(column)` times as large as they shall be, and zero is at `zero()`.
class ByteCodes {
 public:
  static constexpr int64_t kBlockBytes = kBlockCodes;

  static constexpr float unit(int64_t /*column*/) { return 1.0f; }
  float zero() const { return 0.0f; }

  PIO_INLINE simd::FloatPair at(const std::byte* block, int64_t column, int64_t input) const {
    const std::byte* from = block + block_place(column, input);
    return {simd::load_int8(from), simd::load_int8(from + simd::kLanes)};
  }
};

// int4. A code becomes a number where it stands in its word: to shift each of them would take as
// long as what else is done with it.
class WordCodes {
 public:
  static constexpr int64_t kBlockBytes = kBlockCodes / 2;

  explicit WordCodes(const float* table) : zero_(-table[0]) {}

  static constexpr float unit(int64_t column) { return static_cast<float>(1 << (4 * field(column))); }
  float zero() const { return zero_; }

  PIO_INLINE simd::FloatPair at(const std::byte* block, int64_t column, int64_t input) const {
    const std::byte* strip = block + column / kStripColumns * kStripColumns;
    const __m256i words = simd::load_half_words(strip, input != 0);
    return {simd::scaled_code(words, field(column)), simd::scaled_code(words, field(column) + 1)};
  }

 private:
  static constexpr int64_t field(int64_t column) { return column % kStripColumns / simd::kLanes; }

  float zero_;
};

// nf4, or what else sixteen values stand for.
class TableCodes {
 public:
  static constexpr int64_t kBlockBytes = kBlockCodes / 2;

  explicit TableCodes(const float* table) : table_(table) {}

  static constexpr float unit(int64_t /*column*/) { return 1.0f; }
  float zero() const { return 0.0f; }

  PIO_INLINE simd::FloatPair at(const std::byte* block, int64_t column, int64_t input) const {
    const std::byte* strip = block + column / kStripColumns * kStripColumns;
    return table_.at(simd::load_nibbles(strip, input != 0), column % kStripColumns != 0);
  }

 private:
  simd::Table table_;
};

// Brings nearer what lies a few blocks behind `num_bytes` bytes that are read now.
PIO_INLINE void fetch_ahead(const std::byte* from, int64_t num_bytes) {
  constexpr int64_t kAhead = 4096;
  for (int64_t line = 0; line < num_bytes; line += kLineBytes) simd::fetch(from + kAhead + line);
}

// How zero points come into a number: before the scale, or as what their product with it is where
// float32 holds that exactly. Both round once.
enum class Zeros { none, subtracted, folded };

// What the columns of a panel have in a group, as a reader's numbers need it.
template <Zeros kZeros>
struct alignas(kLineBytes) GroupTerms {
  float scales[kPanelColumns];
  float zeros[kPanelColumns];

  template <class Codes>
  GroupTerms(const GroupLayout& layout, const std::byte* group, const Codes& codes) {
    const auto with_scales = [&](auto scale_at) {
      const std::byte* points = group + layout.zeros_at();
      const simd::Floats own = simd::filled(codes.zero());
      if (layout.zero_bytes == 0) return fill<Codes>(scale_at, [&](int64_t) { return own; });
      fill<Codes>(scale_at,
                  [&](int64_t column) { return own + simd::load_int8(points + column); });
    };
    // One loop for each kind of scale: a test in it would cost as much as the rest.
    if (layout.scale_bytes == 2) {
      const auto* scales_at = reinterpret_cast<const uint16_t*>(group);
      with_scales([&](int64_t column) { return simd::load_half(scales_at + column); });
    } else {
      const auto* scales_at = reinterpret_cast<const float*>(group);
      with_scales([&](int64_t column) { return simd::load(scales_at + column); });
    }
  }

  PIO_INLINE simd::Floats finished(int64_t column, simd::Floats x) const {
    const simd::Floats scale = simd::load(scales + column);
    if constexpr (kZeros == Zeros::none) return x * scale;
    const simd::Floats zero = simd::load(zeros + column);
    if constexpr (kZeros == Zeros::subtracted) return (x - zero) * scale;
    return simd::fma(x, scale, zero);
  }

 private:
  template <class Codes, class ScaleAt, class ZeroAt>
  void fill(ScaleAt scale_at, ZeroAt zero_at) {
#pragma GCC unroll 8
    for (int64_t column = 0; column < kPanelColumns; column += simd::kLanes) {
      const simd::Floats scale = scale_at(column);
      simd::store(scales + column, scale * simd::filled(1.0f / Codes::unit(column)));
      if constexpr (kZeros == Zeros::folded) {
        simd::store(zeros + column, (simd::zeros() - zero_at(column)) * scale);
      } else if constexpr (kZeros == Zeros::subtracted) {
        simd::store(zeros + column, zero_at(column) * simd::filled(Codes::unit(column)));
      }
    }
  }
};

// Of codes that stand for themselves.
struct NoTerms {
  NoTerms(const GroupLayout&, const std::byte*, const ByteCodes&) {}
  PIO_INLINE simd::Floats finished(int64_t /*column*/, simd::Floats x) const { return x; }
};

// Calls body(codes) with the reader of this layout, the type of its terms as type parameter.
template <class Body>
void with_codes(const GroupLayout& layout, const float* table, Body body) {
  const bool has_zeros = layout.zero_bytes != 0, has_half_scales = layout.scale_bytes == 2;
  if (layout.in_words) {
    const WordCodes codes(table);  // its own zero is a power of two
    return has_half_scales || !has_zeros
               ? body.template operator()<GroupTerms<Zeros::folded>>(codes)
               : body.template operator()<GroupTerms<Zeros::subtracted>>(codes);
  }
  if (layout.block_bytes != kBlockCodes) {
    const TableCodes codes(table);
    return has_zeros ? body.template operator()<GroupTerms<Zeros::subtracted>>(codes)
                     : body.template operator()<GroupTerms<Zeros::none>>(codes);
  }
  const ByteCodes codes;
  if (layout.scale_bytes == 0) return body.template operator()<NoTerms>(codes);
  if (!has_zeros) return body.template operator()<GroupTerms<Zeros::none>>(codes);
  return has_half_scales ? body.template operator()<GroupTerms<Zeros::folded>>(codes)
                         : body.template operator()<GroupTerms<Zeros::subtracted>>(codes);
}

// Where blocks are widened to: to both strips of a chunk.
template <class T>
struct BlockOut {
  T* data;
  int64_t strip_codes;  // from the first strip to the second

  BlockOut behind(int64_t blocks) const {
    return {data + blocks * kBlockStripCodes, strip_codes};
  }
};

// `count` blocks of the group that begins at `group`, from block `first` on.
inline void widen(const GroupLayout& layout, const float* table, const std::byte* group,
                  int64_t first, int64_t count, const BlockOut<float>& out) {
  with_codes(layout, table, [&]<class Terms>(const auto codes) {
    using Codes = std::remove_const_t<decltype(codes)>;
    const Terms terms(layout, group, codes);
    const std::byte* block = group + layout.codes_at() + first * layout.block_bytes;
    float* to = out.data;
    for (int64_t b = 0; b < count; ++b, block += Codes::kBlockBytes, to += kBlockStripCodes) {
      fetch_ahead(block, Codes::kBlockBytes);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kBlockInputs * kPanelColumns; i += 2 * simd::kLanes) {
        const int64_t input = i / kPanelColumns, column = i % kPanelColumns;
        const simd::FloatPair numbers = codes.at(block, column, input);
        float* at = to + column / kStripColumns * out.strip_codes + input * kStripColumns +
                    column % kStripColumns;
        simd::store(at, terms.finished(column, numbers.first));
        simd::store(at + simd::kLanes, terms.finished(column + simd::kLanes, numbers.second));
      }
    }
  });
}

}  // namespace pio

#endif
