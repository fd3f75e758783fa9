// Entropic transport on the CPU: threads, scratch, and the ops' registration.
#include "../core/isa.h"
#include "../core/memory.h"
#include "problem.h"

namespace stillhouse {
namespace baseline {
extern const SinkhornKernels sinkhorn_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const SinkhornKernels sinkhorn_kernels;
}
namespace avx512 {
extern const SinkhornKernels sinkhorn_kernels;
}
#endif

namespace {

const SinkhornKernels& kernels() {
#if defined(__x86_64__)
  static const SinkhornKernels* const tables[3] = {
      &baseline::sinkhorn_kernels, &avx2::sinkhorn_kernels, &avx512::sinkhorn_kernels};
#else
  static const SinkhornKernels* const tables[3] = {&baseline::sinkhorn_kernels, nullptr, nullptr};
#endif
  return by_isa(tables);
}
const SinkhornSteps<float>& steps(const Batch<float>&) { return kernels().f32; }
const SinkhornSteps<double>& steps(const Batch<double>&) { return kernels().f64; }

void check_lengths(const int64_t* lengths, int64_t groups, int64_t n, int64_t m) {
  for (int64_t g = 0; g < groups && lengths != nullptr; ++g)
    STD_TORCH_CHECK(1 <= lengths[2 * g] && lengths[2 * g] <= n && 1 <= lengths[2 * g + 1] &&
                        lengths[2 * g + 1] <= m,
                    "lengths of problem ", g, " are outside [1, ", n, "] and [1, ", m, "]");
}

// Many problems: each thread takes whole ones. Few and large: threads share the sweeps of one.
template <class Real>
void solve(const Batch<Real>& batch, bool gradient, const Tensor& like) {
  check_lengths(batch.lengths, batch.groups, batch.n, batch.m);
  const SinkhornSteps<Real>& step = steps(batch);
  Task<Real> task{};
  const int64_t bytes = task.lay_out(batch, gradient, nullptr), of_row = row_scratch_bytes(batch);
  const int64_t at_once = batch.blocks() < 8 ? batch.blocks() : 8;
  if (batch.groups >= 2 * at_once || at_once == 1) {
    const int64_t work = batch.n * batch.m * batch.iterations;
    torch::stable::parallel_for(0, batch.groups, 1 + 65536 / work, [&](int64_t lo, int64_t hi) {
      char* const scratch = static_cast<char*>(thread_scratch(bytes + of_row + 64));
      char* const aligned =
          reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
      Task<Real> own{};
      own.lay_out(batch, gradient, aligned);
      for (int64_t group = lo; group < hi; ++group) {
        step.begin(own, group, gradient, aligned + bytes);
        for (; own.step != Step::done; step.next(own, gradient))
          step.rows(own, 0, own.blocks, aligned + bytes);
      }
    });
    return;
  }
  const Tensor memory = torch::stable::new_empty(like, {bytes + 64}, ScalarType::Byte);
  task.lay_out(batch, gradient,
               reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data_ptr()) + 63) &
                                       ~uintptr_t(63)));
  for (int64_t group = 0; group < batch.groups; ++group) {
    step.begin(task, group, gradient, thread_scratch(of_row));
    for (; task.step != Step::done; step.next(task, gradient)) {
      torch::stable::parallel_for(0, task.blocks, 1, [&](int64_t lo, int64_t hi) {
        step.rows(task, lo, hi, thread_scratch(of_row));
      });
    }
  }
}

