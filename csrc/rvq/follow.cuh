// What is done along codes that are known, tables as the search reads them, and several codes of a row.
#pragma once
#include "tile.cuh"

namespace stillhouse {

constexpr int kFollowThreads = 256, kFollowWarps = kFollowThreads / kWarpSize;
// Features of a code that a warp sums.
constexpr int kOwnFeatures = 4, kWarpFeatures = kOwnFeatures * kWarpSize;

// A thread's item of a launch over many; false beyond the last.
__device__ __forceinline__ bool own_item(int64_t count, int64_t& item) {
  item = int64_t(blockIdx.x) * kFollowThreads + threadIdx.x;
  return item < count;
}

// Out of codes that no table has nothing is read: they count as -1.
template <class Real>
__global__ void decode_kernel(Quantizer<Real> q) {
  int64_t item;
  if (!own_item(q.groups * q.n * q.width, item)) return;
  const int64_t row = item / q.width, i = item % q.width, group = row / q.n;
  Real sum = 0;
  for (int64_t stage = 0; stage < q.stages; ++stage) {
    const int64_t k = q.found[row * q.stages + stage];
    if (k >= 0 && k < q.codes) sum += q.code(group, stage, k)[i];
  }
  q.out[item] = sum;
}

// Feature i of a row before a stage. Codes are taken off in the order of the stages, as the search does.
template <class Real>
__device__ Real residual_before(const Residuals<Real>& r, int64_t row, int64_t stage, int64_t i) {
  Real x = widened<Real>(r.x, r.x_dtype, row * r.width + i);
  const int64_t group = row / r.n;
  for (int64_t s = 0; s < stage; ++s) {
    const int64_t k = r.found[row * r.stages + s];
    const int64_t table = group * r.tables + (r.tables == 1 ? 0 : s);
    if (k >= 0 && k < r.codes) x -= r.table[(table * r.codes + k) * r.width + i];
  }
  return x;
}

template <class Real>
__global__ void row_gradient_kernel(Residuals<Real> r) {
  int64_t item;
  if (!own_item(r.groups * r.n * r.width, item)) return;
  const int64_t row = item / r.width, i = item % r.width, group = row / r.n;
  Real x = widened<Real>(r.x, r.x_dtype, item), sum = 0;
  for (int64_t s = 0; s < r.stages; ++s) {
    const int64_t k = r.found[row * r.stages + s];
    if (k < 0 || k >= r.codes) continue;
    const int64_t table = group * r.tables + (r.tables == 1 ? 0 : s);
    x -= r.table[(table * r.codes + k) * r.width + i];
    sum += 2 * r.upstream[row * r.stages + s] * x;
  }
  r.d_x[item] = sum;
}

// A warp for some features of a code of a table: its rows are found again and added up in their order, stage
// after stage where stages share the table.
template <class Real>
__global__ void collect_kernel(Residuals<Real> r) {
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t parts = (r.width + kWarpFeatures - 1) / kWarpFeatures;
  const int64_t warp = int64_t(blockIdx.x) * kFollowWarps + threadIdx.x / kWarpSize;
  const int64_t of_code = warp / parts, first = warp % parts * kWarpFeatures;
  if (of_code >= r.groups * r.tables * r.codes) return;
  const int64_t table = of_code / r.codes, k = of_code % r.codes;
  const int64_t group = table / r.tables, own = table % r.tables;
  const int64_t begin = r.tables == 1 ? 0 : own, end = r.tables == 1 ? r.stages : own + 1;
  Real sum[kOwnFeatures] = {};
  int64_t count = 0;
  for (int64_t stage = begin; stage < end && stage < r.stages; ++stage)
    for (int64_t some = 0; some < r.n; some += kWarpSize) {
      const int64_t row = group * r.n + some + lane;
      const bool its = some + lane < r.n && r.found[row * r.stages + stage] == k;
      uint32_t votes = __ballot_sync(kFullMask, its);
      count += __popc(votes);
      for (; votes != 0; votes &= votes - 1) {
        const int64_t found = group * r.n + some + __ffs(int(votes)) - 1;
        const bool after = r.upstream != nullptr;
        const Real weight = after ? -2 * r.upstream[found * r.stages + stage] : Real(1);
#pragma unroll
        for (int f = 0; f < kOwnFeatures; ++f) {
          const int64_t i = first + lane + f * kWarpSize;
          if (i < r.width) sum[f] += weight * residual_before(r, found, stage + after, i);
        }
      }
    }
#pragma unroll
  for (int f = 0; f < kOwnFeatures; ++f) {
    const int64_t i = first + lane + f * kWarpSize;
    if (i < r.width) r.of_codes[of_code * r.width + i] = sum[f];
  }
  if (r.counts != nullptr && first == 0 && lane == 0) r.counts[of_code] = Real(count);
}

// A block of threads for a block of codes: features pass through shared memory, so that reads and writes are
// of numbers that lie together.
template <class Real>
__global__ void pack_kernel(Packing<Real> p) {
  constexpr int kWide = kWarpSize, kCount = int(kCodes);
  SHARED_ARRAY(Real, held, kCount * (kWide + 1));
  SHARED_ARRAY(Real, scale, kCount);
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int64_t blocks = code_blocks(p.codes), table = blockIdx.x / blocks;
  const int64_t first = blockIdx.x % blocks * kCodes;
  const int64_t size = p.size_of(table);
  const Real* const codes = p.table + (table * p.codes + first) * p.width;
  Real* const block = p.packed + blockIdx.x * block_numbers(p.width);
  for (int j = warp; j < kCount; j += kFollowWarps) {
    double square[1] = {0};
    for (int64_t i = lane; i < p.width && first + j < size; i += kWarpSize) {
      const double x = double(codes[j * p.width + i]);
      square[0] += x * x;
    }
    Team<kWarpSize>::reduce(square, Add());
    if (lane != 0) continue;
    const bool cosine = p.metric == kCosine;
    // A code of zeros has no direction: its cosine is 0.
    scale[j] = cosine ? Real(1 / root(square[0] > 0 ? square[0] : 1.)) : Real(1);
    block[j] = first + j >= size ? -Real(INFINITY) : cosine ? Real(0) : Real(-square[0] / 2);
  }
  for (int64_t begin = 0; begin < p.width; begin += kWide) {
    __syncthreads();
    for (int j = warp; j < kCount; j += kFollowWarps) {
      const int64_t i = begin + lane;
      held[j * (kWide + 1) + lane] =
          i < p.width && first + j < size ? codes[j * p.width + i] : Real(0);
    }
    __syncthreads();
    for (int at = int(threadIdx.x); at < kWide * kCount; at += kFollowThreads) {
      const int i = at / kCount, j = at % kCount;
      if (begin + i < p.width)
        block[(1 + begin + i) * kCodes + j] = held[j * (kWide + 1) + i] * scale[j];
    }
  }
}

// A value of `candidates` and its code; higher values come first, of equal ones the lower code.
struct Ranked {
  double value;
  int64_t code;

