#include "linear.h"

#include <stdexcept>

#include "linear_of_panels.h"

namespace pio {

template <class T>
std::unique_ptr<PackedLinear<T>> PackedLinear<T>::pack(Team& team, View<const T> weight,
                                                       const float* bias) {
  const auto shape = plan_panels<T>(weight.cols, weight.rows, kPanelColumns);
  Panels panels = pack_panels<T>(team, shape, [&](int64_t panel, int64_t column) {
    const int64_t row = panel * kPanelColumns + column;
    return row < weight.rows ? weight.row(row) : nullptr;
  });
  if (bias != nullptr) {
    panels.terms.bias.assign(bias, bias + weight.rows);
    panels.terms.bias.resize(shape.num_panels * kPanelColumns);
  }
  return std::make_unique<LinearOfPanels<T, Panels>>(std::move(panels));
}

template <class T>
std::unique_ptr<PackedLinear<T>> PackedLinear<T>::pack_swiglu(Team& team, View<const T> gate,
                                                              View<const T> up) {
  if (gate.rows != up.rows || gate.cols != up.cols) {
    throw std::invalid_argument("gate and up projections have different shapes");
  }
  constexpr int64_t kHalf = kPanelColumns / 2;
  const auto shape = plan_panels<T>(gate.cols, gate.rows, kHalf);
  return std::make_unique<LinearOfPanels<T, Panels>>(
      pack_panels<T>(team, shape, [&](int64_t panel, int64_t column) {
        const int64_t row = panel * kHalf + column % kHalf;
        return row < gate.rows ? (column < kHalf ? gate : up).row(row) : nullptr;
      }));
}

template class PackedLinear<float>;
template class PackedLinear<bf16>;

}  // namespace pio
