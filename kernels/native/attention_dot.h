// Scores and weighted values straight from the cache's rows, for any number of query rows.
//
// An engine computes blocks of query rows against one part of a head's keys: scores, then, with the
// weights that softmax made of them, sums of values. This one is for every type and build.
// Every score is a sum along head_dim in the same lanes and the same order, every output a sum over
// the keys in order; so a row's result does not depend on the rows beside it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attention_plan.h"
#include "attention_scales.h"
#include "simd.h"

namespace pio {

// The rows of one part of one head's keys; the value of a key lies `value_offset` behind it.
template <class E>
struct PartRows {
  const E* keys[kPartKeys + 64];  // padded with the last key, so that tiles are whole
  int64_t value_offset;
  int begin;  // position of the first key
  int count;
  PartScales<E> scales;
};

// How elements of type E are multiplied with queries of type T: widened to float32.
template <class T, class E>
struct DotStep {
  using Query = float;
  using Operand = simd::Floats;
  static constexpr int kStep = simd::kLanes;

  static PIO_INLINE Operand query(const Query* from) { return simd::load(from); }
  static PIO_INLINE Operand key(const E* from) { return simd::load(from); }
  static PIO_INLINE Operand key_part(const E* from, int count) {
    return simd::load_part(from, count);
  }
  static PIO_INLINE simd::Floats add(simd::Floats sum, Operand a, Operand b) {
    return simd::fma(a, b, sum);
  }
};

#ifdef __AVX512BF16__
// Pairs of bf16 at once.
template <>
struct DotStep<bf16, bf16> {
  using Query = bf16;
  using Operand = __m512bh;
  static constexpr int kStep = 2 * simd::kLanes;

  static PIO_INLINE Operand query(const Query* from) {
    return reinterpret_cast<Operand>(_mm512_loadu_si512(from));
  }
  static PIO_INLINE Operand key(const bf16* from) { return query(from); }
  static PIO_INLINE Operand key_part(const bf16* from, int count) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return reinterpret_cast<Operand>(_mm512_maskz_loadu_epi16(mask, from));
  }
  static PIO_INLINE simd::Floats add(simd::Floats sum, Operand a, Operand b) {
    return _mm512_dpbf16_ps(sum, a, b);
  }
};
#endif

// Of queries of type T over elements of type E: T, or codes, whose scales are the softmax's business.
template <class T, class E>
class DotAttention {
 public:
  using Query = typename DotStep<T, E>::Query;
  using Weight = float;
  static constexpr int kBlockRows = 32;

  // Engines of every kind get memory of their own for what `prepare` makes; this one makes nothing.
  static int64_t memory_bytes(int) { return 0; }
  DotAttention(int head_dim, std::byte*) : head_dim_(head_dim) {}

  // Takes the part that the next calls are about, and the one after it, if that is known.
  void prepare(const PartRows<E>& part, const PartRows<E>* next) {
    part_ = &part;
    next_ = next;
  }

  // scores[r][j] = queries[r] . key j, for j below `visible[r]` at least; `visible` ascends.
  void scores(const Query* queries, int64_t query_stride, int rows, const int* visible,
              float* scores, int64_t stride) const {
    const int count = visible[rows - 1];
    for (int key = 0; key < count; key += kTileKeys) {
      prefetch(key + kKeysAhead);
      for (int row = 0; row < rows; row += kTileRows) {
        const int tile = std::min(kTileRows, rows - row);
        if (visible[row + tile - 1] <= key) continue;
        score_tile(tile, queries + row * query_stride, query_stride, part_->keys + key,
                   scores + row * stride + key, stride);
      }
    }
  }

  // out[r] = the sum of weights[r][j] * value j over the first `count` keys; rows of `out` are
  // written in whole vectors.
  void values(const Weight* weights, int64_t weight_stride, int rows, int count, float* out,
              int64_t out_stride) const {
    for (int row = 0; row < rows; row += kTileRows) {
      const Weight* w = weights + row * weight_stride;
      float* o = out + row * out_stride;
      switch (std::min(kTileRows, rows - row)) {
        case 1: value_rows<1>(w, weight_stride, count, o, out_stride); break;
        case 2: value_rows<2>(w, weight_stride, count, o, out_stride); break;
        case 3: value_rows<std::min(3, kTileRows)>(w, weight_stride, count, o, out_stride); break;
        default: value_rows<kTileRows>(w, weight_stride, count, o, out_stride); break;
      }
    }
  }

 private:
  // Loops over sums carry a pragma each: sums stay in registers only where all are unrolled.
  using Step = DotStep<T, E>;
  using Floats = simd::Floats;
  static constexpr int kLanes = simd::kLanes;
  static constexpr int kTileKeys = 4;
  // A tile's sums are as many vectors as one has lanes: they are added up all at once.
  static constexpr int kTileRows = kLanes / kTileKeys;
  // The memory is kept busy while a part's sums are added up, its softmax and the next one's begin
  // are computed: rows are asked for by their distance in the order in which they are read.
  static constexpr int kKeysAhead = 32;

