#include "forward.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "attention.h"
#include "huge_buffer.h"
#include "indices.h"
#include "pages.h"
#include "rows.h"

namespace pio {

namespace {

struct Widths {
  explicit Widths(const StackShape& shape)
      : hidden(shape.hidden_size),
        inner(shape.intermediate_size),
        queries(int64_t{shape.num_heads} * shape.head_dim),
        qkv(queries + 2 * int64_t{shape.kv_heads} * shape.head_dim) {}

  int64_t hidden, inner, queries, qkv;
};

// What one kernel writes and the next one reads. Queries lie where the projection put them.
template <class T>
struct Activations {
  View<T> normed, qkv, queries, attended, inner;
};

template <class T>
class ActivationBuffers {
 public:
  Activations<T> of(int64_t rows, const Widths& widths) {
    const View<T> qkv = view(qkv_, rows, widths.qkv);
    return {
        .normed = view(normed_, rows, widths.hidden),
        .qkv = qkv,
        .queries = {qkv.data, rows, widths.queries, qkv.stride},
        .attended = view(attended_, rows, widths.queries),
        .inner = view(inner_, rows, widths.inner),
    };
  }

 private:
  // Rows end a cache line apart from a power of two: else the same columns of all rows would share a
  // few sets of the caches.
  static View<T> view(KeptBuffer<T>& buffer, int64_t rows, int64_t cols) {
    const int64_t stride = cols + static_cast<int64_t>(64 / sizeof(T));
    return {buffer.get(static_cast<size_t>(rows * stride)), rows, cols, stride};
  }

  KeptBuffer<T> normed_, qkv_, attended_, inner_;
};

template <class T>
View<const T> reading(View<T> view) {
  return {view.data, view.rows, view.cols, view.stride};
}

template <class E>
KVLayer<const E> reading(KVLayer<E> layer) {
  return {layer.data, layer.kv_heads, layer.block_size, layer.head_dim};
}

template <class T>
BoundsLayer<const T> reading(BoundsLayer<T> layer) {
  return {layer.data, layer.kv_heads, layer.head_dim};
}

void expect(const char* name, int64_t got, int64_t expected) {
  if (got != expected) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(got) +
                                " wide where the stack's shape asks for " +
                                std::to_string(expected));
  }
}

template <class T>
void expect(const char* name, const PackedLinear<T>& linear, int64_t in, int64_t out) {
  const std::string prefix(name);
  expect((prefix + "'s input").c_str(), linear.in_features(), in);
  expect((prefix + "'s output").c_str(), linear.out_features(), out);
}

// The kernels follow these numbers without looking.
void expect_in_cache(const StackStep& step, int64_t num_tokens) {
  check_tables(step.batch, step.block_size, step.num_blocks);
  const auto expect_block = [&](int64_t block) {
    if (block < 0 || block >= step.num_blocks) {
      throw std::out_of_range("there is no block " + std::to_string(block) + " in a cache of " +
                              std::to_string(step.num_blocks));
    }
  };
  for (int64_t i = 0; i < num_tokens; ++i) {
    expect_block(step.slots[i] < 0 ? step.slots[i] : step.slots[i] / step.block_size);
  }
  for (int64_t i = 0; i < step.num_filled; ++i) expect_block(step.filled[i]);
}

}  // namespace

template <class T>
struct LayerStack<T>::Parts {
  Parts(Team& team, const StackShape& shape, std::vector<LayerWeights<T>> layers)
      : team(team),
        shape(shape),
        widths(shape),
        layers(std::move(layers)) {}

  Team& team;
  const StackShape shape;
  const Widths widths;
  const std::vector<LayerWeights<T>> layers;
  ActivationBuffers<T> buffers;
  std::unique_ptr<Attention<T>> attention;  // for caches of this block size
  int32_t block_size = 0;

  void plan_attention(const Batch& batch, int32_t wanted_block_size) {
    if (block_size != wanted_block_size) {
      attention = std::make_unique<Attention<T>>(shape.num_heads, shape.kv_heads, shape.head_dim,
                                                 wanted_block_size, team.size());
      block_size = wanted_block_size;
    }
    attention->plan(batch);
  }

