// Element types and the views that kernels take; nothing here allocates.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace pio {

enum class DType : int32_t { f32 = 0, bf16 = 1 };

// How a layer of the cache stores its numbers: as T, or as codes with a scale for each token.
enum class KVFormat : int32_t { plain = 0, int8 = 1, fp8 = 2 };

// The upper half of a float32.
struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Rounds to nearest, ties to even, as torch does; a NaN stays one.
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// A matrix of `rows` rows, `stride` elements apart.
template <class T>
struct View {
  T* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;

  T* row(int64_t i) const { return data + i * stride; }
};

// Which keys a token sees, as pattern.py has it: those of the last `window` tokens, itself included,
// and of the first `sinks`. Tokens that select pages see the first block, `pages` others and the
// last two; there are pages or a window, not both.
struct Pattern {
  int32_t window;  // more than any position: no window
  int32_t sinks;
  int32_t pages;  // 0: none are selected

  bool sees(int64_t position, int64_t key) const {
    return key <= position && (key > position - window || key < sinks);
  }
  // Whether no token from `position` on sees a key of a block.
  bool hides(int64_t position, int64_t block, int64_t block_size) const {
    return block * block_size >= sinks && (block + 1) * block_size <= position + 1 - window;
  }
};

// In a block table, in the place of a block that the pattern hides from all new tokens.
constexpr int32_t kNoBlock = -1;

// One step's sequences, one after the other along the rows of every activation.
struct Batch {
  int32_t num_sequences;
  const int32_t* query_starts;   // num_sequences + 1 prefix sums of new tokens
  const int32_t* seq_lens;       // length of each sequence behind this step
  const int32_t* block_tables;   // block ids, table after table
  const int64_t* table_starts;   // num_sequences + 1 prefix sums into block_tables
  const int32_t* select_starts;  // of each sequence the first position that selects pages, or null
  Pattern pattern;

  // Of a sequence's first new token.
  int first_position(int sequence) const {
    return seq_lens[sequence] - (query_starts[sequence + 1] - query_starts[sequence]);
  }
};

// A code of the cache: a whole number from -127 to 127.
struct Int8Code {
  uint8_t bits;
};
// A code of the cache in e4m3: sign, four bits of exponent, three of mantissa.
struct Fp8Code {
  uint8_t bits;
};

template <class E>
constexpr bool kIsCode = std::is_same_v<std::remove_const_t<E>, Int8Code> ||
                         std::is_same_v<std::remove_const_t<E>, Fp8Code>;

// One layer of the paged cache, kv_N2KSD (see kernels/api.py), whose elements are numbers, or codes
// with the scales of their rows behind those of each head in each block (see kernels/kv_layer.py).
template <class E>
struct KVLayer {
  using Scale = std::conditional_t<std::is_const_v<E>, const float, float>;

  E* data;
  int32_t kv_heads;
  int32_t block_size;
  int32_t head_dim;

  // Keys of one head in one block: [block_size, head_dim].
  E* keys(int64_t block, int64_t head) const { return at(block * 2, head); }
  // Values likewise.
  E* values(int64_t block, int64_t head) const { return at(block * 2 + 1, head); }
  // Of one head's keys or values in one block: [block_size].
  Scale* scales(E* head) const {
    static_assert(kIsCode<E>);
    return reinterpret_cast<Scale*>(head + codes_of_head());
  }

 private:
  // Rounded up, so that the scales are aligned.
  int64_t codes_of_head() const { return (int64_t{block_size} * head_dim + 3) / 4 * 4; }
  int64_t stride() const {
    if constexpr (kIsCode<E>) return codes_of_head() + block_size * int64_t{sizeof(float)};
    return int64_t{block_size} * head_dim;
  }
  E* at(int64_t row, int64_t head) const { return data + (row * kv_heads + head) * stride(); }
};

// Calls body(layer) with a layer of the type that `format` names. `Data` is void or const void.
template <class T, class Data, class Body>
void with_kv_layer(KVFormat format, Data* data, int32_t kv_heads, int32_t block_size,
                   int32_t head_dim, Body body) {
  const auto as = [&]<class E>(E*) {
    using Element = std::conditional_t<std::is_const_v<Data>, const E, E>;
    body(KVLayer<Element>{static_cast<Element*>(data), kv_heads, block_size, head_dim});
  };
  switch (format) {
    case KVFormat::plain: return as(static_cast<T*>(nullptr));
    case KVFormat::int8: return as(static_cast<Int8Code*>(nullptr));
    case KVFormat::fp8: return as(static_cast<Fp8Code*>(nullptr));
  }
  throw std::invalid_argument("there is no KV format " +
                              std::to_string(static_cast<int32_t>(format)));
}

// Of one layer and every block, the smallest and the largest key by channel: bounds_N2KD.
template <class T>
struct BoundsLayer {
  T* data;
  int32_t kv_heads;
  int32_t head_dim;

  T* smallest(int64_t block, int64_t head) const { return at(block * 2, head); }
  T* largest(int64_t block, int64_t head) const { return at(block * 2 + 1, head); }

 private:
  T* at(int64_t row, int64_t head) const { return data + (row * kv_heads + head) * head_dim; }
};

}  // namespace pio
