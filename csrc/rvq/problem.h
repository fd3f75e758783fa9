// The ops of the residual quantizer between torch's tensors and a device's kernels.
#pragma once
#include <tuple>

#include "../core/tensors.h"
#include "kernel.h"

namespace stillhouse {

// The ops, for a backend that has
//   Tensor output(like, shape, dtype), Tensor zeros(like, shape, dtype)
//   void pack(const Packing<Real>&, like), void encode(const Quantizer<Real>&, like)
//   void candidates(const Candidates<Real>&, like)
//   void follow(const Residuals<Real>&, like), what is summed along known codes
//   void decode(const Quantizer<Real>&, like), from `found` to `out`
template <class Backend>
struct RvqOps {
  static bool in_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

  static void check_tables(const Tensor& codebooks) {
    STD_TORCH_CHECK(codebooks.dim() == 4 && codebooks.size(2) > 0 && codebooks.size(1) > 0,
                    "codebooks are [G, T, K, D] with at least one code");
    STD_TORCH_CHECK(codebooks.scalar_type() == ScalarType::Float || in_double(codebooks),
                    "codebooks are float32 or float64");
  }

  template <class Real>
  static Tensor pack_of(const Tensor& codebooks, const MaybeTensor& sizes, int64_t metric) {
    std::vector<Tensor> hold;
    const int64_t tables = codebooks.size(0) * codebooks.size(1);
    Packing<Real> p{};
    p.tables = tables, p.codes = codebooks.size(2), p.width = codebooks.size(3);
    p.table = static_cast<const Real*>(contiguous_of(codebooks, hold).const_data_ptr());
    p.metric = int32_t(metric);
    if (sizes) {
      STD_TORCH_CHECK(sizes->numel() == tables && sizes->scalar_type() == ScalarType::Long,
                      "sizes are int64 [G, T]");
      p.sizes = static_cast<const int64_t*>(contiguous_of(*sizes, hold).const_data_ptr());
    }
    const Tensor packed = Backend::output(
        codebooks,
        {codebooks.size(0), codebooks.size(1), code_blocks(p.codes), p.width + 1, kCodes},
        codebooks.scalar_type());
    p.packed = static_cast<Real*>(packed.data_ptr());
    if (packed.numel() > 0) Backend::pack(p, codebooks);
    return packed;
  }

  static Tensor pack(const Tensor& codebooks, const MaybeTensor& sizes, int64_t metric) {
    check_tables(codebooks);
    return in_double(codebooks) ? pack_of<double>(codebooks, sizes, metric)
                                : pack_of<float>(codebooks, sizes, metric);
  }

  template <class Real>
  static Quantizer<Real> make(const Tensor& codebooks, int64_t n, int64_t stages,
                              std::vector<Tensor>& hold) {
    Quantizer<Real> q{};
    q.groups = codebooks.size(0), q.tables = codebooks.size(1), q.codes = codebooks.size(2);
    q.width = codebooks.size(3), q.n = n, q.stages = stages;
    STD_TORCH_CHECK(q.tables == 1 || stages <= q.tables, stages, " stages and ", q.tables,
                    " codebooks");
    q.table = static_cast<const Real*>(contiguous_of(codebooks, hold).const_data_ptr());
    return q;
  }

  // `width`: of a row, in tables' widths.
  static void check_rows(const Tensor& x, const Tensor& codebooks, int64_t width = 1) {
    check_tables(codebooks);
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == codebooks.size(0) &&
                        x.size(2) == width * codebooks.size(3) &&
                        in_double(x) == in_double(codebooks),
                    "rows are [G, N, D], float64 where the codebooks are");
  }

  template <class Real>
  static const Real* packed_of(const Tensor& packed, const Tensor& codebooks) {
    const int64_t tables = codebooks.size(0) * codebooks.size(1);
    STD_TORCH_CHECK(packed.scalar_type() == codebooks.scalar_type() && packed.is_contiguous() &&
                        packed.numel() == tables * code_blocks(codebooks.size(2)) *
                                              block_numbers(codebooks.size(3)),
                    "packed is what rvq_pack made of these codebooks");
    return static_cast<const Real*>(packed.const_data_ptr());
  }

  static const int64_t* of_rows(const char* name, const MaybeTensor& given, int64_t rows,
                                std::vector<Tensor>& hold) {
    if (!given) return nullptr;
    STD_TORCH_CHECK(given->numel() == rows && given->scalar_type() == ScalarType::Long, name,
                    " is int64 [G, N]");
    return static_cast<const int64_t*>(contiguous_of(*given, hold).const_data_ptr());
  }

