#include "linear_w8a8.h"

#include <stdexcept>
#include <utility>

#include "linear_codes.h"
#include "linear_of_panels.h"
#include "linear_rescaled.h"
#include "linear_rounding.h"

namespace pio {

namespace {

struct W8A8Panels : Panels {
#ifndef __AVX512F__
  // A few rows pass a panel more than once: what one pass has fetched stays in the first cache.
  static constexpr int64_t kFewRowsSteps = 64;
#endif
  ColumnTerms token_terms;  // after the token's scale
};

template <class T, class Output>
void multiply(Worker& worker, const W8A8Panels& weight, View<const T> x, const Output& to) {
  const RoundedRows rows = round_rows(worker, x, weight.shape.steps * 4);
  LinearRun<int8_t, W8A8Panels>(worker, weight, rows.codes)(
      Rescaled<int32_t, Output>{to, rows.scales, weight.token_terms, weight.shape.panel_columns});
}

}  // namespace

template <class T>
std::unique_ptr<PackedLinear<T>> pack_w8a8(Team& team, const std::vector<QuantizedView>& weights,
                                           const float* bias) {
  const QuantizedView& first = weights.front();
  if (!first.has_row_scales()) {
    throw std::invalid_argument("int8 activations need int8 weights with one scale a row");
  }
  const int64_t share = kPanelColumns / static_cast<int64_t>(weights.size());
  const auto shape = plan_panels<int8_t>(first.cols, first.rows, share);
  Panels panels = pack_panels<int8_t>(team, shape, [&](int64_t panel, int64_t column) {
    const QuantizedView& weight = weights[column / share];
    const int64_t row = panel * share + column % share;
    const auto* codes = reinterpret_cast<const int8_t*>(weight.codes);
    return row < weight.rows ? codes + row * weight.row_bytes : nullptr;
  });
  ColumnTerms terms{.scales = row_scales(weights, shape.num_panels), .bias = {}};
  if (bias != nullptr) {
    terms.bias.assign(bias, bias + first.rows);
    terms.bias.resize(shape.num_panels * kPanelColumns);
  }
  return std::make_unique<LinearOfPanels<T, W8A8Panels>>(
      W8A8Panels{std::move(panels), std::move(terms)});
}

template std::unique_ptr<PackedLinear<float>> pack_w8a8(Team&, const std::vector<QuantizedView>&,
                                                        const float*);
template std::unique_ptr<PackedLinear<bf16>> pack_w8a8(Team&, const std::vector<QuantizedView>&,
                                                       const float*);

}  // namespace pio
