// What tensor cores would round: products of float32 and float64; gradients of the scales; W as numbers.
#pragma once
#include "operand.cuh"

namespace stillhouse {

constexpr int kPlainThreads = 256, kPlainTile = 64, kPlainStride = kPlainTile + 1;

// 16 kOwn rows by two tiles; a thread has kOwn rows and four outputs.
template <class Real, bool kBack, int kOwn>
__global__ void __launch_bounds__(kPlainThreads, 1) plain_product_kernel(FdbProduct p) {
  constexpr int kRows = 16 * kOwn, kRowStride = int(kWord) + 1;
  SHARED_ARRAY(Real, staged, kRows * kRowStride);
  SHARED_ARRAY(Real, weight, 32 * kPlainStride);
  const Pieces<kBack> pieces(p.weight);
  const unsigned downs = unsigned(ceil_div(p.m, kRows));
  const int64_t first_row = int64_t(blockIdx.x % downs) * kRows;
  const int64_t first_tile = int64_t(blockIdx.x / downs) * 2, inner = pieces.inner();
  const int thread = int(threadIdx.x), tx = thread % 16, ty = thread / 16, part = thread / 64;
  const Real* const x = reinterpret_cast<const Real*>(p.x);
  Real sum[kOwn][4] = {};
  for (int piece = 0; piece < pieces.count(); ++piece) {
    int numbers;
    const int64_t first = pieces.first(piece, numbers);
    __syncthreads();
#pragma unroll
    for (int i = thread; i < kRows * 32; i += kPlainThreads) {
      const int row = i / 32, k = i % 32;
      const bool there = first_row + row < p.m && k < numbers;
      staged[row * kRowStride + k] = there ? x[(first_row + row) * inner + first + k] : Real(0);
    }
    // A thread unpacks a quarter of a word of each plane.
    const int which = kBack ? thread % 32 : thread % 64;
    const int64_t block = kBack ? 2 * int64_t(piece) + which / 16 : 2 * first_tile + which / 16;
    const int64_t word = kBack ? first_tile + thread / 32 % 2 : piece;
    uint32_t planes[2] = {0, 0};
    Real level[2] = {0, 0};
    if (block < p.weight.blocks() && word < p.weight.words()) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        planes[n] = pieces.words_at(block, word)[n * kBlock + which % 16] >> 8 * part;
        level[n] = pieces.template scale<Real>(block, unsigned(word), n, which % 16);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Real one = planes[0] >> i & 1 ? level[0] : Real(0);
      const Real two = planes[1] >> i & 1 ? level[1] : Real(0);
      const int bit = 8 * part + i;
      const int at =
          kBack ? which * kPlainStride + thread / 32 % 2 * 32 + bit : bit * kPlainStride + which;
      weight[at] = one + two;
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < 32; ++k) {
      Real w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = weight[k * kPlainStride + tx + 16 * j];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Real xi = staged[(ty + 16 * i) * kRowStride + k];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = mul_add(xi, w[j], sum[i][j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t column = pieces.output(first_tile + j / 2, tx + j % 2 * 16);
    if (column < 0) continue;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t row = first_row + ty + 16 * i;
      if (row < p.m) put_product<Real, Real>(p, row, pieces.outer(), column, sum[i][j]);
    }
  }
}

// 64 rows of W and a group, 64 columns of it at a time: the gradient of W there, summed over its ones.
template <class T>
__global__ void __launch_bounds__(kPlainThreads, 1)
    scale_gradient_kernel(FdbWeight w, int64_t m, const T* upstream, const T* x, SumOf<T>* out) {
  using Real = SumOf<T>;
  SHARED_ARRAY(Real, of_rows, 32 * kPlainStride);
  SHARED_ARRAY(Real, of_columns, 32 * kPlainStride);
  const unsigned groups = unsigned(w.groups);
  const int64_t group = blockIdx.x % groups, first_block = int64_t(blockIdx.x / groups) * 4;
  const int64_t first_row = first_block * kBlock, columns = w.group_columns();
  const int thread = int(threadIdx.x), tx = thread % 16, ty = thread / 16;
  Real sum[4][2] = {};
  for (int64_t first = 0; first < columns; first += kPlainTile) {
    Real product[4][4] = {};
    for (int64_t row = 0; row < m; row += 32) {
      __syncthreads();
#pragma unroll
      for (int i = thread; i < 32 * kPlainTile; i += kPlainThreads) {
        const int r = i / kPlainTile, c = i % kPlainTile, at = r * kPlainStride + c;
        const bool there = row + r < m;
        of_rows[at] = there && first_row + c < w.rows
                          ? Real(widen(upstream[(row + r) * w.rows + first_row + c]))
                          : Real(0);
        of_columns[at] = there && first + c < columns
                             ? Real(widen(x[(row + r) * w.columns + group * columns + first + c]))
                             : Real(0);
      }
      __syncthreads();
#pragma unroll 8
      for (int r = 0; r < 32; ++r) {
        Real b[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] = of_columns[r * kPlainStride + tx + 16 * j];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Real a = of_rows[r * kPlainStride + ty + 16 * i];
#pragma unroll
          for (int j = 0; j < 4; ++j) product[i][j] = mul_add(a, b[j], product[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first_block + i >= w.blocks()) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t word = first / kWord + j / 2;
        if (word >= w.group_words()) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t bits =
              w.words_of(first_block + i, group)[word * 2 * kBlock + n * kBlock + ty];
          if (bits >> (tx + j % 2 * 16) & 1) sum[i][n] += product[i][j];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      for (int offset = 8; offset > 0; offset /= 2)
        sum[i][n] += __shfl_xor_sync(kFullMask, sum[i][n], offset);
      if (tx == 0 && first_block + i < w.blocks())
        out[w.scales_at(first_block + i, group) + n * kBlock + ty] = sum[i][n];
    }
}

constexpr int kColumnsOfBlock = 1024;

template <class T>
__global__ void __launch_bounds__(kPlainThreads, 1) dequantize_kernel(FdbPanel panel) {
  using Real = SumOf<T>;
  const FdbWeight& w = panel.weight;
  const unsigned columns = unsigned(w.group_columns());
  const int64_t width = panel.count_groups * columns;
  const unsigned parts = unsigned(ceil_div(width, kColumnsOfBlock));
  const int64_t row = blockIdx.x / parts, n = panel.first_row + row;
  const int64_t begin = int64_t(blockIdx.x % parts) * kColumnsOfBlock;
  const int64_t end = begin + kColumnsOfBlock < width ? begin + kColumnsOfBlock : width;
  for (int64_t k = begin + threadIdx.x; k < end; k += kPlainThreads) {
    const int64_t group = panel.first_group + unsigned(k) / columns;
    const unsigned i = unsigned(k) % columns;
    const uint32_t* const at = w.words_of(n / kBlock, group) + i / 32 * 2 * kBlock + n % kBlock;
    const int64_t scales = w.scales_at(n / kBlock, group) + n % kBlock;
    Real level[2];
#pragma unroll
    for (int plane = 0; plane < 2; ++plane)
      level[plane] = at[plane * kBlock] >> i % 32 & 1
                         ? number_at<Real>(w.scales, w.scale_dtype, scales + plane * kBlock)
                         : Real(0);
    narrow(level[0] + level[1], reinterpret_cast<T*>(panel.out)[row * width + k]);
  }
}

}  // namespace stillhouse
