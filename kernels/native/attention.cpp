#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention_scratch.h"
#include "pages.h"

namespace pio {

namespace {

// The rows of the part that is computed, and of the one after it.
template <class E>
class PartsAhead {
 public:
  PartRows<E>& current() { return rows_[at_]; }
  PartRows<E>& next() { return rows_[1 - at_]; }
  void advance() { at_ = 1 - at_; }

 private:
  PartRows<E> rows_[2];
  int at_ = 0;
};

}  // namespace

template <class T>
struct Attention<T>::Plan {
  using Scratch = AttentionScratch<T>;

  AttentionShape shape;
  int num_workers;
  std::vector<std::unique_ptr<Scratch>> scratch;  // of each worker
  std::vector<PageScratch> page_scratch;          // likewise
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

  int64_t position(const AttentionTile& tile, int row) const {
    return tile.first_position + row / shape.group;
  }

  // Whether a row sees a key of a part: its last one up to the row, or its first one as a sink.
  bool sees(const AttentionTile& tile, int row, int part) const {
    const int64_t at = position(tile, row), first = int64_t{part} * kPartKeys;
    if (first > at) return false;
    const int64_t last = std::min(at, first + kPartKeys - 1);
    return batch.pattern.sees(at, last) || batch.pattern.sees(at, first);
  }

  const AttentionTile& tile_of(const AttentionItem& item) const {
    return split.tiles[static_cast<size_t>(item.tile)];
  }

  const int32_t* block_table(const AttentionTile& tile) const {
    return tile.selection >= 0 ? split.selected_blocks.data() + tile.selection
                               : batch.block_tables + batch.table_starts[tile.sequence];
  }

