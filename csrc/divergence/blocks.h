// Passes 2 and 3 over one block of a row.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// A double in two parts: logits with an offset make a log-sum-exp large where what is subtracted from
// it leaves little.
template <class Real>
struct TwoPart {
  Real high, low;
  explicit TwoPart(double x) : high(Real(x)), low(Real(x - double(high))) {}
};

// One block as passes 2 and 3 see it: x of both sides, and probabilities up to a factor.
template <class In, class Real>
struct Block {
  int64_t n;  // multiple of kLanes
  const In *z, *t;
  Real z_gain, t_gain, ratio;  // ratio = z_gain / t_gain
  TwoPart<Real> lse_difference, z_lse, t_lse;
  Real *q, *p;
  Real q_factor, p_factor;
};

struct Sums {
  double value = 0, slope = 0;
  double acceptance = 0, below = 0, student_entropy = 0, teacher_entropy = 0;
};

template <class In, class Real>
SH_INLINE Element<Real> element(const Block<In, Real>& b, int64_t j) {
  const Real z = Real(widen(b.z[j])), t = Real(widen(b.t[j]));
  Element<Real> e;
  e.lq = mul_add(b.z_gain, z, -b.z_lse.high) - b.z_lse.low;
  e.lp = mul_add(b.t_gain, t, -b.t_lse.high) - b.t_lse.low;
  e.q = b.q[j] * b.q_factor;
  e.p = b.p[j] * b.p_factor;
  // Not lp - lq: t - z is exact where the gains are equal, and the difference of the log-sum-exps was
  // taken in double.
  const Real gap = mul_add(-b.ratio, z, t);
  e.delta = mul_add(b.t_gain, gap, -b.lse_difference.high) - b.lse_difference.low;
  return e;
}

// Pass 2 without a gradient.
template <class Kind, class In, class Real>
void block_value(const Block<In, Real> b, const KindParams<Real> k, Sums& sums, Prefetch touch) {
  Real value[kLanes] = {};
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) value[i] += kind_term<Kind>(element(b, j + i), k);
  }
  sums.value += fold_sum(value);
}

// Pass 2 where H = -1 is known: value and gradient at once.
template <class Kind, class In, class Out, class Real>
void block_gradient(const Block<In, Real> b, const KindParams<Real> k, Real weight, Out* gradient,
                    Sums& sums, Prefetch touch) {
  Real value[kLanes] = {};
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const Element<Real> e = element(b, j + i);
      value[i] += kind_term<Kind>(e, k);
      narrow((Kind::slope(e, k) + e.q) * weight, gradient[j + i]);
    }
  }
  sums.value += fold_sum(value);
}

// Pass 2 where H is a sum: q stays in b.q and h in b.p.
template <class Kind, class In, class Real>
void block_slopes(const Block<In, Real> b, const KindParams<Real> k, Sums& sums, Prefetch touch) {
  Real value[kLanes] = {}, slope[kLanes] = {};
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const Element<Real> e = element(b, j + i);
      value[i] += kind_term<Kind>(e, k);
      const Real h = Kind::slope(e, k);
      slope[i] += h;
      b.q[j + i] = e.q;
      b.p[j + i] = h;
    }
  }
  sums.value += fold_sum(value);
  sums.slope += fold_sum(slope);
}

// Pass 3.
template <class Out, class Real>
void block_combine(int64_t n, const Real* q, const Real* h, Real H, Real weight, Out* gradient) {
  n &= ~(kLanes - 1);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(mul_add(-q[j], H, h[j]) * weight, gradient[j]);
}

template <class In, class Real>
void block_stats(const Block<In, Real> b, Sums& sums) {
  Real acceptance[kLanes] = {}, below[kLanes] = {}, student[kLanes] = {}, teacher[kLanes] = {};
  for (int64_t j = 0; j < b.n; j += kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const Element<Real> e = element(b, j + i);
      acceptance[i] += e.q < e.p ? e.q : e.p;
      below[i] += e.q < e.p ? e.q : Real(0);
      student[i] += times(e.q, -e.lq);
      teacher[i] += times(e.p, -e.lp);
    }
  }
  sums.acceptance += fold_sum(acceptance);
  sums.below += fold_sum(below);
  sums.student_entropy += fold_sum(student);
  sums.teacher_entropy += fold_sum(teacher);
}

// The last steps of a gradient block that was made in a buffer: label term, soft-cap, storage type.
template <class Real>
void finish_gradient(const Source<Real>& student, const LabelTerm<Real>& label, int64_t start,
                     const Real* x, Real* g, Dtype dtype, char* row) {
  const int64_t columns = student.columns(start), n = padded(columns);
  if (label.on) label.add_gradient(start, n, x, g);
  if (student.cap > 0) {
    const Real inverse = 1 / student.cap;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const Real ratio = x[j] * inverse;
      const Real chained = g[j] * student.scale * (1 - ratio * ratio);
      g[j] = x[j] > -INFINITY ? chained : Real(0);
    }
  }
  with_type(dtype, row, [&](auto* out) {
    out += start;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) narrow(g[j], out[j]);
  });
}
