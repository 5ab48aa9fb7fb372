#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kv_codes.h"
#include "simd.h"

namespace pio {
namespace {

using simd::Floats;
using simd::kLanes;

struct Range {
  int64_t begin;
  int64_t end;
};

// This worker's share of `count` units: neighbours, so that no two workers write to one line often.
Range share(const Worker& worker, int64_t count) {
  return {count * worker.index / worker.count, count * (worker.index + 1) / worker.count};
}

// Calls body(offset, load, store) for each vector of a row. The two read and write a whole vector,
// or the part of it at the row's end; what is read behind the end is zero.
template <class Body>
PIO_INLINE void each_vector(int64_t cols, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) {
    body(
        i, [](const auto* from) { return simd::load(from); },
        [](auto* to, Floats x) { simd::store(to, x); });
  }
  if (i < cols) {
    const int rest = static_cast<int>(cols - i);
    body(
        i, [rest](const auto* from) { return simd::load_part(from, rest); },
        [rest](auto* to, Floats x) { simd::store_part(to, x, rest); });
  }
}

// 1 / sqrt(mean(x ** 2) + eps)
template <class X>
float inverse_rms(const X* x, int64_t cols, float eps) {
  constexpr int kSums = 4;  // independent ones, so that no addition waits for the one before
  Floats sums[kSums] = {simd::zeros(), simd::zeros(), simd::zeros(), simd::zeros()};
  int64_t i = 0;
  for (; i + kSums * kLanes <= cols; i += kSums * kLanes) {
    for (int k = 0; k < kSums; ++k) {
      const Floats value = simd::load(x + i + k * kLanes);
      sums[k] = simd::fma(value, value, sums[k]);
    }
  }
  each_vector(cols - i, [&](int64_t offset, auto load, auto) {
    const Floats value = load(x + i + offset);
    sums[0] = simd::fma(value, value, sums[0]);
  });
  const float total = simd::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return 1.0f / std::sqrt(total / static_cast<float>(cols) + eps);
}

// QK-norm and RoPE of one head. `to` may be `from`: both halves are read before they are written.
template <class T, class Out>
void norm_and_rotate(const T* from, const float* weight, const float* cos, const float* sin,
                     int64_t head_dim, float eps, Out* to) {
  const int64_t half = head_dim / 2;
  const Floats scale = simd::filled(inverse_rms(from, head_dim, eps));
  each_vector(half, [&](int64_t i, auto load, auto store) {
    const int64_t j = i + half;
    const Floats first = simd::rounded_to<T>(load(from + i) * scale) * load(weight + i);
    const Floats second = simd::rounded_to<T>(load(from + j) * scale) * load(weight + j);
    const Floats c = load(cos + i), s = load(sin + i);
    store(to + i, simd::fnma(second, s, first * c));
    store(to + j, simd::fma(first, s, second * c));
  });
}

}  // namespace

template <class T>
void embed(Worker& worker, View<const T> table, const int64_t* ids, View<float> out) {
  const Range rows = share(worker, out.rows);
  for (int64_t t = rows.begin; t < rows.end; ++t) {
    const T* from = table.row(ids[t]);
    float* to = out.row(t);
    each_vector(out.cols, [&](int64_t i, auto load, auto store) { store(to + i, load(from + i)); });
  }
}

template <class X, class T>
void rms_norm(Worker& worker, View<const X> x, const T* weight, float eps, View<T> out) {
  const Range rows = share(worker, x.rows);
  for (int64_t t = rows.begin; t < rows.end; ++t) {
    const X* from = x.row(t);
    T* to = out.row(t);
    const Floats scale = simd::filled(inverse_rms(from, x.cols, eps));
    each_vector(x.cols, [&](int64_t i, auto load, auto store) {
      store(to + i, simd::rounded_to<T>(load(from + i) * scale) * load(weight + i));
    });
  }
}

template <class T, class E>
void qk_norm_rope_write(Worker& worker, View<const T> qkv, const float* weight_AD,
                        View<const float> cos, View<const float> sin, const int64_t* slots,
                        float eps, KVLayer<E> cache, View<T> queries) {
  const int64_t head_dim = cache.head_dim, kv_heads = cache.kv_heads;
  const int64_t num_heads = queries.cols / head_dim;
  const int64_t group = num_heads / kv_heads;
  // A unit is one KV head of one token with its query heads: a single row has work for several.
  const Range units = share(worker, qkv.rows * kv_heads);
  thread_local std::vector<float> wide;  // one head's, before it becomes codes
  if constexpr (kIsCode<E>) wide.resize(static_cast<size_t>(head_dim));
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t t = unit / kv_heads, kv_head = unit % kv_heads;
    const auto normed = [&](int64_t head, auto* to) {
      norm_and_rotate(qkv.row(t) + head * head_dim, weight_AD + head * head_dim, cos.row(t),
                      sin.row(t), head_dim, eps, to);
    };
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      normed(head, queries.row(t) + head * head_dim);
    }
    const int64_t block = slots[t] / cache.block_size, offset = slots[t] % cache.block_size;
    E* keys = cache.keys(block, kv_head);
    E* values = cache.values(block, kv_head);
    const T* value = qkv.row(t) + (num_heads + kv_heads + kv_head) * head_dim;
    if constexpr (kIsCode<E>) {
      normed(num_heads + kv_head, wide.data());
      cache.scales(keys)[offset] = encode(wide.data(), head_dim, keys + offset * head_dim);
      each_vector(head_dim, [&](int64_t i, auto load, auto store) {
        store(wide.data() + i, load(value + i));
      });
      cache.scales(values)[offset] = encode(wide.data(), head_dim, values + offset * head_dim);
    } else {
      normed(num_heads + kv_head, keys + offset * head_dim);
      std::memcpy(values + offset * head_dim, value, sizeof(T) * static_cast<size_t>(head_dim));
    }
  }
}

template void embed(Worker&, View<const float>, const int64_t*, View<float>);
template void embed(Worker&, View<const bf16>, const int64_t*, View<float>);
template void rms_norm(Worker&, View<const float>, const float*, float, View<float>);
template void rms_norm(Worker&, View<const float>, const bf16*, float, View<bf16>);
template void rms_norm(Worker&, View<const bf16>, const bf16*, float, View<bf16>);
#define PIO_WRITE(T, E)                                                                      \
  template void qk_norm_rope_write(Worker&, View<const T>, const float*, View<const float>,  \
                                   View<const float>, const int64_t*, float, KVLayer<E>, View<T>)
PIO_WRITE(float, float);
PIO_WRITE(float, Int8Code);
PIO_WRITE(float, Fp8Code);
PIO_WRITE(bf16, bf16);
PIO_WRITE(bf16, Int8Code);
PIO_WRITE(bf16, Fp8Code);
#undef PIO_WRITE

}  // namespace pio