  // Which blocks a tile sees that selects them, to the plan's room for it.
  void select(const PageSelection& selection, View<const T> queries, BoundsLayer<const T> bounds,
              PageScratch& s) {
    const AttentionTile& tile = split.tiles[static_cast<size_t>(selection.tile)];
    select_pages(
        queries.row(tile.first_row) + int64_t{tile.kv_head} * shape.group * shape.head_dim,
        shape.group, bounds, tile.kv_head,
        batch.block_tables + batch.table_starts[tile.sequence], selection.last,
        batch.pattern.pages, s, split.selected_blocks.data() + tile.selection);
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

  // Calls body(key, rows, first, count) for each block that holds rows of the part from `begin` to
  // `end`: `count` of the block's keys from `first` on, the earliest of them the part's number `key`.
  // Where the table has no block, which no row sees, each key is the first token's own: that one is
  // written, so that what is weighted with 0 is a number.
  template <class E, class Body>
  void each_block(const AttentionTile& tile, int begin, int end, KVLayer<const E> cache,
                  Body body) const {
    const int32_t* table = block_table(tile);
    for (int position = begin; position < end;) {
      const int32_t block = table[position / shape.block_size];
      const int first = position % shape.block_size;
      const int count = std::min(shape.block_size - first, end - position);
      if (block != kNoBlock) {
        body(position - begin, cache.keys(block, tile.kv_head), first, count);
      } else {
        const int own = tile.first_position;
        const E* keys = cache.keys(table[own / shape.block_size], tile.kv_head);
        for (int i = 0; i < count; ++i) {
          body(position - begin + i, keys, own % shape.block_size, 1);
        }
      }
      position += count;
    }
  }

  // Where the rows of one part's keys lie. What no row sees is left out, but for what lies in one
  // vector or panel with a key that is seen: so every key keeps its lane, and a row's sums their
  // order, whatever the tile.
  template <class E>
  void locate(const AttentionTile& tile, int visited, KVLayer<const E> cache,
              PartRows<E>& rows) const {
    const Pattern& pattern = batch.pattern;
    const int window_begin = tile.first_position + 1 - pattern.window;
    int begin = tile.part(visited) * kPartKeys;
    int end = std::min(begin + kPartKeys, tile.num_keys());
    if (begin >= pattern.sinks) {
      begin = std::max(begin, window_begin / kKeyGranule * kKeyGranule);
    } else if (end <= window_begin) {
      end = std::min(end, pattern.sinks);
    }
    rows.begin = begin;
    rows.count = end - begin;
    rows.value_offset = cache.values(0, 0) - cache.keys(0, 0);
    each_block(tile, begin, end, cache, [&](int key, const E* block, int first, int count) {
      for (int i = 0; i < count; ++i) {
        rows.keys[key + i] = block + int64_t{first + i} * shape.head_dim;
      }
      rows.scales.prefetch(cache, block, rows.value_offset, first);
    });
    for (int i = rows.count; i < round_up(rows.count, 16); ++i) rows.keys[i] = rows.keys[i - 1];
  }

  template <class E>
  void take_scales(const AttentionTile& tile, KVLayer<const E> cache, PartRows<E>& rows) const {
    if constexpr (kIsCode<E>) {
      each_block(tile, rows.begin, rows.begin + rows.count, cache,
                 [&](int key, const E* block, int first, int count) {
                   rows.scales.take(key, cache, block, rows.value_offset, first, count);
                 });
      rows.scales.end(rows.count);
    }
  }

  // Leaves the first part of the item that follows, if one is known, in `ahead`.
  template <class Engine, class E>
  void attend(Engine& engine, const AttentionItem& item, const AttentionItem* following,
              View<const T> queries, KVLayer<const E> cache, PartsAhead<E>& parts,
              Scratch& s) const {
    const AttentionTile& tile = tile_of(item);
    gather_queries(tile, queries, reinterpret_cast<typename Engine::Query*>(s.queries));
    for (int visited = item.first_part; visited < item.end_part; ++visited, parts.advance()) {
      const int part = tile.part(visited);
      PartRows<E>& rows = parts.current();
      PartRows<E>* next = nullptr;
      if (visited + 1 < item.end_part) {
        next = &parts.next();
        locate(tile, visited + 1, cache, *next);
      } else if (following != nullptr) {
        next = &parts.next();
        locate(tile_of(*following), following->first_part, cache, *next);
      }
      take_scales(tile, cache, rows);
      const int begin_key = rows.begin;
      const int sinks = std::clamp(batch.pattern.sinks - begin_key, 0, rows.count);
      engine.prepare(rows, next);
      for (int row = 0; row < num_rows(tile); ++row) {
        const int64_t seen = position(tile, row) + 1 - begin_key;
        s.visible[row] = static_cast<int>(std::clamp<int64_t>(seen, 0, rows.count));
        s.hidden[row] = static_cast<int>(
            std::clamp<int64_t>(seen - batch.pattern.window, 0, s.visible[row]));
      }
      for (int begin = 0; begin < num_rows(tile); begin += Engine::kBlockRows) {
        const int end = std::min(begin + Engine::kBlockRows, num_rows(tile));
        // More neighbouring rows than a block has see a part: if any does, the first or last does.
        if (!sees(tile, begin, part) && !sees(tile, end - 1, part)) continue;
        attend_block(engine, rows.scales, begin, end - begin, sinks, s);
        for (int row = begin; row < end; ++row) {
          if (sees(tile, row, part)) keep(tile, visited, row, row - begin, s);
        }
      }
    }
  }

  // Weighted values of the engine's part for one block of rows, to part_values and part_state.
  template <class Engine, class Scales>
  void attend_block(const Engine& engine, const Scales& scales, int begin, int rows, int sinks,
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
      const int hidden = s.hidden[begin + row];
      if (visible[row] > (sinks > 0 ? 0 : hidden)) {
        if (hidden > sinks) {
          std::fill_n(s.scores + row * kScoreStride + sinks, hidden - sinks, -simd::kInfinity);
        }
        s.part_state[row] =
            softmax(s.scores + row * kScoreStride, scales, visible[row], width, to);
      } else {
        std::fill_n(to, width, Weight{});
      }
    }
    engine.values(weights, kWeightStride, rows, count, s.part_values, shape.value_stride());
  }

  // What a part gave for a row goes to the row's sums, or, of a shared tile, to its partials.
  void keep(const AttentionTile& tile, int visited, int row, int row_in_block, Scratch& s) const {
    const float* values = s.part_values + row_in_block * shape.value_stride();
    const SoftmaxState& state = s.part_state[row_in_block];
    if (tile.partial >= 0) {
      float* to = partial(tile, visited, row);
      std::copy_n(values, shape.value_stride(), to);
      state_behind(to) = state;
    } else if (visited == first_visited(tile, row)) {
      std::copy_n(values, shape.value_stride(), s.values + row * shape.value_stride());
      s.state[row] = state;
    } else {
      join(s.state[row], s.values + row * shape.value_stride(), state, values, shape.head_dim);
    }
  }

