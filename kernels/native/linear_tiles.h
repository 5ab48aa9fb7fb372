// Tiles: products of a few rows with one panel, as each instruction set computes them best.
//
// `Tiles<T>` of every header has the same interface; this one chooses. The sum of an element runs
// over k in the same order for every number of rows, so results depend on nothing else.
//
//   kRows         most rows of one tile
//   kBlockRows    rows whose activations stay in the second cache
//   kStepGranule  panels are padded to a multiple of so many steps
//   kStreamSteps  how far weights are fetched ahead
//   prepare       takes the rows of a task, that `multiply` counts from
//   multiply      out[r] (+)= x[first_row + r] @ panel for `steps` steps from `step` on, where
//                 `panel` points; a row of `out` has 64 elements
#pragma once

#include "linear_panels.h"
#include "types.h"

namespace pio {

// What a tile brings into the second cache while it computes: step s of `data` at its own step s.
// A few steps ahead the memory's rate is best; farther ahead it falls by a sixth.
struct Prefetch {
  const std::byte* data = nullptr;
  int64_t steps = 0;
};

inline void prefetch_step(const std::byte* step) {
  for (int64_t line = 0; line < kStepBytes; line += 64) {
    __builtin_prefetch(step + line, 0, 2);
  }
}

template <class T>
class Tiles;

}  // namespace pio

#include "linear_tiles_fma.h"

#if defined(__AMX_BF16__)
#include "linear_tiles_amx.h"
#elif defined(__AVX512BF16__)
#include "linear_tiles_bf16.h"
#endif
