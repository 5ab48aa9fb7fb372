// One row of logits as blocks of 128 neighbours: their maxima, their masses, and the tokens above a
// limit. A pass over the row gives the maxima; everything after it looks into few blocks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pio {

constexpr int64_t kSampleBlock = 128;

struct BlockRange {
  int64_t begin;
  int64_t end;
};

struct LogitRow {
  float* logits;
  int64_t num_tokens;
  float* maxima;     // of each block; NaN where it has one
  int64_t* masses;   // of each block

  int64_t num_blocks() const { return (num_tokens + kSampleBlock - 1) / kSampleBlock; }
  BlockRange all() const { return {0, num_blocks()}; }
  int64_t block_size(int64_t block) const {
    return std::min(kSampleBlock, num_tokens - block * kSampleBlock);
  }
  const float* block(int64_t block) const { return logits + block * kSampleBlock; }
};

// Writes the maxima of some blocks.
void scan(const LogitRow& row, BlockRange blocks);

// The best logit, from the maxima; NaN where there is one.
float best_of(const LogitRow& row);

// Writes the masses of some blocks: the sums of their tokens' weights.
void weigh(const LogitRow& row, BlockRange blocks, float best, double scale);

// The weights of `count` logits.
void weigh(const float* logits, int64_t count, float best, double scale, int64_t* weights);

// Room behind the last candidate that `collect` may write to.
constexpr int64_t kCollectSlack = 16;

// Values and ids, ascending, of the tokens at `lowest` or above; how many there are.
int64_t collect(const LogitRow& row, float lowest, float* values, int32_t* ids);

}  // namespace pio
