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
// What a kind may say of itself beyond that stands in Sum. The kinds are in kinds.h.
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
  SH_INLINE Uniform(Real value = 0) : value(value) {}
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
  return {kept(-Real(x)), kept(-Real(x - double(Real(x))))};
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
//   means               the means, which its logits are without, if a is not 0
//   norms               r = {1 / |z|, 1 / |t|}
//   probability_norms   r = {1 / |q|, 1 / |p|}
//   standard            means, r[0] = T / sqrt(V - 1), r[1] the difference of the log-sum-exps of logits
//                       without their means; logits are divided by their standard deviations
//   head                a becomes the tail's share of sum |p - q|, the head being the teacher's largest
//                       probabilities whose sum stays within a, and at least the largest
//   label               both rows without the label's column y; r[0] = b - a (q_y - p_y) of whole rows
// Columns of -inf are left out.
enum class RowNumbers { none, means, norms, probability_norms, standard, head, label };

// Of the logits x of a side that are not -inf: how many, their sum, and that of the squares about the
// mean (standard) or about 0.
struct Moments {
  double count, sum, squares;
};
template <class Kind>
constexpr bool kTakesMean = Kind::kRow == RowNumbers::means || Kind::kRow == RowNumbers::standard;
template <class Kind>
constexpr bool kTakesSquares =
    Kind::kRow == RowNumbers::norms || Kind::kRow == RowNumbers::standard;

// What a kind makes of them: a number of r, for standardised logits another gain. Returns the mean of the
// tempered logits, 0 for a kind that does not ask for it.
template <class Kind, class Real>
SH_INLINE double take_moments(const Moments& m, double temperature, Real& gain, Real& number) {
  if (Kind::kRow == RowNumbers::norms) number = Real(1 / (double(gain) * ::sqrt(m.squares)));
  if (Kind::kRow == RowNumbers::standard) {
    gain = Real(1 / (temperature * ::sqrt(m.squares / (m.count - 1))));
    number = Real(temperature / ::sqrt(m.count - 1));
  }
  return kTakesMean<Kind> ? double(gain) * (m.sum / m.count) : 0;
}

// A label's column y beside the rest of its row pair, by the tempered logits of y and the log-sum-exps
// of the rest.
struct LabelColumn {
  double q = 0, p = 0, q_rest = 0, p_rest = 0;
  double z_lse = 0, t_lse = 0;  // of whole rows
  double kl = 0;                // of {y, the rest}, teacher || student

  LabelColumn() = default;
  SH_INLINE LabelColumn(double z, double z_rest, double t, double t_rest)
      : z_lse(log_sum(z, z_rest)), t_lse(log_sum(t, t_rest)) {
    q = ::exp(z - z_lse), q_rest = ::exp(z_rest - z_lse);
    p = ::exp(t - t_lse), p_rest = ::exp(t_rest - t_lse);
    const double difference = t_lse - z_lse;
    kl = times(p, (t - z) - difference) + times(p_rest, (t_rest - z_rest) - difference);
  }
  SH_INLINE static double log_sum(double x, double y) {
    const double top = larger(x, y);
    return top > -INFINITY ? top + ::log1p(::exp(-magnitude(x - y))) : x + y;
  }
  // Its part of the row's statistics.
  SH_INLINE double acceptance() const { return q < p ? q : p + (q - q); }
  SH_INLINE double below() const { return q < p ? q : 0; }
  SH_INLINE double student_entropy() const { return times(q, -::log(q)); }
  SH_INLINE double teacher_entropy() const { return times(p, -::log(p)); }
  // The scalars of the whole row, for an element of the rest.
  template <class Scalars>
  SH_INLINE Scalars whole(Scalars row) const {
    using Scalar = decltype(row.q_factor);
    using Real = decltype(row.z_gain);
    row.z_lse = stillhouse::minus_two_part<Real>(z_lse);
    row.t_lse = stillhouse::minus_two_part<Real>(t_lse);
    row.q_factor = Scalar(row.q_factor.value * Real(q_rest));
    row.p_factor = Scalar(row.p_factor.value * Real(p_rest));
    return row;
  }
};

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
  // The element as terms take it.
  template <class Real, class Number>
  SH_INLINE static Element<Real> adjusted(const Element<Real>& e, const KindParams<Number>&) {
    return e;
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

}  // namespace stillhouse
