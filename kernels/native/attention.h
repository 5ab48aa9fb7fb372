// Paged causal attention: chunks of prompts and single new tokens in one call.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "team.h"
#include "types.h"

namespace pio {

// How one step's batch is split among the workers: made once a step, used for every layer.
//
// Query heads that share a KV head are rows of one tile, so each key and value is read once.
// Long contexts of few sequences are split along their keys, and the parts joined.
template <class T>
class Attention {
 public:
  Attention(int num_heads, int kv_heads, int head_dim, int block_size, int num_workers);
  ~Attention();

  // Takes the step's batch; its arrays must live until the last `run` of the step. Not called
  // within a region. Memory grows to the largest step seen and is kept.
  void plan(const Batch& batch);

  // Every new token attends to all tokens of its sequence up to itself, whose keys and values lie
  // in the cache as T or as codes, or to those of them that the batch's pattern leaves. Queries are
  // scaled already. `queries` and `out` are [T, num_heads * head_dim]. `bounds` is read where pages
  // are selected. May hold barriers inside; `out` is complete after the caller's next barrier.
  template <class E>
  void run(Worker& worker, View<const T> queries, KVLayer<const E> cache,
           BoundsLayer<const T> bounds, View<T> out) const;

 private:
  struct Plan;
  std::unique_ptr<Plan> plan_;
};

}  // namespace pio
