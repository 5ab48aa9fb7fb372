#include <stdexcept>

#include "linear_codes.h"
#include "linear_few_rows_amx.h"
#include "linear_few_rows_fma.h"
#include "linear_of_panels.h"
#include "linear_w4a8.h"
#include "linear_w8a8.h"

namespace pio {

namespace {

void check(const QuantizedView& weight) {
  if (weight.group_inputs < 1 ||
      (weight.group_inputs % kBlockInputs != 0 && weight.group_inputs < weight.cols)) {
    throw std::invalid_argument("quantized weights are in groups of an even number of columns");
  }
}

bool are_alike(const QuantizedView& one, const QuantizedView& other) {
  return one.rows == other.rows && one.cols == other.cols && one.groups() == other.groups() &&
         one.has_int8_activations == other.has_int8_activations &&
         one.group_inputs == other.group_inputs && one.has_half_scales == other.has_half_scales &&
         (one.table == nullptr) == (other.table == nullptr) &&
         (one.zeros == nullptr) == (other.zeros == nullptr);
}

template <class T>
std::unique_ptr<PackedLinear<T>> pack_rounding(Team& team,
                                               const std::vector<QuantizedView>& weights,
                                               const float* bias) {
  const bool has_bytes = weights.front().table == nullptr;
  return has_bytes ? pack_w8a8<T>(team, weights, bias) : pack_w4a8<T>(team, weights, bias);
}

}  // namespace

template <class T>
std::unique_ptr<PackedLinear<T>> PackedLinear<T>::pack(Team& team, const QuantizedView& weight,
                                                       const float* bias) {
  check(weight);
  if (weight.has_int8_activations) return pack_rounding<T>(team, {weight}, bias);
  const auto shape = plan_panels<CodeNumber<T>>(weight.cols, weight.rows, kPanelColumns);
  auto panels = pack_codes<CodeNumber<T>>(team, {weight}, shape);
  if (bias != nullptr) {
    panels.terms.bias.assign(bias, bias + weight.rows);
    panels.terms.bias.resize(shape.num_panels * kPanelColumns);
  }
  return std::make_unique<LinearOfPanels<T, CodePanels<CodeNumber<T>>>>(std::move(panels));
}

template <class T>
std::unique_ptr<PackedLinear<T>> PackedLinear<T>::pack_swiglu(Team& team, const QuantizedView& gate,
                                                              const QuantizedView& up) {
  check(gate);
  if (!are_alike(gate, up)) {
    throw std::invalid_argument("gate and up projections are not quantized alike");
  }
  if (gate.has_int8_activations) return pack_rounding<T>(team, {gate, up}, nullptr);
  const auto shape = plan_panels<CodeNumber<T>>(gate.cols, gate.rows, kPanelColumns / 2);
  return std::make_unique<LinearOfPanels<T, CodePanels<CodeNumber<T>>>>(
      pack_codes<CodeNumber<T>>(team, {gate, up}, shape));
}

#define PIO_INSTANTIATE(T)                                                                     \
  template std::unique_ptr<PackedLinear<T>> PackedLinear<T>::pack(Team&, const QuantizedView&, \
                                                                  const float*);               \
  template std::unique_ptr<PackedLinear<T>> PackedLinear<T>::pack_swiglu(                      \
      Team&, const QuantizedView&, const QuantizedView&);
PIO_INSTANTIATE(float)
PIO_INSTANTIATE(bf16)
#undef PIO_INSTANTIATE

}  // namespace pio
