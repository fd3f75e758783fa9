// The ops of the transport family between torch's tensors and a device's kernels.
#pragma once
#include <tuple>

#include "../core/tensors.h"
#include "kernel.h"

namespace stillhouse {

// The order in which Python packs `numbers`; infinite rho: balanced, no annealing: 0, no tolerance:
// -1.
enum TransportNumber { kEpsilon, kRhoA, kRhoB, kAnnealing, kTolerance, kTransportNumbers };

struct TransportArguments {
  const Tensor& cost;
  const MaybeTensor &other, &a, &b, &lengths;
  const Tensor& numbers;
  int64_t iterations, ground, domain, objective;
};

inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A contiguous tensor [..., width].
inline Matrix matrix_of(const Tensor& x) {
  return {static_cast<char*>(x.data_ptr()), dtype_of(x), x.size(x.dim() - 1)};
}

// Everything but the outputs. `hold` keeps tensors alive that were made here.
template <class Real>
Batch<Real> make_batch(const TransportArguments& given, std::vector<Tensor>& hold) {
  STD_TORCH_CHECK(given.numbers.numel() == kTransportNumbers && given.numbers.is_cpu() &&
                      given.numbers.scalar_type() == ScalarType::Double,
                  "numbers must be float64 [", int(kTransportNumbers), "] on the CPU");
  const double* numbers =
      static_cast<const double*>(contiguous_of(given.numbers, hold).const_data_ptr());
  Batch<Real> batch{};
  batch.epsilon = numbers[kEpsilon];
  batch.rho_a = numbers[kRhoA], batch.rho_b = numbers[kRhoB];
  batch.annealing = numbers[kAnnealing], batch.tolerance = numbers[kTolerance];
  batch.iterations = given.iterations;
  batch.ground = int32_t(given.ground), batch.domain = int32_t(given.domain);
  batch.objective = int32_t(given.objective);
  STD_TORCH_CHECK(batch.epsilon > 0 && batch.iterations >= 1 && batch.rho_a > 0 && batch.rho_b > 0,
                  "epsilon, rho and iterations must be positive");
  const Tensor cost = contiguous_of(given.cost, hold);
  STD_TORCH_CHECK(cost.dim() == 3 && (given.ground == kMatrix) == !given.other,
                  "costs are [G, n, m], points [G, n, d] and [G, m, d]");
  batch.groups = cost.size(0), batch.n = cost.size(1);
  batch.cost = matrix_of(cost);
  batch.m = cost.size(2);
  if (given.other) {
    const Tensor other = contiguous_of(*given.other, hold);
    STD_TORCH_CHECK(other.dim() == 3 && other.size(0) == batch.groups &&
                        other.size(2) == cost.size(2) && other.scalar_type() == cost.scalar_type(),
                    "points of both sides have the same groups, dimension and type");
    batch.m = other.size(1);
    batch.other = matrix_of(other);
  }
  const auto side = [&](const MaybeTensor& x, int64_t count) -> const Real* {
    if (!x) return nullptr;
    STD_TORCH_CHECK(x->numel() == batch.groups * count && x->scalar_type() == wide_type(cost),
                    "marginals are [G, n] and [G, m], of the result's type");
    return static_cast<const Real*>(contiguous_of(*x, hold).const_data_ptr());
  };
  batch.a = side(given.a, batch.n), batch.b = side(given.b, batch.m);
  if (given.lengths) {
    STD_TORCH_CHECK(given.lengths->numel() == 2 * batch.groups &&
                        given.lengths->scalar_type() == ScalarType::Long,
                    "lengths are int64 [G, 2]");
    batch.lengths =
        static_cast<const int64_t*>(contiguous_of(*given.lengths, hold).const_data_ptr());
  }
  return batch;
}

using Solution = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What a solution has left for its gradient.
struct Solved {
  const Tensor &upstream, &f, &g, &used, &history;
};

// The ops, for a backend that has
//   Tensor output(like, shape, dtype)
//   void solve(const Batch<Real>&, like), void differentiate(const Batch<Real>&, like)
//   void distances(const Pairs<Real>&, like), void distance_gradient(const Pairs<Real>&, like), of the
//   sides that have somewhere to go
template <class Backend>
struct SinkhornOps {
  static bool in_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

