// Reductions over the threads that work on one row.
#pragma once
#include "launch.h"

namespace stillhouse {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
// Of floats: the NaN of either side is lost, as in fmax.
struct Largest {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// The threads of a row: a warp, or a block of several. Every thread of a team calls its functions, and
// all get the same result, which does not depend on timing.
template <int kThreads>
struct Team {
  static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024, "a team is made of warps");
  static constexpr int kWarps = kThreads / kWarpSize;

  __device__ __forceinline__ static int rank() { return int(threadIdx.x) % kThreads; }

  // What a thread has written is seen by all of the team.
  __device__ __forceinline__ static void sync() {
    if constexpr (kWarps > 1) {
      __syncthreads();
    } else {
      __syncwarp(kFullMask);
    }
  }

  // Sum of x over the threads of lower rank; T is an integer, or the order of additions would show.
  template <class T>
  __device__ static T sum_before(T x) {
    const int warp = rank() / kWarpSize, lane = rank() % kWarpSize;
    T sum = x;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const T other = __shfl_up_sync(kFullMask, sum, offset);
      if (lane >= offset) sum += other;
    }
    if constexpr (kWarps > 1) {
      SHARED_ARRAY(T, of_warp, kWarps);
      __syncthreads();  // the last call's readers are done
      if (lane == kWarpSize - 1) of_warp[warp] = sum;
      __syncthreads();
      for (int w = 0; w < warp; ++w) sum += of_warp[w];
    }
    return sum - x;
  }

  // x_i of all threads combined, for each i. Op is associative and commutative up to rounding.
  template <int kCount, class T, class Op>
  __device__ static void reduce(T (&x)[kCount], Op op) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
        x[i] = op(x[i], __shfl_xor_sync(kFullMask, x[i], offset));
    }
    if constexpr (kWarps > 1) {
      SHARED_ARRAY(T, partial, kWarps * kCount);
      const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
      __syncthreads();  // the last call's readers are done
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) partial[warp * kCount + i] = x[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x[i] = partial[i];
        for (int w = 1; w < kWarps; ++w) x[i] = op(x[i], T(partial[w * kCount + i]));
      }
    }
  }
};

}  // namespace stillhouse
