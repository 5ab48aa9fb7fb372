#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention_scratch.h"

namespace pio {

template <class T>
struct Attention<T>::Plan {
  using Scratch = AttentionScratch<T>;

  AttentionShape shape;
  int num_workers;
  std::vector<std::unique_ptr<Scratch>> scratch;  // of each worker
  Batch batch{};
  AttentionPlan split;
  // Of tiles that items share: for each part and row the weighted values, then the state.
  KeptBuffer<float> partial_memory;
  float* partials = nullptr;

  int num_rows(const AttentionTile& tile) const { return tile.num_tokens * shape.group; }
  int64_t partial_stride() const { return shape.value_stride() + 16; }

  float* partial(const AttentionTile& tile, int part, int row) const {
    return partials + (tile.partial + int64_t{part} * num_rows(tile) + row) * partial_stride();
  }
  SoftmaxState& state_behind(float* partial) const {
    return *reinterpret_cast<SoftmaxState*>(partial + shape.value_stride());
  }

  // The tile's queries, token after token, as the engines take them.
  template <class Query>
  void gather_queries(const AttentionTile& tile, View<const T> queries, Query* to) const {
    for (int token = 0; token < tile.num_tokens; ++token) {
      const T* from =
          queries.row(tile.first_row + token) + int64_t{tile.kv_head} * shape.group * shape.head_dim;
      for (int head = 0; head < shape.group; ++head) {
        if constexpr (std::is_same_v<Query, T>) {
          std::memcpy(to, from, sizeof(T) * static_cast<size_t>(shape.head_dim));
        } else {
          for (int i = 0; i < shape.head_dim; ++i) to[i] = to_float(from[i]);
        }
        std::fill(to + shape.head_dim, to + shape.query_stride(), Query{});
        from += shape.head_dim;
        to += shape.query_stride();
      }
    }
  }

  // The rows of one part's keys, wherever their blocks lie.
  template <class E>
  void gather_part(const AttentionTile& tile, int part, KVLayer<const E> cache,
                   PartRows<E>& rows) const {
    const int32_t* table = batch.block_tables + batch.table_starts[tile.sequence];
    const int begin = part * kPartKeys, end = std::min(begin + kPartKeys, tile.num_keys());
    rows.count = end - begin;
    rows.value_offset = cache.values(0, 0) - cache.keys(0, 0);
    for (int position = begin; position < end;) {
      const E* block = cache.keys(table[position / shape.block_size], tile.kv_head);
      const int offset = position % shape.block_size;
      const int count = std::min(shape.block_size - offset, end - position);
      for (int i = 0; i < count; ++i) {
        rows.keys[position - begin + i] = block + int64_t{offset + i} * shape.head_dim;
      }
      rows.scales.take(position - begin, cache, block, rows.value_offset, offset, count);
      position += count;
    }
    for (int i = rows.count; i < round_up(rows.count, 16); ++i) rows.keys[i] = rows.keys[i - 1];
    rows.scales.end(rows.count);
  }

  template <class Engine, class E>
  void attend(Engine& engine, const AttentionTile& tile, const AttentionItem& item,
              View<const T> queries, KVLayer<const E> cache, Scratch& s) const {
    gather_queries(tile, queries, reinterpret_cast<typename Engine::Query*>(s.queries));
    PartRows<E> rows;
    for (int part = item.first_part; part < item.end_part; ++part) {
      gather_part(tile, part, cache, rows);
      engine.prepare(rows);
      for (int row = 0; row < num_rows(tile); ++row) {
        const int seen = tile.first_position + row / shape.group + 1 - part * kPartKeys;
        s.visible[row] = std::clamp(seen, 0, rows.count);
      }
      for (int begin = 0; begin < num_rows(tile); begin += Engine::kBlockRows) {
        const int end = std::min(begin + Engine::kBlockRows, num_rows(tile));
        if (s.visible[end - 1] == 0) continue;
        attend_block(engine, rows.scales, begin, end - begin, s);
        for (int row = begin; row < end; ++row) {
          if (s.visible[row] > 0) keep(tile, part, row, row - begin, s);
        }
      }
    }
  }

  // Weighted values of the engine's part for one block of rows, to part_values and part_state.
  template <class Engine, class Scales>
  void attend_block(const Engine& engine, const Scales& scales, int begin, int rows,
                    Scratch& s) const {
    using Weight = typename Engine::Weight;
    const auto* queries = reinterpret_cast<const typename Engine::Query*>(s.queries);
    const int* visible = s.visible + begin;
    engine.scores(queries + begin * shape.query_stride(), shape.query_stride(), rows, visible,
                  s.scores, kScoreStride);
    const int count = visible[rows - 1];
    const int width = static_cast<int>(round_up(count, 32));
    Weight* weights = reinterpret_cast<Weight*>(s.weights);
    for (int row = 0; row < rows; ++row) {
      Weight* to = weights + row * kWeightStride;
      if (visible[row] > 0) {
        s.part_state[row] = 
            softmax(s.scores + row * kScoreStride, scales, visible[row], width, to);
      } else {
        std::fill_n(to, width, Weight{});
      }
    }
    engine.values(weights, kWeightStride, rows, count, s.part_values, shape.value_stride());
  }

