// torch's tensors as rows of a type: what the host side of every family asks of them.
#pragma once
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "rows.h"

namespace stillhouse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    case ScalarType::Double:
      return Dtype::f64;
    default:
      STD_TORCH_CHECK(false, "tensors must be float32, bfloat16, float16 or float64");
  }
}

inline Rows rows_of(const Tensor& x) {
  const int64_t item = element_size(dtype_of(x));
  Rows rows{static_cast<char*>(x.data_ptr()), dtype_of(x), int32_t(x.dim()) - 1, {}, {}};
  STD_TORCH_CHECK(x.dim() >= 1 && rows.leading <= kMaxLeading,
                  "tensors must have 1 to 9 dimensions");
  for (int i = 0; i < rows.leading; ++i) {
    rows.size[i] = x.size(i);
    rows.stride[i] = x.stride(i) * item;
  }
  return rows;
}

inline Tensor with_contiguous_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// x, or a contiguous copy that lives as long as `hold`.
inline Tensor contiguous_of(const Tensor& x, std::vector<Tensor>& hold) {
  hold.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
  return hold.back();
}

inline int64_t count_rows(const Tensor& x) {
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) n *= x.size(i);
  return n;
}

}  // namespace stillhouse
