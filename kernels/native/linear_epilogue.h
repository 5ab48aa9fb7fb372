// What becomes of the products of one row with one panel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "linear.h"
#include "linear_panels.h"
#include "simd.h"

namespace pio {

// x * sigmoid(x), never through a large power: 0 far below zero, NaN at minus infinity as torch.
inline simd::Floats silu(simd::Floats x) {
  const simd::Floats zero = simd::zeros();
  const simd::Floats above = simd::max(zero, x), below = simd::max(zero, zero - x);
  const simd::Floats power = simd::exp(zero - (above + below));
  return (above - below * power) / (simd::filled(1.0f) + power);
}

template <class T>
inline simd::Floats load_up_to(const T* from, int count) {
  return count == simd::kLanes ? simd::load(from) : simd::load_part(from, count);
}

template <class T>
inline void store_up_to(T* to, simd::Floats x, int count) {
  if (count == simd::kLanes) {
    simd::store(to, x);
  } else {
    simd::store_part(to, x, count);
  }
}

// Writes `columns` elements that result(offset, count) gives a vector at a time; the last may be a
// part of one.
template <class T, class Result>
inline void write_row(T* out, int64_t columns, Result result) {
  constexpr int64_t kLanes = simd::kLanes;
  int64_t i = 0;
  for (; i + 2 * kLanes <= columns; i += 2 * kLanes) {
    simd::store_both(out + i, result(i, kLanes), result(i + kLanes, kLanes));
  }
  for (; i < columns; i += kLanes) {
    const int count = static_cast<int>(std::min(kLanes, columns - i));
    store_up_to(out + i, result(i, count), count);
  }
}

// One row's products with a panel: those with its two strips, `strip` elements apart.
struct Product {
  float* data;
  int64_t strip;

  float* at(int64_t column) const {
    return data + column / kStripColumns * strip + column % kStripColumns;
  }
};

// Scales, then bias.
inline void apply(const ColumnTerms& terms, int64_t panel, const Product& product) {
  const int64_t first = panel * kPanelColumns;
  if (!terms.scales.empty()) {
    for (int64_t i = 0; i < kPanelColumns; i += simd::kLanes) {
      const simd::Floats scales = simd::load(terms.scales.data() + first + i);
      simd::store(product.at(i), simd::load(product.at(i)) * scales);
    }
  }
  if (!terms.bias.empty()) {
    for (int64_t i = 0; i < kPanelColumns; i += simd::kLanes) {
      const simd::Floats bias = simd::load(terms.bias.data() + first + i);
      simd::store(product.at(i), simd::load(product.at(i)) + bias);
    }
  }
}

// Each takes `columns` results of row `row`, from column `first` on.
template <class T>
inline void finish(const Store<T>& to, int64_t row, int64_t first, int64_t columns,
                   const Product& product) {
  write_row(to.out.row(row) + first, columns,
            [&](int64_t i, int) { return simd::load(product.at(i)); });
}

inline void finish(const StoreFloat& to, int64_t row, int64_t first, int64_t columns,
                   const Product& product) {
  finish(Store<float>{to.out}, row, first, columns, product);
}

template <class T>
inline void finish(const AddTo<T>& to, int64_t row, int64_t first, int64_t columns,
                   const Product& product) {
  const T* residual = to.residual.row(row) + first;
  write_row(to.out.row(row) + first, columns, [&](int64_t i, int count) {
    return load_up_to(residual + i, count) + simd::load(product.at(i));
  });
}

inline void finish(const AddToStream& to, int64_t row, int64_t first, int64_t columns,
                   const Product& product) {
  const View<const float> residual{to.stream.data, to.stream.rows, to.stream.cols,
                                   to.stream.stride};
  finish(AddTo<float>{residual, to.stream}, row, first, columns, product);
}

// The panel's first half are gate columns, its second half the up columns of the same results.
template <class T>
inline void finish(const SwiGLU<T>& to, int64_t row, int64_t first, int64_t columns,
                   const Product& product) {
  write_row(to.out.row(row) + first, columns, [&](int64_t i, int) {
    return silu(simd::load(product.at(i))) * simd::load(product.at(kPanelColumns / 2 + i));
  });
}

}  // namespace pio
