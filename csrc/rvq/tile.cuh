// A tile of rows on its way through the stages, by one block: residuals stay in shared memory, tables pass
// by in chunks.
#pragma once
#include "../core/block.cuh"
#include "../core/tile.cuh"
#include "kernel.h"

namespace stillhouse {

// a b + c as the CPU sums scores: floats are rounded once, doubles twice.
SH_INLINE float fused(float a, float b, float c) { return mul_add(a, b, c); }
SH_INLINE double fused(double a, double b, double c) { return a * b + c; }

template <class Real>
__device__ Real widened(const char* x, Dtype dtype, int64_t at) {
  Real number = 0;
  with_type(dtype, const_cast<char*>(x) + at * element_size(dtype),
            [&](auto* p) { number = Real(widen(*p)); });
  return number;
}

// A row of residuals in shared memory: its features, zeros up to a multiple of 32, and four numbers that no
// one reads, which spread rows over the banks.
SH_INLINE int64_t residual_stride(int64_t width) { return (width + 31) / 32 * 32 + 4; }

// Of a row: the highest score, of equal ones the lower code, and what the score of the next one is.
template <class Real>
struct Best {
  Real score = -INFINITY, second = -INFINITY;
  int code = 0;

  __device__ __forceinline__ void add(Real new_score, int new_code) {
    add(Best{new_score, -INFINITY, new_code});
  }
  __device__ __forceinline__ void add(const Best& other) {
    const bool higher = other.score > score || (other.score == score && other.code < code);
    const Real loser = higher ? score : other.score;
    second = loser > second ? loser : second;
    second = other.second > second ? other.second : second;
    if (higher) score = other.score, code = other.code;
  }
  // Over lanes that differ in the bits below `lanes`.
  __device__ __forceinline__ void over(int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2)
      add(Best{__shfl_xor_sync(kFullMask, score, offset),
               __shfl_xor_sync(kFullMask, second, offset),
               __shfl_xor_sync(kFullMask, code, offset)});
  }
  // A row that is not finite has no score above where they began, or infinite ones.
  __device__ __forceinline__ int found() const {
    return score > -INFINITY && score < INFINITY ? code : -1;
  }
};

template <class Real, int kRows, int kThreads>
struct RowTile {
  static constexpr int kWarps = kThreads / kWarpSize;
  const Quantizer<Real>& q;
  const SharedPointer<Real> residual;  // [kRows, stride]
  const SharedPointer<int> chosen;     // [kRows]
  const SharedPointer<Real> square;    // [kRows], |residual|^2
  int64_t group, first;
  int stride, rows;

  __device__ RowTile(const Quantizer<Real>& q, SharedPointer<Real> residual,
                     SharedPointer<int> chosen, SharedPointer<Real> square)
      : q(q), residual(residual), chosen(chosen), square(square) {
    const unsigned tiles = unsigned((q.n + kRows - 1) / kRows);
    stride = int(residual_stride(q.width));
    group = blockIdx.x / tiles, first = int64_t(blockIdx.x % tiles) * kRows;
    rows = int(q.n - first < kRows ? q.n - first : kRows);
  }

  __device__ static int warp() { return int(threadIdx.x) / kWarpSize; }
  __device__ static int lane() { return int(threadIdx.x) % kWarpSize; }
  __device__ int64_t of_row(int r) const { return group * q.n + first + r; }
  __device__ bool is_deep(int r, int64_t stage) const {
    return stage < q.depth_of(group, first + r);
  }
  // Whether any row has this stage; what the block has written before is there.
  __device__ bool any_deep(int64_t stage) const {
    bool deep = false;
    for (int r = int(threadIdx.x); r < rows; r += kThreads) deep = deep || is_deep(r, stage);
    return __syncthreads_or(deep);
  }

  // Rows by a warp each: `take` gives feature i of row r.
  template <class F>
  __device__ void fill(F take) const {
    for (int r = warp(); r < kRows; r += kWarps) {
      Real sum[1] = {0};
      for (int64_t i = lane(); i < stride - 4; i += kWarpSize) {
        const Real x = r < rows && i < q.width ? take(r, i) : Real(0);
        residual[r * stride + i] = x;
        sum[0] += x * x;
      }
      Team<kWarpSize>::reduce(sum, Add());
      if (lane() == 0) square[r] = sum[0];
    }
  }
  __device__ Real given(int64_t at) const { return widened<Real>(q.x, q.x_dtype, at); }
  __device__ void load() const {
    fill([&](int r, int64_t i) { return given(of_row(r) * q.width + i); });
  }
  // The rows of a stage, from the codes of the stages before, which are in `out`.
  __device__ void couple(int64_t stage) const {
    const int64_t all = q.out_width(), begin = stage * q.width;
    fill([&](int r, int64_t i) {
      Real x = given(of_row(r) * all + begin + i);
      const Real* const taken = q.out + of_row(r) * all;
      const Real* weight = q.coupling + group * all * all + begin + i;
      for (int64_t j = 0; j < begin; ++j) x -= taken[j] * weight[j * all];
      return x;
    });
  }

