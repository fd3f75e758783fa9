// Words that stream from memory to tensor cores as they are: rows of 8 bits, and few rows as planes of bits.
// A lane loads four rows' words at once, and these are columns of four products: columns 0 ... 3 of product v
// are plane 1 of rows v, v + 4, v + 8, v + 12, columns 4 ... 7 plane 2; lane 4 g + t has column g, word t.
#pragma once
#include "operand.cuh"

namespace stillhouse {

constexpr int kStreamWarps = 8, kStreamThreads = kStreamWarps * kWarpSize;

// A warp has a block of W and a share of the words, kWords of a group at a time. kSplit warps share a block.
template <int kWords, int kSplit>
struct Stream {
  const FdbWeight& w;
  int64_t block, rows;  // of x: which of the launch's tiles
  int warp, g, t;
  unsigned words, of_group, begin, end;  // in steps of kWords

  __device__ explicit Stream(const FdbWeight& w, unsigned row_tiles) : w(w) {
    warp = int(threadIdx.x) / kWarpSize;
    g = Team<kWarpSize>::rank() / 4, t = Team<kWarpSize>::rank() % 4;
    rows = blockIdx.x % row_tiles;
    block = int64_t(blockIdx.x / row_tiles) * (kStreamWarps / kSplit) + warp / kSplit;
    words = unsigned(w.group_words()), of_group = (words + kWords - 1) / kWords;
    const int64_t steps = w.groups * of_group, share = warp % kSplit;
    begin = unsigned(steps * share / kSplit), end = unsigned(steps * (share + 1) / kSplit);
    if (block >= w.blocks()) end = begin;
  }
  __device__ unsigned group(unsigned step) const { return step / of_group; }
  // Which word of all of a row the lane has, -1 where the group has none.
  __device__ __forceinline__ int word(unsigned step, int i) const {
    const unsigned of = step % of_group * kWords + 4 * i + t;
    return of < words ? int(group(step) * words + of) : -1;
  }
  __device__ __forceinline__ Vector16<uint32_t> load(int word) const {
    if (word < 0) return {};
    return load_vector(w.tiles + ((block * w.groups * words + word) * 8 + g) * 4);
  }
  // Of the lane's columns of the sums, 2 t and 2 t + 1: number 4 i + v is column 2 t + i of product v.
  __device__ __forceinline__ void scales(unsigned group, float (&scale)[8]) const {
    const int64_t at = w.scales_at(block, group) + 8 * t;
    with_type(w.scale_dtype, const_cast<char*>(w.scales) + at * element_size(w.scale_dtype),
              [&](auto* from) {
                constexpr int kEach = int(16 / sizeof(*from));
#pragma unroll
                for (int i = 0; i < 8 / kEach; ++i) {
                  const auto each = load_vector(from + kEach * i);
#pragma unroll
                  for (int j = 0; j < kEach; ++j) scale[kEach * i + j] = float(widen(each.get(j)));
                }
              });
  }
  // Row of W of sum 4 i + v of a lane of plane 1 (t < 2).
  __device__ int64_t row(int i) const { return block * kBlock + 8 * t + i; }
  __device__ static void store(const FdbProduct& p, int64_t m, int64_t n, float sum) {
    if (m >= p.m || n >= p.weight.rows) return;
    if (p.bias != nullptr) sum += number_at<float>(p.bias, p.bias_dtype, n);
    const int64_t at = m * p.weight.rows + n;
    with_type(p.dtype, p.y + at * element_size(p.dtype), [&](auto* y) { narrow(sum, *y); });
  }
};

// Rows of 8 bits as a stream multiplies them, [M, words, 8]: byte b of number j of a word is its column
// j + 8 b.
__global__ void __launch_bounds__(256, 1)
    arrange_kernel(Pieces<false> pieces, const int8_t* integers, uint32_t* out) {
  const unsigned each = unsigned(pieces.w.words()) * 8, parts = (each + 255) / 256;
  const int64_t row = blockIdx.x / parts;
  const unsigned i = blockIdx.x % parts * 256 + threadIdx.x, j = i % 8;
  if (i >= each) return;
  int count;
  const int8_t* const x = integers + row * pieces.w.columns + pieces.first_of_word(i / 8, count);
  uint32_t bytes = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b)
    if (int(j) + 8 * b < count) bytes |= uint32_t(uint8_t(x[j + 8 * b])) << 8 * b;
  out[row * each + i] = bytes;
}

