// What a warp does on tiles: matrix products on tensor cores, asynchronous copies to shared memory.
#pragma once
#include "launch.h"

namespace stillhouse {

// Formats of mma(): elements a register holds, how the executor reads one, and PTX's name.
struct MmaBf16 {
  using Sum = float;
  static constexpr int kElements = 2;
  SH_INLINE static float element(uint32_t x, int j) { return as_float(x >> (16 * j) << 16); }
};
struct MmaFp16 {
  using Sum = float;
  static constexpr int kElements = 2;
  SH_INLINE static float element(uint32_t x, int j) { return widen(Fp16{uint16_t(x >> (16 * j))}); }
};
struct MmaTf32 {  // the low 13 bits of a float are not looked at
  using Sum = float;
  static constexpr int kElements = 1;
  SH_INLINE static float element(uint32_t x, int) { return as_float(x & 0xffffe000u); }
};
struct MmaInt8 {
  using Sum = int32_t;
  static constexpr int kElements = 4;
  SH_INLINE static int32_t element(uint32_t x, int j) { return int8_t(x >> (8 * j)); }
};
struct MmaBit {  // a product is an AND
  using Sum = int32_t;
  static constexpr int kElements = 32;
  SH_INLINE static int32_t element(uint32_t x, int j) { return x >> j & 1; }
};

template <class Format>
struct MmaOperands {
  uint32_t a[4], b[2];
  typename Format::Sum d[4];
};

#if defined(STILLHOUSE_SIMT)
// The layout that PTX documents for m16n8kK, with g = lane / 4, t = lane % 4, e elements a register and
// K = 8 e: register i of A holds row g + 8 (i % 2), columns t e + 4 e (i / 2) ...; register i of B rows
// t e + 4 e i ... of column g; number i of D row g + 8 (i / 2), column 2 t + i % 2.
template <class Format>
void mma_of_warp(void* const (&lanes)[simt::kWarp]) {
  using Sum = typename Format::Sum;
  constexpr int e = Format::kElements;
  Sum A[16][8 * e], B[8 * e][8];
  const auto of = [&](int lane) { return static_cast<MmaOperands<Format>*>(lanes[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < e; ++j) {
      for (int i = 0; i < 4; ++i)
        A[g + 8 * (i % 2)][t * e + 4 * e * (i / 2) + j] = Format::element(of(lane)->a[i], j);
      for (int i = 0; i < 2; ++i) B[t * e + 4 * e * i + j][g] = Format::element(of(lane)->b[i], j);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      for (int k = 0; k < 8 * e; ++k) of(lane)->d[i] += A[row][k] * B[k][column];
    }
  }
}
#endif

// d += A B for a tile of 16 x K times K x 8, by the 32 lanes of a warp together.
template <class Format>
__device__ __forceinline__ void mma(typename Format::Sum (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
#if defined(STILLHOUSE_SIMT)
  MmaOperands<Format> mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  simt::collective(SIMT_SITE, &mine, mma_of_warp<Format>);
  for (int i = 0; i < 4; ++i) d[i] = mine.d[i];
#else
#define SH_MMA(shape_and_types, constraint)                                        \
  asm volatile("mma.sync.aligned." shape_and_types                                 \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
               : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), \
                 "+" constraint(d[3])                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same<Format, MmaBf16>::value)
    SH_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "f");
  else if constexpr (std::is_same<Format, MmaFp16>::value)
    SH_MMA("m16n8k16.row.col.f32.f16.f16.f32", "f");
  else if constexpr (std::is_same<Format, MmaTf32>::value)
    SH_MMA("m16n8k8.row.col.f32.tf32.tf32.f32", "f");
  else if constexpr (std::is_same<Format, MmaInt8>::value)
    SH_MMA("m16n8k32.row.col.s32.s8.s8.s32", "r");
  else
    SH_MMA("m16n8k256.row.col.s32.b1.b1.s32.and.popc", "r");
#undef SH_MMA
#endif
}

// 16 bytes to shared memory, which arrive when a wait has returned that leaves out no older group than
// theirs; then for the thread itself, for others after a barrier.
template <class T>
__device__ __forceinline__ void copy_async(SharedPointer<T> to, const T* from) {
#if defined(STILLHOUSE_SIMT)
  simt::copy_async(SIMT_SITE, to, from, 16 / sizeof(T));
#else
  const unsigned address = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#endif
}

// Vectors of 16 bytes that lie one after the other in shared memory. Their address is a number that the
// compiler keeps: a pointer's it would make again in every iteration.
template <class T>
class SharedVectors {
 public:
  static constexpr int kSize = Vector16<T>::kSize;
#if defined(STILLHOUSE_SIMT)
  explicit SharedVectors(SharedPointer<T> first) : first_(first) {}
  Vector16<T> load(int i) const { return load_vector(first_ + i * kSize); }
  void store(int i, const Vector16<T>& v) const {
    for (int j = 0; j < kSize; ++j) first_[i * kSize + j] = v.get(j);
  }
  void copy_async(int i, const T* from) const { stillhouse::copy_async(first_ + i * kSize, from); }

 private:
  SharedPointer<T> first_;
#else
  __device__ explicit SharedVectors(SharedPointer<T> first)
      : first_(unsigned(__cvta_generic_to_shared(first))) {}
  __device__ __forceinline__ Vector16<T> load(int i) const {
    Vector16<T> v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "r"(first_ + 16 * i)
                 : "memory");
    return v;
  }
  __device__ __forceinline__ void store(int i, const Vector16<T>& v) const {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(first_ + 16 * i), "r"(v.word[0]),
                 "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  }
  __device__ __forceinline__ void copy_async(int i, const T* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(first_ + 16 * i), "l"(from)
                 : "memory");
  }

 private:
  unsigned first_;
#endif
};

// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
#if defined(STILLHOUSE_SIMT)
  simt::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all groups but the last kPending.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if defined(STILLHOUSE_SIMT)
  simt::copy_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace stillhouse
