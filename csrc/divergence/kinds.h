// The divergences: two functions of one element each (math.h), host and device, and their table.
// A new one: a struct here, a line in SH_DIVERGENCE_KINDS, its series in series.h.
#pragma once
#include "powers.h"

namespace stillhouse {

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
    const Real larger = fast_log(quotient(select(student_larger, e.q, e.p), m));
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
    const Real share = Real(1 - k.a) * quotient(e.q - e.p, m);  // 1 - p / m, exactly 0 at p = q
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
    const Real share = Real(1 - k.a) * quotient(e.p - e.q, m);  // 1 - q / m, exactly 0 at p = q
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

// The same, with the row's own a: how much of sum |p - q| lies outside the teacher's head.
struct AdaptiveKL : SymmetricKL {
  static constexpr RowNumbers kRow = RowNumbers::head;
  // gap: sum |p - q|, of the row and of its tail. c are the coefficients of the reverse KL's series.
  template <class Number>
  SH_INLINE static void set_share(KindParams<Number>& k, double tail_gap, double gap) {
    k.a = Number(select(gap > 0.0, tail_gap / gap, gap));
    for (int i = 0; i < kTerms; ++i) k.series[i] += k.a * (k.c[i] - k.series[i]);
  }
};

// a KL of {y, the rest} + b KL(p || q) of the columns other than the label y, each side on its own with
// sum 1. The elements are those of the rest; the kernel adds what belongs to column y.
struct DKD : Sum {
  static constexpr Form kForm = Form::direct;
  static constexpr RowNumbers kRow = RowNumbers::label;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>& k) {
    return Real(k.b) * ForwardKL::term(e, k);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>& k) {
    return Real(k.r[0]) * e.q - Real(k.b) * e.p;
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

// sum (log q - log p)^2
struct MSELogProbs : Sum {
  static constexpr bool kSeries = false;
  template <class Real, class Number>
  SH_INLINE static Real term(const Element<Real>& e, const KindParams<Number>&) {
    return of_logits(e, e.delta * e.delta);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    return of_logits(e, Real(-2) * e.delta);
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
  // The sides have two gains, and an offset of the logits cancels in neither: delta without the means.
  template <class Real, class Number>
  SH_INLINE static Element<Real> adjusted(Element<Real> e, const KindParams<Number>& k) {
    e.delta = (e.t - e.z) + Real(k.r[1]);
    return e;
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Element<Real>& e, const KindParams<Number>&) {
    return e.q - e.p;
  }
  template <class Real, class Number>
  SH_INLINE static Real basis(const Element<Real>& e, const KindParams<Number>& k) {
    return select(e.lq > Real(-INFINITY), e.z * Real(k.r[0]), e.q);
  }
};

// X(number, type); the numbers are those of stillhouse.ops.kinds. Three are not sums over all pairs of
// columns and have kernels of their own: cross-entropy to labels, number 0, the divergence of sorted rows,
// number 22, and that of the columns which a sparse teacher knows, number 25.
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
  X(19, StandardizedKL)        \
  X(20, AdaptiveKL)            \
  X(21, DKD)                   \
  X(23, AnyAlphaBeta)          \
  X(24, MSELogProbs)

constexpr int kCrossEntropy = 0, kTAID = 6, kAdaptiveKL = 20, kDKD = 21, kULD = 22, kSupportKL = 25;
SH_INLINE bool needs_labels(int kind) { return kind == kCrossEntropy || kind == kDKD; }

// Whether D depends on probabilities alone, so that several columns can be one outcome.
template <class Kind>
constexpr bool kTakesSparse =
    Kind::kRow == RowNumbers::none && (Kind::kForm == Form::unit || Kind::kForm == Form::sum);

// Of an element as Kind::adjusted() makes it.
template <class Kind, class Adjusted, class Number>
SH_INLINE auto kind_term(const Adjusted& e, const KindParams<Number>& k) {
  using Real = decltype(e.q);
  const Real far = Kind::term(e, k);
  if constexpr (Kind::kSeries)
    return select(magnitude(e.delta) < Real(k.near),
                  Kind::mass(e, k) * near_term<Kind::kTerms>(e, k), far);
  return far;
}

}  // namespace stillhouse
