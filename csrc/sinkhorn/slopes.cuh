// Distances of all pairs of points on CUDA, and what their gradient hands on to the points, in tiles: no
// tensor of all differences exists.
#pragma once
#include "task.cuh"

namespace stillhouse {

template <class T>
__device__ __forceinline__ T element_of(const Matrix& rows, int64_t r, int64_t k) {
  T x = 0;
  with_type(rows.dtype, rows.row(r), [&](const auto* row) { x = T(widen(row[k])); });
  return x;
}

constexpr int kPairThreads = 256, kPairTile = 64, kPairDepth = 16;

// L1 distances of 64 by 64 pairs; a thread has 4 by 4 of them, 16 apart, so that a warp reads 16 numbers
// that lie side by side.
template <class Real>
__global__ void __launch_bounds__(kPairThreads, 2) pairs_kernel(const Pairs<Real> p) {
  SHARED_ARRAY(Real, xs, kPairDepth * (kPairTile + 1));
  SHARED_ARRAY(Real, ys, kPairDepth * (kPairTile + 1));
  const int64_t across = (p.m + kPairTile - 1) / kPairTile,
                down = (p.n + kPairTile - 1) / kPairTile;
  const int64_t group = blockIdx.x / (across * down), tile = blockIdx.x % (across * down);
  const int64_t row = tile / across * kPairTile, column = tile % across * kPairTile;
  const int tx = int(threadIdx.x) % 16, ty = int(threadIdx.x) / 16;
  Real sum[4][4] = {};
  for (int64_t start = 0; start < p.d; start += kPairDepth) {
    __syncthreads();  // the last tile's readers are done
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t k = start + tx, i = row + ty + 16 * q, j = column + ty + 16 * q;
      const int at = tx * (kPairTile + 1) + ty + 16 * q;
      xs[at] = k < p.d && i < p.n ? element_of<Real>(p.x, group * p.n + i, k) : Real(0);
      ys[at] = k < p.d && j < p.m ? element_of<Real>(p.y, group * p.m + j, k) : Real(0);
    }
    __syncthreads();
    Real part[4][4] = {};  // sums of sums: fewer digits are lost
#pragma unroll
    for (int k = 0; k < kPairDepth; ++k) {
      Real x[4], y[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        x[q] = xs[k * (kPairTile + 1) + ty + 16 * q];
        y[q] = ys[k * (kPairTile + 1) + tx + 16 * q];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) part[r][c] += magnitude(x[r] - y[c]);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] += part[r][c];
  }
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t i = row + ty + 16 * r, j = column + tx + 16 * c;
      if (i < p.n && j < p.m) p.out[(group * p.n + i) * p.m + j] = sum[r][c];
    }
}

// One side's gradient: out_i += sum over j of weight_ij times the sign of own_i - other_j, or times the
// difference itself.
template <class Real>
struct Slopes {
  Matrix own, other, out;
  const Real* weight;
  int64_t own_stride, other_stride, group_stride;  // of the weights
  // Rows: `own_count` of `own_rows` in each of the groups, from `first` on, against others from `from` on.
  int64_t groups, own_first, own_count, own_rows, other_first, other_count, other_rows;
  bool is_sign, adds;
};

constexpr int kSlopeOthers = 32;

// kWide dimensions of 4 * 256 / kWide rows a block.
template <class Real, int kWide>
__global__ void __launch_bounds__(kPairThreads, 2) slopes_kernel(const Slopes<Real> s) {
  constexpr int kRowsAtOnce = kPairThreads / kWide, kRows = 4 * kRowsAtOnce;
  SHARED_ARRAY(Real, others, kSlopeOthers * kWide);
  SHARED_ARRAY(Real, weights, kRows * (kSlopeOthers + 1));
  const int64_t d = s.own.width;
  const int64_t across = (d + kWide - 1) / kWide, down = (s.own_count + kRows - 1) / kRows;
  const int64_t group = blockIdx.x / (across * down), tile = blockIdx.x % (across * down);
  const int64_t row = tile / across * kRows;
  const int lane = int(threadIdx.x) % kWide, slot = int(threadIdx.x) / kWide;
  const int64_t k = tile % across * kWide + lane;
  Real own[4], sum[4] = {};
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int64_t i = row + slot + kRowsAtOnce * q;
    own[q] = k < d && i < s.own_count
                 ? element_of<Real>(s.own, group * s.own_rows + s.own_first + i, k)
                 : Real(0);
  }
  const Real* const given = s.weight + group * s.group_stride;
  for (int64_t start = 0; start < s.other_count; start += kSlopeOthers) {
    __syncthreads();  // the last tile's readers are done
    for (int at = slot; at < kSlopeOthers; at += kRowsAtOnce) {
      const int64_t j = start + at;
      others[at * kWide + lane] =
          k < d && j < s.other_count
              ? element_of<Real>(s.other, group * s.other_rows + s.other_first + j, k)
              : Real(0);
    }
    for (int at = int(threadIdx.x); at < kRows * kSlopeOthers; at += kPairThreads) {
      // Along the side whose weights lie side by side.
      const int r = s.other_stride == 1 ? at / kSlopeOthers : at % kRows;
      const int c = s.other_stride == 1 ? at % kSlopeOthers : at / kRows;
      const bool is_there = row + r < s.own_count && start + c < s.other_count;
      weights[r * (kSlopeOthers + 1) + c] =
          is_there ? given[(row + r) * s.own_stride + (start + c) * s.other_stride] : Real(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < kSlopeOthers; ++c) {
      const Real y = others[c * kWide + lane];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const Real w = weights[(slot + kRowsAtOnce * q) * (kSlopeOthers + 1) + c];
        const Real difference = own[q] - y;
        if (s.is_sign)
          sum[q] += difference > 0 ? w : difference < 0 ? -w : Real(0);
        else
          sum[q] = mul_add(w, difference, sum[q]);
      }
    }
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int64_t i = row + slot + kRowsAtOnce * q;
    if (k >= d || i >= s.own_count) continue;
    const int64_t r = group * s.own_rows + s.own_first + i;
    with_type(s.out.dtype, s.out.row(r),
              [&](auto* out) { narrow(s.adds ? Real(widen(out[k])) + sum[q] : sum[q], out[k]); });
  }
}

// Numbers in another type.
template <class Real>
__global__ void __launch_bounds__(kPairThreads, 2)
    narrow_kernel(const Real* from, const Matrix to, int64_t count) {
  const int64_t step = int64_t(gridDim.x) * kPairThreads;
  with_type(to.dtype, to.data, [&](auto* out) {
    for (int64_t at = int64_t(blockIdx.x) * kPairThreads + threadIdx.x; at < count; at += step)
      narrow(from[at], out[at]);
  });
}

}  // namespace stillhouse
