// The layout of packed weights: one for every number of rows and every instruction set.
//
// A panel holds 64 output columns. Along k it is cut into steps; a step holds 4 bytes of each
// column, one after the other: one float32 or two bf16 that are neighbours along k.
//
//   panel:  step 0 | step 1 | ...          (256 bytes each)
//   step:   column 0: k, k + 1 | column 1: k, k + 1 | ... | column 63
//
// A vector of 16 columns is one cache line, and 16 lines that lie a step apart are one AMX tile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "huge_buffer.h"
#include "team.h"

namespace pio {

constexpr int64_t kPanelColumns = 64;
constexpr int64_t kStepBytes = kPanelColumns * 4;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct PanelShape {
  int64_t in_features;
  int64_t columns;         // results of a row: half of the packed columns for a SwiGLU
  int64_t panel_columns;   // results of one panel: 64, or 32 of a SwiGLU
  int64_t steps;           // of a panel, the end padded with zeros
  int64_t num_panels;

  int64_t panel_bytes() const { return steps * kStepBytes; }
  int64_t num_bytes() const { return num_panels * panel_bytes(); }
  int64_t columns_of(int64_t panel) const {
    const int64_t left = columns - panel * panel_columns;
    return left < panel_columns ? left : panel_columns;
  }
};

// What the product of each packed column is multiplied by and what is added; empty: nothing.
struct ColumnTerms {
  std::vector<float> scales;
  std::vector<float> bias;
};

struct Panels {
  // A panel is read as it lies in memory, so nothing asks for shorter pieces.
  static constexpr int64_t kFewRowsSteps = std::numeric_limits<int64_t>::max();

  PanelShape shape;
  HugeBuffer data;
  ColumnTerms terms;

  int64_t num_bytes() const { return shape.num_bytes(); }
  const std::byte* steps_at(int64_t panel, int64_t step, int64_t) const { return at(panel, step); }
  const std::byte* at(int64_t panel, int64_t step) const {
    return data.data() + panel * shape.panel_bytes() + step * kStepBytes;
  }
};

// The row of the weight that is column `column` of `panel`, or null where the panel is padded.
template <class T>
using ColumnSource = std::function<const T*(int64_t panel, int64_t column)>;

// Packs with all workers of the team. T is float or bf16.
template <class T>
Panels pack_panels(Team& team, const PanelShape& shape, const ColumnSource<T>& source);

}  // namespace pio
