// The packed linear of any weight that comes in panels.
#pragma once

#include <utility>

#include "linear_run.h"

namespace pio {

template <class T>
PanelShape plan_panels(int64_t in_features, int64_t columns, int64_t panel_columns) {
  constexpr int64_t kElements = 4 / sizeof(T);
  constexpr int64_t kGranule = Tiles<T>::kStepGranule;
  const int64_t steps = ceil_div(ceil_div(in_features, kElements), kGranule) * kGranule;
  return {in_features, columns, panel_columns, steps, ceil_div(columns, panel_columns)};
}

// x @ weight.T of a weight as `LinearRun` takes it; what needs more has an overload.
template <class T, class Weight, class Output>
void multiply(Worker& worker, const Weight& weight, View<const T> x, const Output& to) {
  LinearRun<T, Weight>(worker, weight, x)(to);
}

// `multiply` takes `Weight`.
template <class T, class Weight>
class LinearOfPanels final : public PackedLinear<T> {
 public:
  explicit LinearOfPanels(Weight weight) : weight_(std::move(weight)) {}

  int64_t in_features() const override { return weight_.shape.in_features; }
  int64_t out_features() const override { return weight_.shape.columns; }
  int64_t num_bytes() const override { return weight_.num_bytes(); }
  const std::byte* panels() const override { return weight_.data.data(); }
  void place(std::byte* memory) override { weight_.data = HugeBuffer::view(memory); }

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
    multiply(worker, weight_, x, to);
  }

  Weight weight_;
};

}  // namespace pio
