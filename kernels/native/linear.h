// Linear layers over packed weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "team.h"
#include "types.h"

namespace pio {

// What becomes of a product. `T` is the element type of the activations.
template <class T>
struct Store {  // out = product
  View<T> out;
};
struct StoreFloat {  // out = product, not rounded to the activations' type
  View<float> out;
};
template <class T>
struct AddTo {  // out = residual + product; the two may be the same memory
  View<const T> residual;
  View<T> out;
};
struct AddToStream {  // stream += product: the residual stream in float32
  View<float> stream;
};
template <class T>
struct SwiGLU {  // out = silu(gate product) * (up product), half as many columns as packed rows
  View<T> out;
};

// A quantized weight as a file has it: weight = (code - zero) * scale. Rows are cut into groups of
// `group_inputs` columns, the last one may be shorter; each has a scale and perhaps a zero point.
struct QuantizedView {
  int64_t rows;
  int64_t cols;
  const std::byte* codes;  // of a row: a byte each, or two in a byte, the even column's in its low half
  int64_t row_bytes;
  const float* table;      // the 16 values that 4-bit codes number; null for signed bytes
  const void* scales;      // [rows, groups], contiguous
  const int8_t* zeros;     // as the scales, or null
  int64_t group_inputs;    // even, or at least `cols`
  int32_t has_half_scales;  // float16 instead of float32
  int32_t has_int8_activations;  // which are rounded token by token

  bool has_row_scales() const {  // float32, for signed bytes that stand for themselves
    return table == nullptr && zeros == nullptr && groups() == 1 && has_half_scales == 0;
  }
  int64_t groups() const { return (cols + group_inputs - 1) / group_inputs; }
};

// A weight in the layout that this build's instruction set reads; the original is no longer needed.
template <class T>
class PackedLinear {
 public:
  // `weight` is [out_features, in_features]; `bias`, float32 or null, is added to the product.
  static std::unique_ptr<PackedLinear> pack(Team& team, View<const T> weight, const float* bias);
  // Gate and up, [intermediate, in_features] each, interleaved for the SwiGLU epilogue.
  static std::unique_ptr<PackedLinear> pack_swiglu(Team& team, View<const T> gate,
                                                   View<const T> up);
  // Weights that stay quantized in memory; gate and up are quantized alike.
  static std::unique_ptr<PackedLinear> pack(Team& team, const QuantizedView& weight,
                                            const float* bias);
  static std::unique_ptr<PackedLinear> pack_swiglu(Team& team, const QuantizedView& gate,
                                                   const QuantizedView& up);
  virtual ~PackedLinear() = default;

  virtual int64_t in_features() const = 0;
  virtual int64_t out_features() const = 0;  // of a SwiGLU: of its result
  virtual int64_t num_bytes() const = 0;     // of the packed weight

  // Where the packed weight lies, `num_bytes` long.
  virtual const std::byte* panels() const = 0;
  // From now on it lies in `memory`, at a multiple of 64, which belongs to others. Nothing is
  // copied there; what it lay in before is freed. Not while anything runs.
  virtual void place(std::byte* memory) = 0;

  // Each computes x @ weight.T for all rows of x, in tiles taken from the worker's counter. The
  // sum of one output element runs in the same order for any number of rows and workers.
  virtual void run(Worker& worker, View<const T> x, Store<T> to) const = 0;
  virtual void run(Worker& worker, View<const T> x, StoreFloat to) const = 0;
  virtual void run(Worker& worker, View<const T> x, AddTo<T> to) const = 0;
  virtual void run(Worker& worker, View<const T> x, AddToStream to) const = 0;
  virtual void run(Worker& worker, View<const T> x, SwiGLU<T> to) const = 0;
};

}  // namespace pio
