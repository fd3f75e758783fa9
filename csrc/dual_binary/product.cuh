// Products of many rows of 16 bits on tensor cores: words become numbers in registers.
#pragma once
#include "operand.cuh"

namespace stillhouse {

template <class T>
using MmaOf = std::conditional_t<std::is_same<T, Bf16>::value, MmaBf16, MmaFp16>;

SH_INLINE size_t product_bytes(int rows) { return size_t(2 * rows) * 16 * sizeof(uint32_t); }

// A tile's numbers as a warp multiplies them. The order of what is summed over is free: pair j of a piece
// is its numbers j and j + 16, and a lane has pairs 4 t + p, p = 0 ... 3.
template <class T, bool kBack>
struct Factor {
  static constexpr int kRaw = kBack ? 16 : 8;
  const Pieces<kBack>& pieces;
  int64_t tile;
  int g, t;
  uint32_t level[4][3];  // pairs of scale 1, scale 2, their sum: of columns, or (kBack) of pairs

  __device__ Factor(const Pieces<kBack>& pieces, int64_t tile)
      : pieces(pieces),
        tile(tile),
        g(Team<kWarpSize>::rank() / 4),
        t(Team<kWarpSize>::rank() % 4) {}

  // The words of a lane's part; zeros where there are none.
  __device__ __forceinline__ void fetch(int piece, uint32_t (&raw)[kRaw]) const {
    if constexpr (kBack) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t block = 2 * int64_t(piece) + i / 2;
        Vector16<uint32_t> v{};
        if (block < pieces.w.blocks() && tile < pieces.tiles())
          v = load_vector(pieces.words_at(block, tile) + i % 2 * kBlock + 4 * t);
#pragma unroll
        for (int p = 0; p < 4; ++p) raw[4 * i + p] = v.word[p];
      }
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int64_t block = 2 * tile + q / 2;
        const bool there = block < pieces.w.blocks();
        const uint32_t* const at = pieces.words_at(there ? block : 0, piece) + q % 2 * 8 + g;
        raw[2 * q] = there ? at[0] : 0u;
        raw[2 * q + 1] = there ? at[kBlock] : 0u;
      }
    }
  }

  __device__ __forceinline__ static uint32_t narrowed(float x) {
    T to;
    narrow(x, to);
    return to.bits;
  }
  __device__ __forceinline__ void set(int i, int half, int64_t block, unsigned word, int row) {
    float first = 0, second = 0;
    if (block < pieces.w.blocks() && word < unsigned(pieces.w.words())) {
      first = pieces.template scale<float>(block, word, 0, row);
      second = pieces.template scale<float>(block, word, 1, row);
    }
    const float sums[3] = {first, second, first + second};
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      const uint32_t bits = narrowed(sums[n]);
      level[i][n] = half == 0 ? bits : level[i][n] | bits << 16;
    }
  }
  __device__ __forceinline__ void load_levels(int piece) {
    if (!kBack && unsigned(piece) % pieces.words != 0) return;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kBack)
          set(i, half, 2 * int64_t(piece) + half, unsigned(tile), 4 * t + i);
        else
          set(i, half, 2 * tile + i / 2, unsigned(piece), i % 2 * 8 + g);
      }
  }

  // Of column 8 q + g, pair p.
  __device__ __forceinline__ uint32_t fragment(const uint32_t (&raw)[kRaw], int q, int p) const {
    uint32_t mask[2];
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      if constexpr (kBack) {
        const int bit = 8 * q + g;
        const uint32_t low = raw[4 * plane + p] >> bit & 1,
                       high = raw[8 + 4 * plane + p] >> bit & 1;
        mask[plane] = (low | high << 16) * 0xffffu;
      } else {
        mask[plane] = (raw[2 * q + plane] >> (4 * t + p) & 0x00010001u) * 0xffffu;
      }
    }
    const uint32_t (&of)[3] = level[kBack ? p : q];
    const uint32_t with_first = (mask[1] & of[2]) | (~mask[1] & of[0]);
    return (mask[0] & with_first) | (~mask[0] & mask[1] & of[1]);
  }
};

