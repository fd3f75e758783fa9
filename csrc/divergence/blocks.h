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

// Elements j ... j + kWidth - 1.
template <class In, class Real>
SH_INLINE Element<Lane<Real>> element(const Block<In, Real>& b, int64_t j) {
  using L = Lane<Real>;
  L z, t, q, p;
  load(b.z + j, z);
  load(b.t + j, t);
  load(b.q + j, q);
  load(b.p + j, p);
  Element<L> e;
  e.lq = mul_add(L(b.z_gain), z, L(-b.z_lse.high)) - L(b.z_lse.low);
  e.lp = mul_add(L(b.t_gain), t, L(-b.t_lse.high)) - L(b.t_lse.low);
  e.q = q * L(b.q_factor);
  e.p = p * L(b.p_factor);
  // Not lp - lq: t - z is exact where the gains are equal, and the difference of the log-sum-exps was
  // taken in double.
  const L gap = mul_add(L(-b.ratio), z, t);
  e.delta = mul_add(L(b.t_gain), gap, L(-b.lse_difference.high)) - L(b.lse_difference.low);
  return e;
}

// Pass 2 without a gradient.
template <class Kind, class In, class Real>
void block_value(const Block<In, Real> b, const KindParams<Real> k, Sums& sums, Prefetch touch) {
  Lanes<Real> value;
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      value.at[i] += kind_term<Kind>(element(b, j + i * kWidth<Real>), k);
    }
  }
  sums.value += fold_sum(value);
}

// Pass 2 where H = -1 is known: value and gradient at once.
template <class Kind, class In, class Out, class Real>
void block_gradient(const Block<In, Real> b, const KindParams<Real> k, Real weight, Out* gradient,
                    Sums& sums, Prefetch touch) {
  Lanes<Real> value;
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      const int64_t at = j + i * kWidth<Real>;
      const auto e = element(b, at);
      value.at[i] += kind_term<Kind>(e, k);
      store((Kind::slope(e, k) + e.q) * Lane<Real>(weight), gradient + at);
    }
  }
  sums.value += fold_sum(value);
}

// Pass 2 where H is a sum: q stays in b.q and h in b.p.
template <class Kind, class In, class Real>
void block_slopes(const Block<In, Real> b, const KindParams<Real> k, Sums& sums, Prefetch touch) {
  Lanes<Real> value, slope;
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      const int64_t at = j + i * kWidth<Real>;
      const auto e = element(b, at);
      value.at[i] += kind_term<Kind>(e, k);
      const auto h = Kind::slope(e, k);
      slope.at[i] += h;
      store(e.q, b.q + at);
      store(h, b.p + at);
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
  for (int64_t j = 0; j < n; j += kWidth<Real>) {
    Lane<Real> qj, hj;
    load(q + j, qj);
    load(h + j, hj);
    store(mul_add(-qj, Lane<Real>(H), hj) * Lane<Real>(weight), gradient + j);
  }
}

template <class In, class Real>
void block_stats(const Block<In, Real> b, Sums& sums) {
  Lanes<Real> acceptance, below, student, teacher;
  for (int64_t j = 0; j < b.n; j += kLanes) {
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      const auto e = element(b, j + i * kWidth<Real>);
      const auto is_below = e.q < e.p;
      acceptance.at[i] += select(is_below, e.q, e.p);
      below.at[i] += select(is_below, e.q, Lane<Real>(0));
      student.at[i] += times(e.q, -e.lq);
      teacher.at[i] += times(e.p, -e.lp);
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
