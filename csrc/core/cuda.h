// What the host side of a CUDA file needs from torch: the current stream, a device guard, a launch that
// is checked, output tensors. For the executor of tests/simt all of it is a CPU's.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "launch.h"
#include "library.h"

namespace stillhouse {

// A tensor that a kernel will write.
inline torch::stable::Tensor new_output(const torch::stable::Tensor& like,
                                        const std::vector<int64_t>& shape,
                                        torch::headeronly::ScalarType dtype) {
  torch::stable::Tensor out = torch::stable::new_empty(like, shape, dtype);
#if defined(STILLHOUSE_SIMT)
  simt::poison(out.data_ptr(), size_t(out.numel()) * size_t(out.element_size()));
#endif
  return out;
}

// Kernels that are launched one after the other on the device of `like`, on its current stream.
class Launcher {
 public:
#if defined(STILLHOUSE_SIMT)
  explicit Launcher(const torch::stable::Tensor&) {}
  int64_t multiprocessors() const { return 2; }
  // Bytes of dynamic shared memory that a block can have beside its arrays.
  size_t most_shared() const { return simt::kDynamicShared - 1024; }
  int64_t resident_blocks(const Grid&, int) const { return multiprocessors(); }
  template <class... Parameters, class... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), Grid grid,
                  Arguments... arguments) {
    simt::Launch launch;
    launch.grid = dim3(unsigned(grid.blocks));
    launch.block = dim3(unsigned(grid.threads));
    launch.dynamic_shared = grid.shared;
    launch.allowed_shared = simt::kDynamicShared;
    simt::run(launch, name, [&] { kernel(arguments...); });
  }
#else
  explicit Launcher(const torch::stable::Tensor& like)
      : device_(like.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  int64_t multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  size_t most_shared() const {
    return size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) - kSharedBeside;
  }
  // Blocks that run at the same time, if a multiprocessor has registers for so many.
  int64_t resident_blocks(const Grid& grid, int by_registers) const {
    const int64_t shared = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) /
                           int64_t(grid.shared + kSharedBeside);
    return multiprocessors() * (shared < by_registers ? (shared > 1 ? shared : 1) : by_registers);
  }
  template <class... Parameters, class... Arguments>
  void operator()(const char*, void (*kernel)(Parameters...), Grid grid, Arguments... arguments) {
    if (grid.shared > kSharedWithoutAsking)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(grid.shared)));
    kernel<<<unsigned(grid.blocks), grid.threads, grid.shared, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }
  static constexpr size_t kSharedWithoutAsking = 48 << 10;
  // What a block has beside its dynamic part: arrays of fixed size, and a kibibyte of the system's.
  static constexpr size_t kSharedBeside = 4 << 10;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

}  // namespace stillhouse