// 16 kTiles kDown rows by four tiles; a warp has 16 kTiles rows of one tile.
template <class T, bool kBack, int kTiles, int kDown>
__global__ void __launch_bounds__(128 * kDown, 1) product_kernel(FdbProduct p) {
  constexpr int kOwn = 16 * kTiles, kRows = kOwn * kDown;
  SHARED_DYNAMIC(uint32_t, memory);
  const SharedVectors<uint32_t> staged(memory);  // [2, kRows, 4], pairs
  const Pieces<kBack> pieces(p.weight);
  const unsigned downs = unsigned(ceil_div(p.m, kRows));
  const int warp = int(threadIdx.x) / kWarpSize, own = warp / 4 * kOwn;
  const int64_t first_row = int64_t(blockIdx.x % downs) * kRows;
  Factor<T, kBack> factor(pieces, int64_t(blockIdx.x / downs) * 4 + warp % 4);
  const int g = factor.g, t = factor.t, count = pieces.count();
  const int64_t inner = pieces.inner();
  const T* const x = reinterpret_cast<const T*>(p.x);
  const bool aligned = inner % 8 == 0 && (kBack || pieces.columns % 8 == 0) &&
                       reinterpret_cast<uintptr_t>(p.x) % 16 == 0;

  // A thread brings pairs 8 c ... 8 c + 7 of a row.
  const int my_row = int(threadIdx.x) / 2, c = int(threadIdx.x) % 2;
  const bool brings = my_row < kRows;
  Vector16<T> part[2];
  const auto ask = [&](int piece) {
    int numbers;
    const int64_t first = pieces.first(piece, numbers), row = first_row + my_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int from = 16 * half + 8 * c;
      part[half] = {};
      if (!brings || row >= p.m) continue;
      const T* const at = x + row * inner + first + from;
      if (aligned && numbers == int(kWord)) {
        part[half] = load_vector(at);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (from + i < numbers) part[half].set(i, at[i]);
      }
    }
  };
  const auto put = [&](int buffer) {
    if (!brings) return;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      Vector16<uint32_t> pairs;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs.word[i] = part[0].get(4 * v + i).bits | uint32_t(part[1].get(4 * v + i).bits) << 16;
      staged.store((buffer * kRows + my_row) * 4 + 2 * c + v, pairs);
    }
  };

  float sum[kTiles][4][4] = {};
  uint32_t raw[Factor<T, kBack>::kRaw];
  ask(0);
  put(0);
  factor.fetch(0, raw);
  for (int piece = 0; piece < count; ++piece) {
    __syncthreads();
    const bool more = piece + 1 < count;
    if (more) ask(piece + 1);
    factor.load_levels(piece);
    uint32_t b[4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) b[q][i] = factor.fragment(raw, q, i);
    if (more) factor.fetch(piece + 1, raw);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int at = (piece % 2 * kRows + own + 16 * m + g) * 4 + t;
      const Vector16<uint32_t> upper = staged.load(at), lower = staged.load(at + 32);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t a[4] = {upper.word[2 * step], lower.word[2 * step], upper.word[2 * step + 1],
                               lower.word[2 * step + 1]};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint32_t columns[2] = {b[q][2 * step], b[q][2 * step + 1]};
          mma<MmaOf<T>>(sum[m][q], a, columns);
        }
      }
    }
    if (more) put((piece + 1) % 2);
  }
#pragma unroll
  for (int q = 0; q < 4; ++q)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t column = pieces.output(factor.tile, 8 * q + 2 * t + i);
      if (column < 0) continue;
#pragma unroll
      for (int m = 0; m < 2 * kTiles; ++m) {
        const int64_t row = first_row + own + 8 * m + g;
        if (row < p.m)
          put_product<float, T>(p, row, pieces.outer(), column, sum[m / 2][q][m % 2 * 2 + i]);
      }
    }
}

}  // namespace stillhouse
