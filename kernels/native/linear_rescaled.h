// What becomes of sums of products with activations that were rounded: they lack the token's scale.
#pragma once

#include <cstdint>
#include <type_traits>

#include "linear_epilogue.h"
#include "simd_int8.h"

namespace pio {

// Multiplies by the token's scale, then by what the columns have, before sums become what `to` says.
// `Sum` is what they are in: float, or int32_t in its place.
template <class Sum, class Output>
struct Rescaled {
  Output to;
  const float* token_scales;
  const ColumnTerms& terms;
  int64_t panel_columns;  // results of one panel
};

template <class Sum, class Output>
void finish(const Rescaled<Sum, Output>& to, int64_t row, int64_t first, int64_t columns,
            const Product& product) {
  const simd::Floats scale = simd::filled(to.token_scales[row]);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kPanelColumns; i += simd::kLanes) {
    float* at = product.at(i);
    if constexpr (std::is_same_v<Sum, float>) {
      simd::store(at, simd::load(at) * scale);
    } else {
      simd::store(at, simd::to_floats(simd::load_ints(at)) * scale);
    }
  }
  apply(to.terms, first / to.panel_columns, product);
  finish(to.to, row, first, columns, product);
}

}  // namespace pio
