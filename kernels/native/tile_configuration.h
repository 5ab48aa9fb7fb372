// What the eight tile registers of AMX hold.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace pio {

// As the LDTILECFG instruction reads it.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(std::initializer_list<int> tiles, int64_t num_rows, int64_t num_bytes) {
    for (const int tile : tiles) {
      row_bytes[tile] = static_cast<uint16_t>(num_bytes);
      rows[tile] = static_cast<uint8_t>(num_rows);
    }
  }
  // GCC's intrinsic reads 8 bytes as far as its optimizer knows.
  void load() const { asm volatile("ldtilecfg %0" : : "m"(*this)); }
};

}  // namespace pio
