// The CUDA vocabulary of the kernels: what nvcc brings, or the executor of tests/simt, which runs the
// same sources on a CPU. Kernels use what is named here and in block.cuh, and nothing else of CUDA.
//   thread and block indices; __syncthreads and its _count, _and, _or; __syncwarp; shuffles, ballot,
//   any, all, match_any with a mask; atomics; __ldg and __constant__ tables; SHARED_ARRAY and
//   SHARED_DYNAMIC, shared_add; load_vector and store_vector; tile.cuh
#pragma once
#include <type_traits>

#include "rows.h"

#if defined(STILLHOUSE_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

namespace stillhouse {

#if defined(STILLHOUSE_SIMT)
template <class T>
using SharedPointer = simt::Shared<T>;
// An array in shared memory, of a constant number of elements; not initialised.
#define SHARED_ARRAY(T, name, n) \
  const ::simt::Shared<T> name = ::simt::shared_array<T>(SIMT_SITE, #name, n)
// All that the launch asked for (Grid::shared), as one array.
#define SHARED_DYNAMIC(T, name) const ::simt::Shared<T> name = ::simt::shared_dynamic<T>(SIMT_SITE)
#define SH_NOINLINE __attribute__((noinline))
#else
#define SH_NOINLINE __noinline__  // which, as a macro, would spoil the host's headers
template <class T>
using SharedPointer = T*;
#define SHARED_ARRAY(T, name, n) __shared__ T name[n]
#define SHARED_DYNAMIC(T, name)                                   \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared)
#endif

// array[i] += value, by any thread at any time; returns what was there.
template <class T>
__device__ __forceinline__ T shared_add(SharedPointer<T> array, int64_t i, T value) {
#if defined(STILLHOUSE_SIMT)
  return atomicAdd<typename SharedPointer<T>::Ref, T>(array[i], value);
#else
  using Bits =
      std::conditional_t<sizeof(T) == 8, unsigned long long, T>;  // CUDA has it for no other
  return T(atomicAdd(reinterpret_cast<Bits*>(array + i), Bits(value)));
#endif
}

// Asks for the line of an address that may be read later; any address will do.
__device__ __forceinline__ void prefetch(const void* p) {
#if !defined(STILLHOUSE_SIMT)
  asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
#endif
}

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared = 0;  // bytes of dynamic shared memory a block
};

// 16 bytes that move at once, as four words: elements of 16 bits would be taken apart as soon as they are
// loaded, and so be waited for. The address is a multiple of 16.
template <class T>
struct alignas(16) Vector16 {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t word[4];

  SH_INLINE T get(int i) const {
    T x;
    if constexpr (sizeof(T) == 2) {
      x.bits = uint16_t(word[i / 2] >> 16 * (i % 2));
    } else if constexpr (std::is_same<T, float>::value) {
      x = as_float(word[i]);
    } else if constexpr (std::is_same<T, double>::value) {
      __builtin_memcpy(&x, word + 2 * i, sizeof x);
    } else {
      x = T(word[i]);
    }
    return x;
  }
  SH_INLINE void set(int i, T x) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t other = i % 2 == 0 ? 0xffff0000u : 0xffffu;
      word[i / 2] = (word[i / 2] & other) | uint32_t(x.bits) << 16 * (i % 2);
    } else if constexpr (std::is_same<T, float>::value) {
      word[i] = as_bits(x);
    } else if constexpr (std::is_same<T, uint32_t>::value) {
      word[i] = x;
    } else {
      static_assert(std::is_same<T, double>::value, "a float of 2, 4 or 8 bytes");
      __builtin_memcpy(word + 2 * i, &x, sizeof x);
    }
  }
  // The same bytes as elements of another type.
  template <class Other>
  SH_INLINE Vector16<Other> as() const {
    return {{word[0], word[1], word[2], word[3]}};
  }
};
template <class T>
__device__ __forceinline__ Vector16<T> load_vector(const T* p) {
  const auto* v = reinterpret_cast<const Vector16<T>*>(p);
#if defined(STILLHOUSE_SIMT)
  return simt::aligned(SIMT_SITE, v);
#else
  return *v;
#endif
}
#if defined(STILLHOUSE_SIMT)
template <class T>
Vector16<T> load_vector(const simt::Shared<T>& p) {
  if (p.first() * sizeof(T) % 16 != 0) simt::fail(SIMT_SITE, "misaligned access of 16 bytes");
  Vector16<T> v{};
  for (int i = 0; i < v.kSize; ++i) v.set(i, p[i]);
  return v;
}
#endif
template <class T>
__device__ __forceinline__ void store_vector(T* p, const Vector16<T>& value) {
  auto* v = reinterpret_cast<Vector16<T>*>(p);
#if defined(STILLHOUSE_SIMT)
  simt::aligned(SIMT_SITE, v);
#endif
  *v = value;
}

}  // namespace stillhouse
