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

// Calls body(offset, count) for vectors of `columns` elements; the last may be a part of one.
template <class Body>
inline void for_vectors(int64_t columns, Body body) {
  for (int64_t i = 0; i < columns; i += simd::kLanes) {
    body(i, static_cast<int>(std::min<int64_t>(simd::kLanes, columns - i)));
  }
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

// One row's products with a panel: scales, then bias.
inline void apply(const ColumnTerms& terms, int64_t panel, float* product) {
  const int64_t first = panel * kPanelColumns;
  if (!terms.scales.empty()) {
    for (int64_t i = 0; i < kPanelColumns; i += simd::kLanes) {
      const simd::Floats scales = simd::load(terms.scales.data() + first + i);
      simd::store(product + i, simd::load(product + i) * scales);
    }
  }
  if (!terms.bias.empty()) {
    for (int64_t i = 0; i < kPanelColumns; i += simd::kLanes) {
      const simd::Floats bias = simd::load(terms.bias.data() + first + i);
      simd::store(product + i, simd::load(product + i) + bias);
    }
  }
}

// Each takes `columns` results of row `row`, from column `first` on. `product` has a panel's 64.
template <class T>
inline void finish(const Store<T>& to, int64_t row, int64_t first, int64_t columns,
                   const float* product) {
  T* out = to.out.row(row) + first;
  for_vectors(columns, [&](int64_t i, int n) { store_up_to(out + i, simd::load(product + i), n); });
}

inline void finish(const StoreFloat& to, int64_t row, int64_t first, int64_t columns,
                   const float* product) {
  finish(Store<float>{to.out}, row, first, columns, product);
}

template <class T>
inline void finish(const AddTo<T>& to, int64_t row, int64_t first, int64_t columns,
                   const float* product) {
  const T* residual = to.residual.row(row) + first;
  T* out = to.out.row(row) + first;
  for_vectors(columns, [&](int64_t i, int n) {
    store_up_to(out + i, load_up_to(residual + i, n) + simd::load(product + i), n);
  });
}

inline void finish(const AddToStream& to, int64_t row, int64_t first, int64_t columns,
                   const float* product) {
  const View<const float> residual{to.stream.data, to.stream.rows, to.stream.cols,
                                   to.stream.stride};
  finish(AddTo<float>{residual, to.stream}, row, first, columns, product);
}

// The panel's first half are gate columns, its second half the up columns of the same results.
template <class T>
inline void finish(const SwiGLU<T>& to, int64_t row, int64_t first, int64_t columns,
                   const float* product) {
  T* out = to.out.row(row) + first;
  const float* up = product + kPanelColumns / 2;
  for_vectors(columns, [&](int64_t i, int n) {
    store_up_to(out + i, silu(simd::load(product + i)) * simd::load(up + i), n);
  });
}

}  // namespace pio