  using Encoded = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  template <class Real>
  static Encoded encode_of(const Tensor& x, const Tensor& codebooks, const Tensor& packed,
                           const MaybeTensor& depth, const MaybeTensor& coupling, int64_t stages,
                           bool want_out, bool want_error, bool want_margin) {
    std::vector<Tensor> hold;
    Quantizer<Real> q = make<Real>(codebooks, x.size(1), stages, hold);
    q.packed = packed_of<Real>(packed, codebooks);
    q.x = static_cast<const char*>(contiguous_of(x, hold).const_data_ptr());
    q.x_dtype = dtype_of(x);
    q.depth = of_rows("depth", depth, q.groups * q.n, hold);
    if (coupling) {
      const int64_t all = stages * q.width;
      STD_TORCH_CHECK(want_out && coupling->numel() == q.groups * all * all &&
                          coupling->scalar_type() == codebooks.scalar_type(),
                      "coupling is [G, Q D, Q D], of the codebooks' type, and out is wanted");
      q.coupling = static_cast<const Real*>(contiguous_of(*coupling, hold).const_data_ptr());
    }
    const ScalarType real = codebooks.scalar_type();
    const std::vector<int64_t> none{0}, each{q.groups, q.n, stages};
    const std::vector<int64_t> wide{q.groups, q.n, q.out_width()};
    const Tensor codes = Backend::output(x, each, ScalarType::Long);
    const Tensor out = Backend::output(x, want_out ? wide : none, real);
    const Tensor error = Backend::output(x, want_error ? each : none, real);
    const Tensor margin = Backend::output(x, want_margin ? each : none, real);
    const auto numbers = [](const Tensor& t, bool wanted) {
      return wanted ? static_cast<Real*>(t.data_ptr()) : nullptr;
    };
    q.found = static_cast<int64_t*>(codes.data_ptr());
    q.out = numbers(out, want_out), q.error = numbers(error, want_error);
    q.margin = numbers(margin, want_margin);
    if (q.groups * q.n > 0) Backend::encode(q, x);
    return {codes, out, error, margin};
  }

  static Encoded encode(const Tensor& x, const Tensor& codebooks, const Tensor& packed,
                        const MaybeTensor& depth, const MaybeTensor& coupling, int64_t stages,
                        bool want_out, bool want_error, bool want_margin) {
    check_rows(x, codebooks, coupling ? stages : 1);
    const auto encode = in_double(x) ? &encode_of<double> : &encode_of<float>;
    return encode(x, codebooks, packed, depth, coupling, stages, want_out, want_error, want_margin);
  }

  template <class Real>
  static std::tuple<Tensor, Tensor> candidates_of(const Tensor& x, const Tensor& codebooks,
                                                  const Tensor& packed, int64_t k, double sharpness,
                                                  int64_t seed, int64_t node,
                                                  const MaybeTensor& position) {
    STD_TORCH_CHECK(codebooks.size(1) == 1, "candidates are of one table");
    STD_TORCH_CHECK(1 <= k && k <= codebooks.size(2), "k is from 1 to the number of codes");
    std::vector<Tensor> hold;
    Candidates<Real> c{};
    c.groups = x.size(0), c.n = x.size(1), c.width = x.size(2);
    c.codes = codebooks.size(2), c.k = k;
    c.x = static_cast<const char*>(contiguous_of(x, hold).const_data_ptr());
    c.x_dtype = dtype_of(x);
    c.table = static_cast<const Real*>(contiguous_of(codebooks, hold).const_data_ptr());
    c.packed = packed_of<Real>(packed, codebooks);
    c.sharpness = sharpness, c.seed = uint64_t(seed), c.node = node;
    c.position = of_rows("position", position, c.groups * c.n, hold);
    const Tensor codes = Backend::output(x, {c.groups, c.n, k}, ScalarType::Long);
    const Tensor error = Backend::output(x, {c.groups, c.n, k}, codebooks.scalar_type());
    c.found = static_cast<int64_t*>(codes.data_ptr());
    c.error = static_cast<Real*>(error.data_ptr());
    if (c.groups * c.n > 0) Backend::candidates(c, x);
    return {codes, error};
  }

  static std::tuple<Tensor, Tensor> candidates(const Tensor& x, const Tensor& codebooks,
                                               const Tensor& packed, int64_t k, double sharpness,
                                               int64_t seed, int64_t node,
                                               const MaybeTensor& position) {
    check_rows(x, codebooks);
    const auto find = in_double(x) ? &candidates_of<double> : &candidates_of<float>;
    return find(x, codebooks, packed, k, sharpness, seed, node, position);
  }

  // Reading a table at a code that it does not have must not be possible.
  static Tensor checked_codes(const Tensor& codes, const Tensor& codebooks,
                              std::vector<Tensor>& hold) {
    STD_TORCH_CHECK(codes.dim() == 3 && codes.size(0) == codebooks.size(0) &&
                        codes.scalar_type() == ScalarType::Long,
                    "codes are int64 [G, N, Q]");
    return contiguous_of(codes, hold);
  }

