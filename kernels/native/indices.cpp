#include "indices.h"

#include <stdexcept>
#include <string>

namespace pio {

void check_indices(const char* what, const int64_t* indices, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= end) {
      throw std::out_of_range(std::string(what) + " " + std::to_string(i) + " is " +
                              std::to_string(indices[i]) + "; it lies in [0, " +
                              std::to_string(end - 1) + "]");
    }
  }
}

void check_tables(const Batch& batch, int32_t block_size, int64_t num_blocks) {
  for (int sequence = 0; sequence < batch.num_sequences; ++sequence) {
    const int64_t begin = batch.table_starts[sequence], end = batch.table_starts[sequence + 1];
    const int first = batch.first_position(sequence);
    for (int64_t number = 0; number < end - begin; ++number) {
      const int32_t block = batch.block_tables[begin + number];
      if (block >= 0 && block < num_blocks) continue;
      if (block == kNoBlock && batch.pattern.hides(first, number, block_size)) continue;
      throw std::out_of_range("a block table holds block " + std::to_string(block) +
                              "; the cache has blocks 0 to " + std::to_string(num_blocks - 1));
    }
  }
}

}  // namespace pio