  // The first of the tile's visited parts in which a row sees a key.
  int first_visited(const AttentionTile& tile, int row) const {
    const int64_t first = position(tile, row) + 1 - batch.pattern.window;
    if (first <= 0 || batch.pattern.sinks > 0) return 0;
    return static_cast<int>(first / kPartKeys) - (tile.hidden_end - tile.hidden_begin);
  }

  // The shared tile's parts, each row's in order.
  void join_partials(const AttentionTile& tile, Scratch& s) const {
    for (int row = 0; row < num_rows(tile); ++row) {
      float* values = s.values + row * shape.value_stride();
      int visited = first_visited(tile, row);
      float* first = partial(tile, visited, row);
      std::copy_n(first, shape.value_stride(), values);
      s.state[row] = state_behind(first);
      while (++visited < tile.num_parts()) {
        if (!sees(tile, row, tile.part(visited))) continue;
        float* further = partial(tile, visited, row);
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
  plan_->page_scratch.resize(static_cast<size_t>(num_workers));
}

template <class T>
Attention<T>::~Attention() = default;

template <class T>
void Attention<T>::plan(const Batch& batch) {
  Plan& p = *plan_;
  p.batch = batch;
  p.split.make(batch, p.shape.kv_heads, p.shape.group, p.shape.block_size, kMaxTileRows,
               p.num_workers);
  int longest = 0;
  for (const PageSelection& selection : p.split.selections) {
    longest = std::max(longest, selection.last + 1);
  }
  for (PageScratch& scratch : p.page_scratch) scratch.make_room(p.shape.head_dim, longest);
  p.partials =
      p.partial_memory.get(static_cast<size_t>(p.split.num_partial_rows * p.partial_stride()));
}

template <class T>
template <class E>
void Attention<T>::run(Worker& worker, View<const T> queries, KVLayer<const E> cache,
                       BoundsLayer<const T> bounds, View<T> out) const {
  Plan& p = *plan_;
  if (const auto count = static_cast<int64_t>(p.split.selections.size()); count > 0) {
    PageScratch& own = p.page_scratch[static_cast<size_t>(worker.index)];
    for (int64_t i = worker.take(); i < count; i = worker.take()) {
      p.select(p.split.selections[static_cast<size_t>(i)], queries, bounds, own);
    }
    worker.barrier();
  }
  AttentionScratch<T>& s = *p.scratch[static_cast<size_t>(worker.index)];
  DotAttention<T, E> few(p.shape.head_dim, nullptr);
  typename ManyRows<T, E>::Engine many(p.shape.head_dim, s.engine);
  const std::vector<AttentionItem>& items = p.split.items;
  const auto item_at = [&](int64_t i) {
    return i < static_cast<int64_t>(items.size()) ? &items[static_cast<size_t>(i)] : nullptr;
  };
  // A worker that takes an item early keeps it from the others: only where there are many.
  const bool takes_ahead = static_cast<int64_t>(items.size()) >= kItemsPerWorker * worker.count;
  PartsAhead<E> parts;
  const AttentionItem* following = nullptr;
  for (const AttentionItem* item = item_at(worker.take()); item != nullptr;
       item = takes_ahead ? following : item_at(worker.take())) {
    if (following == nullptr) {
      p.locate(p.tile_of(*item), item->first_part, cache, parts.current());
    }
    if (takes_ahead) following = item_at(worker.take());
    const AttentionTile& tile = p.tile_of(*item);
    // By the sequence's rows: how many a tile has depends on the number of workers.
    if (tile.of_tokens * p.shape.group <= kFewRows) {
      p.attend(few, *item, following, queries, cache, parts, s);
    } else {
      p.attend(many, *item, following, queries, cache, parts, s);
    }
    if (tile.partial >= 0) {
      if (!p.ends_tile(tile, *item)) continue;
      p.join_partials(tile, s);
    }
    p.write(tile, s, out);
  }
}

template class Attention<float>;
template class Attention<bf16>;

#define PIO_RUN(T, E) \
  template void Attention<T>::run(Worker&, View<const T>, KVLayer<const E>, BoundsLayer<const T>, \
                                  View<T>) const
PIO_RUN(float, float);
PIO_RUN(float, Int8Code);
PIO_RUN(float, Fp8Code);
PIO_RUN(bf16, bf16);
PIO_RUN(bf16, Int8Code);
PIO_RUN(bf16, Fp8Code);
#undef PIO_RUN

}  // namespace pio
