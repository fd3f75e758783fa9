// One side of a row for CUDA threads: chunks of 16 bytes, the gradient of a chunk, a running sum.
#pragma once
#include "../core/launch.h"
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
  int64_t vocab;
  Real gain, scale, cap;
  bool aligned;  // see on_16_bytes

  DeviceSide() = default;
  __device__ DeviceSide(const Logits& logits, int64_t r, int64_t vocab)
      : row(row_of(logits.rows, r)),
        dtype(logits.rows.dtype),
        vocab(vocab),
        gain(Real((logits.cap > 0 ? 1.0 : logits.scale) / logits.temperature)),
        scale(Real(logits.scale)),
        cap(Real(logits.cap)) {}

  // Columns before the first multiple of 16 bytes.
  __device__ int head() const {
    if constexpr (std::is_same<In, Mixed>::value) return 0;
    return int((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(In));
  }
  // Whether a row's chunks lie on multiples of 16 bytes if the first starts at column `origin`.
  __device__ static bool on_16_bytes(const char* row, int64_t origin) {
    if constexpr (std::is_same<In, Mixed>::value) return false;
    return (reinterpret_cast<uintptr_t>(row) + uintptr_t(origin) * sizeof(In)) % 16 == 0;
  }

  __device__ Real at(int64_t j) const {
    Real x = 0;
    if constexpr (std::is_same<In, Mixed>::value) {
      with_type(dtype, row, [&](auto* in) { x = Real(widen(in[j])); });
    } else {
      x = Real(widen(reinterpret_cast<const In*>(row)[j]));
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
    for (int i = 0; i < kSize; ++i) x[i] = Real(widen(v.at[i]));
  }

  // Columns start ... start + kSize - 1 to shared memory, -inf outside the row; see copy_async.
  __device__ void copy(int64_t start, SharedPointer<In> to) const {
    const In* from = reinterpret_cast<const In*>(row) + start;
    if (aligned && start >= 0 && start + kSize <= vocab) return copy_async(to, from);
    for (int i = 0; i < kSize; ++i) {
      In x;
      narrow(-INFINITY, x);
      if (start + i >= 0 && start + i < vocab) x = from[i];
      to[i] = x;
    }
  }

  // Columns start ... start + kSize - 1, -inf outside the row.
  __device__ void load(int64_t start, Real (&x)[kSize]) const {
    const bool whole = start >= 0 && start + kSize <= vocab;
    if (whole && aligned) {
      if constexpr (!std::is_same<In, Mixed>::value) {
        widen_all(load_vector(reinterpret_cast<const In*>(row) + start), x);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        x[i] = start + i >= 0 && start + i < vocab ? at(start + i) : Real(-INFINITY);
    }
    if (!kPlain && cap > 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (x[i] > -INFINITY) x[i] = cap * tanh(scale * x[i] / cap);
    }
  }
};

// Where the gradient of a chunk goes.
template <class In, class Real>
__device__ void store_chunk(char* row, Dtype dtype, bool aligned, int64_t start, int64_t vocab,
                            const Real (&g)[kChunk<In>]) {
  constexpr int kSize = kChunk<In>;
  if constexpr (std::is_same<In, Mixed>::value) {
    with_type(dtype, row, [&](auto* out) {
      for (int i = 0; i < kSize; ++i)
        if (start + i >= 0 && start + i < vocab) narrow(g[i], out[start + i]);
    });
  } else {
    In* out = reinterpret_cast<In*>(row);
    if (aligned && start >= 0 && start + kSize <= vocab) {
      Vector16<In> v;
#pragma unroll
      for (int i = 0; i < kSize; ++i) narrow(g[i], v.at[i]);
      store_vector(out + start, v);
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (start + i >= 0 && start + i < vocab) narrow(g[i], out[start + i]);
  }
}

// A maximum and a sum of exponentials relative to it, chunk by chunk.
template <class Real>
struct RunningSum {
  Real max = -INFINITY, sum = 0, label_sum = 0;

  __device__ static Real shift_of(Real max) { return max > -INFINITY ? max : Real(0); }

  template <int kSize>
  __device__ void widen_to(const Real (&x)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) max = x[i] > max ? x[i] : max;
  }

  // gain2: of the sum, in powers of two; label_gain2: of a second sum over the same x, 0 for none.
  template <int kSize>
  __device__ void add(const Real (&x)[kSize], Real gain2, Real label_gain2) {
    Real top = max;
#pragma unroll
    for (int i = 0; i < kSize; ++i) top = x[i] > top ? x[i] : top;
    if (top > max) {
      const Real step = shift_of(max) - top;
      if (max > -INFINITY) {
        sum *= fast_exp2(step * gain2);
        if (label_gain2 > 0) label_sum *= fast_exp2(step * label_gain2);
      }
      max = top;
    }
    const Real shift = shift_of(max);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += fast_exp2((x[i] - shift) * gain2);
    if (label_gain2 > 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) label_sum += fast_exp2((x[i] - shift) * label_gain2);
    }
  }

  // What the sums are relative to another maximum.
  __device__ void rescale(Real other, Real gain2, Real label_gain2) {
    if (!(max > -INFINITY)) return;
    sum *= fast_exp2((max - other) * gain2);
    if (label_gain2 > 0) label_sum *= fast_exp2((max - other) * label_gain2);
  }
};

}  // namespace stillhouse
