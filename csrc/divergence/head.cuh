// Where the head of a row ends (order.h), for a team that is a block.
#pragma once
#include "../core/block.cuh"
#include "order.h"

namespace stillhouse {

// Masses are integers, in units of 2^-52, so that their sums do not depend on the order of atomics.
SH_INLINE uint64_t fixed_mass(double mass) {
  return mass > 0 ? uint64_t(mass * 4503599627370496.0) : 0;
}

// Offsets below `end` are in the head. Those equal to it are, as long as `room` has place for one more
// of `size`; not at all if size is 0.
struct HeadEnd {
  uint64_t end, room, size;
};

// Elements have an offset in [0, span] and a mass; the head is what comes first, up to a mass of `most`.
// each(f) calls f(offset, mass) for the elements of this thread, a second time and a third if need be.
template <int kThreads, class Each>
__device__ HeadEnd find_head_end(uint64_t span, uint64_t most, Each each) {
  using T = Team<kThreads>;
  constexpr int kBinsEach = 4, kBins = kBinsEach * kThreads;
  SHARED_ARRAY(uint64_t, masses, kBins);
  SHARED_ARRAY(uint32_t, counts, kBins);
  enum { kBin, kMassBefore, kMass, kCount, kResults };
  SHARED_ARRAY(uint64_t, result, kResults);
  uint64_t begin = 0, before = 0;
  for (;;) {
    const int shift = bin_shift(span, kBins);
    for (int i = 0; i < kBinsEach; ++i) {
      masses[T::rank() * kBinsEach + i] = 0;
      counts[T::rank() * kBinsEach + i] = 0;
    }
    if (T::rank() == 0) result[kBin] = kBins;
    __syncthreads();
    each([&](uint64_t offset, uint64_t mass) {
      if (offset < begin || offset - begin > span) return;
      const int64_t bin = int64_t((offset - begin) >> shift);
      shared_add<uint64_t>(masses, bin, mass);
      shared_add<uint32_t>(counts, bin, 1);
    });
    __syncthreads();
    uint64_t sum = 0;
    for (int i = 0; i < kBinsEach; ++i) sum += masses[T::rank() * kBinsEach + i];
    sum = before + T::sum_before(sum);
    for (int i = 0; i < kBinsEach; ++i) {
      const int bin = T::rank() * kBinsEach + i;
      const uint64_t mass = masses[bin];
      if (sum <= most && sum + mass > most) {
        result[kBin] = bin, result[kMassBefore] = sum;
        result[kMass] = mass, result[kCount] = uint32_t(counts[bin]);
      }
      sum += mass;
    }
    __syncthreads();
    const uint64_t bin = result[kBin];
    if (bin == kBins) return {begin + span + 1, 0, 0};  // all of them
    before = result[kMassBefore];
    const uint64_t mass = result[kMass], count = result[kCount];
    __syncthreads();  // before the next round writes
    begin += bin << shift;
    if (count == 1) return {begin, 0, 0};
    if (shift == 0) return {begin, most - before, mass / count};
    span = (uint64_t(1) << shift) - 1;
  }
}

}  // namespace stillhouse
