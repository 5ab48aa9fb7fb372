#include "attention_plan.h"

#include <algorithm>

#include "pages.h"

namespace pio {
namespace {

// Reading and preparing a key and its value costs about as much as computing so many rows with it.
constexpr int64_t kKeyCost = 32;
// Tiles have at least so many rows where there are enough tokens: with fewer, preparing the keys
// costs more than it helps to have another item.
constexpr int kLeastTileRows = 32;
int64_t cost_of(const AttentionTile& tile, int group) {
  return tile.num_visited_keys() * (tile.num_tokens * int64_t{group} + kKeyCost);
}

// Leaves out the parts between sinks and window.
void hide_parts(AttentionTile& tile, const Pattern& pattern) {
  const int begin = (pattern.sinks + kPartKeys - 1) / kPartKeys;
  const int end = std::max(0, tile.first_position + 1 - pattern.window) / kPartKeys;
  if (begin < end) tile.hidden_begin = begin, tile.hidden_end = end;
}

}  // namespace

void AttentionPlan::add_selecting_tiles(const Batch& batch, int sequence, int row, int position,
                                        int kv_heads, int block_size) {
  const int num_pages = kFirstPages + batch.pattern.pages + kLastPages;
  const int last_key = (num_pages - 1) * block_size + position % block_size;
  for (int head = 0; head < kv_heads; ++head) {
    const auto room = static_cast<int64_t>(selected_blocks.size());
    selections.push_back({static_cast<int32_t>(tiles.size()), position / block_size});
    selected_blocks.resize(static_cast<size_t>(room + num_pages));
    tiles.push_back({sequence, head, row, 1, 1, last_key, 0, 0, -1, room});
  }
}

void AttentionPlan::make(const Batch& batch, int kv_heads, int group, int block_size, int max_rows,
                         int num_workers) {
  tiles.clear();
  selections.clear();
  selected_blocks.clear();
  items.clear();
  num_partial_rows = 0;

  const int64_t wanted = num_workers == 1 ? 1 : kItemsPerWorker * num_workers;
  const int64_t num_rows = int64_t{batch.query_starts[batch.num_sequences]} * group;
  int tile_rows = max_rows;
  while (tile_rows > kLeastTileRows && num_rows * kv_heads < wanted * tile_rows) tile_rows /= 2;
  const int tile_tokens = std::max(1, tile_rows / group);

  for (int sequence = 0; sequence < batch.num_sequences; ++sequence) {
    const int begin = batch.query_starts[sequence], end = batch.query_starts[sequence + 1];
    const int num_computed = batch.seq_lens[sequence] - (end - begin);
    int split = end;  // the first row that selects pages
    if (batch.select_starts != nullptr) {
      split = std::clamp(begin + batch.select_starts[sequence] - num_computed, begin, end);
    }
    for (int first = begin; first < split; first += tile_tokens) {
      const int count = std::min(tile_tokens, split - first);
      for (int head = 0; head < kv_heads; ++head) {
        tiles.push_back({sequence, head, first, count, split - begin, num_computed + first - begin,
                         0, 0, -1, -1});
        hide_parts(tiles.back(), batch.pattern);
      }
    }
    for (int row = split; row < end; ++row) {
      add_selecting_tiles(batch, sequence, row, num_computed + row - begin, kv_heads, block_size);
    }
  }

  int64_t total_cost = 0;
  for (const AttentionTile& tile : tiles) total_cost += cost_of(tile, group);
  const int64_t largest = total_cost / wanted;
  parts_left.assign(tiles.size(), 0);
  for (size_t i = 0; i < tiles.size(); ++i) {
    AttentionTile& tile = tiles[i];
    const int32_t index = static_cast<int32_t>(i), num_parts = tile.num_parts();
    const int64_t cost = cost_of(tile, group);
    if (cost <= largest || num_parts == 1 || num_workers == 1) {
      items.push_back({index, 0, num_parts, cost});
      continue;
    }
    tile.partial = num_partial_rows;
    num_partial_rows += int64_t{num_parts} * tile.num_tokens * group;
    parts_left[i] = num_parts;
    const int32_t step = static_cast<int32_t>(std::max<int64_t>(1, num_parts * largest / cost));
    for (int32_t part = 0; part < num_parts; part += step) {
      const int32_t last = std::min(part + step, num_parts);
      items.push_back({index, part, last, cost * (last - part) / num_parts});
    }
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const auto& a, const auto& b) { return a.cost > b.cost; });
}

}  // namespace pio
