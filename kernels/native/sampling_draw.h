// Draws a token of one row whose maxima, and masses where it has no top-k, are known.
#pragma once

#include <cstdint>

#include "sampling.h"
#include "sampling_row.h"

namespace pio {

// The best token; of equals the lowest id.
int64_t best_token(const LogitRow& row, float best);

int64_t draw_token(const LogitRow& row, float best, const Draw& draw);

// The `count` best tokens in canonical order.
void best_tokens(const LogitRow& row, float best, int64_t count, float* values, int64_t* ids);

}  // namespace pio
