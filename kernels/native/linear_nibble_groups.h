// The layout of int4 weights that are multiplied with int8 activations: groups of 32 k.
//
//   panel:  group 0 | group 1 | ...
//   group:  64 scales in float16 | pair 0 | ... | pair 3
//   pair:   8 k of 64 columns, 4 bytes each: byte j has the code of k = j in its low half and that
//           of k = 4 + j in its high half
//
// One vector of a pair becomes two steps as linear_panels.h has them. Codes are unsigned, 8 for zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "huge_buffer.h"
#include "linear_panels.h"

namespace pio {

constexpr int64_t kGroupInputs = 32;
constexpr int64_t kPairInputs = 8;
constexpr int64_t kPairs = kGroupInputs / kPairInputs;
constexpr int64_t kPairBytes = kPanelColumns * 4;
constexpr int64_t kGroupScaleBytes = kPanelColumns * 2;
constexpr int64_t kGroupBytes = kGroupScaleBytes + kPairs * kPairBytes;

struct NibblePanels {
  // A panel is read as it lies in memory, so nothing asks for shorter pieces.
  static constexpr int64_t kFewRowsSteps = Panels::kFewRowsSteps;

  PanelShape shape;  // a step of it is a group
  HugeBuffer data = {};
  ColumnTerms terms = {};  // none: sums lack the token's scale
  ColumnTerms token_terms = {};  // behind it

  int64_t panel_bytes() const { return shape.steps * kGroupBytes; }
  int64_t num_bytes() const { return shape.num_panels * panel_bytes(); }
  // Not in strips.
  Chunk steps_at(int64_t panel, int64_t step, int64_t /*steps*/) const {
    return {data.data() + panel * panel_bytes() + step * kGroupBytes, 0};
  }
  // Runs on behind the end; see `Panels::ahead`.
  Prefetch ahead(int64_t panel, int64_t step, int64_t steps, int64_t distance) const {
    return {steps_at(panel, step + distance, steps), steps};
  }
};

}  // namespace pio
