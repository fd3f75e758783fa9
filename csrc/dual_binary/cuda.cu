// Dual-binary weights on CUDA: which kernels are launched, and the ops' registration.
#include "../core/cuda.h"
#include "plain.cuh"
#include "problem.h"
#include "product.cuh"
#include "stream.cuh"

namespace stillhouse {
namespace {

void check_aligned(const FdbWeight& w) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(w.tiles) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(w.scales) % 16 == 0,
                  "tiles and scales begin at addresses that are multiples of 16");
}

template <class T, bool kBack, int kTiles, int kDown>
void launch_product(Launcher& launch, const FdbProduct& p) {
  constexpr int kRows = 16 * kTiles * kDown;
  const int64_t blocks = ceil_div(p.m, kRows) * ceil_div(Pieces<kBack>(p.weight).tiles(), 4);
  launch("product", product_kernel<T, kBack, kTiles, kDown>,
         Grid{blocks, 128 * kDown, product_bytes(kRows)}, p);
}
template <class Real, bool kBack, int kOwn>
void launch_plain(Launcher& launch, const FdbProduct& p) {
  const int64_t blocks = ceil_div(p.m, 16 * kOwn) * ceil_div(Pieces<kBack>(p.weight).tiles(), 2);
  launch("plain product", plain_product_kernel<Real, kBack, kOwn>, Grid{blocks, kPlainThreads}, p);
}

template <class T, bool kBack>
void multiply(Launcher& launch, const FdbProduct& p) {
  if constexpr (sizeof(T) == 2) {
    if (p.m <= 16) return launch_product<T, kBack, 1, 1>(launch, p);
    if (p.m <= 64) return launch_product<T, kBack, 4, 1>(launch, p);
    launch_product<T, kBack, 4, 2>(launch, p);
  } else {
    if (p.m <= 16) return launch_plain<T, kBack, 1>(launch, p);
    launch_plain<T, kBack, 4>(launch, p);
  }
}
template <bool kBack>
void multiply(Launcher& launch, const FdbProduct& p) {
  with_type(p.dtype, p.y,
            [&](auto* y) { multiply<std::remove_pointer_t<decltype(y)>, kBack>(launch, p); });
}

template <int kTiles, int kSplit>
void launch_integers(Launcher& launch, const FdbProduct& p, const uint32_t* arranged) {
  const int64_t blocks =
      ceil_div(p.m, 16 * kTiles) * ceil_div(p.weight.blocks(), kStreamWarps / kSplit);
  launch("integers", integer_kernel<kTiles, kSplit>, Grid{blocks, kStreamThreads}, p, arranged);
}

void multiply_integers(Launcher& launch, const FdbProduct& p, const Tensor& like) {
  const int64_t each = p.weight.words() * 8;
  const Tensor scratch = new_output(like, {p.m, each}, ScalarType::Int);
  auto* const arranged = static_cast<uint32_t*>(scratch.data_ptr());
  launch("arrange", arrange_kernel, Grid{p.m * ceil_div(each, 256), 256}, Pieces<false>(p.weight),
         p.integers, arranged);
  if (p.m <= 16) return launch_integers<1, 8>(launch, p, arranged);
  if (p.m <= 64) return launch_integers<2, 4>(launch, p, arranged);
  launch_integers<2, 1>(launch, p, arranged);
}

struct Cuda {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return new_output(like, shape, dtype);
  }

  static void product(const FdbProduct& p, const Tensor& x, const Tensor&) {
    check_aligned(p.weight);
    Launcher launch(x);
    if (p.x == nullptr) return multiply_integers(launch, p, x);
    multiply<false>(launch, p);
  }

  static void quantize(const FdbQuantizing& q, const Tensor& like) {
    Launcher launch(like);
    const Grid grid{ceil_div(q.m * q.groups, 8), 256};
    with_type(q.dtype, const_cast<char*>(q.x), [&](auto* x) {
      using T = std::remove_pointer_t<decltype(x)>;
      if constexpr (sizeof(T) < 8) launch("quantize", quantize_kernel<T>, grid, q);
    });
  }

  static void dequantize(const FdbPanel& panel, const Tensor& like) {
    Launcher launch(like);
    const int64_t width = panel.count_groups * panel.weight.group_columns();
    const Grid grid{panel.count_rows * ceil_div(width, kColumnsOfBlock), kPlainThreads};
    with_type(panel.dtype, panel.out, [&](auto* out) {
      launch("dequantize", dequantize_kernel<std::remove_pointer_t<decltype(out)>>, grid, panel);
    });
  }

  static void gradient_x(const FdbWeight& w, const Tensor& upstream, const Tensor& d_x) {
    check_aligned(w);
    Launcher launch(d_x);
    FdbProduct p{};
    p.weight = w, p.m = d_x.size(0), p.dtype = dtype_of(d_x);
    p.x = static_cast<const char*>(upstream.const_data_ptr());
    p.y = static_cast<char*>(d_x.data_ptr());
    multiply<true>(launch, p);
  }

  static void gradient_scales(const FdbWeight& w, const Tensor& upstream, const Tensor& x,
                              const Tensor& d_scales) {
    Launcher launch(x);
    const Grid grid{w.groups * ceil_div(w.blocks(), 4), kPlainThreads};
    with_type(dtype_of(x), static_cast<char*>(const_cast<void*>(x.const_data_ptr())),
              [&](auto* numbers) {
                using T = std::remove_pointer_t<decltype(numbers)>;
                launch("scale gradient", scale_gradient_kernel<T>, grid, w, x.size(0),
                       static_cast<const T*>(upstream.const_data_ptr()),
                       static_cast<const T*>(numbers), static_cast<SumOf<T>*>(d_scales.data_ptr()));
              });
  }
};

}  // namespace
}  // namespace stillhouse

STILLHOUSE_CUDA_LIBRARY(m) { stillhouse::FdbOps<stillhouse::Cuda>::register_ops(m); }
