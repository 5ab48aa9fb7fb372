// How one step's attention is cut into items that workers take.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace pio {

// Keys whose softmax is computed at once. Longer contexts are joined from such parts in order,
// whoever computes them: a result does not depend on how the work is split.
constexpr int kPartKeys = 512;
// Keys of a part that are visited begin at a multiple of this.
constexpr int kKeyGranule = 64;
// So many items for each worker make it likely that all end together.
constexpr int64_t kItemsPerWorker = 4;

// Query heads of one KV head over neighbouring new tokens of one sequence: the rows of one tile,
// token after token.
struct AttentionTile {
  int32_t sequence;
  int32_t kv_head;
  int32_t first_row;       // of the step's rows
  int32_t num_tokens;
  int32_t of_tokens;       // new ones of the sequence, all its tiles together
  int32_t first_position;  // in the sequence, of the first token
  int32_t hidden_begin;    // parts [hidden_begin, hidden_end) hold no key that any row sees
  int32_t hidden_end;
  int64_t partial;         // first row of the tile's parts where several items share it, else -1
  int64_t selection;       // first of the plan's selected blocks, which it sees alone, or -1

  int32_t num_keys() const { return first_position + num_tokens; }
  // Parts that are visited, and the number of each among the sequence's.
  int32_t num_parts() const {
    return (num_keys() + kPartKeys - 1) / kPartKeys - (hidden_end - hidden_begin);
  }
  int32_t part(int32_t visited) const {
    return visited < hidden_begin ? visited : visited + hidden_end - hidden_begin;
  }
  int64_t num_visited_keys() const {
    return num_keys() - int64_t{hidden_end - hidden_begin} * kPartKeys;
  }
};

// A tile whose one token selects pages. It is computed as if its sequence had these alone.
struct PageSelection {
  int32_t tile;
  int32_t last;  // number of the token's own block
};

// Some parts of one tile.
struct AttentionItem {
  int32_t tile;
  int32_t first_part;
  int32_t end_part;
  int64_t cost;
};

// All of a step, the costliest item first. Its vectors keep their memory from step to step.
struct AttentionPlan {
  std::vector<AttentionTile> tiles;
  std::vector<AttentionItem> items;
  std::vector<int32_t> parts_left;  // of each tile that items share
  int64_t num_partial_rows = 0;
  std::vector<PageSelection> selections;
  std::vector<int32_t> selected_blocks;  // room for what each selection gives

  // `group` query heads share a KV head; a tile has at most `max_rows` rows, or one token.
  void make(const Batch& batch, int kv_heads, int group, int block_size, int max_rows,
            int num_workers);

 private:
  void add_selecting_tiles(const Batch& batch, int sequence, int row, int position, int kv_heads,
                           int block_size);
};

}  // namespace pio
