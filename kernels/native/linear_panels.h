// The layout of packed weights: one for every number of rows and every instruction set.
//
// A panel holds 64 output columns, in two strips of 32. Along k a strip is cut into steps; a step
// holds 4 bytes of each column, one after the other: one float32, or two bf16 or four int8 that are
// neighbours along k.
//
//   panel:  strip 0 | strip 1
//   strip:  step 0 | step 1 | ...          (128 bytes each)
//   step:   column 0: k, k + 1 | column 1: k, k + 1 | ... | column 31
//
// A vector of 16 columns is one cache line, and 16 lines that lie a step apart are one AMX tile.
// What is multiplied at once with many rows, some steps of a strip, is one run of memory: it fills
// all sets of the first cache, and the hardware fetches ahead of it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "huge_buffer.h"
#include "team.h"

namespace pio {

constexpr int64_t kPanelColumns = 64;
constexpr int64_t kStrips = 2;
constexpr int64_t kStripColumns = kPanelColumns / kStrips;
constexpr int64_t kStepBytes = kStripColumns * 4;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct PanelShape {
  int64_t in_features;
  int64_t columns;         // results of a row: half of the packed columns for a SwiGLU
  int64_t panel_columns;   // results of one panel: 64, or 32 of a SwiGLU
  int64_t steps;           // of a panel, the end padded with zeros
  int64_t num_panels;

  int64_t strip_bytes() const { return steps * kStepBytes; }
  int64_t panel_bytes() const { return kStrips * strip_bytes(); }
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

// The same steps of a panel's strips.
struct Chunk {
  const std::byte* data;  // of the first strip
  int64_t strip_bytes;    // from there to the second's

  // Where the first of these steps has a column.
  const std::byte* at(int64_t column) const {
    return data + column / kStripColumns * strip_bytes + column % kStripColumns * 4;
  }
};

constexpr int64_t kLineBytes = 64;

// What a tile brings into the second cache while it computes: at its own step s that of both strips.
// A few steps ahead the memory's rate is best; farther ahead it falls by a sixth.
struct Prefetch {
  Chunk weights = {};
  int64_t steps = 0;
};

// A run of memory.
struct Span {
  const std::byte* data;
  int64_t num_bytes;
};

struct Panels {
  // A panel is read as it lies in memory, so nothing asks for shorter pieces.
  static constexpr int64_t kFewRowsSteps = std::numeric_limits<int64_t>::max();

  PanelShape shape;
  HugeBuffer data;
  ColumnTerms terms;

  int64_t num_bytes() const { return shape.num_bytes(); }
  Chunk steps_at(int64_t panel, int64_t step, int64_t /*steps*/) const {
    return {data.data() + panel * shape.panel_bytes() + step * kStepBytes, shape.strip_bytes()};
  }
  // What tiles fetch while they read these steps, `distance` steps behind them. It runs on behind a
  // strip's end to what lies there: in most cases it is read next, and to look first costs a tenth
  // of the memory's rate.
  Prefetch ahead(int64_t panel, int64_t step, int64_t steps, int64_t distance) const {
    return {steps_at(panel, step + distance, steps), steps};
  }

  // What is read for these steps of a strip.
  Span stored(int64_t panel, int64_t strip, int64_t step, int64_t steps) const {
    return {steps_at(panel, step, steps).at(strip * kStripColumns), steps * kStepBytes};
  }
};

// The row of the weight that is column `column` of `panel`, or null where the panel is padded.
template <class T>
using ColumnSource = std::function<const T*(int64_t panel, int64_t column)>;

// Packs with all workers of the team. T is float, bf16 or int8_t.
template <class T>
Panels pack_panels(Team& team, const PanelShape& shape, const ColumnSource<T>& source);

}  // namespace pio