  static int whole_tiles(const PartRows<E>& part) {
    return (part.count + kTileKeys - 1) / kTileKeys * kTileKeys;
  }

  // A tile of rows in the order: the part's keys, its values, keys and values of the next part.
  void prefetch(int row) const {
    const PartRows<E>* part = part_;
    if (row >= 2 * whole_tiles(*part)) {
      if (next_ == nullptr) return;
      row -= 2 * whole_tiles(*part);
      part = next_;
    }
    const int rows = whole_tiles(*part);
    int64_t offset = 0;
    if (row >= rows) {
      row -= rows;
      offset = part->value_offset;
      if (row >= rows) return;
    }
    for (int i = 0; i < kTileKeys; ++i) {
      const char* line = reinterpret_cast<const char*>(part->keys[row + i] + offset);
      for (size_t byte = 0; byte < head_dim_ * sizeof(E); byte += 64) simd::fetch(line + byte);
    }
  }

  void score_tile(int rows, const Query* queries, int64_t query_stride, const E* const* keys,
                  float* scores, int64_t stride) const {
    switch (rows) {
      case 1: return score_rows<1>(queries, query_stride, keys, scores, stride);
      case 2: return score_rows<2>(queries, query_stride, keys, scores, stride);
      case 3: return score_rows<std::min(3, kTileRows)>(queries, query_stride, keys, scores, stride);
      default: return score_rows<kTileRows>(queries, query_stride, keys, scores, stride);
    }
  }

  template <int kRows>
  void score_rows(const Query* queries, int64_t query_stride, const E* const* keys, float* scores,
                  int64_t stride) const {
    Floats sums[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = simd::zeros();
    const auto add = [&](int i, auto load_key) __attribute__((always_inline)) {
      typename Step::Operand query[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) query[r] = Step::query(queries + r * query_stride + i);
#pragma GCC unroll 4
      for (int k = 0; k < kTileKeys; ++k) {
        const typename Step::Operand key = load_key(keys[k] + i);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[r * kTileKeys + k] = Step::add(sums[r * kTileKeys + k], query[r], key);
        }
      }
    };
    int i = 0;
    for (; i + Step::kStep <= head_dim_; i += Step::kStep) {
      add(i, [](const E* key) __attribute__((always_inline)) { return Step::key(key); });
    }
    if (i < head_dim_) {
      const int rest = head_dim_ - i;
      add(i, [rest](const E* key) __attribute__((always_inline)) {
        return Step::key_part(key, rest);
      });
    }
    const Floats all = simd::sums_of_each(sums);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) _mm_storeu_ps(scores + r * stride, simd::four_lanes(all, r));
  }

  template <int kRows>
  void value_rows(const Weight* weights, int64_t weight_stride, int count, float* out,
                  int64_t out_stride) const {
    constexpr int kVectors = kLanes == 16 && kRows <= 2 ? 8 : 4;  // as the registers allow
    int column = 0;
    for (; column + kVectors * kLanes <= head_dim_; column += kVectors * kLanes) {
      value_columns<kRows, kVectors>(weights, weight_stride, count, column, out, out_stride,
                                     [](const E* from) { return simd::load(from); });
    }
    for (; column + kLanes <= head_dim_; column += kLanes) {
      value_columns<kRows, 1>(weights, weight_stride, count, column, out, out_stride,
                              [](const E* from) { return simd::load(from); });
    }
    if (column < head_dim_) {
      const int rest = head_dim_ - column;
      value_columns<kRows, 1>(weights, weight_stride, count, column, out, out_stride,
                              [rest](const E* from) { return simd::load_part(from, rest); });
    }
  }

  template <int kRows, int kVectors, class Load>
  void value_columns(const Weight* weights, int64_t weight_stride, int count, int column,
                     float* out, int64_t out_stride, Load load) const {
    Floats sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = simd::zeros();
    }
    const int64_t offset = part_->value_offset + column;
    const int values_begin = whole_tiles(*part_);
    for (int key = 0; key < count; ++key) {
      if (column == 0 && key % kTileKeys == 0) prefetch(values_begin + key + kKeysAhead);
      Floats weight[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) weight[r] = simd::filled(weights[r * weight_stride + key]);
      const E* value = part_->keys[key] + offset;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Floats element = load(value + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r][v] = simd::fma(weight[r], element, sums[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        simd::store(out + r * out_stride + column + v * kLanes, sums[r][v]);
      }
    }
  }

  const int head_dim_;
  const PartRows<E>* part_ = nullptr;
  const PartRows<E>* next_ = nullptr;
};

}  // namespace pio
