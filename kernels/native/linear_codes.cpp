#include "linear_codes.h"

#include <algorithm>
#include <cstring>

#include "linear_code_tiles.h"
#include "linear_codes_fma.h"
#include "linear_widen.h"

namespace pio {

namespace {

// Two k of a byte of codes are a block; so many blocks stay in the first cache while they are filled.
constexpr int64_t kBlocksAtOnce = 64;

// Whether codes are numbers less 0 or 8.
bool is_int4(const float* table) {
  for (int code = 1; code < 16; ++code) {
    if (table[code] != table[0] + static_cast<float>(code)) return false;
  }
  return table[0] == 0.0f || table[0] == -8.0f;
}

template <class T>
GroupLayout plan_group(const QuantizedView& weight, int64_t padded_inputs) {
  const int64_t whole = ceil_div(padded_inputs, kBlockInputs) * kBlockInputs;
  const int64_t inputs = weight.groups() == 1 ? whole : weight.group_inputs;
  return {
      .inputs = inputs,
      .scale_bytes = weight.has_row_scales() ? 0 : weight.has_half_scales ? 2 : 4,
      .zero_bytes = weight.zeros == nullptr ? 0 : 1,
      .block_bytes = weight.table == nullptr ? kBlockCodes : kBlockCodes / 2,
      .in_tiles = kHasCodeTiles<T> && !weight.has_row_scales() && inputs % kTileInputs == 0,
      .in_words = kHasCodeWords && weight.table != nullptr && is_int4(weight.table),
  };
}

// Where the code of an input lies in a block.
template <class T>
int64_t place(const GroupLayout& group, int64_t column, int64_t input) {
  if (sizeof(T) == 4) return block_place(column, input);
  return group.scale_bytes == 0 ? column / 16 * 32 + input * 16 + column % 16 : column * 2 + input;
}

// Puts a code of 4 bits where it belongs in a block of zeros.
#ifdef __AVX512F__
template <class T>
void put_nibble(const GroupLayout& group, std::byte* block, int64_t column, int64_t input,
                int code) {
  const int64_t at = place<T>(group, column, input), field = at / 16, lane = at % 16;
  block[lane * 4 + field / 2] |= static_cast<std::byte>(code << (field % 2 * 4));
}
#else
template <class T>
void put_nibble(const GroupLayout& group, std::byte* block, int64_t column, int64_t input,
                int code) {
  std::byte* strip = block + column / kStripColumns * kStripColumns;
  const int64_t vector = column % kStripColumns / 8, lane = column % 8;
  if (group.in_words) {
    strip[lane * 4 + input * 2 + vector / 2] |= static_cast<std::byte>(code << (vector % 2 * 4));
  } else {
    strip[lane / 4 * 16 + vector * 4 + lane % 4] |= static_cast<std::byte>(code << (input * 4));
  }
}
#endif

// Puts a code into tiles of zeros: those of `kTileInputs` inputs of a panel.
void put_in_tiles(std::byte* tiles, int64_t column, int64_t input, int code, bool is_byte) {
  if (is_byte) {
    tiles[column * kTileInputs + input] = static_cast<std::byte>(code);
    return;
  }
  const int64_t word = column / 4 * kTileInputs + input, field = column % 4;
  tiles[word * 2 + field / 2] |= static_cast<std::byte>(code << (field % 2 * 4));
}

// One column of a panel.
template <class T>
class ColumnPacker {
 public:
  ColumnPacker(const CodePanels<T>& panels, const QuantizedView& weight, int64_t row,
               int64_t column, std::byte* panel)
      : panels_(panels), weight_(weight), row_(row), column_(column), panel_(panel) {}

  void pack_shared() const {
    const GroupLayout& group = panels_.group;
    for (int64_t g = 0; g < weight_.groups(); ++g) {
      std::byte* out = panel_ + g * group.num_bytes();
      const int64_t from = row_ * weight_.groups() + g;
      std::memcpy(out + column_ * group.scale_bytes,
                  static_cast<const std::byte*>(weight_.scales) + from * group.scale_bytes,
                  group.scale_bytes);
      if (group.zero_bytes != 0) {
        std::memcpy(out + group.zeros_at() + column_, weight_.zeros + from, 1);
      }
    }
  }

  void pack_blocks(int64_t first, int64_t end) const {
    const GroupLayout& group = panels_.group;
    const std::byte* codes = weight_.codes + row_ * weight_.row_bytes;
    for (int64_t b = first; b < end; ++b) {
      if (group.in_tiles) {
        pack_into_tiles(b);
        continue;
      }
      std::byte* block = panel_ + b / group.blocks() * group.num_bytes() + group.codes_at() +
                         b % group.blocks() * group.block_bytes;
      const bool has_second = b * kBlockInputs + 1 < weight_.cols;
      if (weight_.table != nullptr) {
        const int pair = static_cast<int>(codes[b]);
        put_nibble<T>(group, block, column_, 0, pair & 15);
        if (has_second) put_nibble<T>(group, block, column_, 1, pair >> 4);
      } else {
        block[place<T>(group, column_, 0)] = codes[b * 2];
        if (has_second) block[place<T>(group, column_, 1)] = codes[b * 2 + 1];
      }
    }
  }

 private:
  // The two codes of a block.
  void pack_into_tiles(int64_t b) const {
    constexpr int64_t kTileBlocks = kTileInputs / kBlockInputs;
    const GroupLayout& group = panels_.group;
    const std::byte* codes = weight_.codes + row_ * weight_.row_bytes;
    const int64_t first = b % group.blocks() / kTileBlocks * kTileBlocks;
    std::byte* tiles = panel_ + b / group.blocks() * group.num_bytes() + group.codes_at() +
                       first * group.block_bytes;
    const bool is_byte = weight_.table == nullptr;
    for (int64_t i = 0; i < kBlockInputs && b * kBlockInputs + i < weight_.cols; ++i) {
      const int code = is_byte ? static_cast<int>(codes[b * kBlockInputs + i])
                               : static_cast<int>(codes[b]) >> (4 * i) & 15;
      put_in_tiles(tiles, column_, b % kTileBlocks * kBlockInputs + i, code, is_byte);
    }
  }

