// The nearest codes of floats by tensor cores: scores whose error is bounded say which codes of a row may be
// the nearest, mostly one or two, and those are scored exactly. The codes are those of the exact search.
#pragma once
#include "tile.cuh"

namespace stillhouse {

// Candidates of a row; where there are more, the row is searched exactly.
constexpr int kSlots = 16;
constexpr int kFilterChunk = 32, kFilterStride = int(kCodes) + 8;  // rows of a chunk in all banks

SH_INLINE size_t filter_bytes(int64_t width, int rows) {
  return size_t(rows * residual_stride(width) + 2 * kFilterChunk * kFilterStride) * sizeof(float);
}

// How far scores of a lane's codes from tensor cores can be from the exact search's: they leave out 13 bits
// of each factor, and either sum is of up to width + 8 roundings.
struct ScoreError {
  float of_product, of_square;   // shares of |r| |c|, and of |c|^2 / 2
  float length = 0, square = 0;  // of codes, at most

  __device__ explicit ScoreError(int64_t width) {
    of_square = (2 * float(width) + 16) * 0x1p-23f;
    of_product = 0x1p-9f + 0x1p-18f + of_square;
  }
  // A code whose score begins with -|c|^2 / 2, or with 0 if its length is 1.
  __device__ __forceinline__ void see(float begin) {
    if (begin == -INFINITY) return;  // no code
    const float of_code = begin < 0 ? root(-2 * begin) * 1.00001f : 1.00001f;
    length = of_code > length ? of_code : length;
    square = -begin > square ? -begin : square;
  }
  __device__ __forceinline__ float of(float row_length) const {
    return row_length * length * of_product + square * of_square + 1e-36f;
  }
};

// A warp has kTiles times 16 rows of its own.
template <int kTiles, int kWarps>
struct FilterSearch {
  static constexpr int kThreads = kWarpSize * kWarps, kOwnRows = 16 * kTiles;
  static constexpr int kRows = kOwnRows * kWarps, kColumns = int(kCodes) / 8;
  using Tile = RowTile<float, kRows, kThreads>;
  const SharedPointer<float> buffer;
  const SharedPointer<int> count, code;    // [kRows], [kRows, kSlots]
  const SharedPointer<float> most, lower;  // the same of what scores can be at most; [kRows]
  const SharedPointer<int> list;           // [kRows, kSlots]: slots of a warp's rows to be scored

  // The score that the exact search gives a code.
  __device__ static float exact(const Tile& tile, const float* blocks, int r, int code) {
    const int64_t width = tile.q.width;
    const float* const block = blocks + code / kCodes * block_numbers(width) + code % kCodes;
    const SharedPointer<float> x = tile.residual + r * tile.stride;
    float score = block[0];
    int64_t k = 0;
    for (; k + 8 <= width; k += 8) {
      float c[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) c[i] = block[(1 + k + i) * kCodes];
#pragma unroll
      for (int i = 0; i < 8; ++i) score = fused(float(x[k + i]), c[i], score);
    }
    for (; k < width; ++k) score = fused(float(x[k]), block[(1 + k) * kCodes], score);
    return score;
  }

  __device__ void operator()(const Tile& tile, int64_t stage) const {
    const Quantizer<float>& q = tile.q;
    const int lane = Tile::lane(), first = Tile::warp() * kOwnRows, g = lane / 4, t = lane % 4;
    const float* const blocks = q.blocks(tile.group, stage);
    const ScoreError error(q.width);
    // Number i of a tile's sums belongs to row g + 8 (i / 2) and column 2 t + i % 2.
    float length[2 * kTiles], bound[2 * kTiles];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      length[i] = root(float(tile.square[first + g + 8 * i])) * 1.00001f;
      bound[i] = -INFINITY;
    }
    if (lane < kOwnRows) count[first + lane] = 0;  // a chunk's barrier is before they are counted
    const ChunkStream<float, kFilterChunk, kFilterStride, kThreads> chunks(
        blocks, code_blocks(q.codes), q.width, buffer);
    float sum[kTiles][kColumns][4];
    chunks.each([&](int chunk) {
      const float* const block = chunks.block(chunk);
      const int feature = chunks.first_feature(chunk);
      if (feature == 0) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float begin = block[8 * c + 2 * t + i % 2];
#pragma unroll
            for (int m = 0; m < kTiles; ++m) sum[m][c][i] = begin;
          }
      }
      const SharedPointer<float> codes = chunks.at(chunk);
      const SharedPointer<float> x = tile.residual + (first * tile.stride + feature);
      const int features = chunks.features(chunk);
      for (int k = 0; k < features; k += 8) {
        uint32_t a[kTiles][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[m][i] =
                as_bits(float(x[(16 * m + g + 8 * (i % 2)) * tile.stride + k + t + 4 * (i / 2)]));
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          uint32_t b[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int of_chunk = k + t + 4 * i;
            // Beyond the last feature rows are zeros, and nothing was copied.
            b[i] = of_chunk < features ? as_bits(float(codes[of_chunk * kFilterStride + 8 * c + g]))
                                       : 0u;
          }
#pragma unroll
          for (int m = 0; m < kTiles; ++m) mma<MmaTf32>(sum[m][c], a[m], b);
        }
      }
      if (feature + features < q.width) return;
      note(block, chunks.number(chunk) * int(kCodes), error, length, bound, sum, first);
    });
    if (t == 0) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) lower[first + g + 8 * i] = bound[i];
    }
    __syncwarp(kFullMask);
    score_candidates(tile, blocks, stage, first);
  }

  // Candidates of a block whose first code is `first_code`.
  __device__ void note(const float* block, int first_code, ScoreError error,
                       const float (&length)[2 * kTiles], float (&bound)[2 * kTiles],
                       const float (&sum)[kTiles][kColumns][4], int first) const {
    const int g = Team<kWarpSize>::rank() / 4, t = Team<kWarpSize>::rank() % 4;
    error.length = error.square = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) error.see(block[8 * c + 2 * t + i]);
