// The C interface of forward.h: a stack's handle, and its run over one step.
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "api.h"
#include "forward.h"

namespace pio {
namespace {

// As in forward.py.
struct LayerPointers {
  const void* input_norm;
  const void* qkv;
  const float* qk_norm_AD;
  const void* attention_out;
  const void* mlp_norm;
  const void* gate_up;
  const void* down;
};

struct StepPointers {
  float* stream;
  int64_t num_tokens;
  Batch batch;
  const float* cos;
  const float* sin;
  const int64_t* slots;
  int64_t first_layer;
  int64_t num_layers;
  void* const* kv_layers;
  void* const* bounds_layers;
  const int32_t* filled;
  int64_t num_filled;
  int64_t num_blocks;
  int32_t block_size;
  KVFormat kv_format;
};

using AnyStack = std::variant<LayerStack<float>, LayerStack<bf16>>;

template <class T>
const PackedLinear<T>* linear(const void* handle) {
  return static_cast<const PackedLinear<T>*>(handle);
}

template <class T>
AnyStack* make(Team& team, const StackShape& shape, const LayerPointers* layers, int count) {
  std::vector<LayerWeights<T>> weights;
  for (const LayerPointers* layer = layers; layer < layers + count; ++layer) {
    weights.push_back({
        .input_norm = static_cast<const T*>(layer->input_norm),
        .qkv = linear<T>(layer->qkv),
        .qk_norm_AD = layer->qk_norm_AD,
        .attention_out = linear<T>(layer->attention_out),
        .mlp_norm = static_cast<const T*>(layer->mlp_norm),
        .gate_up = linear<T>(layer->gate_up),
        .down = linear<T>(layer->down),
    });
  }
  return new AnyStack(std::in_place_type<LayerStack<T>>, team, shape, std::move(weights));
}

template <class T>
void run(LayerStack<T>& stack, const StepPointers& step) {
  stack.run(step.stream, step.num_tokens,
            {
                .batch = step.batch,
                .cos = step.cos,
                .sin = step.sin,
                .slots = step.slots,
                .first_layer = step.first_layer,
                .num_layers = step.num_layers,
                .kv_format = step.kv_format,
                .kv_layers = step.kv_layers,
                .bounds_layers = step.bounds_layers,
                .filled = step.filled,
                .num_filled = step.num_filled,
                .num_blocks = step.num_blocks,
                .block_size = step.block_size,
            });
}

}  // namespace
}  // namespace pio

// `dtype` is the element type of activations and weights; what `layers` point to outlives the stack.
PIO_API const char* pio_stack_new(void* team, int32_t dtype, const pio::StackShape* shape,
                                  const pio::LayerPointers* layers, int32_t count, void** stack) {
  return pio::guarded([&] {
    auto& threads = *static_cast<pio::Team*>(team);
    switch (static_cast<pio::DType>(dtype)) {
      case pio::DType::f32: *stack = pio::make<float>(threads, *shape, layers, count); return;
      case pio::DType::bf16: *stack = pio::make<pio::bf16>(threads, *shape, layers, count); return;
    }
    throw std::invalid_argument("there is no element type " + std::to_string(dtype));
  });
}

PIO_API void pio_stack_delete(void* stack) { delete static_cast<pio::AnyStack*>(stack); }

PIO_API const char* pio_stack_run(void* stack, const pio::StepPointers* step) {
  return pio::guarded([&] {
    std::visit([&](auto& typed) { pio::run(typed, *step); },
               *static_cast<pio::AnyStack*>(stack));
  });
}
