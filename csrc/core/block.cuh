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
  static_assert(kThreads >= kWarpSize && kThreads <= 1024 && (kThreads & (kThreads - 1)) == 0,
                "a team is made of 1, 2, 4, ... 32 warps");
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
    of_warp(x, op);
    if constexpr (kWarps > 1) {
      SHARED_ARRAY(T, partial, kWarps * kCount);
      __syncthreads();  // the last call's readers are done
      leave(partial, x);
      __syncthreads();
      find(partial, x);
      of_warps(x, op);
    }
  }

  // The same in parts. Combined over the lanes of a warp; a warp's result left in `partial`, which has
  // kWarps kCount elements; found there, that of warp w by lane w of every warp; combined over these.
  template <int kCount, class T, class Op>
  __device__ static void of_warp(T (&x)[kCount], Op op) {
    of_lanes<kWarpSize>(x, op);
  }
  template <int kCount, class T>
  __device__ static void leave(SharedPointer<T> partial, const T (&x)[kCount]) {
    if (threadIdx.x % kWarpSize != 0) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) partial[rank() / kWarpSize * kCount + i] = x[i];
  }
  template <int kCount, class T>
  __device__ static void find(SharedPointer<T> partial, T (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = partial[int(threadIdx.x) % kWarps * kCount + i];
  }
  template <int kCount, class T, class Op>
  __device__ static void of_warps(T (&x)[kCount], Op op) {
    of_lanes<kWarps>(x, op);
  }

 private:
  template <int kLanes, int kCount, class T, class Op>
  __device__ __forceinline__ static void of_lanes(T (&x)[kCount], Op op) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        x[i] = op(x[i], __shfl_xor_sync(kFullMask, x[i], offset));
    }
  }
};

}  // namespace stillhouse
