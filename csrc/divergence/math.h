// Divergences between two rows of logits: the scalar algebra, host and device.
//
// Student q = softmax(z), teacher p = softmax(t), lq = log q, lp = log p, delta = lp - lq, and
// D = sum_j d(p_j, q_j). With h_j = dD/dlq_j and H = sum_j h_j,
//     dD/dz_j = h_j - q_j H,
// so a divergence is two functions of one element: `term` (d) and `slope` (h, up to a multiple of
// q_j, which cancels in h_j - q_j H); and where D is a function of such a sum, `finish`. The gradient
// to the teacher is the student's gradient of the exchanged divergence (forward KL <-> reverse KL,
// beta <-> 1 - beta, ...).
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

constexpr int kMostTerms = 7, kCoefficients = 8;

template <class Real>
struct Element {
  Real lq, lp;  // log-probabilities, -inf where the logit is -inf
  Real q, p;    // probabilities
  Real delta;   // lp - lq; NaN where both are -inf
  Real z, t;    // tempered logits, without their means where a kind asks for that
};

template <class Real>
struct KindParams {
  Real r[2];                // numbers of the row (RowNumbers)
  Real a, b;                // beta, alpha or the weight t of the kind; a second one of some
  Real c[kCoefficients];    // what a kind makes of them once a call (series.h)
  Real series[kMostTerms];  // Taylor coefficients of d / (mass delta^2)
  Real near;                // |delta| below which the series takes over
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
// teacher over the student, what makes probabilities of the exponentials, means of the tempered logits.
template <class Real, class Scalar>
struct RowScalars {
  Real z_gain, t_gain, ratio;  // ratio = z_gain / t_gain
  MinusTwoPart<Scalar> lse_difference, z_lse, t_lse;
  Scalar q_factor, p_factor;
  MinusTwoPart<Scalar> z_mean, t_mean;
};

// From logits z and t and exponentials q and p; i says whose scalars, where rows lie side by side.
template <class Real, class Scalar, class L>
SH_INLINE Element<L> make_element(const RowScalars<Real, Scalar>& row, L z, L t, L q, L p,
                                  int64_t i) {
  Element<L> e;
  e.lq = mul_add(L(row.z_gain), z, row.z_lse.high[i]) + row.z_lse.low[i];
  e.lp = mul_add(L(row.t_gain), t, row.t_lse.high[i]) + row.t_lse.low[i];
  e.z = mul_add(L(row.z_gain), z, row.z_mean.high[i]) + row.z_mean.low[i];
  e.t = mul_add(L(row.t_gain), t, row.t_mean.high[i]) + row.t_mean.low[i];
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

template <int kTerms, class Real, class Number>
SH_INLINE Real near_term(const Element<Real>& e, const KindParams<Number>& k) {
  Real c(k.series[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) c = horner(c, e.delta, Real(k.series[i]));
  return e.delta * e.delta * c;
}

// D and its derivative with respect to the sum of terms, for a kind that is a function of it.
struct Finished {
  double value, factor;
};

// How slopes h become a gradient: h + q (their sum is known to be -1), h itself, h - basis sum h, or
// h - basis sum (h basis), for a basis that is q unless a kind says otherwise.
enum class Form { unit, direct, sum, projected };

// What a kind must know of whole sides before its terms.
//   means               a times the means, which its logits are without
//   norms               r = {1 / |z|, 1 / |t|}
//   probability_norms   r = {1 / |q|, 1 / |p|}
//   standard            means, and r[0] = T / sqrt(V - 1); logits are divided by their standard deviation
// Columns of -inf are left out.
enum class RowNumbers { none, means, norms, probability_norms, standard };

// What most kinds have in common.
struct Sum {
  static constexpr Form kForm = Form::sum;
  static constexpr RowNumbers kRow = RowNumbers::none;
  static constexpr bool kSeries = true;   // terms near delta = 0 by Taylor's series ...
  static constexpr int kTerms = 5;        // ... of so many terms: more where much cancels
  static constexpr bool kFinish = false;  // D is not the sum of terms itself, but finish() of it
  // What the series is relative to.
  template <class Real, class Number>
  SH_INLINE static Real mass(const Element<Real>& e, const KindParams<Number>&) {
    return e.q;
  }
  template <class Real, class Number>
  SH_INLINE static Real basis(const Element<Real>& e, const KindParams<Number>&) {
    return e.q;
  }
  template <class Number>
  SH_INLINE static Finished finish(double terms, double, const KindParams<Number>&) {
    return {terms, 1};
  }
};

// Whether the gradient is known as soon as the slope is.
template <class Kind>
constexpr bool kOnePass = Kind::kForm == Form::unit || Kind::kForm == Form::direct;
template <class Kind, class Real>
SH_INLINE Real known_gradient(const Element<Real>& e, Real slope) {
  return Kind::kForm == Form::unit ? slope + e.q : slope;
}
// What the sum in the gradient is of.
template <class Kind, class Real>
SH_INLINE Real summand(Real slope, Real basis) {
  return Kind::kForm == Form::projected ? slope * basis : slope;
}

// KL(p || q)
struct ForwardKL : Sum {
  static constexpr Form kForm = Form::unit;
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
struct ReverseKL : Sum {
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
struct JSD : Sum {
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
struct SkewKL : Sum {
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
struct SkewReverseKL : Sum {
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

// -sum p log q
struct SoftCrossEntropy : Sum {
  static constexpr bool kSeries = false;
  static constexpr Form kForm = Form::unit;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>&) {
    return times(e.p, -e.lq);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    return -e.p;
  }
};

// The same to p_t = softmax((1 - t) z + t T), the student's part detached. The kernel puts p_t in the
// teacher's place.
struct TAID : SoftCrossEntropy {};

// sum |p - q| / 2
struct TVD : Sum {
  static constexpr bool kSeries = false;
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

// (1 - a) KL(p || q) + a KL(q || p)
struct SymmetricKL : Sum {
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>& k) {
    return mul_add(Real(1 - k.a), ForwardKL::term(e, k), Real(k.a) * ReverseKL::term(e, k));
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>& k) {
    return mul_add(Real(1 - k.a), e.q - e.p, Real(k.a) * times(e.q, -e.delta));
  }
};

// sum (sqrt p - sqrt q)^2
struct Hellinger : Sum {
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>&) {
    const Real gap = root(e.p) - root(e.q);
    return gap * gap;
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    return root(e.q) * (root(e.q) - root(e.p));
  }
};

// sum (p - q)^2 / q; infinite where q is 0 and p is not
struct Chi2 : Sum {
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>&) {
    const Real gap = e.p - e.q;
    return select(magnitude(gap) > Real(0), gap * (gap / e.q), gap);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    const Real gap = e.q - e.p;
    return select(magnitude(gap) > Real(0), gap * ((e.q + e.p) / e.q), gap);
  }
};

// -log sum min(p, q), the acceptance rate of speculative sampling
struct LogAcceptance : Sum {
  static constexpr bool kSeries = false, kFinish = true;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>&) {
    return select(e.q < e.p, e.q, e.p + (e.q - e.q));
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    return select(e.q < e.p, e.q, e.p - e.p);
  }
  template <class Number>
  SH_INLINE static Finished finish(double terms, double, const KindParams<Number>&) {
    const double acceptance = terms > 1 ? 1 : terms;
    return {-::log(acceptance), -1 / acceptance};
  }
};

// Above this an exponential is infinite.
SH_INLINE float overflow_limit(float) { return 88; }
SH_INLINE double overflow_limit(double) { return 709; }

// exp(a lp + b lq); a column that is -inf on both sides is left out whatever the exponents.
template <class Real, class Number>
SH_INLINE Real power_product(const Element<Real>& e, Number a, Number b) {
  const Real of_p = a == 0 ? Real(0) : Real(a) * e.lp, of_q = b == 0 ? Real(0) : Real(b) * e.lq;
  const Real x = of_p + of_q;
  if (a >= 0 && b >= 0 && a + b > 0) return fast_exp(x);  // a power of a probability is at most 1
  const Real power = select(x > Real(overflow_limit(a)), Real(INFINITY), fast_exp(x));
  return select(larger(e.lq, e.lp) > Real(-INFINITY), power, e.q + e.p);
}

// -1 / (a b) sum [p^a q^b - a / s p^s - b / s q^s], s = a + b, and its limits: whatever a and b are, a
// term is a combination of the powers, of powers times delta, and of delta^2.
struct AlphaBeta : Sum {
  static constexpr int kTerms = kMostTerms;
  enum { kA, kP, kQ, kPDelta, kQDelta, kDelta2, kSlopeOfPowers, kSlopeOfDelta };
  template <class Real, class Number>
  SH_INLINE static Real mass(const Element<Real>& e, const KindParams<Number>& k) {
    return power_product(e, Number(0), k.a + k.b);
  }
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>& k) {
    const Number s = k.a + k.b;
    const Real P = power_product(e, s, Number(0)), Q = power_product(e, Number(0), s);
    Real d = Real(k.c[kP]) * P + Real(k.c[kQ]) * Q;
    if (k.c[kPDelta] != 0) d = d + Real(k.c[kPDelta]) * times(P, e.delta);
    if (k.c[kQDelta] != 0) d = d + Real(k.c[kQDelta]) * times(Q, e.delta);
    if (k.c[kDelta2] != 0) d = d + Real(k.c[kDelta2]) * times(Q, e.delta * e.delta);
    if (k.c[kA] != 0) {  // where it is infinite, so is the divergence
      const Real A = power_product(e, k.a, k.b);
      d = select(A < Real(INFINITY), d + Real(k.c[kA]) * A, A);
    }
    return d;
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>& k) {
    const Real Q = power_product(e, Number(0), k.a + k.b);
    if (k.c[kSlopeOfPowers] == 0) return Real(k.c[kSlopeOfDelta]) * times(Q, e.delta);
    return Real(k.c[kSlopeOfPowers]) * (Q - power_product(e, k.a, k.b));
  }
};

// [sum p^a q^(1 - a) - 1] / (a (a - 1)): AlphaBeta(a, 1 - a), whose other powers are p and q
struct Amari : Sum {
  static constexpr int kTerms = kMostTerms;
  enum { kA, kP, kQ };
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>& k) {
    return mul_add(Real(k.c[kA]), power_product(e, k.a, k.b),
                   mul_add(Real(k.c[kP]), e.p, Real(k.c[kQ]) * e.q));
  }
  // Without the multiple of q, so that the sum of slopes holds sum p^a q^(1 - a) to the last place.
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>& k) {
    return Real(-k.c[kQ]) * power_product(e, k.a, k.b);
  }
};

// log sum p^a q^(1 - a) / (a - 1)
struct Renyi : Amari {
  static constexpr bool kFinish = true;
  template <class Number>
  SH_INLINE static Finished finish(double terms, double slopes, const KindParams<Number>& k) {
    const double a = k.a, change = a * (a - 1) * terms, power = -a * slopes;
    // Far from 1 the power sum itself is the better one.
    const bool near = change > -0.5 && change < 1;
    const double log_power = near ? ::log1p(change) : ::log(power);
    return {log_power / (a - 1), a / (near ? 1 + change : power)};
  }
};

// A difference of logits, 0 where a column is -inf on both sides.
template <class Real>
SH_INLINE Real of_logits(const Element<Real>& e, Real difference) {
  return select(larger(e.lq, e.lp) > Real(-INFINITY), difference, e.q + e.p);
}

// sum (z - t)^2, or of the logits without their means (a = 1)
struct MSELogits : Sum {
  static constexpr bool kSeries = false;
  static constexpr Form kForm = Form::direct;
  static constexpr RowNumbers kRow = RowNumbers::means;
  template <class Real, class Number>
  SH_INLINE static Real gap(const Element<Real>& e, const KindParams<Number>&) {
    return of_logits(e, e.z - e.t);
  }
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>& k) {
    return gap(e, k) * gap(e, k);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>& k) {
    return Real(2) * gap(e, k);
  }
};

