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

}  // namespace pio
