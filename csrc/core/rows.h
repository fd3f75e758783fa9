// The rows of a [..., V] tensor whose last dimension is contiguous, as pointers and strides.
#pragma once
#include <cstdint>

#include "scalar.h"

namespace stillhouse {

enum class Dtype : int32_t { f32, bf16, fp16, f64 };
constexpr int kMaxLeading = 8;

SH_INLINE int64_t element_size(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

struct Rows {
  char* data;
  Dtype dtype;
  int32_t leading;
  int64_t size[kMaxLeading], stride[kMaxLeading];  // strides in bytes
};

SH_INLINE char* row_of(const Rows& rows, int64_t r) {
  char* data = rows.data;
  // The first dimension needs no division, which costs as much as a short row's logarithm.
#if defined(__CUDACC__)
#pragma unroll 1
#endif
  for (int i = rows.leading - 1; i > 0; --i) {
    data += (r % rows.size[i]) * rows.stride[i];
    r /= rows.size[i];
  }
  return rows.leading > 0 ? data + r * rows.stride[0] : data;
}

// Calls f with a row as a pointer to its element type.
template <class F>
SH_INLINE void with_type(Dtype dtype, char* row, F f) {
  switch (dtype) {
    case Dtype::f32:
      return f(reinterpret_cast<float*>(row));
    case Dtype::bf16:
      return f(reinterpret_cast<Bf16*>(row));
    case Dtype::fp16:
      return f(reinterpret_cast<Fp16*>(row));
    case Dtype::f64:
      return f(reinterpret_cast<double*>(row));
  }
}

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::f32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::f64;
};
template <>
struct DtypeOf<Bf16> {
  static constexpr Dtype value = Dtype::bf16;
};
template <>
struct DtypeOf<Fp16> {
  static constexpr Dtype value = Dtype::fp16;
};

}  // namespace stillhouse
