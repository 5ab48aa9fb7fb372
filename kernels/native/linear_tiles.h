// Tiles: products of a few rows with one panel, as each instruction set computes them best.
//
// `Tiles<T>` of every header has the same interface; this one chooses. The sum of an element runs
// over k in the same order for every number of rows, so results depend on nothing else.
//
//   kRows         most rows of one tile
//   kBlockRows    rows of a task: so many of their activations stay in the second cache
//   kChunkSteps   of a panel, or of a strip where `kByStrips`: they stay in the first cache
//   kByStrips     more rows than a tile has go past one strip after the other
//   kStepGranule  panels are padded to a multiple of so many steps
//   kStreamSteps  how far weights are fetched ahead
//   prepare       takes the rows of a task, that `multiply` counts from
//   multiply      out[r] (+)= x[first_row + r] @ panel for `steps` steps from `step` on, which
//                 `weights` points to; a row of `out` has 64 elements
//
// and where `kByStrips`:
//
//   multiply_strip  likewise with a strip, which `weights` points to; a row of `out` has 32 elements
#pragma once

#include "linear_panels.h"
#include "simd.h"
#include "types.h"

namespace pio {

inline void prefetch_step(const Prefetch& ahead, int64_t step) {
  for (int64_t strip = 0; strip < kStrips; ++strip) {
    const std::byte* from = ahead.weights.at(strip * kStripColumns) + step * kStepBytes;
    for (int64_t line = 0; line < kStepBytes; line += kLineBytes) {
      simd::fetch(from + line);
    }
  }
}

template <class T>
class Tiles;

}  // namespace pio

#include "linear_tiles_fma.h"

#if defined(__AMX_BF16__)
#include "linear_tiles_amx.h"
#else
#include "linear_tiles_int8.h"
#if defined(__AVX512BF16__)
#include "linear_tiles_bf16.h"
#endif
#endif
