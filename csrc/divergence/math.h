// Divergences between two rows of logits: the scalar algebra, host and device.
//
// Student q = softmax(z), teacher p = softmax(t), lq = log q, lp = log p, delta = lp - lq, and
// D = sum_j d(p_j, q_j). With h_j = dD/dlq_j and H = sum_j h_j,
//     dD/dz_j = h_j - q_j H,
// so a divergence is two functions of one element: `term` (d) and `slope` (h, up to a multiple of
// q_j, which cancels in h_j - q_j H). The gradient to the teacher is the student's gradient of the
// exchanged divergence (forward KL <-> reverse KL, beta <-> 1 - beta, ...).
//
// Values are kept in Bregman form, every term >= 0 (sum p = sum q, so adding q - p changes nothing).
// Near delta = 0 such a term is a difference of nearly equal numbers; there it is evaluated as
// q delta^2 (c_0 + c_1 delta + ...), with c the Taylor coefficients of the kind (series.h). A KL of
// 5e-7 between float32 rows is right to 1e-4.
//
// A new divergence: one struct here, one line in SH_DIVERGENCE_KINDS, its series in series.h.
#pragma once
#include "../core/simd.h"

namespace stillhouse {

constexpr int kSeriesTerms = 5;

template <class Real>
struct Element {
  Real lq, lp;  // log-probabilities, -inf where the logit is -inf
  Real q, p;    // probabilities
  Real delta;   // lp - lq; NaN where both are -inf
};

template <class Real>
struct KindParams {
  Real a;                     // beta, alpha or the weight t of the kind
  Real series[kSeriesTerms];  // Taylor coefficients of d / (q delta^2)
};

// A number of a row where kLanes rows side by side have one each.
template <class Real>
struct Uniform {
  Real value;
  SH_INLINE Uniform(Real value) : value(value) {}
  SH_INLINE Lane<Real> operator[](int64_t) const { return Lane<Real>(value); }
};

// Minus a double in two parts: logits with an offset make a log-sum-exp large where what is subtracted
// from it leaves little.
template <class Scalar>
struct MinusTwoPart {
  Scalar high, low;
};
template <class Real>
SH_INLINE MinusTwoPart<Uniform<Real>> minus_two_part(double x) {
  return {-Real(x), -Real(x - double(Real(x)))};
}

// What a row's elements have in common: gains of the logits, log-sum-exps of both sides and of the
// teacher over the student, and what makes probabilities of the exponentials.
template <class Real, class Scalar>
struct RowScalars {
  Real z_gain, t_gain, ratio;  // ratio = z_gain / t_gain
  MinusTwoPart<Scalar> lse_difference, z_lse, t_lse;
  Scalar q_factor, p_factor;
};

// From logits z and t and exponentials q and p; i says whose scalars, where rows lie side by side.
template <class Real, class Scalar, class L>
SH_INLINE Element<L> make_element(const RowScalars<Real, Scalar>& row, L z, L t, L q, L p,
                                  int64_t i) {
  Element<L> e;
  e.lq = mul_add(L(row.z_gain), z, row.z_lse.high[i]) + row.z_lse.low[i];
  e.lp = mul_add(L(row.t_gain), t, row.t_lse.high[i]) + row.t_lse.low[i];
  e.q = q * row.q_factor[i];
  e.p = p * row.p_factor[i];
  // Not lp - lq: t - z is exact where the gains are equal, and the difference of the log-sum-exps was
  // taken in double.
  const L gap = mul_add(L(-row.ratio), z, t);
  e.delta = mul_add(L(row.t_gain), gap, row.lse_difference.high[i]) + row.lse_difference.low[i];
  return e;
}

// mass * x with 0 * (+-inf) = 0. A NaN must reach the value and the gradient in every kind, so what is
// left where a comparison with it fails has to hold it.
template <class Real>
SH_INLINE Real times(Real mass, Real x) {
  return select(mass > Real(0), mass * x, mass);
}

// |delta| below which the series takes over: its terms leave 1e-6 (float) and 1e-15 (double) there, the
// direct form loses 1e-5 and 1e-10 of its value.
SH_INLINE float near_limit(float) { return 0.15f; }
SH_INLINE double near_limit(double) { return 1e-3; }

template <class Real, class Number>
SH_INLINE Real near_term(const Element<Real>& e, const KindParams<Number>& k) {
  Real c(k.series[kSeriesTerms - 1]);
  for (int i = kSeriesTerms - 2; i >= 0; --i) c = horner(c, e.delta, Real(k.series[i]));
  return e.q * (e.delta * e.delta) * c;
}

// KL(p || q)
struct ForwardKL {
  static constexpr bool kSeries = true, kUnitSlope = true;  // sum of slopes is -1
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>&) {
    return times(e.p, e.delta) + (e.q - e.p);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    return -e.p;
  }
};