  template <class Real>
  static Solution solution_of(const TransportArguments& given, bool want_plan, bool want_history) {
    std::vector<Tensor> hold;
    Batch<Real> batch = make_batch<Real>(given, hold);
    const ScalarType wide = wide_type(given.cost);
    const auto output = [&](const std::vector<int64_t>& shape, ScalarType dtype) {
      return Backend::output(given.cost, shape, dtype);
    };
    const int64_t groups = batch.groups, n = batch.n, m = batch.m;
    const Tensor value = output({groups}, wide), error = output({groups}, wide);
    const Tensor f = output({groups, n}, wide), g = output({groups, m}, wide);
    const Tensor used = output({groups}, ScalarType::Long);
    const Tensor plan = want_plan ? output({groups, n, m}, wide) : output({0}, wide);
    const Tensor history =
        want_history ? output({groups, batch.iterations, n + m}, wide) : output({0}, wide);
    batch.value = static_cast<Real*>(value.data_ptr());
    batch.error = static_cast<Real*>(error.data_ptr());
    batch.f = static_cast<Real*>(f.data_ptr());
    batch.g = static_cast<Real*>(g.data_ptr());
    batch.used = static_cast<int64_t*>(used.data_ptr());
    batch.plan = want_plan ? static_cast<Real*>(plan.data_ptr()) : nullptr;
    batch.history = want_history ? static_cast<Real*>(history.data_ptr()) : nullptr;
    if (groups > 0) Backend::solve(batch, given.cost);
    return {value, plan, f, g, used, error, history};
  }

  static Solution sinkhorn(const Tensor& cost, const MaybeTensor& other, const MaybeTensor& a,
                           const MaybeTensor& b, const MaybeTensor& lengths, const Tensor& numbers,
                           int64_t iterations, int64_t ground, int64_t domain, int64_t objective,
                           int64_t mode, bool want_plan) {
    const TransportArguments given{cost,    other,      a,      b,      lengths,
                                   numbers, iterations, ground, domain, objective};
    // The unrolled gradient goes back through all of them.
    const bool want_history = mode == kUnrolled;
    return in_double(cost) ? solution_of<double>(given, want_plan, want_history)
                           : solution_of<float>(given, want_plan, want_history);
  }

  template <class Real>
  static Gradients gradient_of(const TransportArguments& given, const Solved& solved, int64_t mode,
                               bool want_cost, bool want_other, bool want_marginals) {
    std::vector<Tensor> hold;
    Batch<Real> batch = make_batch<Real>(given, hold);
    batch.mode = int32_t(mode);
    const ScalarType wide = wide_type(given.cost);
    const auto input = [&](const Tensor& x, int64_t count) {
      STD_TORCH_CHECK(x.scalar_type() == wide && x.numel() == count,
                      "what the solution left has another size");
      return static_cast<Real*>(contiguous_of(x, hold).data_ptr());
    };
    const int64_t groups = batch.groups, n = batch.n, m = batch.m;
    batch.upstream = input(solved.upstream, groups);
    batch.f = input(solved.f, groups * n);
    batch.g = input(solved.g, groups * m);
    STD_TORCH_CHECK(solved.used.scalar_type() == ScalarType::Long && solved.used.numel() == groups,
                    "iterations_used is int64 [G]");
    batch.used = static_cast<int64_t*>(contiguous_of(solved.used, hold).data_ptr());
    if (mode == kUnrolled)
      batch.history = input(solved.history, groups * batch.iterations * (n + m));
    const auto output = [&](bool wanted, const std::vector<int64_t>& shape, ScalarType dtype) {
      return Backend::output(given.cost, wanted ? shape : std::vector<int64_t>{0}, dtype);
    };
    const Tensor& cost = given.cost;
    const Tensor d_cost = output(want_cost, {groups, n, cost.size(2)}, cost.scalar_type());
    const Tensor d_other = output(want_other, {groups, m, cost.size(2)}, cost.scalar_type());
    const Tensor d_a = output(want_marginals, {groups, n}, wide);
    const Tensor d_b = output(want_marginals, {groups, m}, wide);
    if (want_cost) batch.d_cost = matrix_of(d_cost);
    if (want_other) batch.d_other = matrix_of(d_other);
    if (want_marginals) {
      batch.d_a = static_cast<Real*>(d_a.data_ptr());
      batch.d_b = static_cast<Real*>(d_b.data_ptr());
    }
    if (groups > 0) Backend::differentiate(batch, cost);
    return {d_cost, d_other, d_a, d_b};
  }

