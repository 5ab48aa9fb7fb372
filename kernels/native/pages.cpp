#include "pages.h"

#include <algorithm>
#include <cmath>

#include "kv_codes.h"
#include "simd.h"

namespace pio {
namespace {

using simd::Floats;
using simd::kLanes;

// Calls body(offset, load, store) for each vector of a row; see rows.cpp.
template <class Body>
PIO_INLINE void each_vector(int cols, Body body) {
  int i = 0;
  for (; i + kLanes <= cols; i += kLanes) {
    body(
        i, [](const auto* from) { return simd::load(from); },
        [](auto* to, Floats x) { simd::store(to, x); });
  }
  if (i < cols) {
    const int rest = cols - i;
    body(
        i, [rest](const auto* from) { return simd::load_part(from, rest); },
        [rest](auto* to, Floats x) { simd::store_part(to, x, rest); });
  }
}

// The sum over the queries of each one's largest possible product with a key within the bounds.
template <class T>
float score(const float* parts, const T* smallest, const T* largest, int head_dim) {
  Floats low = simd::zeros(), high = simd::zeros();
  each_vector(head_dim, [&](int i, auto load, auto) {
    low = simd::fma(load(parts + i), load(smallest + i), low);
    high = simd::fma(load(parts + head_dim + i), load(largest + i), high);
  });
  const float found = simd::sum(low + high);
  // A NaN has no order: it is taken for the highest.
  return std::isnan(found) ? simd::kInfinity : found;
}

// What the elements of key `key` are multiplied with; `keys` are those of one head in one block.
template <class E>
Floats scale_of(KVLayer<const E> cache, const E* keys, int key) {
  if constexpr (kIsCode<E>) return simd::filled(cache.scales(keys)[key] * Codes<E>::kUnit);
  return simd::filled(1.0f);
}

}  // namespace

template <class T, class E>
void bound_pages(Worker& worker, KVLayer<const E> cache, const int32_t* blocks, int64_t count,
                 BoundsLayer<T> bounds) {
  const int64_t units = count * cache.kv_heads;
  const int64_t end = units * (worker.index + 1) / worker.count;
  for (int64_t unit = units * worker.index / worker.count; unit < end; ++unit) {
    const int64_t block = blocks[unit / cache.kv_heads], head = unit % cache.kv_heads;
    const E* keys = cache.keys(block, head);
    each_vector(cache.head_dim, [&](int i, auto load, auto store) {
      Floats smallest = load(keys + i) * scale_of(cache, keys, 0), largest = smallest;
      for (int key = 1; key < cache.block_size; ++key) {
        const Floats element =
            load(keys + int64_t{key} * cache.head_dim + i) * scale_of(cache, keys, key);
        smallest = simd::min(smallest, element);
        largest = simd::max(largest, element);
      }
      store(bounds.smallest(block, head) + i, smallest);
      store(bounds.largest(block, head) + i, largest);
    });
  }
}

void PageScratch::make_room(int head_dim, int64_t num_blocks) {
  parts.resize(static_cast<size_t>(2 * head_dim));
  if (scores.size() < static_cast<size_t>(num_blocks)) {
    scores.resize(static_cast<size_t>(num_blocks));
    order.resize(static_cast<size_t>(num_blocks));
  }
}

template <class T>
void select_pages(const T* queries, int group, BoundsLayer<const T> bounds, int kv_head,
                  const int32_t* table, int last, int pages, PageScratch& scratch, int32_t* seen) {
  const int head_dim = bounds.head_dim;
  float* parts = scratch.parts.data();
  std::fill_n(parts, 2 * head_dim, 0.0f);
  for (int row = 0; row < group; ++row) {
    for (int i = 0; i < head_dim; ++i) {
      const float x = to_float(queries[int64_t{row} * head_dim + i]);
      parts[x > 0 ? head_dim + i : i] += x;
    }
  }
  const int begin = kFirstPages, end = last + 1 - kLastPages;
  float* scores = scratch.scores.data();
  int32_t* order = scratch.order.data();
  for (int page = begin; page < end; ++page) {
    const int32_t block = table[page];
    scores[page] = score(parts, bounds.smallest(block, kv_head), bounds.largest(block, kv_head),
                         head_dim);
    order[page - begin] = page;
  }
  std::nth_element(order, order + pages - 1, order + (end - begin), [&](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  std::sort(order, order + pages);
  for (int page = 0; page < begin; ++page) *seen++ = table[page];
  for (int i = 0; i < pages; ++i) *seen++ = table[order[i]];
  for (int page = end; page <= last; ++page) *seen++ = table[page];
}

template void bound_pages(Worker&, KVLayer<const float>, const int32_t*, int64_t,
                          BoundsLayer<float>);
template void bound_pages(Worker&, KVLayer<const Int8Code>, const int32_t*, int64_t,
                          BoundsLayer<float>);
template void bound_pages(Worker&, KVLayer<const Fp8Code>, const int32_t*, int64_t,
                          BoundsLayer<float>);
template void bound_pages(Worker&, KVLayer<const bf16>, const int32_t*, int64_t,
                          BoundsLayer<bf16>);
template void bound_pages(Worker&, KVLayer<const Int8Code>, const int32_t*, int64_t,
                          BoundsLayer<bf16>);
template void bound_pages(Worker&, KVLayer<const Fp8Code>, const int32_t*, int64_t,
                          BoundsLayer<bf16>);
template void select_pages(const float*, int, BoundsLayer<const float>, int, const int32_t*, int,
                           int, PageScratch&, int32_t*);
template void select_pages(const bf16*, int, BoundsLayer<const bf16>, int, const int32_t*, int, int,
                           PageScratch&, int32_t*);

}  // namespace pio
