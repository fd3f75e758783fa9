// Few rows of 16 bits: numbers of a group become integers of 16 bits, and these planes of bits, which are the
// rows of a product of bits with the words of W as they are.
#pragma once
#include "stream.cuh"

namespace stillhouse {

constexpr int kPlanes = 16;

// What an integer of 1 is worth: a power of two, so that a number keeps its bits down to 2^-15 of the group's
// largest; NaN for a group that is not finite. A warp for each group of a row: [M, words, kPlanes], bit i of
// a word its column i.
template <class T>
__global__ void __launch_bounds__(256, 1)
    planes_kernel(Pieces<false> pieces, int64_t m, const T* x, uint32_t* planes, float* steps) {
  const int64_t at = int64_t(blockIdx.x) * 8 + threadIdx.x / kWarpSize;
  if (at >= m * pieces.w.groups) return;
  const int columns = pieces.columns, lane = Team<kWarpSize>::rank();
  x += at * columns;
  uint32_t bits[1] = {0};
  for (int k = lane; k < columns; k += kWarpSize)
    bits[0] = Largest()(bits[0], as_bits(widen(x[k])) & 0x7fffffffu);
  Team<kWarpSize>::reduce(bits, Largest());
  const bool finite = bits[0] < 0x7f800000u;
  // The exponent of the largest, at least that of 2^-112: its scale and its step are normal numbers.
  const uint32_t exponent = bits[0] >> 23 > 15 ? bits[0] >> 23 : 15;
  const float scale = as_float((268 - exponent) << 23);
  if (lane == 0) steps[at] = finite ? as_float((exponent - 14) << 23) : NAN;
  constexpr float kRound = 12582912.f;  // whose sum with a small number is rounded, ties to even
  for (int word = 0; word < int(pieces.words); ++word) {
    const int k = word * int(kWord) + lane;
    const float number = finite && k < columns ? float(widen(x[k])) : 0.f;
    const uint32_t integer = as_bits(number * scale + kRound) - as_bits(kRound);
    uint32_t mine = 0;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const uint32_t votes = __ballot_sync(kFullMask, integer >> plane & 1);
      if (lane == plane) mine = votes;
    }
    if (lane < kPlanes) planes[(at * pieces.words + word) * kPlanes + lane] = mine;
  }
}

// kRows rows, their planes one product each. A warp's sums are of one group and 256 columns at a time, so
// that they are exact in float32 too.
template <int kRows>
__global__ void __launch_bounds__(kStreamThreads, 1)
    planes_product_kernel(FdbProduct p, const uint32_t* planes, const float* steps) {
  constexpr int kSplit = kStreamWarps;
  const Stream<8, kSplit> stream(p.weight, unsigned(ceil_div(p.m, kRows)));
  const int g = stream.g, t = stream.t;
  const int64_t first = stream.rows * kRows, of_row = p.weight.words() * kPlanes;
  // Planes g and g + 8 of a lane; the highest counts negative.
  const float low = float(1 << g), high = float(g == 7 ? -(1 << 15) : 1 << (g + 8));
  float total[kRows][8] = {};
  for (unsigned step = stream.begin; step < stream.end; ++step) {
    const int word[2] = {stream.word(step, 0), stream.word(step, 1)};
    const Vector16<uint32_t> weights[2] = {stream.load(word[0]), stream.load(word[1])};
    const unsigned group = stream.group(step);
    float scale[8];
    stream.scales(group, scale);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (first + m >= p.m) continue;
      const uint32_t* const x = planes + (first + m) * of_row + g;
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[2 * i] = word[i] < 0 ? 0u : x[word[i] * kPlanes];
        a[2 * i + 1] = word[i] < 0 ? 0u : x[word[i] * kPlanes + 8];
      }
      const float worth = steps[(first + m) * p.weight.groups + group];
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        int32_t sum[4] = {};
        const uint32_t b[2] = {weights[0].word[v], weights[1].word[v]};
        mma<MmaBit>(sum, a, b);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float integer = mul_add(high, float(sum[2 + i]), low * float(sum[i]));
          total[m][4 * i + v] = mul_add(scale[4 * i + v] * worth, integer, total[m][4 * i + v]);
        }
      }
    }
  }
  // Planes of x, planes of W, and the warps, in their order.
  SHARED_ARRAY(float, shares, kStreamWarps * kRows * 16);
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float sum = total[m][i];
#pragma unroll
      for (int offset = 2; offset < kWarpSize; offset *= 2) {
        const float other = __shfl_xor_sync(kFullMask, sum, offset);
        sum += other;
      }
      if (g == 0 && t < 2) shares[(stream.warp * kRows + m) * 16 + 8 * t + i] = sum;
    }
  __syncthreads();
  const int item = int(threadIdx.x);
  if (item >= kRows * 16) return;
  float y = 0;
  for (int warp = 0; warp < kStreamWarps; ++warp) y += shares[warp * kRows * 16 + item];
  stream.store(p, first + item / 16, stream.block * kBlock + item % 16, y);
}

}  // namespace stillhouse
