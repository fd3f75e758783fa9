// Dual-binary weights on CUDA: which kernels are launched, and the ops' registration.
#include "../core/cuda.h"
#include "plain.cuh"
#include "planes.cuh"
#include "problem.h"
#include "product.cuh"
#include "stream.cuh"

namespace stillhouse {
namespace {

// Calls f with an element of a type, on the host.
template <class F>
void of_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float());
    case Dtype::bf16:
      return f(Bf16());
    case Dtype::fp16:
      return f(Fp16());
    case Dtype::f64:
      return f(double());
  }
}

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

template <int kRows>
void launch_planes(Launcher& launch, const FdbProduct& p, const uint32_t* planes,
                   const float* steps) {
  const Grid grid{ceil_div(p.m, kRows) * p.weight.blocks(), kStreamThreads};
  launch("planes product", planes_product_kernel<kRows>, grid, p, planes, steps);
}

template <class T>
void multiply_planes(Launcher& launch, const FdbProduct& p, const Tensor& like) {
  const Pieces<false> pieces(p.weight);
  const Tensor scratch = new_output(like, {p.m, p.weight.words() * kPlanes}, ScalarType::Int);
  const Tensor worth = new_output(like, {p.m, p.weight.groups}, ScalarType::Float);
  auto* const planes = static_cast<uint32_t*>(scratch.data_ptr());
  auto* const steps = static_cast<float*>(worth.data_ptr());
  launch("planes", planes_kernel<T>, Grid{ceil_div(p.m * p.weight.groups, 8), 256}, pieces, p.m,
         reinterpret_cast<const T*>(p.x), planes, steps);
  if (p.m == 1) return launch_planes<1>(launch, p, planes, steps);
  if (p.m == 2) return launch_planes<2>(launch, p, planes, steps);
  if (p.m <= 4) return launch_planes<4>(launch, p, planes, steps);
  launch_planes<8>(launch, p, planes, steps);
}

// Which kernel has how many rows. None of these borders is measured yet: they are where tiles are full, and
// for planes where products of bits should begin to cost more than the words' way from memory.
//   16 bits: up to 8 rows planes of bits, up to 16 and 64 tiles of that size, then of 128
//   gradients of 16 bits: the tiles
//   float32, float64: plain tiles of 16 or 64 rows
//   8 bits: up to 16 and 64 rows warps that share a block's words, then a block for each
constexpr int64_t kMostPlanes = 8;

template <class T, bool kBack>
void multiply(Launcher& launch, const FdbProduct& p, const Tensor& like) {
  if constexpr (sizeof(T) == 2) {
    if (!kBack && p.m <= kMostPlanes) return multiply_planes<T>(launch, p, like);
    if (p.m <= 16) return launch_product<T, kBack, 1, 1>(launch, p);
    if (p.m <= 64) return launch_product<T, kBack, 4, 1>(launch, p);
    launch_product<T, kBack, 4, 2>(launch, p);
  } else {
    if (p.m <= 16) return launch_plain<T, kBack, 1>(launch, p);
    launch_plain<T, kBack, 4>(launch, p);
  }
}
template <bool kBack>
void multiply(Launcher& launch, const FdbProduct& p, const Tensor& like) {
  of_type(p.dtype, [&](auto type) { multiply<decltype(type), kBack>(launch, p, like); });
}

struct Cuda {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return new_output(like, shape, dtype);
  }

  static void product(const FdbProduct& p, const Tensor& x, const Tensor&) {
    check_aligned(p.weight);
    Launcher launch(x);
    if (p.x == nullptr) return multiply_integers(launch, p, x);
    multiply<false>(launch, p, x);
  }

  static void quantize(const FdbQuantizing& q, const Tensor& like) {
    Launcher launch(like);
    const Grid grid{ceil_div(q.m * q.groups, 8), 256};
    of_type(q.dtype, [&](auto type) {
      using T = decltype(type);
      if constexpr (sizeof(T) < 8) launch("quantize", quantize_kernel<T>, grid, q);
    });
  }

  static void dequantize(const FdbPanel& panel, const Tensor& like) {
    Launcher launch(like);
    const int64_t width = panel.count_groups * panel.weight.group_columns();
    const Grid grid{panel.count_rows * ceil_div(width, kColumnsOfBlock), kPlainThreads};
    of_type(panel.dtype, [&](auto type) {
      launch("dequantize", dequantize_kernel<decltype(type)>, grid, panel);
    });
  }

  static void gradient_x(const FdbWeight& w, const Tensor& upstream, const Tensor& d_x) {
    check_aligned(w);
    Launcher launch(d_x);
    FdbProduct p{};
    p.weight = w, p.m = d_x.size(0), p.dtype = dtype_of(d_x);
    p.x = static_cast<const char*>(upstream.const_data_ptr());
    p.y = static_cast<char*>(d_x.data_ptr());
    multiply<true>(launch, p, d_x);
  }

  static void gradient_scales(const FdbWeight& w, const Tensor& upstream, const Tensor& x,
                              const Tensor& d_scales) {
    Launcher launch(x);
    const Grid grid{w.groups * ceil_div(w.blocks(), 4), kPlainThreads};
    of_type(dtype_of(x), [&](auto type) {
      using T = decltype(type);
      launch("scale gradient", scale_gradient_kernel<T>, grid, w, x.size(0),
             static_cast<const T*>(upstream.const_data_ptr()),
             static_cast<const T*>(x.const_data_ptr()),
             static_cast<SumOf<T>*>(d_scales.data_ptr()));
    });
  }
};

}  // namespace
}  // namespace stillhouse

STILLHOUSE_CUDA_LIBRARY(m) { stillhouse::FdbOps<stillhouse::Cuda>::register_ops(m); }