  static Gradients gradient(const Tensor& upstream, const Tensor& cost, const MaybeTensor& other,
                            const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& lengths,
                            const Tensor& numbers, const Tensor& f, const Tensor& g,
                            const Tensor& used, const Tensor& history, int64_t iterations,
                            int64_t ground, int64_t domain, int64_t objective, int64_t mode,
                            bool want_cost, bool want_other, bool want_marginals) {
    const TransportArguments given{cost,    other,      a,      b,      lengths,
                                   numbers, iterations, ground, domain, objective};
    const Solved solved{upstream, f, g, used, history};
    return in_double(cost)
               ? gradient_of<double>(given, solved, mode, want_cost, want_other, want_marginals)
               : gradient_of<float>(given, solved, mode, want_cost, want_other, want_marginals);
  }

  template <class Real>
  static Pairs<Real> make_pairs(const Tensor& x, const Tensor& y, std::vector<Tensor>& hold) {
    STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) &&
                        x.size(2) == y.size(2) && x.scalar_type() == y.scalar_type(),
                    "points are [G, n, d] and [G, m, d] of one type");
    Pairs<Real> p{};
    p.groups = x.size(0), p.n = x.size(1), p.m = y.size(1), p.d = x.size(2);
    p.x = matrix_of(contiguous_of(x, hold)), p.y = matrix_of(contiguous_of(y, hold));
    return p;
  }

  template <class Real>
  static Tensor pairwise_l1_of(const Tensor& x, const Tensor& y) {
    std::vector<Tensor> hold;
    Pairs<Real> p = make_pairs<Real>(x, y, hold);
    const Tensor out = Backend::output(x, {p.groups, p.n, p.m}, wide_type(x));
    p.out = static_cast<Real*>(out.data_ptr());
    if (out.numel() > 0) Backend::distances(p, x);
    return out;
  }

  static Tensor pairwise_l1(const Tensor& x, const Tensor& y) {
    return in_double(x) ? pairwise_l1_of<double>(x, y) : pairwise_l1_of<float>(x, y);
  }

  template <class Real>
  static std::tuple<Tensor, Tensor> pairwise_l1_gradient_of(const Tensor& upstream, const Tensor& x,
                                                            const Tensor& y, bool want_x,
                                                            bool want_y) {
    std::vector<Tensor> hold;
    Pairs<Real> p = make_pairs<Real>(x, y, hold);
    STD_TORCH_CHECK(
        upstream.scalar_type() == wide_type(x) && upstream.numel() == p.groups * p.n * p.m,
        "upstream is [G, n, m], of the result's type");
    p.upstream = static_cast<const Real*>(contiguous_of(upstream, hold).const_data_ptr());
    const auto side = [&](bool wanted, int64_t count, Matrix& rows) {
      const Tensor out = Backend::output(
          x, wanted ? std::vector<int64_t>{p.groups, count, p.d} : std::vector<int64_t>{0},
          x.scalar_type());
      if (wanted && out.numel() > 0) rows = matrix_of(out);
      return out;
    };
    const Tensor d_x = side(want_x, p.n, p.d_x), d_y = side(want_y, p.m, p.d_y);
    Backend::distance_gradient(p, x);
    return {d_x, d_y};
  }

  static std::tuple<Tensor, Tensor> pairwise_l1_gradient(const Tensor& upstream, const Tensor& x,
                                                         const Tensor& y, bool want_x,
                                                         bool want_y) {
    return in_double(x) ? pairwise_l1_gradient_of<double>(upstream, x, y, want_x, want_y)
                        : pairwise_l1_gradient_of<float>(upstream, x, y, want_x, want_y);
  }

  template <class Library>
  static void register_ops(Library& m) {
    m.impl("sinkhorn", TORCH_BOX(&SinkhornOps::sinkhorn));
    m.impl("sinkhorn_gradient", TORCH_BOX(&SinkhornOps::gradient));
    m.impl("pairwise_l1", TORCH_BOX(&SinkhornOps::pairwise_l1));
    m.impl("pairwise_l1_gradient", TORCH_BOX(&SinkhornOps::pairwise_l1_gradient));
  }
};

}  // namespace stillhouse