  const CodePanels<T>& panels_;
  const QuantizedView& weight_;
  const int64_t row_;
  const int64_t column_;
  std::byte* const panel_;
};

template <class T>
void pack_panel(const CodePanels<T>& panels, const std::vector<QuantizedView>& weights,
                int64_t panel) {
  const int64_t share = kPanelColumns / static_cast<int64_t>(weights.size());
  const int64_t blocks = ceil_div(weights[0].cols, kBlockInputs);
  std::byte* out = panels.data.data() + panel * panels.panel_bytes();
  std::vector<ColumnPacker<T>> columns;
  for (int64_t column = 0; column < kPanelColumns; ++column) {
    const QuantizedView& weight = weights[column / share];
    const int64_t row = panel * share + column % share;
    if (row < weight.rows) columns.emplace_back(panels, weight, row, column, out);
  }
  for (const auto& column : columns) column.pack_shared();
  for (int64_t block = 0; block < blocks; block += kBlocksAtOnce) {
    for (const auto& column : columns) {
      column.pack_blocks(block, std::min(blocks, block + kBlocksAtOnce));
    }
  }
}

}  // namespace

std::vector<float> row_scales(const std::vector<QuantizedView>& weights, int64_t num_panels) {
  const int64_t share = kPanelColumns / static_cast<int64_t>(weights.size());
  std::vector<float> scales(num_panels * kPanelColumns);
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto* from = static_cast<const float*>(weights[i].scales);
    for (int64_t row = 0; row < weights[i].rows; ++row) {
      scales[row / share * kPanelColumns + i * share + row % share] = from[row];
    }
  }
  return scales;
}

template <class T>
CodePanels<T> pack_codes(Team& team, const std::vector<QuantizedView>& weights,
                         const PanelShape& shape) {
  const QuantizedView& first = weights.front();
  const int64_t padded_inputs = shape.steps * static_cast<int64_t>(4 / sizeof(T));
  CodePanels<T> panels{.shape = shape, .group = plan_group<T>(first, padded_inputs)};
  panels.num_groups = ceil_div(padded_inputs, panels.group.inputs);
  if (first.table != nullptr) panels.table.assign(first.table, first.table + 16);
  if (first.has_row_scales()) panels.terms.scales = row_scales(weights, shape.num_panels);
  panels.data = HugeBuffer(panels.num_bytes());
  team.run([&](Worker& worker) {
    for (int64_t panel = worker.take(); panel < shape.num_panels; panel = worker.take()) {
      pack_panel(panels, weights, panel);
    }
  });
  return panels;
}

template <class T>
Chunk CodePanels<T>::steps_at(int64_t panel, int64_t step, int64_t steps) const {
  constexpr int64_t kElements = 4 / sizeof(T);
  thread_local KeptBuffer<T> kept;
  int64_t block = step * kElements / kBlockInputs;
  const int64_t end = ceil_div((step + steps) * kElements, kBlockInputs);
  const int64_t strip_codes = (end - block) * kBlockStripCodes;
  T* const chunk = kept.get(kStrips * strip_codes);
  const Chunk result{reinterpret_cast<const std::byte*>(chunk),
                     strip_codes * static_cast<int64_t>(sizeof(T))};
  if constexpr (kHasCodeTiles<T>) {
    if (group.in_tiles) {
      widen_tiles(group, table.data(), data.data() + panel * panel_bytes(),
                  block * kBlockInputs / kTileInputs, (end - block) * kBlockInputs / kTileInputs,
                  chunk, strip_codes);
      return result;
    }
  }
  for (BlockOut<T> out{chunk, strip_codes}; block < end;) {
    const int64_t first = block % group.blocks();
    const int64_t count = std::min(end - block, group.blocks() - first);
    const std::byte* from =
        data.data() + panel * panel_bytes() + block / group.blocks() * group.num_bytes();
    widen(group, table.data(), from, first, count, out);
    out = out.behind(count);
    block += count;
  }
  return result;
}

template <class T>
const std::byte* CodePanels<T>::codes_at(int64_t panel, int64_t step) const {
  const int64_t block = step * static_cast<int64_t>(4 / sizeof(T)) / kBlockInputs;
  return data.data() + panel * panel_bytes() + block / group.blocks() * group.num_bytes() +
         group.codes_at() + block % group.blocks() * group.block_bytes;
}

template <class T>
Span CodePanels<T>::stored(int64_t panel, int64_t strip, int64_t step, int64_t steps) const {
  const std::byte* begin = codes_at(panel, step);
  const int64_t half = (codes_at(panel, step + steps) - begin) / kStrips;
  return {begin + strip * half, half};
}

template <class T>
Prefetch CodePanels<T>::ahead(int64_t panel, int64_t step, int64_t steps, int64_t) const {
  if (group.scale_bytes != 0) return {};
  const Span half = stored(panel, 1, step + steps, steps);
  const int64_t quarter = half.num_bytes / kStrips;
  return {{half.data, quarter}, quarter / kStepBytes};
}

template struct CodePanels<float>;
template CodePanels<float> pack_codes(Team&, const std::vector<QuantizedView>&, const PanelShape&);
#ifdef __AVX512F__
template struct CodePanels<bf16>;
template CodePanels<bf16> pack_codes(Team&, const std::vector<QuantizedView>&, const PanelShape&);
#endif

}  // namespace pio
