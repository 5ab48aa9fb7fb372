// The layers of a model, one after the other, in one parallel region.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "linear.h"
#include "team.h"
#include "types.h"

namespace pio {

// What all layers of a stack have in common.
struct StackShape {
  int32_t hidden_size;
  int32_t intermediate_size;
  int32_t num_heads;
  int32_t kv_heads;
  int32_t head_dim;
  float eps;  // of every RMSNorm
};

// One layer's weights; they belong to others and outlive the stack.
template <class T>
struct LayerWeights {
  const T* input_norm;
  const PackedLinear<T>* qkv;
  const float* qk_norm_AD;  // see qk_norm_rope_write
  const PackedLinear<T>* attention_out;
  const T* mlp_norm;
  const PackedLinear<T>* gate_up;
  const PackedLinear<T>* down;
};

// What one step brings besides the residual stream.
struct StackStep {
  Batch batch;
  const float* cos;      // [T, head_dim / 2]
  const float* sin;      // likewise
  const int64_t* slots;  // [T], where each token's key and value are written
  int64_t first_layer;   // of `num_layers` that run
  int64_t num_layers;
  KVFormat kv_format;
  void* const* kv_layers;      // the cache of each layer that runs, kv_N2KSD
  void* const* bounds_layers;  // its bounds_N2KD; read where pages are selected
  const int32_t* filled;       // blocks that the step fills, whose bounds are then due
  int64_t num_filled;
  int64_t num_blocks;  // N of each
  int32_t block_size;
};

template <class T>
class LayerStack {
 public:
  // Throws std::invalid_argument where a packed weight is not of the shape.
  LayerStack(Team& team, const StackShape& shape, std::vector<LayerWeights<T>> layers);
  ~LayerStack();

  // Layers over the residual stream, float32 [num_tokens, hidden_size], in place. Buffers grow to
  // the largest step seen and are kept. Throws std::out_of_range for a layer, block or slot that is
  // not there.
  void run(float* stream, int64_t num_tokens, const StackStep& step);

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace pio
