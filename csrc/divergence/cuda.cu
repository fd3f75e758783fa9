// The divergence family on CUDA: so far the scaling of a gradient by its upstream.
#include "../core/cuda.h"
#include "../core/rows.h"

namespace stillhouse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// gradient *= upstream over n contiguous elements; returns at once when upstream is 1.
template <class T, class Up>
__global__ void scale_kernel(T* gradient, const Up* upstream, int64_t n) {
  const Up factor = *upstream;
  if (factor == Up(1)) return;
  const int64_t stride = int64_t(blockDim.x) * gridDim.x;
  for (int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; j < n; j += stride)
    narrow(Up(widen(gradient[j])) * factor, gradient[j]);
}

template <class T, class Up>
void launch_scale(const Tensor& gradient, const Tensor& upstream) {
  constexpr int kThreads = 256, kMaxBlocks = 4096;
  const int64_t n = gradient.numel(), blocks = (n + kThreads - 1) / kThreads;
  const int grid = int(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  scale_kernel<<<grid, kThreads, 0, current_stream(gradient.get_device_index())>>>(
      static_cast<T*>(gradient.data_ptr()), static_cast<const Up*>(upstream.const_data_ptr()), n);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void scale_(Tensor gradient, const Tensor& upstream) {
  STD_TORCH_CHECK(gradient.is_contiguous(), "scale_ needs a contiguous gradient on CUDA");
  if (gradient.numel() == 0) return;
  torch::stable::accelerator::DeviceGuard guard(gradient.get_device_index());
  switch (gradient.scalar_type()) {
    case ScalarType::Float:
      return launch_scale<float, float>(gradient, upstream);
    case ScalarType::BFloat16:
      return launch_scale<Bf16, float>(gradient, upstream);
    case ScalarType::Half:
      return launch_scale<Fp16, float>(gradient, upstream);
    case ScalarType::Double:
      return launch_scale<double, double>(gradient, upstream);
    default:
      STD_TORCH_CHECK(false, "gradient must be float32, bfloat16, float16 or float64");
  }
}

}  // namespace
}  // namespace stillhouse

STABLE_TORCH_LIBRARY_IMPL(stillhouse, CUDA, m) { m.impl("scale_", TORCH_BOX(&stillhouse::scale_)); }
