// The layout of quantized weights: panels as linear_panels.h has them, of codes instead of numbers.
//
// A panel is cut along k into groups, each with what its columns share, then its codes:
//
//   panel:  group 0 | group 1 | ...
//   group:  64 scales | 64 zero points | block 0 | block 1 | ...
//   block:  the codes of 2 k: 128, first those of strip 0, each strip's in the order that their
//           elements have in the dense panel
//
// 8-bit codes lie one after the other; where the panel becomes bf16 and they have no scales, their
// pairs are apart: 16 columns' codes of the first k, then those of the second.
//
// 4-bit codes lie so that one vector of 32-bit lanes becomes eight vectors of numbers: bits 4 * j to
// 4 * j + 3 of lane l are code 16 * j + l of the block.
//
// Without AVX-512 codes become float32 whatever the activations are: nothing else is multiplied
// there, and to round to bf16 takes longer than all the rest. Of 4-bit codes each strip has 32 bytes
// there. Those of int4 are 8 words: word l has columns l, l + 8, l + 16 and l + 24 of the first k in
// its lower half, then those of the second. Codes that are looked up have a byte for the two k of a
// column; bytes 4 * q + i and 16 + 4 * q + i are columns 8 * q + i and 8 * q + 4 + i.
//
// With AMX, bf16 and groups of whole tiles, 32 k, the codes lie in tiles instead of blocks:
//
//   tile:  32 k of 16 columns, each column's one after the other where they have 8 bits; 4-bit codes
//          of four columns are 32 words, of which bits 4 * j to 4 * j + 3 are column j's
//
// first those of the panel's first 16 columns. A row of such a tile is a column of the panel:
// few rows multiply with it as it is, many rows turn it to the dense layout.
//
// The dense tiles read it, a chunk of steps at a time, in a dense panel's layout: from memory come
// codes, and the chunk stays in the first cache until all rows of a block went past it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "huge_buffer.h"
#include "linear.h"
#include "linear_panels.h"
#include "linear_tiles.h"

namespace pio {

constexpr int64_t kBlockInputs = 2;
constexpr int64_t kBlockCodes = kBlockInputs * kPanelColumns;
constexpr int64_t kBlockStripCodes = kBlockCodes / kStrips;

// Which of a block's codes that become float32 is the one of a column.
constexpr int64_t block_place(int64_t column, int64_t input) {
  return column / kStripColumns * kBlockStripCodes + input * kStripColumns + column % kStripColumns;
}

constexpr int64_t kTileColumns = 16;
constexpr int64_t kTileInputs = 32;

// Whether codes in groups of whole tiles lie in tiles.
#ifdef __AMX_BF16__
template <class T>
constexpr bool kHasCodeTiles = sizeof(T) == 2;
#else
template <class T>
constexpr bool kHasCodeTiles = false;
#endif

// What codes become where activations are of type T.
#ifdef __AVX512F__
template <class T>
using CodeNumber = T;
constexpr bool kHasCodeWords = false;
#else
template <class T>
using CodeNumber = float;
constexpr bool kHasCodeWords = true;
#endif

struct GroupLayout {
  int64_t inputs;       // k of a group, even
  int64_t scale_bytes;  // of one scale: 2 (float16) or 4; 0 where each row has one, in `terms`
  int64_t zero_bytes;   // of one zero point: 1, or 0 without
  int64_t block_bytes;  // 64 with 4 bits a code, 128 with 8
  bool in_tiles;        // instead of blocks
  bool in_words;        // 4-bit codes of int4, without AVX-512

  int64_t zeros_at() const { return kPanelColumns * scale_bytes; }
  int64_t codes_at() const { return kPanelColumns * (scale_bytes + zero_bytes); }
  int64_t blocks() const { return inputs / kBlockInputs; }
  int64_t num_bytes() const { return codes_at() + blocks() * block_bytes; }
};

template <class T>
struct CodePanels {
  // Half of the first cache for the chunk, half for what else is read.
  static constexpr int64_t kFewRowsSteps = 64;

  PanelShape shape;  // of the panels that the tiles read
  GroupLayout group;
  int64_t num_groups = 0;         // of a panel
  std::vector<float> table = {};  // of 4-bit codes
  HugeBuffer data = {};
  ColumnTerms terms = {};

  int64_t panel_bytes() const { return num_groups * group.num_bytes(); }
  int64_t num_bytes() const { return shape.num_panels * panel_bytes(); }

  // `steps` steps of a panel in the dense layout, in memory of this thread until the next call.
  // `step` is even.
  Chunk steps_at(int64_t panel, int64_t step, int64_t steps) const;

  // What tiles fetch while they read these steps. Plain bytes are widened faster than the memory
  // gives them: the tiles' time is needed too, and they fetch the second half of the next steps. Behind the
  // last panel that fetches nothing that is read, which is harmless.
  Prefetch ahead(int64_t panel, int64_t step, int64_t steps, int64_t distance) const;

  const std::byte* codes_at(int64_t panel, int64_t step) const;

  // The part of the codes of these steps that is fetched for this strip: a half.
  Span stored(int64_t panel, int64_t strip, int64_t step, int64_t steps) const;
};

// Of each packed column, zero where the panel is padded.
std::vector<float> row_scales(const std::vector<QuantizedView>& weights, int64_t num_panels);

// Packs with all workers of the team. The columns of a panel are shared out evenly among `weights`:
// one weight, or gate and up, which are quantized alike.
template <class T>
CodePanels<T> pack_codes(Team& team, const std::vector<QuantizedView>& weights,
                         const PanelShape& shape);

}  // namespace pio