  // What a part gave for a row goes to the row's sums, or, of a shared tile, to its partials.
  void keep(const AttentionTile& tile, int part, int row, int row_in_block, Scratch& s) const {
    const float* values = s.part_values + row_in_block * shape.value_stride();
    const SoftmaxState& state = s.part_state[row_in_block];
    if (tile.partial >= 0) {
      float* to = partial(tile, part, row);
      std::copy_n(values, shape.value_stride(), to);
      state_behind(to) = state;
    } else if (part == 0) {
      std::copy_n(values, shape.value_stride(), s.values + row * shape.value_stride());
      s.state[row] = state;
    } else {
      join(s.state[row], s.values + row * shape.value_stride(), state, values, shape.head_dim);
    }
  }

  // The shared tile's parts, each row's in order.
  void join_partials(const AttentionTile& tile, Scratch& s) const {
    for (int row = 0; row < num_rows(tile); ++row) {
      float* values = s.values + row * shape.value_stride();
      float* first = partial(tile, 0, row);
      std::copy_n(first, shape.value_stride(), values);
      s.state[row] = state_behind(first);
      const int last = (tile.first_position + row / shape.group) / kPartKeys;
      for (int part = 1; part <= last; ++part) {
        float* further = partial(tile, part, row);
        join(s.state[row], values, state_behind(further), further, shape.head_dim);
      }
    }
  }

  // Whether this was the last of a shared tile's items; its partials are then complete.
  bool ends_tile(const AttentionTile& tile, const AttentionItem& item) {
    const int32_t own = item.end_part - item.first_part;
    std::atomic_ref<int32_t> left(split.parts_left[static_cast<size_t>(item.tile)]);
    if (left.fetch_sub(own, std::memory_order_acq_rel) != own) return false;
    left.store(tile.num_parts(), std::memory_order_relaxed);  // for the next layer
    return true;
  }

  void write(const AttentionTile& tile, const Scratch& s, View<T> out) const {
    for (int row = 0; row < num_rows(tile); ++row) {
      const int64_t head = int64_t{tile.kv_head} * shape.group + row % shape.group;
      finish(s.state[row], s.values + row * shape.value_stride(), shape.head_dim,
             out.row(tile.first_row + row / shape.group) + head * shape.head_dim);
    }
  }
};

template <class T>
Attention<T>::Attention(int num_heads, int kv_heads, int head_dim, int block_size,
                        int num_workers)
    : plan_(std::make_unique<Plan>()) {
  if (kv_heads < 1 || num_heads < 1 || num_heads % kv_heads != 0) {
    throw std::invalid_argument("attention has " + std::to_string(num_heads) +
                                " query heads over " + std::to_string(kv_heads) +
                                " KV heads; a multiple of them is needed");
  }
  if (head_dim < 1 || block_size < 1 || num_workers < 1) {
    throw std::invalid_argument("attention needs a head_dim, a block_size and a worker, not " +
                                std::to_string(head_dim) + ", " + std::to_string(block_size) +
                                " and " + std::to_string(num_workers));
  }
  plan_->shape = {kv_heads, num_heads / kv_heads, head_dim, block_size};
  plan_->num_workers = num_workers;
  for (int i = 0; i < num_workers; ++i) {
    plan_->scratch.push_back(std::make_unique<AttentionScratch<T>>(plan_->shape));
  }
}

template <class T>
Attention<T>::~Attention() = default;

template <class T>
void Attention<T>::plan(const Batch& batch) {
  Plan& p = *plan_;
  p.batch = batch;
  p.split.make(batch, p.shape.kv_heads, p.shape.group, kMaxTileRows, p.num_workers);
  p.partials =
      p.partial_memory.get(static_cast<size_t>(p.split.num_partial_rows * p.partial_stride()));
}

template <class T>
template <class E>
void Attention<T>::run(Worker& worker, View<const T> queries, KVLayer<const E> cache,
                       View<T> out) const {
  Plan& p = *plan_;
  AttentionScratch<T>& s = *p.scratch[static_cast<size_t>(worker.index)];
  DotAttention<T, E> few(p.shape.head_dim, nullptr);
  typename ManyRows<T, E>::Engine many(p.shape.head_dim, s.engine);
  const auto num_items = static_cast<int64_t>(p.split.items.size());
  for (int64_t i = worker.take(); i < num_items; i = worker.take()) {
    const AttentionItem& item = p.split.items[static_cast<size_t>(i)];
    const AttentionTile& tile = p.split.tiles[static_cast<size_t>(item.tile)];
    // By the sequence's rows: how many a tile has depends on the number of workers.
    if (tile.of_tokens * p.shape.group <= kFewRows) {
      p.attend(few, tile, item, queries, cache, s);
    } else {
      p.attend(many, tile, item, queries, cache, s);
    }
    if (tile.partial >= 0) {
      if (!p.ends_tile(tile, item)) continue;
      p.join_partials(tile, s);
    }
    p.write(tile, s, out);
  }
}

template class Attention<float>;
template class Attention<bf16>;

#define PIO_RUN(T, E) \
  template void Attention<T>::run(Worker&, View<const T>, KVLayer<const E>, View<T>) const
PIO_RUN(float, float);
PIO_RUN(float, Int8Code);
PIO_RUN(float, Fp8Code);
PIO_RUN(bf16, bf16);
PIO_RUN(bf16, Int8Code);
PIO_RUN(bf16, Fp8Code);
#undef PIO_RUN

}  // namespace pio
