// The sizes of attention's operands, and one worker's memory for one item.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "attention_dot.h"
#include "attention_packed.h"
#include "attention_plan.h"
#include "attention_softmax.h"
#include "attention_widened.h"
#include "huge_buffer.h"

namespace pio {

constexpr int64_t round_up(int64_t value, int64_t granule) {
  return (value + granule - 1) / granule * granule;
}

// Rows of a block lie a line more than a power of two apart: else they share few sets of the cache.
constexpr int kScoreStride = kPartKeys + 16;
constexpr int kWeightStride = kPartKeys + 32;
constexpr int kMaxBlockRows = 32;
constexpr int kMaxTileRows = 256;  // queries and sums of a tile stay in the second cache

struct AttentionShape {
  int kv_heads;
  int group;  // query heads to a KV head
  int head_dim;
  int block_size;

  int64_t query_stride() const { return round_up(head_dim, 32); }
  int64_t value_stride() const { return round_up(head_dim, 64); }
  // Engines read and write blocks whole, whatever of them is in use.
  int64_t tile_rows() const {
    return round_up(std::max(kMaxTileRows, group), kMaxBlockRows) + kMaxBlockRows;
  }
};

template <class T>
struct AttentionScratch {
  float* queries;       // [tile_rows, query_stride] of the engine's own type, zeros behind head_dim
  int* visible;         // [tile_rows]: keys of the part that lie before a row's end
  int* hidden;          // [tile_rows]: of them, end of those that its window hides
  float* values;        // [tile_rows, value_stride]: weighted values of the parts so far
  SoftmaxState* state;  // [tile_rows]
  float* scores;             // of one block and one part
  float* weights;            // likewise, of the engine's own type
  float* part_values;        // likewise
  SoftmaxState* part_state;  // likewise
  std::byte* engine;

  explicit AttentionScratch(const AttentionShape& shape) {
    size_t size = 0;
    const auto place = [&](auto*& pointer, int64_t count) {
      using Element = std::remove_reference_t<decltype(*pointer)>;
      pointer = reinterpret_cast<Element*>(memory_.data() + size);
      size += static_cast<size_t>(round_up(count * int64_t{sizeof(Element)}, 64));
    };
    for (const bool counted : {false, true}) {  // the first round only counts
      if (counted) memory_ = HugeBuffer::whole_pages(size);
      size = 0;
      place(queries, shape.tile_rows() * shape.query_stride());
      place(visible, shape.tile_rows());
      place(hidden, shape.tile_rows());
      place(values, shape.tile_rows() * shape.value_stride());
      place(state, shape.tile_rows());
      place(scores, kMaxBlockRows * kScoreStride);
      place(weights, kMaxBlockRows * kWeightStride);
      place(part_values, kMaxBlockRows * shape.value_stride());
      place(part_state, kMaxBlockRows);
      place(engine, std::max({ManyRows<T, T>::Engine::memory_bytes(shape.head_dim),
                              ManyRows<T, Int8Code>::Engine::memory_bytes(shape.head_dim),
                              ManyRows<T, Fp8Code>::Engine::memory_bytes(shape.head_dim)}));
    }
  }

 private:
  HugeBuffer memory_;
};

}  // namespace pio
