// Which engine computes sequences of many rows: it pays to lay keys and values out for them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention_dot.h"
#include "attention_packed.h"

namespace pio {

// Scores and weighted values over codes that are widened once for all rows of a tile. T holds the
// numbers of all codes exactly, so that a row's result is the same as straight from the codes.
template <class T, class E>
class WidenedAttention : public DotAttention<T, T> {
 public:
  static int64_t memory_bytes(int head_dim) {
    return 2 * int64_t{kPartKeys} * stride(head_dim) * int64_t{sizeof(T)};
  }
  // `memory` is aligned to 64 bytes.
  WidenedAttention(int head_dim, std::byte* memory)
      : DotAttention<T, T>(head_dim, nullptr),
        head_dim_(head_dim),
        memory_(reinterpret_cast<T*>(memory)) {}

  void prepare(const PartRows<E>& part, const PartRows<E>* /*next*/) {
    const int64_t step = stride(head_dim_);
    rows_.count = part.count;
    rows_.value_offset = kPartKeys * step;
    for (int key = 0; key < part.count; ++key) {
      T* to = memory_ + key * step;
      widen(part.keys[key], to);
      widen(part.keys[key] + part.value_offset, to + rows_.value_offset);
      rows_.keys[key] = to;
    }
    std::fill_n(rows_.keys + part.count, 16, rows_.keys[part.count - 1]);
    DotAttention<T, T>::prepare(rows_, nullptr);
  }

 private:
  static int64_t stride(int head_dim) {
    return (head_dim + simd::kLanes - 1) / simd::kLanes * int64_t{simd::kLanes};
  }

  void widen(const E* from, T* to) const {
    int i = 0;
    for (; i + simd::kLanes <= head_dim_; i += simd::kLanes) {
      simd::store(to + i, simd::load(from + i));
    }
    if (i < head_dim_) simd::store(to + i, simd::load_part(from + i, head_dim_ - i));
  }

  const int head_dim_;
  T* const memory_;
  PartRows<T> rows_;
};

// What computes sequences of more rows than `kFewRows`.
constexpr int kFewRows = 8;
template <class T, class E>
struct ManyRows {
  using Engine = WidenedAttention<T, E>;
};
template <class T>
struct ManyRows<T, T> {
  using Engine = DotAttention<T, T>;
};
#ifdef __AVX512BF16__
template <class E>
struct ManyRows<bf16, E> {
  using Engine = PackedAttention<E>;
};
template <>
struct ManyRows<bf16, bf16> {
  using Engine = PackedAttention<bf16>;
};
#endif

}  // namespace pio