using Solution = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Real>
Solution sinkhorn_of(const TransportArguments& given, bool want_plan, bool want_history) {
  std::vector<Tensor> hold;
  Batch<Real> batch = make_batch<Real>(given, hold);
  const ScalarType wide = wide_type(given.cost);
  const auto output = [&](const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_empty(given.cost, shape, dtype);
  };
  const int64_t groups = batch.groups, n = batch.n, m = batch.m;
  const Tensor value = output({groups}, wide), error = output({groups}, wide);
  const Tensor f = output({groups, n}, wide), g = output({groups, m}, wide);
  const Tensor used = output({groups}, ScalarType::Long);
  const Tensor plan = want_plan ? output({groups, n, m}, wide) : output({0}, wide);
  const Tensor history =
      want_history ? output({groups, batch.iterations, n + m}, wide) : output({0}, wide);
  if (want_plan) advise_huge_pages(plan, plan.numel() * int64_t(sizeof(Real)));
  batch.value = static_cast<Real*>(value.data_ptr());
  batch.error = static_cast<Real*>(error.data_ptr());
  batch.f = static_cast<Real*>(f.data_ptr());
  batch.g = static_cast<Real*>(g.data_ptr());
  batch.used = static_cast<int64_t*>(used.data_ptr());
  batch.plan = want_plan ? static_cast<Real*>(plan.data_ptr()) : nullptr;
  batch.history = want_history ? static_cast<Real*>(history.data_ptr()) : nullptr;
  if (groups > 0) solve(batch, false, given.cost);
  return {value, plan, f, g, used, error, history};
}

Solution sinkhorn(const Tensor& cost, const MaybeTensor& other, const MaybeTensor& a,
                  const MaybeTensor& b, const MaybeTensor& lengths, const Tensor& numbers,
                  int64_t iterations, int64_t ground, int64_t domain, int64_t objective,
                  int64_t mode, bool want_plan) {
  const TransportArguments given{cost,    other,      a,      b,      lengths,
                                 numbers, iterations, ground, domain, objective};
  // The unrolled gradient goes back through all of them.
  const bool want_history = mode == kUnrolled;
  return cost.scalar_type() == ScalarType::Double
             ? sinkhorn_of<double>(given, want_plan, want_history)
             : sinkhorn_of<float>(given, want_plan, want_history);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Solved {
  const Tensor &upstream, &f, &g, &used, &history;
};

template <class Real>
Gradients gradient_of(const TransportArguments& given, const Solved& solved, int64_t mode,
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
  for (int64_t g = 0; g < groups; ++g)
    STD_TORCH_CHECK(1 <= batch.used[g] && batch.used[g] <= batch.iterations, "problem ", g,
                    " used another number of iterations than there are");
  if (mode == kUnrolled) batch.history = input(solved.history, groups * batch.iterations * (n + m));
  const auto output = [&](bool wanted, const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_empty(given.cost, wanted ? shape : std::vector<int64_t>{0}, dtype);
  };
  const Tensor& cost = given.cost;
  const Tensor d_cost = output(want_cost, {groups, n, cost.size(2)}, cost.scalar_type());
  const Tensor d_other = output(want_other, {groups, m, cost.size(2)}, cost.scalar_type());
  const Tensor d_a = output(want_marginals, {groups, n}, wide);
  const Tensor d_b = output(want_marginals, {groups, m}, wide);
  if (want_cost) {
    advise_huge_pages(d_cost, d_cost.numel() * element_size(dtype_of(cost)));
    batch.d_cost = matrix_of(d_cost);
  }
  if (want_other) batch.d_other = matrix_of(d_other);
  if (want_marginals) {
    batch.d_a = static_cast<Real*>(d_a.data_ptr());
    batch.d_b = static_cast<Real*>(d_b.data_ptr());
  }
  if (groups > 0) solve(batch, true, cost);
  return {d_cost, d_other, d_a, d_b};
}

Gradients sinkhorn_gradient(const Tensor& upstream, const Tensor& cost, const MaybeTensor& other,
                            const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& lengths,
                            const Tensor& numbers, const Tensor& f, const Tensor& g,
                            const Tensor& used, const Tensor& history, int64_t iterations,
                            int64_t ground, int64_t domain, int64_t objective, int64_t mode,
                            bool want_cost, bool want_other, bool want_marginals) {
  const TransportArguments given{cost,    other,      a,      b,      lengths,
                                 numbers, iterations, ground, domain, objective};
  const Solved solved{upstream, f, g, used, history};
  return cost.scalar_type() == ScalarType::Double
             ? gradient_of<double>(given, solved, mode, want_cost, want_other, want_marginals)
             : gradient_of<float>(given, solved, mode, want_cost, want_other, want_marginals);
}

void l1(const Pairs<float>& p, int64_t lo, int64_t hi) { kernels().l1_f32(p, lo, hi); }
void l1(const Pairs<double>& p, int64_t lo, int64_t hi) { kernels().l1_f64(p, lo, hi); }
void l1_gradient(const Pairs<float>& p, bool of_x, int64_t lo, int64_t hi) {
  kernels().l1_gradient_f32(p, of_x, lo, hi);
}
void l1_gradient(const Pairs<double>& p, bool of_x, int64_t lo, int64_t hi) {
  kernels().l1_gradient_f64(p, of_x, lo, hi);
}

template <class Real>
Pairs<Real> make_pairs(const Tensor& x, const Tensor& y, std::vector<Tensor>& hold) {
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) &&
                      x.size(2) == y.size(2) && x.scalar_type() == y.scalar_type(),
                  "points are [G, n, d] and [G, m, d] of one type");
  Pairs<Real> p{};
  p.groups = x.size(0), p.n = x.size(1), p.m = y.size(1), p.d = x.size(2);
  p.x = matrix_of(contiguous_of(x, hold)), p.y = matrix_of(contiguous_of(y, hold));
  return p;
}

