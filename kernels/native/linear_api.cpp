// The C interface of packed linears.
#include <stdexcept>

#include "api.h"
#include "linear.h"

namespace pio {
namespace {

// A view whose element type is an argument of its own.
struct Matrix {
  void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;

  template <class T>
  View<T> as() const {
    return {static_cast<T*>(data), rows, cols, stride};
  }
};

// Calls body(T{}) with the element type.
template <class Body>
void with_type(int32_t dtype, Body body) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(bf16{});
  }
  throw std::invalid_argument("the element type is neither float32 nor bfloat16");
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// Runs one linear in a region of its own.
template <class T, class Output>
void run(void* team, const void* handle, const Matrix& x, const Matrix& out, const Output& to) {
  const auto& linear = *static_cast<const PackedLinear<T>*>(handle);
  require(x.cols == linear.in_features(), "x has another width than the weight");
  require(out.cols == linear.out_features(), "the output has another width than the weight");
  require(out.rows == x.rows, "the output has another number of rows than x");
  static_cast<Team*>(team)->run(
      [&](Worker& worker) { linear.run(worker, x.as<const T>(), to); });
}

}  // namespace
}  // namespace pio

using pio::Matrix;

// `handle` becomes a PackedLinear<T>*. `bias` is float32 or null.
PIO_API const char* pio_linear_pack(void* team, int32_t dtype, const Matrix* weight,
                                    const float* bias, void** handle) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      using T = decltype(element);
      auto& workers = *static_cast<pio::Team*>(team);
      *handle = pio::PackedLinear<T>::pack(workers, weight->as<const T>(), bias).release();
    });
  });
}

PIO_API const char* pio_linear_pack_swiglu(void* team, int32_t dtype, const Matrix* gate,
                                           const Matrix* up, void** handle) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      using T = decltype(element);
      auto& workers = *static_cast<pio::Team*>(team);
      *handle = pio::PackedLinear<T>::pack_swiglu(workers, gate->as<const T>(), up->as<const T>())
                    .release();
    });
  });
}

// `dtype` is that of the activations.
PIO_API const char* pio_linear_pack_quantized(void* team, int32_t dtype,
                                              const pio::QuantizedView* weight, const float* bias,
                                              void** handle) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      auto& workers = *static_cast<pio::Team*>(team);
      *handle = pio::PackedLinear<decltype(element)>::pack(workers, *weight, bias).release();
    });
  });
}

PIO_API const char* pio_linear_pack_quantized_swiglu(void* team, int32_t dtype,
                                                     const pio::QuantizedView* gate,
                                                     const pio::QuantizedView* up, void** handle) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      auto& workers = *static_cast<pio::Team*>(team);
      *handle = pio::PackedLinear<decltype(element)>::pack_swiglu(workers, *gate, *up).release();
    });
  });
}

PIO_API const char* pio_linear_free(int32_t dtype, void* handle) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      delete static_cast<pio::PackedLinear<decltype(element)>*>(handle);
    });
  });
}

PIO_API const char* pio_linear_num_bytes(int32_t dtype, const void* handle, int64_t* num_bytes) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      *num_bytes = static_cast<const pio::PackedLinear<decltype(element)>*>(handle)->num_bytes();
    });
  });
}

PIO_API const char* pio_linear_panels(int32_t dtype, const void* handle, const void** panels) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      *panels = static_cast<const pio::PackedLinear<decltype(element)>*>(handle)->panels();
    });
  });
}

PIO_API const char* pio_linear_place(int32_t dtype, void* handle, void* memory) {
  return pio::guarded([&] {
    pio::require(reinterpret_cast<uintptr_t>(memory) % 64 == 0, "the memory is not aligned to 64");
    pio::with_type(dtype, [&](auto element) {
      static_cast<pio::PackedLinear<decltype(element)>*>(handle)->place(
          static_cast<std::byte*>(memory));
    });
  });
}

PIO_API const char* pio_linear_store(void* team, int32_t dtype, const void* handle,
                                     const Matrix* x, const Matrix* out) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      using T = decltype(element);
      pio::run<T>(team, handle, *x, *out, pio::Store<T>{out->as<T>()});
    });
  });
}

PIO_API const char* pio_linear_store_float(void* team, int32_t dtype, const void* handle,
                                           const Matrix* x, const Matrix* out) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      using T = decltype(element);
      pio::run<T>(team, handle, *x, *out, pio::StoreFloat{out->as<float>()});
    });
  });
}

PIO_API const char* pio_linear_add(void* team, int32_t dtype, const void* handle, const Matrix* x,
                                   const Matrix* residual, const Matrix* out) {
  return pio::guarded([&] {
    pio::require(residual->rows == out->rows && residual->cols == out->cols,
                 "the residual has another shape than the output");
    pio::with_type(dtype, [&](auto element) {
      using T = decltype(element);
      pio::run<T>(team, handle, *x, *out, pio::AddTo<T>{residual->as<const T>(), out->as<T>()});
    });
  });
}

PIO_API const char* pio_linear_add_to_stream(void* team, int32_t dtype, const void* handle,
                                             const Matrix* x, const Matrix* stream) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      using T = decltype(element);
      pio::run<T>(team, handle, *x, *stream, pio::AddToStream{stream->as<float>()});
    });
  });
}

PIO_API const char* pio_linear_swiglu(void* team, int32_t dtype, const void* handle,
                                      const Matrix* x, const Matrix* out) {
  return pio::guarded([&] {
    pio::with_type(dtype, [&](auto element) {
      using T = decltype(element);
      pio::run<T>(team, handle, *x, *out, pio::SwiGLU<T>{out->as<T>()});
    });
  });
}
