// Blocks as pages: bounds of their keys, and the choice of those that a token's queries may want.
#pragma once

#include <cstdint>
#include <vector>

#include "team.h"
#include "types.h"

namespace pio {

// As in pattern.py: blocks that a token sees whatever its queries.
constexpr int kFirstPages = 1;
constexpr int kLastPages = 2;

// Writes the bounds of full blocks, whose keys are numbers or codes. The workers split them by index.
template <class T, class E>
void bound_pages(Worker& worker, KVLayer<const E> cache, const int32_t* blocks, int64_t count,
                 BoundsLayer<T> bounds);

// One worker's memory for choices.
struct PageScratch {
  std::vector<float> parts;  // [2, head_dim]: sums of the queries' negative and positive elements
  std::vector<float> scores;  // of each block
  std::vector<int32_t> order;

  // Makes room for tables of so many blocks; not within a region.
  void make_room(int head_dim, int64_t num_blocks);
};

// The blocks of `table` that a token sees whose own is number `last`: kFirstPages, the `pages` whose
// keys may score highest, kLastPages; in the table's order, to `seen`. There are more blocks than
// that. `queries` are those of one KV head, `group` rows of head_dim elements.
template <class T>
void select_pages(const T* queries, int group, BoundsLayer<const T> bounds, int kv_head,
                  const int32_t* table, int last, int pages, PageScratch& scratch, int32_t* seen);

}  // namespace pio