template <class Real>
Tensor pairwise_l1_of(const Tensor& x, const Tensor& y) {
  std::vector<Tensor> hold;
  Pairs<Real> p = make_pairs<Real>(x, y, hold);
  const Tensor out = torch::stable::new_empty(x, {p.groups, p.n, p.m}, wide_type(x));
  p.out = static_cast<Real*>(out.data_ptr());
  if (out.numel() > 0)
    torch::stable::parallel_for(0, p.groups * p.n, 1 + 65536 / (p.m * p.d + 1),
                                [&](int64_t lo, int64_t hi) { l1(p, lo, hi); });
  return out;
}

Tensor pairwise_l1(const Tensor& x, const Tensor& y) {
  return x.scalar_type() == ScalarType::Double ? pairwise_l1_of<double>(x, y)
                                               : pairwise_l1_of<float>(x, y);
}

template <class Real>
std::tuple<Tensor, Tensor> pairwise_l1_gradient_of(const Tensor& upstream, const Tensor& x,
                                                   const Tensor& y, bool want_x, bool want_y) {
  std::vector<Tensor> hold;
  Pairs<Real> p = make_pairs<Real>(x, y, hold);
  STD_TORCH_CHECK(
      upstream.scalar_type() == wide_type(x) && upstream.numel() == p.groups * p.n * p.m,
      "upstream is [G, n, m], of the result's type");
  p.upstream = static_cast<const Real*>(contiguous_of(upstream, hold).const_data_ptr());
  const auto side = [&](bool wanted, int64_t count, Matrix& rows, bool of_x) {
    Tensor out = torch::stable::new_empty(
        x, wanted ? std::vector<int64_t>{p.groups, count, p.d} : std::vector<int64_t>{0});
    if (!wanted || out.numel() == 0) return out;
    rows = matrix_of(out);
    torch::stable::parallel_for(0, p.groups * count, 1 + 65536 / (p.n * p.m * p.d / count + 1),
                                [&](int64_t lo, int64_t hi) { l1_gradient(p, of_x, lo, hi); });
    return out;
  };
  const Tensor d_x = side(want_x, p.n, p.d_x, true);
  return {d_x, side(want_y, p.m, p.d_y, false)};
}

std::tuple<Tensor, Tensor> pairwise_l1_gradient(const Tensor& upstream, const Tensor& x,
                                                const Tensor& y, bool want_x, bool want_y) {
  return x.scalar_type() == ScalarType::Double
             ? pairwise_l1_gradient_of<double>(upstream, x, y, want_x, want_y)
             : pairwise_l1_gradient_of<float>(upstream, x, y, want_x, want_y);
}

}  // namespace
}  // namespace stillhouse

STABLE_TORCH_LIBRARY_IMPL(stillhouse, CPU, m) {
  m.impl("sinkhorn", TORCH_BOX(&stillhouse::sinkhorn));
  m.impl("sinkhorn_gradient", TORCH_BOX(&stillhouse::sinkhorn_gradient));
  m.impl("pairwise_l1", TORCH_BOX(&stillhouse::pairwise_l1));
  m.impl("pairwise_l1_gradient", TORCH_BOX(&stillhouse::pairwise_l1_gradient));
}