  // One worker's part of one layer. Every kernel reads what all workers wrote in the one before.
  void run_layer(Worker& worker, const LayerWeights<T>& layer, View<float> stream,
                 const Activations<T>& to, const StackStep& step, void* kv_data,
                 void* bounds_data) const {
    const int64_t rows = stream.rows, half = shape.head_dim / 2;
    const View<const float> cos{step.cos, rows, half, half}, sin{step.sin, rows, half, half};

    rms_norm(worker, reading(stream), layer.input_norm, shape.eps, to.normed);
    worker.barrier();
    layer.qkv->run(worker, reading(to.normed), Store<T>{to.qkv});
    worker.barrier();
    const auto attend = [&]<class E>(KVLayer<E> cache) {
      qk_norm_rope_write(worker, reading(to.qkv), layer.qk_norm_AD, cos, sin, step.slots,
                         shape.eps, cache, to.queries);
      worker.barrier();
      const BoundsLayer<T> bounds{static_cast<T*>(bounds_data), shape.kv_heads, shape.head_dim};
      if (step.num_filled > 0) {
        bound_pages(worker, reading(cache), step.filled, step.num_filled, bounds);
        worker.barrier();
      }
      attention->run(worker, reading(to.queries), reading(cache), reading(bounds), to.attended);
      worker.barrier();
    };
    with_kv_layer<T>(step.kv_format, kv_data, shape.kv_heads, block_size, shape.head_dim, attend);
    layer.attention_out->run(worker, reading(to.attended), AddToStream{stream});
    worker.barrier();
    rms_norm(worker, reading(stream), layer.mlp_norm, shape.eps, to.normed);
    worker.barrier();
    layer.gate_up->run(worker, reading(to.normed), SwiGLU<T>{to.inner});
    worker.barrier();
    layer.down->run(worker, reading(to.inner), AddToStream{stream});
    worker.barrier();
  }
};

template <class T>
LayerStack<T>::LayerStack(Team& team, const StackShape& shape, std::vector<LayerWeights<T>> layers)
    : parts_(std::make_unique<Parts>(team, shape, std::move(layers))) {
  const Widths& widths = parts_->widths;
  for (const LayerWeights<T>& layer : parts_->layers) {
    expect("qkv", *layer.qkv, widths.hidden, widths.qkv);
    expect("attention_out", *layer.attention_out, widths.queries, widths.hidden);
    expect("gate_up", *layer.gate_up, widths.hidden, widths.inner);
    expect("down", *layer.down, widths.inner, widths.hidden);
  }
}

template <class T>
LayerStack<T>::~LayerStack() = default;

template <class T>
void LayerStack<T>::run(float* stream, int64_t num_tokens, const StackStep& step) {
  Parts& parts = *parts_;
  expect_in_cache(step, num_tokens);
  const int64_t end = step.first_layer + step.num_layers;
  if (step.first_layer < 0 || step.num_layers < 0 || end > static_cast<int64_t>(parts.layers.size())) {
    throw std::out_of_range("layers " + std::to_string(step.first_layer) + " to " +
                            std::to_string(end) + " of a stack of " +
                            std::to_string(parts.layers.size()));
  }
  const int64_t hidden = parts.widths.hidden;
  const View<float> rows{stream, num_tokens, hidden, hidden};
  const Activations<T> activations = parts.buffers.of(num_tokens, parts.widths);
  parts.plan_attention(step.batch, step.block_size);
  parts.team.run([&](Worker& worker) {
    for (int64_t i = 0; i < step.num_layers; ++i) {
      void* bounds = step.bounds_layers == nullptr ? nullptr : step.bounds_layers[i];
      parts.run_layer(worker, parts.layers[step.first_layer + i], rows, activations, step,
                      step.kv_layers[i], bounds);
    }
  });
}

template class LayerStack<float>;
template class LayerStack<bf16>;

}  // namespace pio
