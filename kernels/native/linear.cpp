#include "linear.h"

#include <stdexcept>

#include "linear_run.h"

namespace pio {

namespace {

template <class T>
PanelShape plan_panels(int64_t in_features, int64_t columns, int64_t panel_columns) {
  constexpr int64_t kElements = 4 / sizeof(T);
  constexpr int64_t kGranule = Tiles<T>::kStepGranule;
  const int64_t steps = ceil_div(ceil_div(in_features, kElements), kGranule) * kGranule;
  return {in_features, columns, panel_columns, steps, ceil_div(columns, panel_columns)};
}

template <class T>
class DenseLinear final : public PackedLinear<T> {
 public:
  explicit DenseLinear(Panels panels) : panels_(std::move(panels)) {}

  int64_t in_features() const override { return panels_.shape.in_features; }
  int64_t out_features() const override { return panels_.shape.columns; }
  int64_t num_bytes() const override { return panels_.shape.num_bytes(); }

  void run(Worker& worker, View<const T> x, Store<T> to) const override { run_to(worker, x, to); }
  void run(Worker& worker, View<const T> x, StoreFloat to) const override { run_to(worker, x, to); }
  void run(Worker& worker, View<const T> x, AddTo<T> to) const override { run_to(worker, x, to); }
  void run(Worker& worker, View<const T> x, AddToStream to) const override {
    run_to(worker, x, to);
  }
  void run(Worker& worker, View<const T> x, SwiGLU<T> to) const override { run_to(worker, x, to); }

 private:
  template <class Output>
  void run_to(Worker& worker, View<const T> x, const Output& to) const {
    LinearRun<T>(worker, panels_, x)(to);
  }

  Panels panels_;
};

}  // namespace

template <class T>
std::unique_ptr<PackedLinear<T>> PackedLinear<T>::pack(Team& team, View<const T> weight,
                                                       const float* bias) {
  const auto shape = plan_panels<T>(weight.cols, weight.rows, kPanelColumns);
  Panels panels = pack_panels<T>(team, shape, [&](int64_t panel, int64_t column) {
    const int64_t row = panel * kPanelColumns + column;
    return row < weight.rows ? weight.row(row) : nullptr;
  });
  if (bias != nullptr) {
    panels.bias.assign(bias, bias + weight.rows);
    panels.bias.resize(shape.num_panels * kPanelColumns);
  }
  return std::make_unique<DenseLinear<T>>(std::move(panels));
}

template <class T>
std::unique_ptr<PackedLinear<T>> PackedLinear<T>::pack_swiglu(Team& team, View<const T> gate,
                                                              View<const T> up) {
  if (gate.rows != up.rows || gate.cols != up.cols) {
    throw std::invalid_argument("gate and up projections have different shapes");
  }
  constexpr int64_t kHalf = kPanelColumns / 2;
  const auto shape = plan_panels<T>(gate.cols, gate.rows, kHalf);
  return std::make_unique<DenseLinear<T>>(
      pack_panels<T>(team, shape, [&](int64_t panel, int64_t column) {
        const int64_t row = panel * kHalf + column % kHalf;
        return row < gate.rows ? (column < kHalf ? gate : up).row(row) : nullptr;
      }));
}

template class PackedLinear<float>;
template class PackedLinear<bf16>;

}  // namespace pio
