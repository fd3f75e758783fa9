// One side of a row for CUDA threads: chunks of 16 bytes, the gradient of a chunk, a running sum.
#pragma once
#include "../core/block.cuh"
#include "../core/tile.cuh"
#include "kernel.h"

namespace stillhouse {

// Rows of any mix of types, element by element.
struct Mixed {};
template <class In>
constexpr int kChunk = 16 / int(sizeof(In));
template <>
constexpr int kChunk<Mixed> = 4;

// One side of a row: tempered logit = gain * x.
template <class In, class Real, bool kPlain>
struct DeviceSide {
  static constexpr int kSize = kChunk<In>;

  char* row;
  Dtype dtype;
  int vocab;
  Real gain, scale, cap;
  bool aligned;  // see on_16_bytes

  DeviceSide() = default;
  __device__ DeviceSide(const Logits& logits, int64_t r, int vocab)
      : row(row_of(logits.rows, r)),
        dtype(logits.rows.dtype),
        vocab(vocab),
        gain(kept(Real(logits.gain))),
        scale(Real(logits.scale)),
        cap(Real(logits.cap)) {}

  // Columns before the first multiple of 16 bytes.
  __device__ int head() const {
    if constexpr (std::is_same<In, Mixed>::value) return 0;
    return int((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(In));
  }
  // Whether a row's chunks lie on multiples of 16 bytes if the first starts at column `origin`.
  __device__ static bool on_16_bytes(const char* row, int origin) {
    if constexpr (std::is_same<In, Mixed>::value) return false;
    return (reinterpret_cast<uintptr_t>(row) + intptr_t(origin) * int(sizeof(In))) % 16 == 0;
  }

  __device__ Real at(int64_t j) const {
    Real x = 0;
    if constexpr (std::is_same<In, Mixed>::value) {
      with_type(dtype, row, [&](auto* in) { x = Real(stillhouse::widen(in[j])); });
    } else {
      x = Real(stillhouse::widen(reinterpret_cast<const In*>(row)[j]));
    }
    return x;
  }

  // The logit of one column, as load() makes it.
  __device__ Real column(int64_t j) const {
    const Real x = at(j);
    return !kPlain && cap > 0 && x > -INFINITY ? cap * tanh(scale * x / cap) : x;
  }

  __device__ static void widen_all(const Vector16<In>& v, Real (&x)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (std::is_same<In, Bf16>::value) {  // one instruction each
        x[i] = Real(as_float(i % 2 == 0 ? v.word[i / 2] << 16 : v.word[i / 2] & 0xffff0000u));
      } else {
        x[i] = Real(stillhouse::widen(v.get(i)));
      }
    }
  }

  // Columns start ... start + kSize - 1 as they are, -inf outside the row.
  __device__ Vector16<In> fetch(int start) const {
    const In* from = reinterpret_cast<const In*>(row) + start;
    if (aligned && start >= 0 && start + kSize <= vocab) return load_vector(from);
    Vector16<In> v{};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      In x;
      narrow(-INFINITY, x);
      if (start + i >= 0 && start + i < vocab) x = from[i];
      v.set(i, x);
    }
    return v;
  }
  // The same to vector `at` of shared memory.
  __device__ void copy(int start, const SharedVectors<In>& to, int at) const {
    if (aligned && start >= 0 && start + kSize <= vocab)
      return to.copy_async(at, reinterpret_cast<const In*>(row) + start);
    to.store(at, fetch(start));
  }

  // The same as logits.
  __device__ void load(int start, Real (&x)[kSize]) const {
    if constexpr (std::is_same<In, Mixed>::value) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        x[i] = start + i >= 0 && start + i < vocab ? at(start + i) : Real(-INFINITY);
      soften(x);
    } else {
      widen(fetch(start), x);
    }
  }
  __device__ void widen(const Vector16<In>& v, Real (&x)[kSize]) const {
    widen_all(v, x);
    soften(x);
  }
  // The soft-cap, if there is one.
  __device__ void soften(Real (&x)[kSize]) const {
    if constexpr (!kPlain) {
      if (!(cap > 0)) return;
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (x[i] > -INFINITY) x[i] = cap * tanh(scale * x[i] / cap);
    }
  }
};

