// The C interface of the operations on rows.
#include <cstdint>

#include "api.h"
#include "indices.h"
#include "rows.h"
#include "team.h"
#include "types.h"

namespace {

using namespace pio;

template <class T>
View<T> view(void* data, int64_t rows, int64_t cols, int64_t stride) {
  return {static_cast<T*>(data), rows, cols, stride};
}
template <class T>
View<const T> view(const void* data, int64_t rows, int64_t cols, int64_t stride) {
  return {static_cast<const T*>(data), rows, cols, stride};
}

template <class T>
void embed_all(Team& team, const void* table, int64_t table_rows, int64_t stride,
               const int64_t* ids, int64_t num_ids, int64_t cols, float* out) {
  check_indices("token id", ids, num_ids, table_rows);
  team.run([&](Worker& worker) {
    embed(worker, view<T>(table, table_rows, cols, stride), ids, View<float>{out, num_ids, cols, cols});
  });
}

template <class X, class T>
void rms_norm_all(Team& team, const void* x, int64_t rows, int64_t cols, int64_t stride,
                  const void* weight, float eps, void* out) {
  team.run([&](Worker& worker) {
    rms_norm(worker, view<X>(x, rows, cols, stride), static_cast<const T*>(weight), eps,
             view<T>(out, rows, cols, cols));
  });
}

// In the order of the arguments of pio_qk_norm_rope_write.
struct Projection {
  void* data;
  int64_t rows;
  int64_t stride;
  int32_t num_heads;
};
struct Rotation {
  const float* weight_AD;
  const float* cos;
  const float* sin;
  const int64_t* slots;
  float eps;
};
struct Cache {
  void* data;
  int64_t num_blocks;
  int32_t kv_heads;
  int32_t block_size;
  int32_t head_dim;
};

template <class T>
void write_all(Team& team, const Projection& qkv, const Rotation& rotation, const Cache& cache) {
  check_indices("slot", rotation.slots, qkv.rows, cache.num_blocks * cache.block_size);
  const int64_t half = cache.head_dim / 2;
  const int64_t query_cols = int64_t{qkv.num_heads} * cache.head_dim;
  const int64_t cols = query_cols + 2 * int64_t{cache.kv_heads} * cache.head_dim;
  team.run([&](Worker& worker) {
    qk_norm_rope_write(worker, view<T>(static_cast<const void*>(qkv.data), qkv.rows, cols, qkv.stride),
                       rotation.weight_AD, View<const float>{rotation.cos, qkv.rows, half, half},
                       View<const float>{rotation.sin, qkv.rows, half, half}, rotation.slots,
                       rotation.eps,
                       KVLayer<T>{static_cast<T*>(cache.data), cache.kv_heads, cache.block_size,
                                  cache.head_dim},
                       view<T>(qkv.data, qkv.rows, query_cols, qkv.stride));
  });
}

}  // namespace

// `table` [table_rows, cols] of `dtype`; `out` float32 [num_ids, cols].
PIO_API const char* pio_embed(void* team, DType dtype, const void* table, int64_t table_rows,
                              int64_t stride, const int64_t* ids, int64_t num_ids, int64_t cols,
                              float* out) {
  return guarded([&] {
    const auto run = dtype == DType::bf16 ? embed_all<bf16> : embed_all<float>;
    run(*static_cast<Team*>(team), table, table_rows, stride, ids, num_ids, cols, out);
  });
}

// `x` [rows, cols] of `x_dtype`, which is `dtype` or float32; `weight` and `out` of `dtype`.
PIO_API const char* pio_rms_norm(void* team, DType x_dtype, DType dtype, const void* x,
                                 int64_t rows, int64_t cols, int64_t stride, const void* weight,
                                 float eps, void* out) {
  return guarded([&] {
    const auto run = dtype == DType::f32    ? rms_norm_all<float, float>
                     : x_dtype == DType::f32 ? rms_norm_all<float, bf16>
                                             : rms_norm_all<bf16, bf16>;
    run(*static_cast<Team*>(team), x, rows, cols, stride, weight, eps, out);
  });
}

// Queries stay in the begin of `qkv`'s rows.
PIO_API const char* pio_qk_norm_rope_write(void* team, DType dtype, void* qkv, int64_t rows,
                                           int64_t stride, int32_t num_heads,
                                           const float* weight_AD, const float* cos,
                                           const float* sin, const int64_t* slots, float eps,
                                           void* cache, int64_t num_blocks, int32_t kv_heads,
                                           int32_t block_size, int32_t head_dim) {
  return guarded([&] {
    const auto run = dtype == DType::bf16 ? write_all<bf16> : write_all<float>;
    run(*static_cast<Team*>(team), {qkv, rows, stride, num_heads},
        {weight_AD, cos, sin, slots, eps}, {cache, num_blocks, kv_heads, block_size, head_dim});
  });
}