#pragma unroll
    for (int row = 0; row < 2 * kTiles; ++row) {
      const int m = row / 2, half = row % 2, r = first + g + 8 * row;
      const float off = error.of(length[row]);
      float best = bound[row];
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float least = sum[m][c][2 * half + i] - off;
          best = least > best ? least : best;
        }
      for (int offset = 1; offset < 4; offset *= 2) {
        const float other = __shfl_xor_sync(kFullMask, best, offset);
        best = other > best ? other : best;
      }
      bound[row] = best;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float score = sum[m][c][2 * half + i];
          if (!(score + off >= best) || score == -INFINITY) continue;
          const int slot = shared_add(count, r, 1);
          if (slot >= kSlots) continue;
          code[r * kSlots + slot] = first_code + 8 * c + 2 * t + i;
          most[r * kSlots + slot] = score + off;
        }
    }
  }

  // The warp's rows, from their candidates, or from all codes where those were too many.
  __device__ void score_candidates(const Tile& tile, const float* blocks, int64_t stage,
                                   int first) const {
    const int lane = Tile::lane();
    int total = 0;
    for (int i = lane; i < kOwnRows * kSlots; i += kWarpSize) {
      const int r = first + i / kSlots, held = count[r];
      const bool scored = r < tile.rows && i % kSlots < held && held <= kSlots &&
                          most[first * kSlots + i] >= lower[r];
      const uint32_t votes = __ballot_sync(kFullMask, scored);
      if (scored) list[first * kSlots + total + __popc(votes & ((1u << lane) - 1))] = i;
      total += __popc(votes);
    }
    __syncwarp(kFullMask);
    for (int i = lane; i < total; i += kWarpSize) {
      const int at = first * kSlots + list[first * kSlots + i];
      const int r = at / kSlots;
      // What is not scored keeps a bound that is below the row's highest score.
      most[at] = exact(tile, blocks, r, code[at]);
    }
    __syncwarp(kFullMask);
    for (int i = 0; i < kOwnRows; ++i) {
      const int r = first + i, held = count[r];
      Best<float> best;
      const bool safe = held > 0 && held <= kSlots && lower[r] < INFINITY;
      if (safe && lane < held && most[r * kSlots + lane] >= lower[r])
        best.add(most[r * kSlots + lane], code[r * kSlots + lane]);
      if (!safe && r < tile.rows)
        for (int64_t k = lane; k < tile.q.codes; k += kWarpSize)
          best.add(exact(tile, blocks, r, int(k)), int(k));
      best.over(kWarpSize);
      if (lane == 0) tile.choose(r, stage, best);
    }
  }
};

template <int kTiles, int kWarps>
__global__ void __launch_bounds__(kWarpSize* kWarps) filter_kernel(Quantizer<float> q) {
  using Search = FilterSearch<kTiles, kWarps>;
  constexpr int kRows = Search::kRows;
  SHARED_DYNAMIC(float, memory);
  SHARED_ARRAY(int, chosen, kRows);
  SHARED_ARRAY(float, square, kRows);
  SHARED_ARRAY(int, count, kRows);
  SHARED_ARRAY(float, lower, kRows);
  SHARED_ARRAY(int, code, kRows* kSlots);
  SHARED_ARRAY(float, most, kRows* kSlots);
  SHARED_ARRAY(int, list, kRows* kSlots);
  const typename Search::Tile tile(q, memory, chosen, square);
  Search search{memory + kRows * tile.stride, count, code, most, lower, list};
  tile.run(search);
}

}  // namespace stillhouse
