// Rows of draft trees on the CPU. Compiled once per instruction set, in a namespace of its own: no torch
// header and no standard-library template here (csrc/rvq/cpu.cpp says why).
#include <type_traits>

#include "../core/simd.h"
#include "kernel.h"

namespace stillhouse {
namespace STILLHOUSE_ISA {
namespace {

#include "../core/lanes.h"

// Spans ahead that numbers are asked for: a hardware prefetcher stops where a page of 4 KiB ends.
constexpr int64_t kAhead = 2;

template <class Real>
struct Span {
  const Real* x;
  int64_t n;
};

// The numbers of a span, and then those that change no maximum (of logits) and no sum: where they lie, if
// nothing has to be done to them, else in `memory`.
template <class Real>
Span<Real> span_of(const TreeRow& row, int64_t columns, int64_t span, Real (&memory)[kSpan]) {
  const int64_t first = span * kSpan, left = columns - first, n = left < kSpan ? left : kSpan;
  if (left > (kAhead + 1) * kSpan) {
    const int64_t size = element_size(row.dtype);
    const char* const next = row.data + (first + kAhead * kSpan) * size;
    for (int64_t at = 0; at < kSpan * size; at += 64) __builtin_prefetch(next + at, 0, 2);
  }
  if (n == kSpan && row.dtype == DtypeOf<Real>::value)
    return {reinterpret_cast<const Real*>(row.data) + first, n};
  with_type(row.dtype, const_cast<char*>(row.data),
            [&](auto* x) { widen_first(n, x + first, memory); });
  if (row.probabilities)
    for (int64_t j = n; j < padded(n); ++j) memory[j] = 0;
  return {memory, n};
}

template <class Real>
SH_INLINE Real span_sum(int64_t n, const Real* x) {
  Lanes<Real> sum;
  each_step<Real>(padded(n), [&](int64_t j, int64_t s) { sum[s] += lane(x + j); });
  return fold_sum(sum);
}

template <class Real>
SH_INLINE void to_probabilities(const TreeRow& row, Span<Real> span, Real* p) {
  const Lane<Real> max{Real(row.max)}, factor{Real(row.factor)}, scale{Real(row.scale)};
  if (row.probabilities)
    each_step<Real>(padded(span.n),
                    [&](int64_t j, int64_t) { store(lane(span.x + j) * scale, p + j); });
  else
    each_step<Real>(padded(span.n), [&](int64_t j, int64_t) {
      store(fast_exp2((lane(span.x + j) - max) * factor) * scale, p + j);
    });
}

template <class Real>
void measure_span(const TreeRow& row, int64_t columns, int64_t span, double& extreme, double& sum) {
  Real memory[kSpan];
  const Span<Real> found = span_of(row, columns, span, memory);
  const Real* const x = found.x;
  const int64_t n = found.n;
  if (row.probabilities) {
    Real least = 0;  // of those below 0, which is what matters
#pragma omp simd reduction(min : least)
    for (int64_t j = 0; j < n; ++j) least = x[j] < least ? x[j] : least;
    extreme = least, sum = span_sum(n, x);
    return;
  }
  const Real most = block_max<Real>(padded(n), x);
  extreme = most, sum = 0;
  if (most == -INFINITY) {
    // Nothing, or NaN, which no maximum sees.
    for (int64_t j = 0; j < n; ++j)
      if (x[j] != x[j]) sum = x[j];
    return;
  }
  const Lane<Real> max{most}, factor{Real(row.factor)};
  Lanes<Real> sums;
  each_step<Real>(
      padded(n), [&](int64_t j, int64_t s) { sums[s] += fast_exp2((lane(x + j) - max) * factor); });
  sum = fold_sum(sums);
}

// What rejections have left of P in a span.
template <class Real>
int64_t left_of(const Residual& r, int64_t span, Real (&p)[kSpan]) {
  const Span<Real> of_target = span_of(r.p, r.columns, span, p);
  const int64_t n = of_target.n, first = span * kSpan;
  to_probabilities(r.p, of_target, p);
  if (r.count == 0) return n;
  Real q[kSpan];
  if (r.q.data != nullptr) {
    to_probabilities(r.q, span_of(r.q, r.columns, span, q), q);
  } else {
    for (int64_t j = 0; j < padded(n); ++j) q[j] = 0;
  }
  for (int64_t i = 0; i < r.count; ++i) {
    const Rejection& by = r.rejections[i];
    const Lane<Real> a{Real(by.a)}, share{Real(by.share)}, scale{Real(by.scale)}, none{Real(0)};
    each_step<Real>(padded(n), [&](int64_t j, int64_t) {
      store(larger(lane(p + j) * a - lane(q + j) * share, none) * scale, p + j);
    });
  }
  for (int64_t i = 0; i < r.patched; ++i) {
    const int64_t at = r.patches[i].token - first;
    if (at >= 0 && at < n) p[at] = Real(r.patches[i].value);
  }
  return n;
}

bool is_double(const TreeRow& p, const TreeRow& q) {
  return p.dtype == Dtype::f64 || (q.data != nullptr && q.dtype == Dtype::f64);
}
// Calls f with a number of the type that a residual is computed in.
template <class F>
SH_INLINE void with_real(const TreeRow& p, const TreeRow& q, F f) {
  is_double(p, q) ? f(double()) : f(float());
}

void measure(const TreeRow& row, int64_t columns, int64_t lo, int64_t hi, double* extremes,
             double* sums) {
  with_real(row, row, [&](auto real) {
    for (int64_t span = lo; span < hi; ++span)
      measure_span<decltype(real)>(row, columns, span, extremes[span], sums[span]);
  });
}

void sums(const Residual& residual, int64_t lo, int64_t hi, double* sums) {
  with_real(residual.p, residual.q, [&](auto real) {
    using Real = decltype(real);
    for (int64_t span = lo; span < hi; ++span) {
      Real p[kSpan];
      sums[span] = span_sum(left_of(residual, span, p), p);
    }
  });
}

void values(const Residual& residual, int64_t span, double* values) {
  with_real(residual.p, residual.q, [&](auto real) {
    decltype(real) p[kSpan];
    const int64_t n = left_of(residual, span, p);
    for (int64_t j = 0; j < n; ++j) values[j] = p[j];
  });
}

void entropies(const Residual& residual, int64_t lo, int64_t hi, double* sums) {
  with_real(residual.p, residual.q, [&](auto real) {
    using Real = decltype(real);
    const Lane<Real> least{Real(1.1754944e-38)};  // where a logarithm still is one; times P it is 0
    for (int64_t span = lo; span < hi; ++span) {
      Real p[kSpan];
      const int64_t n = left_of(residual, span, p);
      Lanes<Real> sum;
      each_step<Real>(padded(n), [&](int64_t j, int64_t s) {
        sum[s] += lane(p + j) * fast_log(larger(lane(p + j), least));
      });
      sums[span] = -fold_sum(sum);
    }
  });
}

// Looks for the place only of what is above `before`: no other can be the row's.
template <class Real>
void largest_of_span(const TreeRow& row, int64_t columns, int64_t span, double before, double& best,
                     int64_t& index) {
  Real memory[kSpan];
  const Span<Real> found = span_of(row, columns, span, memory);
  const Real* const x = found.x;
  const int64_t n = found.n;
  const Real most = block_max<Real>(padded(n), x);
  // 0 x is 0 but for NaN and infinities, of which -inf is allowed.
  const Lane<Real> none{Real(0)};
  Lanes<Real> odd;
  each_step<Real>(padded(n), [&](int64_t j, int64_t s) {
    odd[s] += select(lane(x + j) < none, none, lane(x + j) * none);
  });
  best = most, index = -1;
  if (!(fold_sum(odd) == 0)) return;
  index = 0;
  while (most > before && x[index] != most) ++index;
  index += span * kSpan;
}

void largest(const TreeRow& row, int64_t columns, int64_t lo, int64_t hi, double* best,
             int64_t* index) {
  with_real(row, row, [&](auto real) {
    double before = -INFINITY;
    for (int64_t span = lo; span < hi; ++span) {
      largest_of_span<decltype(real)>(row, columns, span, before, best[span], index[span]);
      before = best[span] > before ? best[span] : before;
    }
  });
}

}  // namespace

extern const TreeKernels tree_kernels;
const TreeKernels tree_kernels = {measure, sums, values, entropies, largest};

}  // namespace STILLHOUSE_ISA
}  // namespace stillhouse