  __device__ __forceinline__ bool before(const Ranked& other) const {
    return value > other.value || (value == other.value && code < other.code);
  }
};

// Blocks take rows in turn; `values` [blocks, K] are theirs.
template <class Real>
__global__ void candidates_kernel(Candidates<Real> c, double* values) {
  SHARED_DYNAMIC(Real, x);
  SHARED_ARRAY(double, of_warp, kFollowWarps);
  SHARED_ARRAY(int64_t, code_of_warp, kFollowWarps);
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  double* const value = values + blockIdx.x * c.codes;
  for (int64_t row = blockIdx.x; row < c.groups * c.n; row += gridDim.x) {
    const int64_t group = row / c.n;
    const Real* const blocks = c.packed + group * code_blocks(c.codes) * block_numbers(c.width);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < c.width; i += kFollowThreads)
      x[i] = widened<Real>(c.x, c.x_dtype, row * c.width + i);
    __syncthreads();
    const uint64_t position = uint64_t(c.position == nullptr ? row : c.position[row]);
    for (int64_t k = threadIdx.x; k < c.codes; k += kFollowThreads) {
      const Real* const code = blocks + k / kCodes * block_numbers(c.width) + k % kCodes;
      Real score = code[0];
      for (int64_t i = 0; i < c.width; ++i)
        score = fused(Real(x[i]), code[(1 + i) * kCodes], score);
      double noisy = double(score);
      if (c.sharpness != 0) {
        const Words4 words = philox(c.seed, position, uint32_t(c.node), uint32_t(k / 4));
        noisy = c.sharpness * noisy + gumbel_of(words.word[k % 4]);
      }
      value[k] = noisy;
    }
    // Each round finds the first after the last one.
    Ranked last{INFINITY, -1};
    bool finite = true;
    for (int64_t j = 0; j < c.k; ++j) {
      Ranked best{-INFINITY, c.codes};
      for (int64_t k = threadIdx.x; k < c.codes; k += kFollowThreads) {
        const Ranked own{value[k], k};
        if (last.before(own) && own.before(best)) best = own;
        if (!(own.value < INFINITY)) best = {INFINITY, -1};
      }
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        const Ranked other{__shfl_xor_sync(kFullMask, best.value, offset),
                           __shfl_xor_sync(kFullMask, best.code, offset)};
        if (other.before(best)) best = other;
      }
      __syncthreads();
      if (lane == 0) of_warp[warp] = best.value, code_of_warp[warp] = best.code;
      __syncthreads();
      for (int w = 0; w < kFollowWarps; ++w) {
        const Ranked other{of_warp[w], code_of_warp[w]};
        if (other.before(best)) best = other;
      }
      finite = finite && best.value < INFINITY && best.value > -INFINITY;
      const bool there = finite;
      Real sum[1] = {0};
      if (there && warp == 0)
        for (int64_t i = lane; i < c.width; i += kWarpSize) {
          const Real gap = x[i] - c.table[(group * c.codes + best.code) * c.width + i];
          sum[0] += gap * gap;
        }
      if (warp == 0) Team<kWarpSize>::reduce(sum, Add());
      if (threadIdx.x == 0) {
        c.found[row * c.k + j] = there ? best.code : -1;
        c.error[row * c.k + j] = there ? sum[0] : Real(NAN);
      }
      last = best;
    }
  }
}

}  // namespace stillhouse