// 1 - <z, t> / (|z| |t|) = |z / |z| - t / |t||^2 / 2
struct CosineLogits : Sum {
  static constexpr bool kSeries = false, kFinish = true;
  static constexpr Form kForm = Form::projected;
  static constexpr RowNumbers kRow = RowNumbers::norms;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>& k) {
    return Real(0.5) * slope(e, k) * slope(e, k);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>& k) {
    return of_logits(e, Real(k.r[0]) * e.z - Real(k.r[1]) * e.t);
  }
  template <class Real, class Number>
  SH_INLINE static Real basis(const Element<Real>& e, const KindParams<Number>& k) {
    return of_logits(e, Real(k.r[0]) * e.z);
  }
  template <class Number>
  SH_INLINE static Finished finish(double terms, double, const KindParams<Number>& k) {
    return {terms, double(k.r[0])};
  }
};

// The same of the probabilities.
struct CosineProbs : Sum {
  static constexpr bool kSeries = false;
  static constexpr RowNumbers kRow = RowNumbers::probability_norms;
  template <class Real, class Number>
  SH_INLINE static Real gap(const Element<Real>& e, const KindParams<Number>& k) {
    return Real(k.r[0]) * e.q - Real(k.r[1]) * e.p;
  }
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>& k) {
    return Real(0.5) * gap(e, k) * gap(e, k);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>& k) {
    return Real(k.r[0]) * e.q * gap(e, k);
  }
  template <class Real, class Number>
  SH_INLINE static Real basis(const Element<Real>& e, const KindParams<Number>& k) {
    return (Real(k.r[0]) * e.q) * (Real(k.r[0]) * e.q);
  }
};

