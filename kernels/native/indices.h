// Refuses indices that do not exist.
#pragma once

#include <cstdint>

namespace pio {

// Throws std::out_of_range unless all lie in [0, end); `what` is the name of one.
void check_indices(const char* what, const int64_t* indices, int64_t count, int64_t end);

}  // namespace pio
