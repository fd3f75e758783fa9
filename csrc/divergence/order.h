// Order without a sort: numbers are taken as integers of the same order, and counted in bins of them.
// - Which of a row's logits are its largest (RowNumbers::head of math.h): a histogram over a range shows
//   in which narrower range the border lies, until few are left.
// - Which ranks a probability can have (sorted.h): as many as there are in its bin.
#pragma once
#include "../core/scalar.h"

namespace stillhouse {

// As unsigned integers of the same order; -0 is 0.
SH_INLINE uint64_t order_of(float x) {
  const uint32_t bits = as_bits(x + 0.f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
SH_INLINE uint64_t order_of(double x) {
  const uint64_t bits = __builtin_bit_cast(uint64_t, x + 0.0);
  return bits ^ (bits >> 63 ? ~uint64_t(0) : uint64_t(1) << 63);
}

// So that 0 ... span fall into `bins` bins when shifted to the right.
SH_INLINE int bin_shift(uint64_t span, uint64_t bins) {
  int shift = 0;
  while (span >> shift >= bins) ++shift;
  return shift;
}

// Columns below this probability are not in the head: of V of them together there is too little.
SH_INLINE double least_in_head(double mass, int64_t columns) {
  return (1 - mass) / double(columns);
}

// Bins of probabilities in descending order: 64 to an octave, what is below 2^-64 in the last, 0 in none
// of them, which is bin kRankBins.
constexpr int kRankBins = 4096;
SH_INLINE int32_t rank_bin(float q) {
  const int32_t bin = (int32_t(as_bits(1.f)) - int32_t(as_bits(q))) >> 17;
  const int32_t inside = bin < 0 ? 0 : bin < kRankBins ? bin : kRankBins - 1;
  return q > 0.f ? inside : kRankBins;
}
SH_INLINE int32_t rank_bin(double q) {
  const int64_t below = __builtin_bit_cast(int64_t, 1.0) - __builtin_bit_cast(int64_t, q);
  const int64_t bin = below >> 46;
  const int64_t inside = bin < 0 ? 0 : bin < kRankBins ? bin : kRankBins - 1;
  return q > 0.0 ? int32_t(inside) : kRankBins;
}
// The largest probability of a bin but the first, which has no limit.
SH_INLINE float first_of_rank_bin(int32_t bin) {
  return bin == 0 ? INFINITY : as_float(as_bits(1.f) - (uint32_t(bin) << 17));
}

}  // namespace stillhouse