// KL(q || p)
struct ReverseKL {
  static constexpr bool kSeries = true, kUnitSlope = false;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>&) {
    return times(e.q, -e.delta) + (e.p - e.q);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    return times(e.q, -e.delta);
  }
};

// log(q / m) and log(p / m) for m = b p + (1 - b) q, through the larger of p and q, so that the
// argument of the logarithm stays within [1, 1 / min(b, 1 - b)].
template <class Real>
struct MixtureLogs {
  Real q_over_m, p_over_m;
  SH_INLINE MixtureLogs(const Element<Real>& e, Real b) {
    const Real m = mul_add(b, e.p, (Real(1) - b) * e.q);
    const auto student_larger = e.q > e.p;
    const Real larger = fast_log(select(student_larger, e.q, e.p) / m);
    q_over_m = select(student_larger, larger, larger - e.delta);
    p_over_m = select(student_larger, larger + e.delta, larger);
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
struct JSD {
  static constexpr bool kSeries = true, kUnitSlope = false;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>& k) {
    const MixtureLogs<Real> logs(e, Real(k.a));
    return mul_add(Real(k.a), times(e.p, logs.p_over_m), Real(1 - k.a) * times(e.q, logs.q_over_m));
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>& k) {
    const MixtureLogs<Real> logs(e, Real(k.a));
    return Real(1 - k.a) * times(e.q, logs.q_over_m);
  }
};

// KL(p || m), m = alpha p + (1 - alpha) q
struct SkewKL {
  static constexpr bool kSeries = true, kUnitSlope = false;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>& k) {
    const Real m = mul_add(Real(k.a), e.p, Real(1 - k.a) * e.q);
    return times(e.p, MixtureLogs<Real>(e, Real(k.a)).p_over_m) + (m - e.p);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>& k) {
    const Real m = mul_add(Real(k.a), e.p, Real(1 - k.a) * e.q);
    const Real share = Real(1 - k.a) * (e.q - e.p) / m;  // 1 - p / m, exactly 0 at p = q
    return times(e.q, Real(1 - k.a) * share);
  }
};

// KL(q || m), m = (1 - alpha) p + alpha q
struct SkewReverseKL {
  static constexpr bool kSeries = true, kUnitSlope = false;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>& k) {
    const Real m = mul_add(Real(k.a), e.q, Real(1 - k.a) * e.p);
    return times(e.q, MixtureLogs<Real>(e, Real(1 - k.a)).q_over_m) + (m - e.q);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>& k) {
    const Real m = mul_add(Real(k.a), e.q, Real(1 - k.a) * e.p);
    const Real share = Real(1 - k.a) * (e.p - e.q) / m;  // 1 - q / m, exactly 0 at p = q
    return times(e.q, MixtureLogs<Real>(e, Real(1 - k.a)).q_over_m + Real(k.a) * share);
  }
};

// Cross-entropy to p_t = softmax((1 - t) z + t T), the student's part detached (TAID). The kernel
// puts p_t in the teacher's place.
struct TAID {
  static constexpr bool kSeries = false, kUnitSlope = true;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>&) {
    return times(e.p, -e.lq);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    return -e.p;
  }
};

// sum |p - q| / 2
struct TVD {
  static constexpr bool kSeries = false, kUnitSlope = false;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>&) {
    return Real(0.5) * magnitude(e.p - e.q);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    const Real half = Real(0.5) * e.q;
    return select(e.q > e.p, half, select(e.q < e.p, -half, e.p - e.q));
  }
};

// X(number, type); the numbers are those of stillhouse.ops.kinds. Cross-entropy to labels, number
// 0, has no teacher: it is the label term of the kernel alone.
#define SH_DIVERGENCE_KINDS(X) \
  X(1, ForwardKL)              \
  X(2, ReverseKL)              \
  X(3, JSD)                    \
  X(4, SkewKL)                 \
  X(5, SkewReverseKL)          \
  X(6, TAID)                   \
  X(7, TVD)

constexpr int kCrossEntropy = 0, kTAID = 6;

template <class Kind, class Real, class Number>
SH_INLINE Real kind_term(const Element<Real>& e, const KindParams<Number>& k) {
  const Real far = Kind::term(e, k);
  if constexpr (Kind::kSeries)
    return select(magnitude(e.delta) < Real(near_limit(k.a)), near_term(e, k), far);
  return far;
}

}  // namespace stillhouse
