// Entropic transport on the CPU. Compiled once per instruction set, in a namespace of its own: no
// torch header and no standard-library template here, or the linker might keep the AVX-512 copy of
// a shared inline function and run it on a machine without AVX-512.
//
// A problem goes through steps, each a sweep over its rows in blocks of kBlockRows. Blocks leave
// sums of their own, which are added up in the blocks' order: results do not depend on the number
// of threads.
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernel.h"

namespace stillhouse {
namespace STILLHOUSE_ISA {
namespace {

#include "../core/lanes.h"

#include "costs.h"

#include "solve.h"

#include "reverse.h"

#include "resident.h"

#include "resident_gradient.h"

#include "pairwise.h"

template <class Real>
void block_rows(const Task<Real>& t, int64_t block, const RowScratch<Real>& w) {
  const int64_t width = padded(t.m);
  Real* const columns = t.columns + block * width;
  double* const sums = t.of_block + kBlockSums * block;
  fill(columns, width, t.step == Step::column_maxima ? Real(-INFINITY) : Real(0));
  fill(sums, kBlockSums, 0.);
  if (t.step == Step::gradient && t.other_points != nullptr) {
    const int64_t size = t.batch->point_size() * padded(t.batch->m);
    fill(t.other_points + block * size, size, Real(0));
  }
  const int64_t first = block * kBlockRows;
  const int64_t last = first + kBlockRows < t.n ? first + kBlockRows : t.n;
  for (int64_t i = first; i < last; ++i) {
    switch (t.step) {
      case Step::largest: {
        const Real* cost = cost_row(t, i, w);
        for (int64_t j = 0; j < t.m; ++j)
          if (double(cost[j]) > sums[kLargest] && cost[j] < INFINITY)
            sums[kLargest] = double(cost[j]);
        break;
      }
      case Step::rows:
        update_row(t, i, w, columns, sums);
        break;
      case Step::column_maxima:
        column_maxima(t, i, w, columns);
        break;
      case Step::column_sums:
        column_sums(t, i, w, columns);
        break;
      case Step::result:
        result_row(t, i, w, t.lambda_b != 1 ? columns : nullptr, sums);
        break;
      case Step::sums:
        plan_sums_row(t, i, w, columns);
        break;
      case Step::seeds:
        seeds_row(t, i, w, columns);
        break;
      case Step::reverse:
        reverse_row(t, i, w, columns);
        break;
      case Step::conjugate:
        conjugate_row(t, i, w, columns);
        break;
      case Step::gradient:
        gradient_row(t, block, i, w);
        break;
      case Step::done:
        break;
    }
  }
}

// f() with results below the normal numbers as 0. A plan is full of them where epsilon is small, and
// each costs as much as a hundred others. Inputs stay: float16 is widened through such numbers. No
// destructor puts the mode back: it would bring an exception handler into this object.
template <class F>
void flushing(F f) {
#if defined(__x86_64__)
  constexpr unsigned kFlushResults = 0x8000;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kFlushResults);
  f();
  _mm_setcsr(before);
#else
  f();
#endif
}

template <class Real>
void rows(const Task<Real>& t, int64_t lo, int64_t hi, void* scratch) {
  const RowScratch<Real> w(*t.batch, scratch);
  flushing([&] {
    for (int64_t block = lo; block < hi; ++block) block_rows(t, block, w);
  });
}

// What the gradient begins with, at the solution that it is taken at.
template <class Real>
void start_gradient(Task<Real>& t) {
  const Batch<Real>& b = *t.batch;
  restore(t);
  const bool gives_way = b.rho_a < INFINITY || b.rho_b < INFINITY;
  if (b.mode == kImplicit || (b.objective == kEntropic && gives_way)) {
    t.step = Step::sums;
    return;
  }
  if (by_sides(t)) set_side_seeds(t);
  t.step = b.mode == kEnvelope ? Step::gradient : Step::seeds;
}

template <class Real>
void begin_normal(const Pair<Task<Real>*>& tasks, int64_t count, int64_t group, bool gradient,
                  void* scratch) {
  const RowScratch<Real> w(*tasks.at[0]->batch, scratch);
  for (int64_t i = 0; i < count; ++i) start_task(*tasks.at[i], group + i);
  Pair<bool> done{};
  if (!gradient) done = solve_resident(tasks, count, w);
  for (int64_t i = 0; i < count; ++i) {
    Task<Real>& t = *tasks.at[i];
    if (done.at[i] || (gradient && differentiated_resident(t, w))) continue;
    t.epsilon = 0;
    if (t.batch->annealing > 0)
      t.step = Step::largest;
    else if (gradient)
      start_gradient(t);
    else
      start_iterations(t);
  }
}

template <class Real>
void next_normal(Task<Real>& t, bool gradient) {
  const Batch<Real>& b = *t.batch;
  switch (t.step) {
    case Step::largest:
      t.start = block_total(t, kLargest, true);
      return gradient ? start_gradient(t) : start_iterations(t);
    case Step::rows:
      return after_rows(t);
    case Step::column_maxima:
      return after_maxima(t);
    case Step::column_sums:
      return after_sums(t);
    case Step::result:
      return after_result(t);
    case Step::sums:
      add_blocks(t);
      for (int64_t j = 0; j < padded(t.m); ++j) t.column_sums[j] = Real(t.totals[j]);
      if (by_sides(t)) set_side_seeds(t);
      t.step = b.mode == kEnvelope ? Step::gradient : Step::seeds;
      return;
    case Step::seeds:
      if (b.mode == kImplicit) {
        start_solver(t);
        t.step = t.product > 0 ? Step::conjugate : Step::gradient;
        return;
      }
      take_bar_beta(t, t.iteration, 1);
      load_iteration(t, t.iteration);
      t.step = Step::reverse;
      return;
    case Step::reverse:
      if (t.iteration > 1) {
        const int64_t before = t.iteration - 1;
        take_bar_beta(t, before, annealed(t, before) / t.epsilon);
        return load_iteration(t, before);
      }
      restore(t);
      t.step = Step::gradient;
      return;
    case Step::conjugate:
      if (advance_solver(t)) t.step = Step::gradient;
      return;
    case Step::gradient:
      return after_gradient(t);
    case Step::done:
      return;
  }
}

template <class Real>
void begin(const Pair<Task<Real>*>& tasks, int64_t count, int64_t group, bool gradient,
           void* scratch) {
  flushing([&] { begin_normal(tasks, count, group, gradient, scratch); });
}
template <class Real>
void next(Task<Real>& t, bool gradient) {
  flushing([&] { next_normal(t, gradient); });
}

}  // namespace

extern const SinkhornKernels sinkhorn_kernels;
const SinkhornKernels sinkhorn_kernels = {{begin<float>, rows<float>, next<float>},
                                          {begin<double>, rows<double>, next<double>},
                                          pairwise_l1<float>,
                                          pairwise_l1<double>,
                                          pairwise_l1_gradient<float>,
                                          pairwise_l1_gradient<double>};

}  // namespace STILLHOUSE_ISA
}  // namespace stillhouse