// 16 kTiles rows of 8 bits: the sums of a group are exact.
template <int kTiles, int kSplit>
__global__ void __launch_bounds__(kStreamThreads, 1)
    integer_kernel(FdbProduct p, const uint32_t* arranged) {
  constexpr int kSums = 16 * kTiles;
  const Stream<4, kSplit> stream(p.weight, unsigned(ceil_div(p.m, 16 * kTiles)));
  const int g = stream.g, t = stream.t;
  const int64_t first = stream.rows * 16 * kTiles, of_row = p.weight.words() * 8;
  float total[kTiles][4][4] = {};
  int32_t sum[kTiles][4][4] = {};
  for (unsigned step = stream.begin; step < stream.end; ++step) {
    const int word = stream.word(step, 0);
    const Vector16<uint32_t> weights = stream.load(word);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      Vector16<uint32_t> x[2][2] = {};  // rows g and g + 8
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = first + 16 * m + 8 * i + g;
        if (row >= p.m || word < 0) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          x[i][half] = load_vector(arranged + row * of_row + word * 8 + 4 * half);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = k % 2 * 2;
        const uint32_t a[4] = {x[0][k / 2].word[at], x[1][k / 2].word[at], x[0][k / 2].word[at + 1],
                               x[1][k / 2].word[at + 1]};
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const uint32_t b[2] = {weights.word[v] >> 2 * k & 0x01010101u,
                                 weights.word[v] >> (2 * k + 1) & 0x01010101u};
          mma<MmaInt8>(sum[m][v], a, b);
        }
      }
    }
    const unsigned group = stream.group(step);
    if (step + 1 < stream.end && stream.group(step + 1) == group) continue;
    float scale[8];
    stream.scales(group, scale);
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first + 16 * m + 8 * half + g;
        const float worth = row < p.m ? p.steps[row * p.weight.groups + group] : 0.f;
#pragma unroll
        for (int v = 0; v < 4; ++v)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            total[m][v][i] =
                mul_add(scale[i % 2 * 4 + v] * worth, float(sum[m][v][i]), total[m][v][i]);
            sum[m][v][i] = 0;
          }
      }
  }
  // The planes of a row, and the warps of a block of W, in their order.
  SHARED_ARRAY(float, shares, kSplit > 1 ? kStreamWarps * kSums * 16 : 1);
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int v = 0; v < 4; ++v)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float other = __shfl_xor_sync(kFullMask, total[m][v][i], 2);
        total[m][v][i] += other;
        if (kSplit > 1 && t < 2)
          shares[(stream.warp * kSums + (m * 4 + v) * 4 + i) * 16 + 2 * g + t] = total[m][v][i];
      }
  if (kSplit > 1) __syncthreads();
  if (t >= 2 || stream.block >= p.weight.blocks()) return;
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int v = 0; v < 4; ++v)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = (m * 4 + v) * 4 + i;
        if (kSplit > 1 && e % kSplit != stream.warp % kSplit) continue;
        float y = kSplit > 1 ? 0.f : total[m][v][i];
        if constexpr (kSplit > 1)
          for (int s = 0; s < kSplit; ++s)
            y += shares[((stream.warp / kSplit * kSplit + s) * kSums + e) * 16 + 2 * g + t];
        stream.store(p, first + 16 * m + 8 * (i / 2) + g, stream.row(i % 2 * 4 + v), y);
      }
}

// Rows to 8 bits, a warp for each group of a row.
template <class T>
__global__ void __launch_bounds__(256, 1) quantize_kernel(FdbQuantizing q) {
  const int64_t at = int64_t(blockIdx.x) * 8 + threadIdx.x / kWarpSize;
  if (at >= q.m * q.groups) return;
  const int columns = int(q.columns / q.groups), lane = Team<kWarpSize>::rank();
  const T* const x = reinterpret_cast<const T*>(q.x) + at * columns;
  uint32_t bits[1] = {0};  // of magnitudes, which order as integers, those that are not finite last
  for (int k = lane; k < columns; k += kWarpSize)
    bits[0] = Largest()(bits[0], as_bits(float(widen(x[k]))) & 0x7fffffffu);
  Team<kWarpSize>::reduce(bits, Largest());
  constexpr float kRound = 12582912.f;  // whose sum with a small number is rounded, ties to even
  const float largest = as_float(bits[0]), step = largest / 127.f;
  const bool finite = bits[0] < 0x7f800000u;
  // A step that has become a denormal number or 0 has no reciprocal.
  const float scale = finite && step >= 1.1754944e-38f ? 127.f / largest : 0.f;
  if (lane == 0) q.steps[at] = !finite ? NAN : scale == 0.f ? 0.f : step;
  for (int k = lane; k < columns; k += kWarpSize) {
    const float number = finite ? float(widen(x[k])) : 0.f;
    q.integers[at * columns + k] = int8_t(as_bits(number * scale + kRound) - as_bits(kRound));
  }
}

}  // namespace stillhouse
