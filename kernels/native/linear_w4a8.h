// Linears of int4 weights in groups, for activations that are rounded to int8 token by token.
//
// A group's sum of codes is exact in int32; times the group's scale it is added to the column's in
// float32. The layout is that of linear_nibble_groups.h.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"

namespace pio {

// One weight, or gate and up for the SwiGLU epilogue; `bias` is float32 or null. Groups are of a
// multiple of 32 columns, or one has them all; scales are float16.
template <class T>
std::unique_ptr<PackedLinear<T>> pack_w4a8(Team& team, const std::vector<QuantizedView>& weights,
                                           const float* bias);

}  // namespace pio
