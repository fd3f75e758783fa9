// Passes 2 and 3 over one block of a row.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// One block as passes 2 and 3 see it: x of both sides, and probabilities up to a factor. Scalar is
// Uniform for a block of one row, Lanes for kLanes rows side by side.
template <class In, class Real, class Scalar>
struct Block {
  int64_t n;  // multiple of kLanes
  const In *z, *t;
  Real *q, *p;
  RowScalars<Real, Scalar> row;
};

// Step i of the elements from j.
template <class In, class Real, class Scalar>
SH_INLINE Element<Lane<Real>> element(const Block<In, Real, Scalar>& b, int64_t j, int64_t i) {
  Lane<Real> z, t, q, p;
  load_step(b.z + j, i, z);
  load_step(b.t + j, i, t);
  load_step(b.q + j, i, q);
  load_step(b.p + j, i, p);
  return make_element(b.row, z, t, q, p, i);
}

// Pass 2 without a gradient. Returns the values' sums.
template <class Kind, class In, class Real, class Scalar>
Lanes<Real> block_value(const Block<In, Real, Scalar> b, const KindParams<Real> k, Prefetch touch) {
  Lanes<Real> value;
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      value[i] += kind_term<Kind>(Kind::adjusted(element(b, j, i), k), k);
    }
  }
  return value;
}

// Pass 2 where no sum is waited for: the gradient, and the value where it is wanted.
template <class Kind, bool kValue, class In, class Out, class Real, class Scalar>
Lanes<Real> block_gradient(const Block<In, Real, Scalar> b, const KindParams<Real> k,
                           const Scalar weight, Out* gradient, Prefetch touch) {
  Lanes<Real> value;
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
    Steps<Lane<Real>, Out> out{gradient + j};
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      const auto e = Kind::adjusted(element(b, j, i), k);
      if constexpr (kValue) value[i] += kind_term<Kind>(e, k);
      out.store(i, known_gradient<Kind>(e, Kind::slope(e, k)) * weight[i]);
    }
  }
  return value;
}

// Pass 2 where H is a sum: the basis (q, mostly) stays in b.q and h in b.p.
template <class Real>
struct Slopes {
  Lanes<Real> value, slope;
};
template <class Kind, bool kValue, class In, class Real, class Scalar>
Slopes<Real> block_slopes(const Block<In, Real, Scalar> b, const KindParams<Real> k,
                          Prefetch touch) {
  Slopes<Real> sums;
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      const int64_t at = j + i * kWidth<Real>;
      const auto e = Kind::adjusted(element(b, j, i), k);
      if constexpr (kValue) sums.value[i] += kind_term<Kind>(e, k);
      const auto h = Kind::slope(e, k);
      const auto basis = Kind::basis(e, k);
      sums.slope[i] += summand<Kind>(h, basis);
      store(basis, b.q + at);
      store(h, b.p + at);
    }
  }
  return sums;
}

// Pass 3.
template <class Out, class Real, class Scalar>
void block_combine(int64_t n, const Real* q, const Real* h, const Scalar H, const Scalar weight,
                   Out* gradient) {
  for (int64_t j = 0; j < n; j += kLanes) {
    Steps<Lane<Real>, Out> out{gradient + j};
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      Lane<Real> qj, hj;
      load_step(q + j, i, qj);
      load_step(h + j, i, hj);
      out.store(i, mul_add(-qj, H[i], hj) * weight[i]);
    }
  }
}

// Sums of |p - q|: all, and where the teacher's logit is above the border.
template <class Real>
struct Gaps {
  Lanes<Real> all, above;
};
template <class In, class Real, class Scalar>
Gaps<Real> block_gaps(const Block<In, Real, Scalar> b, Real border) {
  Gaps<Real> sums;
  for (int64_t j = 0; j < b.n; j += kLanes) {
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      const auto e = element(b, j, i);
      const auto gap = magnitude(e.p - e.q);
      Lane<Real> t;
      load_step(b.t + j, i, t);
      sums.all[i] += gap;
      sums.above[i] += select(t > Lane<Real>(border), gap, Lane<Real>(0));
    }
  }
  return sums;
}

template <class Real>
struct StatSums {
  Lanes<Real> acceptance, below, student_entropy, teacher_entropy;
};
template <class In, class Real, class Scalar>
StatSums<Real> block_stats(const Block<In, Real, Scalar> b) {
  StatSums<Real> sums;
  for (int64_t j = 0; j < b.n; j += kLanes) {
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      const auto e = element(b, j, i);
      const auto is_below = e.q < e.p;
      sums.acceptance[i] += select(is_below, e.q, e.p);
      sums.below[i] += select(is_below, e.q, Lane<Real>(0));
      sums.student_entropy[i] += times(e.q, -e.lq);
      sums.teacher_entropy[i] += times(e.p, -e.lp);
    }
  }
  return sums;
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
  with_type(dtype, row, [&](auto* out) { narrow_first(columns, g, out + start); });
}