// Two numbers side by side in a word, and the larger ones of two such pairs: an instruction of the hardware.
// To largest_two a NaN is no number, as in fmax.
template <class In>
__device__ __forceinline__ uint32_t narrow_two(float low, float high) {
#if defined(STILLHOUSE_SIMT)
  In x, y;
  narrow(low, x);
  narrow(high, y);
  return uint32_t(y.bits) << 16 | x.bits;
#else
  uint32_t both;
  if constexpr (std::is_same<In, Bf16>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
#endif
}
template <class In>
__device__ __forceinline__ uint32_t largest_two(uint32_t a, uint32_t b) {
#if defined(STILLHOUSE_SIMT)
  const auto larger = [&](int shift) {
    return std::fmax(widen(In{uint16_t(a >> shift)}), widen(In{uint16_t(b >> shift)}));
  };
  return narrow_two<In>(larger(0), larger(16));
#else
  if constexpr (std::is_same<In, Bf16>::value) {
    asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  } else {
    asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  }
  return a;
#endif
}

template <class In, class Real>
__device__ __forceinline__ Vector16<In> narrow_all(const Real (&g)[kChunk<In>]) {
  Vector16<In> v{};
  if constexpr (sizeof(In) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = narrow_two<In>(float(g[2 * i]), float(g[2 * i + 1]));
  } else {
#pragma unroll
    for (int i = 0; i < v.kSize; ++i) v.set(i, In(g[i]));
  }
  return v;
}

// The largest of a chunk; a NaN is no number.
template <class Real, class In>
__device__ __forceinline__ Real largest_of(const Vector16<In>& v) {
  if constexpr (sizeof(In) == 2) {
    Vector16<In> two{};
    two.word[0] = largest_two<In>(largest_two<In>(v.word[0], v.word[1]),
                                  largest_two<In>(v.word[2], v.word[3]));
    return Largest()(Real(widen(two.get(0))), Real(widen(two.get(1))));
  } else {
    Real top = -INFINITY;
#pragma unroll
    for (int i = 0; i < v.kSize; ++i) top = Largest()(Real(v.get(i)), top);
    return top;
  }
}
template <class Real, int kSize>
__device__ __forceinline__ Real largest_of(const Real (&x)[kSize]) {
  Real top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kSize; ++i) top = Largest()(x[i], top);
  return top;
}

// Where the gradient of a chunk goes.
template <class In, class Real>
__device__ void store_chunk(char* row, Dtype dtype, bool aligned, int start, int vocab,
                            const Real (&g)[kChunk<In>]) {
  constexpr int kSize = kChunk<In>;
  if constexpr (std::is_same<In, Mixed>::value) {
    with_type(dtype, row, [&](auto* out) {
      for (int i = 0; i < kSize; ++i)
        if (start + i >= 0 && start + i < vocab) narrow(g[i], out[start + i]);
    });
  } else {
    In* out = reinterpret_cast<In*>(row);
    if (aligned && start >= 0 && start + kSize <= vocab)
      return store_vector(out + start, narrow_all<In>(g));
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (start + i >= 0 && start + i < vocab) narrow(g[i], out[start + i]);
  }
}

// 2^(gain2 x - offset), the exponential of a logit relative to a shift in one multiplication and addition.
// The offset is gain2 shift, rounded: logarithms of sums take the error out again.
template <class Real>
struct Exponential {
  Real gain2 = 0, shift = 0, offset = 0;

  Exponential() = default;
  __device__ Exponential(Real gain, Real shift)
      : gain2(Real(gain * kLog2e)), shift(shift), offset(shift * gain2) {}
  __device__ __forceinline__ Real operator()(Real x) const {
    return fast_exp2(mul_add(x, gain2, -offset));
  }
  // What the logarithm of a sum of exponentials has to be added, for that of gain (x - shift), of gain x.
  __device__ double to_shift() const {
    return -mul_add(double(shift), double(gain2), -double(offset)) * kLn2;
  }
  __device__ double to_zero(double gain) const { return gain * double(shift) + to_shift(); }
};

// A maximum and a sum of exponentials relative to it, chunk by chunk.
template <class Real>
struct RunningSum {
  Real max = -INFINITY, sum = 0, label_sum = 0;
  Real offset = 0, label_offset = 0;  // of Exponential at the maximum

  __device__ static Real shift_of(Real max) { return max > -INFINITY ? max : Real(0); }

  // gain2: of the sum, in powers of two; label_gain2: of a second sum over the same x, 0 for none.
  // top: the largest x.
  template <int kSize>
  __device__ void add(const Real (&x)[kSize], Real top, Real gain2, Real label_gain2) {
    // Without branches, which the two sides of a pair would wait for one after the other.
    const bool first = !(max > -INFINITY), higher = top > max;
    const Real of_top = top * gain2;
    sum *= higher && !first ? fast_exp2(offset - of_top) : Real(1);
    offset = higher ? of_top : offset;
    if (label_gain2 > 0 && higher) {
      if (!first) label_sum *= fast_exp2(label_offset - top * label_gain2);
      label_offset = top * label_gain2;
    }
    max = higher ? top : max;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += fast_exp2(mul_add(x[i], gain2, -offset));
    if (label_gain2 > 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        label_sum += fast_exp2(mul_add(x[i], label_gain2, -label_offset));
    }
  }
  template <int kSize>
  __device__ void add(const Real (&x)[kSize], Real gain2, Real label_gain2) {
    add(x, largest_of(x), gain2, label_gain2);
  }

  // What the sums are relative to another maximum.
  __device__ void rescale(Real other, Real gain2, Real label_gain2) {
    if (!(max > -INFINITY)) return;
    sum *= fast_exp2(offset - other * gain2);
    if (label_gain2 > 0) label_sum *= fast_exp2(label_offset - other * label_gain2);
  }
};

}  // namespace stillhouse
