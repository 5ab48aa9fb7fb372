#include "linear_w4a8.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "linear_of_panels.h"
#include "linear_rescaled.h"
#include "linear_rounding.h"
#include "linear_tiles_w4a8.h"

namespace pio {

// For `LinearOfPanels`, which looks for it where the panels are declared.
template <class T, class Output>
void multiply(Worker& worker, const NibblePanels& weight, View<const T> x, const Output& to) {
  const RoundedRows rows = round_rows(worker, x, weight.shape.steps * kGroupInputs);
  const View<const GroupedCode> codes{reinterpret_cast<const GroupedCode*>(rows.codes.data),
                                      rows.codes.rows, rows.codes.cols, rows.codes.stride};
  LinearRun<GroupedCode, NibblePanels>(worker, weight, codes)(
      Rescaled<float, Output>{to, rows.scales, weight.token_terms, weight.shape.panel_columns});
}

namespace {

void check(const QuantizedView& weight) {
  const bool in_runs = weight.group_inputs % kGroupInputs == 0 || weight.groups() == 1;
  if (weight.table == nullptr || weight.table[0] != -8.0f || weight.zeros != nullptr ||
      weight.has_half_scales == 0 || !in_runs) {
    throw std::invalid_argument(
        "int8 activations need int4 weights in groups of 32 columns or multiples, without zero "
        "points, with scales in float16");
  }
}

// Writes one column of a panel.
void pack_column(const QuantizedView& weight, int64_t row, int64_t column, int64_t groups,
                 std::byte* panel) {
  const auto* scales = static_cast<const uint16_t*>(weight.scales) + row * weight.groups();
  const std::byte* codes = weight.codes + row * weight.row_bytes;
  const auto code_at = [&](int64_t k) {
    return k < weight.cols ? codes[k / 2] >> (k % 2 * 4) & std::byte{15} : std::byte{0};
  };
  for (int64_t g = 0; g < groups; ++g, panel += kGroupBytes) {
    const int64_t first = g * kGroupInputs;
    std::memcpy(panel + column * sizeof *scales, scales + first / weight.group_inputs,
                sizeof *scales);
    for (int64_t p = 0; p < kPairs; ++p) {
      std::byte* out = panel + kGroupScaleBytes + p * kPairBytes + column * 4;
      const int64_t k = first + p * kPairInputs;
      for (int64_t j = 0; j < 4; ++j) out[j] = code_at(k + j) | code_at(k + 4 + j) << 4;
    }
  }
}

}  // namespace

template <class T>
std::unique_ptr<PackedLinear<T>> pack_w4a8(Team& team, const std::vector<QuantizedView>& weights,
                                           const float* bias) {
  const QuantizedView& first = weights.front();
  for (const QuantizedView& weight : weights) check(weight);
  const int64_t share = kPanelColumns / static_cast<int64_t>(weights.size());
  const int64_t groups = ceil_div(first.cols, kGroupInputs);
  NibblePanels panels{.shape = {first.cols, first.rows, share, groups,
                                ceil_div(first.rows, share)}};
  panels.data = HugeBuffer(panels.num_bytes());
  team.run([&](Worker& worker) {
    for (int64_t panel = worker.take(); panel < panels.shape.num_panels; panel = worker.take()) {
      std::byte* out = panels.data.data() + panel * panels.panel_bytes();
      for (int64_t column = 0; column < kPanelColumns; ++column) {
        const QuantizedView& weight = weights[column / share];
        const int64_t row = panel * share + column % share;
        if (row < weight.rows) pack_column(weight, row, column, groups, out);
      }
    }
  });
  if (bias != nullptr) {
    panels.token_terms.bias.assign(bias, bias + first.rows);
    panels.token_terms.bias.resize(panels.shape.num_panels * kPanelColumns);
  }
  return std::make_unique<LinearOfPanels<T, NibblePanels>>(std::move(panels));
}

template std::unique_ptr<PackedLinear<float>> pack_w4a8(Team&, const std::vector<QuantizedView>&,
                                                        const float*);
template std::unique_ptr<PackedLinear<bf16>> pack_w4a8(Team&, const std::vector<QuantizedView>&,
                                                       const float*);

}  // namespace pio
