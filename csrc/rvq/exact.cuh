// The nearest codes by products of floats or doubles, summed feature by feature as the CPU does: scores, and
// so codes, are the same.
#pragma once
#include "tile.cuh"

namespace stillhouse {

// Sixteen threads share a row, four codes of a block each.
constexpr int kCodeThreads = 16, kOwnCodes = int(kCodes) / kCodeThreads, kExactChunk = 32;

// Bytes of shared memory of a tile.
template <class Real>
SH_INLINE size_t exact_bytes(int64_t width, int rows) {
  return size_t(rows * residual_stride(width) + 2 * kExactChunk * kCodes) * sizeof(Real);
}

// Four numbers that lie together.
template <class Real, class Pointer>
__device__ __forceinline__ void load_four(Pointer p, Real (&x)[4]) {
  constexpr int kSize = Vector16<Real>::kSize;
#pragma unroll
  for (int v = 0; v < 4 / kSize; ++v) {
    const Vector16<Real> loaded = load_vector(p + v * kSize);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[v * kSize + i] = loaded.get(i);
  }
}

template <class Real, int kOwnRows, int kRowThreads>
struct ExactSearch {
  static constexpr int kThreads = kCodeThreads * kRowThreads, kRows = kOwnRows * kRowThreads;
  const SharedPointer<Real> buffer;

  __device__ void operator()(const RowTile<Real, kRows, kThreads>& tile, int64_t stage) const {
    const Quantizer<Real>& q = tile.q;
    const int own = int(threadIdx.x) % kCodeThreads, row = int(threadIdx.x) / kCodeThreads;
    const ChunkStream<Real, kExactChunk, int(kCodes), kThreads> chunks(
        q.blocks(tile.group, stage), code_blocks(q.codes), q.width, buffer);
    Best<Real> best[kOwnRows];
    Real score[kOwnRows][kOwnCodes];
    chunks.each([&](int chunk) {
      const int feature = chunks.first_feature(chunk);
      if (feature == 0) {
        Real begin[kOwnCodes];
        load_four(chunks.block(chunk) + own * kOwnCodes, begin);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
          for (int j = 0; j < kOwnCodes; ++j) score[i][j] = begin[j];
      }
      const SharedPointer<Real> codes = chunks.at(chunk) + own * kOwnCodes;
      const SharedPointer<Real> x = tile.residual + (row * tile.stride + feature);
      const int count = chunks.features(chunk);
      int k = 0;
      for (; k + 4 <= count; k += 4) {
        Real code[4][kOwnCodes];
#pragma unroll
        for (int f = 0; f < 4; ++f) load_four(codes + (k + f) * int(kCodes), code[f]);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          Real xi[4];
          load_four(x + (i * kRowThreads * tile.stride + k), xi);
#pragma unroll
          for (int f = 0; f < 4; ++f)
#pragma unroll
            for (int j = 0; j < kOwnCodes; ++j) score[i][j] = fused(xi[f], code[f][j], score[i][j]);
        }
      }
      for (; k < count; ++k)
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
          for (int j = 0; j < kOwnCodes; ++j)
            score[i][j] = fused(Real(x[i * kRowThreads * tile.stride + k]),
                                Real(codes[k * int(kCodes) + j]), score[i][j]);
      if (feature + count < q.width) return;
      const int first = chunks.number(chunk) * int(kCodes) + own * kOwnCodes;
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
        for (int j = 0; j < kOwnCodes; ++j) best[i].add(score[i][j], first + j);
    });
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      best[i].over(kCodeThreads);
      if (own == 0) tile.choose(row + i * kRowThreads, stage, best[i]);
    }
  }
};

template <class Real, int kOwnRows, int kRowThreads>
__global__ void __launch_bounds__(kCodeThreads* kRowThreads, 1) exact_kernel(Quantizer<Real> q) {
  using Search = ExactSearch<Real, kOwnRows, kRowThreads>;
  SHARED_DYNAMIC(Real, memory);
  SHARED_ARRAY(int, chosen, Search::kRows);
  SHARED_ARRAY(Real, square, Search::kRows);
  const RowTile<Real, Search::kRows, Search::kThreads> tile(q, memory, chosen, square);
  Search search{memory + Search::kRows * tile.stride};
  tile.run(search);
}

}  // namespace stillhouse
