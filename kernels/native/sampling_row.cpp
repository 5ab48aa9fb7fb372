#include "sampling_row.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "sampling_weights.h"
#include "simd.h"

namespace pio {
namespace {

using simd::Floats;
using simd::kInfinity;
using simd::kLanes;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The maximum of `count` floats; NaN where one is.
PIO_INLINE float maximum(const float* x, int64_t count) {
  Floats most = simd::filled(-kInfinity);
  bool nan = false;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Floats a = simd::load(x + i), b = simd::load(x + i + kLanes);
    nan |= simd::any_nan(a, b);
    most = simd::max(simd::max(a, b), most);
  }
  for (; i < count; i += kLanes) {
    const int rest = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    const Floats a = simd::first_lanes(simd::load_part(x + i, rest), rest, -kInfinity);
    nan |= simd::any_nan(a, a);
    most = simd::max(a, most);
  }
  return nan ? kNaN : simd::largest(most);
}

// The hardware's prefetch ends with each 4 KB page; this one goes on in the next.
constexpr int64_t kAhead = 8;

PIO_INLINE void prefetch(const float* block) {
  for (int64_t i = 0; i < kSampleBlock; i += 16) {
    _mm_prefetch(reinterpret_cast<const char*>(block + i), _MM_HINT_T0);
  }
}

// A block's logits; the last block of a row is filled up with tokens that cannot come.
class WholeBlock {
 public:
  WholeBlock(const LogitRow& row, int64_t block) : logits(row.block(block)) {
    const int64_t size = row.block_size(block);
    if (size == kSampleBlock) return;
    std::memcpy(padded_, logits, sizeof(float) * static_cast<size_t>(size));
    std::fill(padded_ + size, padded_ + kSampleBlock, -kInfinity);
    logits = padded_;
  }

  const float* logits;

 private:
  float padded_[kSampleBlock];
};

PIO_INLINE int64_t mass_of(const float* block, const Weigher& weigher) {
  weights::Longs even = weights::none(), odd = weights::none();
#pragma GCC unroll 4
  for (int i = 0; i < kSampleBlock; i += 2 * weights::kLanes) {
    even = weights::add(even, weigher(block + i));
    odd = weights::add(odd, weigher(block + i + weights::kLanes));
  }
  return weights::sum(weights::add(even, odd));
}

// Appends the lanes of `x` that are at `lowest` or above, and their ids.
PIO_INLINE int64_t append(Floats x, Floats lowest, int lanes, int64_t id, float* values,
                          int32_t* ids) {
  uint32_t found = simd::at_least(x, lowest) & ((1u << lanes) - 1);
#ifdef __AVX512F__
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i id_of_lane = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(id)));
  const auto mask = static_cast<__mmask16>(found);
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, x));
  _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(mask, id_of_lane));
  return __builtin_popcount(found);
#else
  float all[kLanes];
  simd::store(all, x);
  int64_t count = 0;
  for (; found != 0; found &= found - 1) {
    const int lane = __builtin_ctz(found);
    values[count] = all[lane];
    ids[count++] = static_cast<int32_t>(id + lane);
  }
  return count;
#endif
}

}  // namespace

void scan(const LogitRow& row, BlockRange blocks) {
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t size = row.block_size(block);
    if (block + kAhead < row.num_blocks()) prefetch(row.block(block + kAhead));
    // The compiler unrolls the loop over a whole block.
    row.maxima[block] = size == kSampleBlock ? maximum(row.block(block), kSampleBlock)
                                             : maximum(row.block(block), size);
  }
}

float best_of(const LogitRow& row) { return maximum(row.maxima, row.num_blocks()); }

void weigh(const LogitRow& row, BlockRange blocks, float best, double scale) {
  const Weigher weigher(best, scale);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const bool weightless = exponent_of(row.maxima[block], best, scale) < kWeightless;
    row.masses[block] = weightless ? 0 : mass_of(WholeBlock(row, block).logits, weigher);
  }
}

void weigh(const float* logits, int64_t count, float best, double scale, int64_t* out) {
  const Weigher weigher(best, scale);
  int64_t i = 0;
  for (; i + weights::kLanes <= count; i += weights::kLanes) {
    weights::store(out + i, weigher(logits + i));
  }
  if (i == count) return;
  const size_t rest = static_cast<size_t>(count - i);
  float last[weights::kLanes] = {};
  int64_t found[weights::kLanes];
  std::fill(last, last + weights::kLanes, best);
  std::memcpy(last, logits + i, rest * sizeof(float));
  weights::store(found, weigher(last));
  std::memcpy(out + i, found, rest * sizeof(int64_t));
}

int64_t collect(const LogitRow& row, float lowest, float* values, int32_t* ids) {
  const Floats limit = simd::filled(lowest);
  int64_t count = 0;
  for (int64_t block = 0; block < row.num_blocks(); ++block) {
    if (row.maxima[block] < lowest) continue;
    const float* logits = row.block(block);
    const int64_t first = block * kSampleBlock, size = row.block_size(block);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      count += append(simd::load(logits + i), limit, kLanes, first + i, values + count, ids + count);
    }
    if (i < size) {
      const int rest = static_cast<int>(size - i);
      count += append(simd::load_part(logits + i, rest), limit, rest, first + i, values + count,
                      ids + count);
    }
  }
  return count;
}

}  // namespace pio
