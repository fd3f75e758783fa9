// The ops of dual-binary weights between torch's tensors and a device's kernels.
#pragma once
#include <tuple>

#include "../core/tensors.h"
#include "kernel.h"

namespace stillhouse {

// The ops, for a backend that has
//   Tensor output(like, shape, dtype)
//   void product(const FdbProduct&, x, y): x and y are the tensors that it points to
//   void quantize(const FdbQuantizing&, like), void dequantize(const FdbPanel&, like)
//   void gradient_x(weight, upstream, d_x), void gradient_scales(weight, upstream, x, d_scales)
// d_x has the dtype of x; d_scales is float32, or float64 where x is.
template <class Backend>
struct FdbOps {
  // A tensor of words keeps its weight alive: `hold` has what had to be copied.
  static FdbWeight weight_of(const Tensor& tiles, const Tensor& scales, int64_t rows,
                             int64_t columns, std::vector<Tensor>& hold) {
    FdbWeight w{};
    STD_TORCH_CHECK(tiles.dim() == 5 && scales.dim() == 4 && tiles.scalar_type() == ScalarType::Int,
                    "tiles are int32 [N / 16, g, words, 2, 16], scales [N / 16, g, 2, 16]");
    w.rows = rows, w.columns = columns, w.groups = tiles.size(1);
    STD_TORCH_CHECK(rows >= 0 && columns >= 0 && w.groups > 0 && columns % w.groups == 0,
                    "columns are whole groups");
    STD_TORCH_CHECK(tiles.size(0) == w.blocks() && tiles.size(2) == w.group_words() &&
                        tiles.size(3) == 2 && tiles.size(4) == kBlock,
                    "tiles do not fit ", rows, " rows and ", columns, " columns");
    STD_TORCH_CHECK(scales.size(0) == w.blocks() && scales.size(1) == w.groups &&
                        scales.size(2) == 2 && scales.size(3) == kBlock,
                    "scales do not fit the tiles");
    w.tiles = static_cast<const uint32_t*>(contiguous_of(tiles, hold).const_data_ptr());
    w.scales = static_cast<const char*>(contiguous_of(scales, hold).const_data_ptr());
    w.scale_dtype = dtype_of(scales);
    return w;
  }

  static void add_bias(FdbProduct& p, const MaybeTensor& bias, std::vector<Tensor>& hold) {
    if (!bias) return;
    STD_TORCH_CHECK(bias->numel() == p.weight.rows, "bias is [N]");
    p.bias = static_cast<const char*>(contiguous_of(*bias, hold).const_data_ptr());
    p.bias_dtype = dtype_of(*bias);
  }

  static Tensor finish(FdbProduct& p, const Tensor& x, ScalarType dtype) {
    const Tensor y = Backend::output(x, {p.m, p.weight.rows}, dtype);
    p.y = static_cast<char*>(y.data_ptr());
    p.dtype = dtype_of(y);
    if (y.numel() > 0) Backend::product(p, x, y);
    return y;
  }

  static Tensor matmul(const Tensor& x, const Tensor& tiles, const Tensor& scales,
                       const MaybeTensor& bias, int64_t rows) {
    STD_TORCH_CHECK(x.dim() == 2, "x is [M, K]");
    std::vector<Tensor> hold;
    FdbProduct p{};
    p.weight = weight_of(tiles, scales, rows, x.size(1), hold);
    p.m = x.size(0);
    const Tensor contiguous = contiguous_of(x, hold);
    p.x = static_cast<const char*>(contiguous.const_data_ptr());
    add_bias(p, bias, hold);
    return finish(p, contiguous, x.scalar_type());
  }

