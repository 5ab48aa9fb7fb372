// The C interface of attention. A handle is of one shape, dtype and team; one caller at a time.
#include <cstdint>
#include <memory>

#include "api.h"
#include "attention.h"
#include "indices.h"
#include "pages.h"
#include "team.h"
#include "types.h"

namespace {

using namespace pio;

struct AttentionShapeOf {
  int32_t num_heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t block_size;
};

// An Attention of some element type with what it needs to run.
class AttentionHandle {
 public:
  virtual ~AttentionHandle() = default;
  virtual void plan(const Batch& batch, int64_t num_blocks) = 0;
  virtual void run(const void* queries, int64_t rows, int64_t stride, KVFormat format,
                   const void* cache, const void* bounds, void* out) = 0;
};

template <class T>
class TypedHandle final : public AttentionHandle {
 public:
  TypedHandle(Team& team, const AttentionShapeOf& shape)
      : team_(team),
        shape_(shape),
        attention_(shape.num_heads, shape.kv_heads, shape.head_dim, shape.block_size,
                   team.size()) {}

  void plan(const Batch& batch, int64_t num_blocks) override {
    check_tables(batch, shape_.block_size, num_blocks);
    attention_.plan(batch);
  }

  void run(const void* queries, int64_t rows, int64_t stride, KVFormat format, const void* cache,
           const void* bounds, void* out) override {
    const int64_t cols = int64_t{shape_.num_heads} * shape_.head_dim;
    const BoundsLayer<const T> of_pages{static_cast<const T*>(bounds), shape_.kv_heads,
                                        shape_.head_dim};
    const auto over = [&](auto layer) {
      team_.run([&](Worker& worker) {
        attention_.run(worker, View<const T>{static_cast<const T*>(queries), rows, cols, stride},
                       layer, of_pages, View<T>{static_cast<T*>(out), rows, cols, cols});
      });
    };
    with_kv_layer<T>(format, cache, shape_.kv_heads, shape_.block_size, shape_.head_dim, over);
  }

 private:
  Team& team_;
  const AttentionShapeOf shape_;
  Attention<T> attention_;
};

}  // namespace

PIO_API const char* pio_attention_new(void* team, DType dtype, int32_t num_heads, int32_t kv_heads,
                                      int32_t head_dim, int32_t block_size, void** handle) {
  return guarded([&] {
    const AttentionShapeOf shape{num_heads, kv_heads, head_dim, block_size};
    Team& workers = *static_cast<Team*>(team);
    if (dtype == DType::bf16) {
      *handle = std::make_unique<TypedHandle<bf16>>(workers, shape).release();
    } else {
      *handle = std::make_unique<TypedHandle<float>>(workers, shape).release();
    }
  });
}

PIO_API void pio_attention_delete(void* handle) { delete static_cast<AttentionHandle*>(handle); }

// `batch` and its arrays must live until the last run of this plan.
PIO_API const char* pio_attention_plan(void* handle, const Batch* batch, int64_t num_blocks) {
  return guarded([&] { static_cast<AttentionHandle*>(handle)->plan(*batch, num_blocks); });
}

// `queries` [rows, num_heads * head_dim], rows `stride` elements apart; `out` without gaps.
// `bounds` may be null where no pages are selected.
PIO_API const char* pio_attention_run(void* handle, const void* queries, int64_t rows,
                                      int64_t stride, KVFormat format, const void* cache,
                                      const void* bounds, void* out) {
  return guarded([&] {
    static_cast<AttentionHandle*>(handle)->run(queries, rows, stride, format, cache, bounds, out);
  });
}

// `blocks` lie in the cache and are full. `dtype` is that of the bounds.
PIO_API const char* pio_bound_pages(void* team, DType dtype, KVFormat format, const void* cache,
                                    int32_t kv_heads, int32_t block_size, int32_t head_dim,
                                    const int32_t* blocks, int64_t count, void* bounds) {
  return guarded([&] {
    const auto run = [&]<class T>(T* to) {
      const auto over = [&](auto layer) {
        static_cast<Team*>(team)->run([&](Worker& worker) {
          bound_pages(worker, layer, blocks, count, BoundsLayer<T>{to, kv_heads, head_dim});
        });
      };
      with_kv_layer<T>(format, cache, kv_heads, block_size, head_dim, over);
    };
    if (dtype == DType::bf16) {
      run(static_cast<bf16*>(bounds));
    } else {
      run(static_cast<float*>(bounds));
    }
  });
}
