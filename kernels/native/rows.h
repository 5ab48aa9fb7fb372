// Operations on each token alone: embedding, norms, rotation and the write into the cache.
//
// The workers split the rows by index. A row's result depends on nothing but the row.
#pragma once

#include <cstdint>

#include "team.h"
#include "types.h"

namespace pio {

// out[t] = table[ids[t]], as float32: the begin of the residual stream.
template <class T>
void embed(Worker& worker, View<const T> table, const int64_t* ids, View<float> out);

// RMSNorm over each row; `weight` has x.cols elements.
// Computed in float32 and rounded to T twice, as the models were trained: before the product with
// the weight and after it. `X` is T, or float where x is the residual stream.
template <class X, class T>
void rms_norm(Worker& worker, View<const X> x, const T* weight, float eps, View<T> out);

// QK-norm and RoPE on queries and keys, then keys and values into the cache.
//
// A row of `qkv` holds the query heads, key heads and value heads of one token. `weight_AD`,
// float32, has a row for each query head (softmax scale included), then for each key head. What the
// norm gives is rounded to T before the weight, as in `rms_norm`.
// `cos` and `sin` are float32 [T, head_dim / 2]; channel i turns with channel i + head_dim / 2.
// Token t goes to slot `slots[t]` = block * block_size + offset. Queries go to `queries`,
// [T, num_heads * head_dim], which may be the begin of qkv's own rows. A cache of codes gets its keys
// from float32: they are not rounded to T before.
template <class T, class E>
void qk_norm_rope_write(Worker& worker, View<const T> qkv, const float* weight_AD,
                        View<const float> cos, View<const float> sin, const int64_t* slots,
                        float eps, KVLayer<E> cache, View<T> queries);

}  // namespace pio
