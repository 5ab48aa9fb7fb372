// Refuses indices that do not exist.
#pragma once

#include <cstdint>

#include "types.h"

namespace pio {

// Throws std::out_of_range unless all lie in [0, end); `what` is the name of one.
void check_indices(const char* what, const int64_t* indices, int64_t count, int64_t end);

// Likewise for the blocks that a step's tables name; a hidden one may be kNoBlock.
void check_tables(const Batch& batch, int32_t block_size, int64_t num_blocks);

}  // namespace pio
