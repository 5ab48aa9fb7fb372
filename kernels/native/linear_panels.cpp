#include "linear_panels.h"

#include <algorithm>
#include <cstring>

#include "types.h"

namespace pio {

namespace {

// A cache line of a weight's row: read whole, and as many steps of a panel stay in the first cache.
constexpr int64_t kBlockSteps = 16;

template <class T>
void pack_block(const PanelShape& shape, const ColumnSource<T>& source, int64_t panel,
                int64_t first_step, int64_t steps, std::byte* panel_at) {
  constexpr int64_t kElements = 4 / sizeof(T);
  const int64_t first = first_step * kElements;
  const int64_t count = std::clamp<int64_t>(shape.in_features - first, 0, steps * kElements);
  for (int64_t column = 0; column < kPanelColumns; ++column) {
    const T* row = source(panel, column);
    if (row == nullptr) continue;  // the buffer is zero
    T block[kBlockSteps * kElements] = {};
    std::memcpy(block, row + first, count * sizeof(T));
    std::byte* out = panel_at + column / kStripColumns * shape.strip_bytes() +
                     (first_step * kStripColumns + column % kStripColumns) * 4;
    for (int64_t step = 0; step < steps; ++step) {
      std::memcpy(out + step * kStepBytes, block + step * kElements, 4);
    }
  }
}

}  // namespace

template <class T>
Panels pack_panels(Team& team, const PanelShape& shape, const ColumnSource<T>& source) {
  Panels panels{shape, HugeBuffer(shape.num_bytes()), {}};
  team.run([&](Worker& worker) {
    for (int64_t panel = worker.take(); panel < shape.num_panels; panel = worker.take()) {
      std::byte* out = panels.data.data() + panel * shape.panel_bytes();
      for (int64_t step = 0; step < shape.steps; step += kBlockSteps) {
        const int64_t steps = std::min(kBlockSteps, shape.steps - step);
        pack_block(shape, source, panel, step, steps, out);
      }
    }
  });
  return panels;
}

template Panels pack_panels(Team&, const PanelShape&, const ColumnSource<float>&);
template Panels pack_panels(Team&, const PanelShape&, const ColumnSource<bf16>&);
template Panels pack_panels(Team&, const PanelShape&, const ColumnSource<int8_t>&);

}  // namespace pio
