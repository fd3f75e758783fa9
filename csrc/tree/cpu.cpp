// Rows of draft trees on the CPU. Compiled once per instruction set, in a namespace of its own: no torch
// header and no standard-library template here (csrc/rvq/cpu.cpp says why).
#include <type_traits>

#include "../core/simd.h"
#include "kernel.h"

namespace stillhouse {
namespace STILLHOUSE_ISA {
namespace {

#include "../core/lanes.h"

// Numbers are asked for some spans ahead, line by line as a span is read: a hardware prefetcher stops where
// a page of 4 KiB ends, and all lines at once would keep the loads waiting.
constexpr int64_t kAhead = 4;

struct Ahead {
  const char* numbers;
  int64_t size;
  // Behind the last of spans lo ... hi lie those of `next`, unless it is null.
  Ahead(const TreeRow& row, const char* next, int64_t span, int64_t lo, int64_t hi)
      : numbers(row.data), size(element_size(row.dtype)) {
    int64_t then = span + kAhead;
    if (then >= hi && next != nullptr)
      numbers = next, then += lo - hi;
    else if (then >= hi)
      then = span;
    numbers += then * kSpan * size;
  }
  SH_INLINE void ask(int64_t j) const { __builtin_prefetch(numbers + j * size, 0, 2); }
};

template <class Real>
struct Span {
  const Real* x;
  int64_t n;
};

int64_t span_length(int64_t columns, int64_t span) {
  const int64_t left = columns - span * kSpan;
  return left < kSpan ? left : kSpan;
}

// The numbers of a span, and then those that change no maximum (of logits) and no sum: where they lie, if
// nothing has to be done to them, else in `memory`.
template <class Real>
Span<Real> span_of(const TreeRow& row, int64_t columns, int64_t span, Real (&memory)[kSpan]) {
  const int64_t first = span * kSpan, left = columns - first, n = span_length(columns, span);
  if (n == kSpan && row.dtype == DtypeOf<Real>::value)
    return {reinterpret_cast<const Real*>(row.data) + first, n};
  with_type(row.dtype, const_cast<char*>(row.data),
            [&](auto* x) { widen_first(n, x + first, memory); });
  if (row.probabilities)
    for (int64_t j = n; j < padded(n); ++j) memory[j] = 0;
  return {memory, n};
}

// The sum of n numbers, a multiple of kLanes, which number(j) gives a lane of from j on.
template <class Real, class F>
SH_INLINE Real sum_of_lanes(int64_t n, F number) {
  Lanes<Real> sum;
  each_step<Real>(n, [&](int64_t j, int64_t s) { sum[s] += number(j); });
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
void measure_span(const TreeRow& row, int64_t columns, int64_t span, double& extreme, double& sum,
                  Real* kept, const Ahead& ahead) {
  alignas(64) Real memory[kSpan];
  const Span<Real> found = span_of(row, columns, span, memory);
  const Real* const x = found.x;
  const int64_t n = found.n;
  if (row.probabilities) {
    Real least = 0;  // of those below 0, which is what matters
#pragma omp simd reduction(min : least)
    for (int64_t j = 0; j < n; ++j) least = x[j] < least ? x[j] : least;
    extreme = least;
    sum = sum_of_lanes<Real>(padded(n), [&](int64_t j) { return ahead.ask(j), lane(x + j); });
    return;
  }
  const Real most = block_max<Real>(padded(n), x);
  extreme = most, sum = 0;
  if (most == -INFINITY) {
    // Nothing, or NaN, which no maximum sees.
    for (int64_t j = 0; j < n; ++j)
      if (x[j] != x[j]) sum = x[j];
    for (int64_t j = 0; kept != nullptr && j < padded(n); ++j) kept[j] = 0;
    return;
  }
  const Lane<Real> max{most}, factor{Real(row.factor)};
  const auto power = [&](int64_t j) {
    return ahead.ask(j), fast_exp2((lane(x + j) - max) * factor);
  };
  if (kept == nullptr)
    sum = sum_of_lanes<Real>(padded(n), power);
  else
    sum = sum_of_lanes<Real>(padded(n), [&](int64_t j) {
      const Lane<Real> each = power(j);
      store(each, kept + j);
      return each;
    });
}

// use(what gives a lane from place j on) of what rejections leave of P: in registers, as long as they are
// few. p_at and q_at give lanes of P and Q.
template <class Real, class P, class Q, class Use>
SH_INLINE void use_left(const Residual& r, int64_t n, P p_at, Q q_at, Use use) {
  const auto rejected = [&](auto before, int64_t i) {
    const Rejection& by = r.rejections[i];
    const Lane<Real> a{Real(by.a)}, share{Real(by.share)}, scale{Real(by.scale)}, none{Real(0)};
    return [=](int64_t j) { return larger(before(j) * a - q_at(j) * share, none) * scale; };
  };
  if (r.count == 0) return use(p_at);
  const auto once = rejected(p_at, 0);
  if (r.count == 1) return use(once);
  const auto twice = rejected(once, 1);
  if (r.count == 2) return use(twice);
  alignas(64) Real left[kSpan];
  const auto stored = [&left](int64_t j) { return lane(left + j); };
  const auto keep = [&](auto numbers) {
    each_step<Real>(padded(n), [&](int64_t j, int64_t) { store(numbers(j), left + j); });
  };
  keep(twice);
  for (int64_t i = 2; i < r.count; ++i) keep(rejected(stored, i));
  use(stored);
}

// The same from the rows of a span.
template <class Real, class Use>
SH_INLINE void left_of(const Residual& r, const Kept& kept, int64_t span, Use use) {
  const int64_t n = span_length(r.columns, span);
  const auto none = [](int64_t) { return Lane<Real>(Real(0)); };
  const bool with_q = r.q.data != nullptr && r.count > 0;
  if (kept.p.numbers != nullptr) {
    const auto again = [span](const KeptRow& row) {
      const Real* const x = reinterpret_cast<const Real*>(row.numbers) + span * kSpan;
      const Lane<Real> by{Real(row.spans[span])};
      return [x, by](int64_t j) { return lane(x + j) * by; };
    };
    const auto p_at = again(kept.p);
    return with_q ? use_left<Real>(r, n, p_at, again(kept.q), use)
                  : use_left<Real>(r, n, p_at, none, use);
  }
  alignas(64) Real p[kSpan], q[kSpan];
  const auto at = [](const Real* x) { return [x](int64_t j) { return lane(x + j); }; };
  to_probabilities(r.p, span_of(r.p, r.columns, span, p), p);
  if (with_q) to_probabilities(r.q, span_of(r.q, r.columns, span, q), q);
  with_q ? use_left<Real>(r, n, at(p), at(q), use) : use_left<Real>(r, n, at(p), none, use);
}

// Stored, with the tokens of children put right.
template <class Real>
int64_t store_left(const Residual& r, const Kept& kept, int64_t span, Real (&left)[kSpan]) {
  const int64_t n = span_length(r.columns, span), first = span * kSpan;
  left_of<Real>(r, kept, span, [&](auto numbers) {
    each_step<Real>(padded(n), [&](int64_t j, int64_t) { store(numbers(j), left + j); });
  });
  for (int64_t i = 0; i < r.patched; ++i) {
    const int64_t at = r.patches[i].token - first;
    if (at >= 0 && at < n) left[at] = Real(r.patches[i].value);
  }
  return n;
}

template <class Real>
Real sum_left(const Residual& r, const Kept& kept, int64_t span) {
  const int64_t n = span_length(r.columns, span);
  for (int64_t i = 0; i < r.patched; ++i)
    if (r.patches[i].token / kSpan == span) {
      alignas(64) Real left[kSpan];
      store_left(r, kept, span, left);
      return sum_of_lanes<Real>(padded(n), [&](int64_t j) { return lane(left + j); });
    }
  Real sum = 0;
  left_of<Real>(r, kept, span, [&](auto numbers) { sum = sum_of_lanes<Real>(padded(n), numbers); });
  return sum;
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
             double* sums, char* kept, const char* next) {
  with_real(row, row, [&](auto real) {
    auto* const numbers = reinterpret_cast<decltype(real)*>(kept);
    for (int64_t span = lo; span < hi; ++span)
      measure_span(row, columns, span, extremes[span], sums[span],
                   kept == nullptr ? nullptr : numbers + span * kSpan,
                   Ahead(row, next, span, lo, hi));
  });
}

void sums(const Residual& residual, const Kept& kept, int64_t lo, int64_t hi, double* sums) {
  with_real(residual.p, residual.q, [&](auto real) {
    using Real = decltype(real);
    for (int64_t span = lo; span < hi; ++span) sums[span] = sum_left<Real>(residual, kept, span);
  });
}

void values(const Residual& residual, const Kept& kept, int64_t span, double* values) {
  with_real(residual.p, residual.q, [&](auto real) {
    alignas(64) decltype(real) p[kSpan];
    const int64_t n = store_left(residual, kept, span, p);
    for (int64_t j = 0; j < n; ++j) values[j] = p[j];
  });
}

void entropies(const Residual& residual, const Kept& kept, int64_t lo, int64_t hi, double* sums) {
  with_real(residual.p, residual.q, [&](auto real) {
    using Real = decltype(real);
    const Lane<Real> least{Real(1.1754944e-38)};  // where a logarithm still is one; times P it is 0
    for (int64_t span = lo; span < hi; ++span) {
      alignas(64) Real p[kSpan];
      const int64_t n = store_left(residual, kept, span, p);
      sums[span] = -sum_of_lanes<Real>(
          padded(n), [&](int64_t j) { return lane(p + j) * fast_log(larger(lane(p + j), least)); });
    }
  });
}

// Looks for the place only of what is above `before`: no other can be the row's.
template <class Real>
void largest_of_span(const TreeRow& row, int64_t columns, int64_t span, double before, double& best,
                     int64_t& index, const Ahead& ahead) {
  alignas(64) Real memory[kSpan];
  const Span<Real> found = span_of(row, columns, span, memory);
  const Real* const x = found.x;
  const int64_t n = found.n;
  const Real most = block_max<Real>(padded(n), x);
  // 0 x is 0 but for NaN and infinities, of which -inf is allowed.
  const Lane<Real> none{Real(0)};
  const Real odd = sum_of_lanes<Real>(padded(n), [&](int64_t j) {
    return ahead.ask(j), select(lane(x + j) < none, none, lane(x + j) * none);
  });
  best = most, index = -1;
  if (!(odd == 0)) return;
  index = 0;
  while (most > before && x[index] != most) ++index;
  index += span * kSpan;
}

void largest(const TreeRow& row, int64_t columns, int64_t lo, int64_t hi, double* best,
             int64_t* index, const char* next) {
  with_real(row, row, [&](auto real) {
    double before = -INFINITY;
    for (int64_t span = lo; span < hi; ++span) {
      largest_of_span<decltype(real)>(row, columns, span, before, best[span], index[span],
                                      Ahead(row, next, span, lo, hi));
      before = best[span] > before ? best[span] : before;
    }
  });
}

}  // namespace

extern const TreeKernels tree_kernels;
const TreeKernels tree_kernels = {measure, sums, values, entropies, largest};

}  // namespace STILLHOUSE_ISA
}  // namespace stillhouse