  static Tensor matmul_int8(const Tensor& x, const Tensor& steps, const Tensor& tiles,
                            const Tensor& scales, const MaybeTensor& bias, int64_t rows,
                            ScalarType dtype) {
    STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Char, "x is int8 [M, K]");
    std::vector<Tensor> hold;
    FdbProduct p{};
    p.weight = weight_of(tiles, scales, rows, x.size(1), hold);
    p.m = x.size(0);
    STD_TORCH_CHECK(steps.dim() == 2 && steps.size(0) == p.m && steps.size(1) == p.weight.groups &&
                        steps.scalar_type() == ScalarType::Float,
                    "steps are float32 [M, g]");
    STD_TORCH_CHECK(dtype != ScalarType::Double, "products of integers are float32 at most");
    const Tensor contiguous = contiguous_of(x, hold);
    p.integers = static_cast<const int8_t*>(contiguous.const_data_ptr());
    p.steps = static_cast<const float*>(contiguous_of(steps, hold).const_data_ptr());
    add_bias(p, bias, hold);
    return finish(p, contiguous, dtype);
  }

  static std::tuple<Tensor, Tensor> quantize(const Tensor& x, int64_t groups) {
    STD_TORCH_CHECK(x.dim() == 2 && groups > 0 && x.size(1) % groups == 0 &&
                        x.scalar_type() != ScalarType::Double,
                    "x is [M, K] of whole groups, float32 at most");
    std::vector<Tensor> hold;
    const Tensor integers = Backend::output(x, {x.size(0), x.size(1)}, ScalarType::Char);
    const Tensor steps = Backend::output(x, {x.size(0), groups}, ScalarType::Float);
    const Tensor contiguous = contiguous_of(x, hold);
    const FdbQuantizing q{x.size(0),
                          x.size(1),
                          groups,
                          static_cast<const char*>(contiguous.const_data_ptr()),
                          dtype_of(x),
                          static_cast<int8_t*>(integers.data_ptr()),
                          static_cast<float*>(steps.data_ptr())};
    if (steps.numel() > 0) Backend::quantize(q, contiguous);
    return {integers, steps};
  }

  static Tensor dequantize(const Tensor& tiles, const Tensor& scales, int64_t rows, int64_t columns,
                           ScalarType dtype) {
    std::vector<Tensor> hold;
    const FdbWeight w = weight_of(tiles, scales, rows, columns, hold);
    const Tensor out = Backend::output(tiles, {rows, columns}, dtype);
    const FdbPanel panel{
        w, 0, rows, 0, w.groups, static_cast<char*>(out.data_ptr()), dtype_of(out)};
    if (out.numel() > 0) Backend::dequantize(panel, tiles);
    return out;
  }

  // What is not wanted is [0].
  static std::tuple<Tensor, Tensor> gradient(const Tensor& upstream, const Tensor& x,
                                             const Tensor& tiles, const Tensor& scales, bool want_x,
                                             bool want_scales) {
    STD_TORCH_CHECK(x.dim() == 2 && upstream.dim() == 2 && upstream.size(0) == x.size(0) &&
                        upstream.scalar_type() == x.scalar_type(),
                    "x is [M, K], what comes back [M, N] of the same dtype");
    std::vector<Tensor> hold;
    const FdbWeight w = weight_of(tiles, scales, upstream.size(1), x.size(1), hold);
    const Tensor back = contiguous_of(upstream, hold), rows = contiguous_of(x, hold);
    const ScalarType sums =
        x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const bool all = x.size(0) * w.rows * w.columns > 0;
    const auto made = [&](bool wanted, std::vector<int64_t> shape, ScalarType dtype) {
      if (!wanted) shape = {0};
      return all || !wanted ? Backend::output(x, shape, dtype)
                            : torch::stable::new_zeros(x, shape, dtype);
    };
    const Tensor d_x = made(want_x, {x.size(0), w.columns}, x.scalar_type());
    const Tensor d_scales = made(want_scales, {w.blocks(), w.groups, 2, kBlock}, sums);
    if (want_x && all) Backend::gradient_x(w, back, d_x);
    if (want_scales && all) Backend::gradient_scales(w, back, rows, d_scales);
    return {d_x, d_scales};
  }

  template <class Library>
  static void register_ops(Library& m) {
    m.impl("fdb_matmul", TORCH_BOX(&matmul));
    m.impl("fdb_matmul_int8", TORCH_BOX(&matmul_int8));
    m.impl("fdb_quantize", TORCH_BOX(&quantize));
    m.impl("fdb_dequantize", TORCH_BOX(&dequantize));
    m.impl("fdb_gradient", TORCH_BOX(&gradient));
  }
};

}  // namespace stillhouse