// Forward KL of logits that are standardised row by row.
struct StandardizedKL : ForwardKL {
  static constexpr Form kForm = Form::projected;
  static constexpr RowNumbers kRow = RowNumbers::standard;
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    return e.q - e.p;
  }
  template <class Real, class Number>
  SH_INLINE static Real basis(const Element<Real>& e, const KindParams<Number>& k) {
    return select(e.lq > Real(-INFINITY), e.z * Real(k.r[0]), e.q);
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
  X(7, TVD)                    \
  X(8, SoftCrossEntropy)       \
  X(9, SymmetricKL)            \
  X(10, Hellinger)             \
  X(11, Chi2)                  \
  X(12, LogAcceptance)         \
  X(13, AlphaBeta)             \
  X(14, Amari)                 \
  X(15, Renyi)                 \
  X(16, MSELogits)             \
  X(17, CosineLogits)          \
  X(18, CosineProbs)           \
  X(19, StandardizedKL)

constexpr int kCrossEntropy = 0, kTAID = 6;

template <class Kind, class Real, class Number>
SH_INLINE Real kind_term(const Element<Real>& e, const KindParams<Number>& k) {
  const Real far = Kind::term(e, k);
  if constexpr (Kind::kSeries)
    return select(magnitude(e.delta) < Real(k.near),
                  Kind::mass(e, k) * near_term<Kind::kTerms>(e, k), far);
  return far;
}

}  // namespace stillhouse