  // What a search has found of a row, by one thread.
  __device__ void choose(int r, int64_t stage, const Best<Real>& best) const {
    if (r >= rows) return;
    const bool deep = is_deep(r, stage);
    const int code = deep ? best.found() : -1;
    const int64_t at = of_row(r) * q.stages + stage;
    chosen[r] = code;
    q.found[at] = code;
    if (q.margin != nullptr)
      q.margin[at] = code >= 0 ? 2 * (best.score - best.second) : deep ? Real(NAN) : Real(0);
  }
  __device__ void choose_none(int64_t stage) const {
    for (int r = int(threadIdx.x); r < rows; r += kThreads) choose(r, stage, Best<Real>());
  }

  // Takes the codes of a stage off the rows.
  __device__ void settle(int64_t stage) const {
    for (int r = warp(); r < rows; r += kWarps) {
      const int k = chosen[r];
      const bool deep = is_deep(r, stage);
      const int64_t at = of_row(r) * q.stages + stage;
      Real* const out =
          q.coupling == nullptr ? nullptr : q.out + of_row(r) * q.out_width() + stage * q.width;
      Real sum[1] = {0};
      if (k >= 0) {
        const Real* const code = q.code(group, stage, k);
        for (int64_t i = lane(); i < q.width; i += kWarpSize) {
          const Real left = residual[r * stride + i] - code[i];
          residual[r * stride + i] = left;
          sum[0] += left * left;
          if (out != nullptr) out[i] = code[i];
        }
        Team<kWarpSize>::reduce(sum, Add());
        if (lane() == 0) square[r] = sum[0];
      } else if (out != nullptr) {
        for (int64_t i = lane(); i < q.width; i += kWarpSize) out[i] = deep ? Real(NAN) : Real(0);
      }
      if (lane() == 0 && q.error != nullptr)
        q.error[at] = k >= 0 ? sum[0] : deep ? Real(NAN) : Real(0);
    }
  }

  // The sums of the codes, in the order of the stages; what was chosen is there since `settle`.
  __device__ void add_up() const {
    if (q.out == nullptr || q.coupling != nullptr) return;
    for (int r = warp(); r < rows; r += kWarps) {
      const int64_t* const found = q.found + of_row(r) * q.stages;
      for (int64_t i = lane(); i < q.width; i += kWarpSize) {
        Real sum = 0;
        for (int64_t stage = 0; stage < q.stages; ++stage) {
          if (found[stage] >= 0)
            sum += q.code(group, stage, found[stage])[i];
          else if (is_deep(r, stage))
            sum = Real(NAN);
        }
        q.out[of_row(r) * q.width + i] = sum;
      }
    }
  }

  template <class Search>
  __device__ void run(Search& search) const {
    if (q.coupling == nullptr) load();
    for (int64_t stage = 0; stage < q.stages; ++stage) {
      const bool deep = any_deep(stage);
      if (q.coupling != nullptr) {
        couple(stage);
        __syncthreads();
      }
      if (deep)
        search(*this, stage);
      else
        choose_none(stage);
      __syncthreads();
      settle(stage);
    }
    add_up();
  }
};

// Chunks of a table on their way to shared memory, each of up to kChunk features of a block of codes; a
// feature's numbers are kStride apart.
template <class Real, int kChunk, int kStride, int kThreads>
struct ChunkStream {
  static constexpr int kVector = Vector16<Real>::kSize;
  const Real* blocks;
  const SharedPointer<Real> buffer;  // [2, kChunk, kStride]
  int64_t width;
  int of_block, total;  // chunks of a block, of all

  __device__ ChunkStream(const Real* blocks, int64_t count, int64_t width,
                         SharedPointer<Real> buffer)
      : blocks(blocks), buffer(buffer), width(width) {
    of_block = int((width + kChunk - 1) / kChunk), total = int(count) * of_block;
  }
  __device__ int number(int chunk) const { return int(unsigned(chunk) / unsigned(of_block)); }
  __device__ const Real* block(int chunk) const {
    return blocks + number(chunk) * block_numbers(width);
  }
  __device__ int first_feature(int chunk) const {
    return int(unsigned(chunk) % unsigned(of_block)) * kChunk;
  }
  __device__ int features(int chunk) const {
    const int left = int(width) - first_feature(chunk);
    return left < kChunk ? left : kChunk;
  }
  __device__ SharedPointer<Real> at(int chunk) const {
    return buffer + chunk % 2 * (kChunk * kStride);
  }
  __device__ void ask(int chunk) const {
    if (chunk < total) {
      const Real* const from = block(chunk) + (1 + first_feature(chunk)) * kCodes;
      const int vectors = features(chunk) * int(kCodes) / kVector;
      constexpr int of_feature = int(kCodes) / kVector;
      for (int i = int(threadIdx.x); i < vectors; i += kThreads)
        copy_async(at(chunk) + (i / of_feature * kStride + i % of_feature * kVector),
                   from + i * kVector);
    }
    copy_async_commit();
  }
  // f(chunk) of each, which is there for all threads. The next is on its way meanwhile, to where all threads
  // are done with the one before.
  template <class F>
  __device__ void each(F f) const {
    ask(0);
    for (int chunk = 0; chunk < total; ++chunk) {
      copy_async_wait<0>();
      __syncthreads();
      ask(chunk + 1);
      f(chunk);
    }
  }
};

}  // namespace stillhouse
