// Linears of int8 weights, one scale a row, for activations that are rounded to int8 token by token.
//
// Sums of codes are exact in int32. The layout is that of linear_panels.h with four codes a step.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"

namespace pio {

// One weight, or gate and up for the SwiGLU epilogue; `bias` is float32 or null.
template <class T>
std::unique_ptr<PackedLinear<T>> pack_w8a8(Team& team, const std::vector<QuantizedView>& weights,
                                           const float* bias);

}  // namespace pio