  template <class Real>
  static Tensor decode_of(const Tensor& codes, const Tensor& codebooks) {
    std::vector<Tensor> hold;
    Quantizer<Real> q = make<Real>(codebooks, codes.size(1), codes.size(2), hold);
    q.found = static_cast<int64_t*>(checked_codes(codes, codebooks, hold).data_ptr());
    const Tensor out =
        Backend::output(codebooks, {q.groups, q.n, q.width}, codebooks.scalar_type());
    q.out = static_cast<Real*>(out.data_ptr());
    if (out.numel() > 0) Backend::decode(q, codebooks);
    return out;
  }

  static Tensor decode(const Tensor& codes, const Tensor& codebooks) {
    check_tables(codebooks);
    return in_double(codebooks) ? decode_of<double>(codes, codebooks)
                                : decode_of<float>(codes, codebooks);
  }

  template <class Real>
  static Residuals<Real> make_residuals(const Tensor& x, const Tensor& codes,
                                        const Tensor& codebooks, std::vector<Tensor>& hold) {
    const Quantizer<Real> q = make<Real>(codebooks, x.size(1), codes.size(2), hold);
    Residuals<Real> r{};
    r.groups = q.groups, r.n = q.n, r.width = q.width, r.codes = q.codes, r.tables = q.tables;
    r.stages = q.stages, r.table = q.table;
    r.x = static_cast<const char*>(contiguous_of(x, hold).const_data_ptr());
    r.x_dtype = dtype_of(x);
    const Tensor found = checked_codes(codes, codebooks, hold);
    STD_TORCH_CHECK(found.size(1) == r.n, "there are as many rows of codes as of x");
    r.found = static_cast<const int64_t*>(found.const_data_ptr());
    return r;
  }

  template <class Real>
  static std::tuple<Tensor, Tensor> statistics_of(const Tensor& x, const Tensor& codes,
                                                  const Tensor& codebooks) {
    std::vector<Tensor> hold;
    Residuals<Real> r = make_residuals<Real>(x, codes, codebooks, hold);
    const ScalarType real = codebooks.scalar_type();
    const Tensor counts = Backend::zeros(x, {r.groups, r.tables, r.codes}, real);
    const Tensor sums = Backend::zeros(x, {r.groups, r.tables, r.codes, r.width}, real);
    r.counts = static_cast<Real*>(counts.data_ptr());
    r.of_codes = static_cast<Real*>(sums.data_ptr());
    if (r.n > 0) Backend::follow(r, x);
    return {counts, sums};
  }

  static std::tuple<Tensor, Tensor> statistics(const Tensor& x, const Tensor& codes,
                                               const Tensor& codebooks) {
    check_rows(x, codebooks);
    return in_double(x) ? statistics_of<double>(x, codes, codebooks)
                        : statistics_of<float>(x, codes, codebooks);
  }

  template <class Real>
  static std::tuple<Tensor, Tensor> gradient_of(const Tensor& upstream, const Tensor& x,
                                                const Tensor& codes, const Tensor& codebooks,
                                                bool want_x, bool want_codebooks) {
    std::vector<Tensor> hold;
    Residuals<Real> r = make_residuals<Real>(x, codes, codebooks, hold);
    const ScalarType real = codebooks.scalar_type();
    STD_TORCH_CHECK(upstream.scalar_type() == real && upstream.numel() == codes.numel(),
                    "upstream is [G, N, Q], of the codebooks' type");
    r.upstream = static_cast<const Real*>(contiguous_of(upstream, hold).const_data_ptr());
    const std::vector<int64_t> none{0};
    const Tensor d_x =
        Backend::zeros(x, want_x ? std::vector<int64_t>{r.groups, r.n, r.width} : none, real);
    const Tensor d_codebooks = Backend::zeros(
        x, want_codebooks ? std::vector<int64_t>{r.groups, r.tables, r.codes, r.width} : none,
        real);
    if (want_x) r.d_x = static_cast<Real*>(d_x.data_ptr());
    if (want_codebooks) r.of_codes = static_cast<Real*>(d_codebooks.data_ptr());
    if (r.n > 0) Backend::follow(r, x);
    return {d_x, d_codebooks};
  }

  static std::tuple<Tensor, Tensor> gradient(const Tensor& upstream, const Tensor& x,
                                             const Tensor& codes, const Tensor& codebooks,
                                             bool want_x, bool want_codebooks) {
    check_rows(x, codebooks);
    return in_double(x) ? gradient_of<double>(upstream, x, codes, codebooks, want_x, want_codebooks)
                        : gradient_of<float>(upstream, x, codes, codebooks, want_x, want_codebooks);
  }

  template <class Library>
  static void register_ops(Library& m) {
    m.impl("rvq_pack", TORCH_BOX(&RvqOps::pack));
    m.impl("rvq_encode", TORCH_BOX(&RvqOps::encode));
    m.impl("rvq_candidates", TORCH_BOX(&RvqOps::candidates));
    m.impl("rvq_decode", TORCH_BOX(&RvqOps::decode));
    m.impl("rvq_statistics", TORCH_BOX(&RvqOps::statistics));
    m.impl("rvq_gradient", TORCH_BOX(&RvqOps::gradient));
  }
};

}  // namespace stillhouse
