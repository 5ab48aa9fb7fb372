// Activations rounded to int8, each token by a scale of its own.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd_int8.h"
#include "team.h"
#include "types.h"

namespace pio {

struct RoundedRows {
  View<const int8_t> codes;
  const float* scales;  // of each row
};

// The scale with which the largest magnitude of a row becomes 127; NaN where one is not finite.
template <class T>
float rounding_scale(const T* x, int64_t cols) {
  simd::Floats largest = simd::zeros(), poison = simd::zeros();
  for (int64_t i = 0; i < cols; i += simd::kLanes) {
    const int64_t left = cols - i;
    const simd::Floats value = left >= simd::kLanes
                                   ? simd::load(x + i)
                                   : simd::load_part(x + i, static_cast<int>(left));
    largest = simd::max(largest, simd::max(value, simd::zeros() - value));
    poison = simd::fma(value, simd::zeros(), poison);
  }
  float lanes[simd::kLanes];
  simd::store(lanes, largest);
  float most = 1e-30f;  // a row of zeros keeps a scale that can be divided by
  for (const float lane : lanes) most = lane > most ? lane : most;
  return most / 127.0f + simd::sum(poison);
}

// Writes `padded` codes, zeros behind the row's end, and up to a vector more.
template <class T>
void round_row(const T* x, int64_t cols, float scale, int64_t padded, int8_t* codes) {
  const simd::Floats divisor = simd::filled(scale), inverse = simd::filled(1.0f / scale);
  for (int64_t i = 0; i < padded; i += simd::kLanes) {
    const int64_t left = cols - i;
    const simd::Floats value =
        left >= simd::kLanes ? simd::load(x + i)
        : left > 0           ? simd::load_part(x + i, static_cast<int>(left))
                             : simd::zeros();
    // The quotient as a division rounds it, without its cost.
    const simd::Floats near = value * inverse;
    const simd::Floats rest = simd::fnma(near, divisor, value);
    simd::store_rounded(codes + i, simd::fma(rest, inverse, near));
  }
}

// The workers share the rows; when it returns, all are done. The memory is the team's, until the
// next call.
template <class T>
RoundedRows round_rows(Worker& worker, View<const T> x, int64_t padded) {
  constexpr int64_t kLine = 64;
  // A cache line more keeps the same columns of all rows out of the same few sets of the caches.
  const int64_t stride = (padded + kLine - 1) / kLine * kLine + kLine;
  std::byte* memory = worker.shared(static_cast<size_t>(x.rows * (stride + sizeof(float))));
  auto* codes = reinterpret_cast<int8_t*>(memory);
  auto* scales = reinterpret_cast<float*>(memory + x.rows * stride);
  const int64_t end = x.rows * (worker.index + 1) / worker.count;
  for (int64_t r = x.rows * worker.index / worker.count; r < end; ++r) {
    scales[r] = rounding_scale(x.row(r), x.cols);
    round_row(x.row(r), x.cols, scales[r], padded, codes + r * stride);
  }
  worker.barrier();
  return {{codes, x.rows, padded, stride}, scales};
}

}  // namespace pio
