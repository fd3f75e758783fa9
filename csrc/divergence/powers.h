// Divergences of powers p^a q^b: alpha-beta and its members that have kernels of their own.
#pragma once
#include "math.h"

namespace stillhouse {

// Above this a power of two is infinite.
SH_INLINE float overflow_limit(float) { return 127; }
SH_INLINE double overflow_limit(double) { return 1023; }

// exp(a lp + b lq); a column that is -inf on both sides is left out whatever the exponents.
template <class Real, class Number>
SH_INLINE Real power_product(const Element<Real>& e, Number a, Number b) {
  const Real a2(Number(a * kLog2e)),
      b2(Number(b * kLog2e));  // an exponent is rounded twice, not more
  const Real x = a == 0 ? b2 * e.lq : b == 0 ? a2 * e.lp : mul_add(a2, e.lp, b2 * e.lq);
  if (a >= 0 && b >= 0 && a + b > 0) return fast_exp2(x);  // a power of a probability is at most 1
  const Real none = a == 0 && b == 0 ? Real(1) : fast_exp2(x);
  const Real power = select(x > Real(overflow_limit(a)), Real(INFINITY), none);
  return select(larger(e.lq, e.lp) > Real(-INFINITY), power, e.q + e.p);
}

// -1 / (a b) sum [p^a q^b - a / s p^s - b / s q^s], s = a + b, and its limits: whatever a and b are, a
// term is a combination of the powers, of powers times delta, and of delta^2.
template <class Real>
struct Powers : Element<Real> {
  Real A, P, Q;  // p^a q^b, p^s, q^s
};
struct AnyAlphaBeta : Sum {
  static constexpr int kTerms = kMostTerms;
  enum { kA, kP, kQ, kPDelta, kQDelta, kDelta2, kSlopeOfPowers, kSlopeOfDelta };
  template <class Real, class Number>
  SH_INLINE static Powers<Real> adjusted(const Element<Real>& e, const KindParams<Number>& k) {
    const Number none(0), s = k.a + k.b;
    return {e, power_product(e, k.a, k.b), power_product(e, s, none), power_product(e, none, s)};
  }
  template <class Real, class Number>
  SH_INLINE static Real mass(const Powers<Real>& e, const KindParams<Number>&) {
    return e.Q;
  }
  template <class Real, class Number>
  SH_INLINE static Real term(const Powers<Real>& e, const KindParams<Number>& k) {
    Real d = Real(k.c[kP]) * e.P + Real(k.c[kQ]) * e.Q;
    if (k.c[kPDelta] != 0) d = d + Real(k.c[kPDelta]) * times(e.P, e.delta);
    if (k.c[kQDelta] != 0) d = d + Real(k.c[kQDelta]) * times(e.Q, e.delta);
    if (k.c[kDelta2] != 0) d = d + Real(k.c[kDelta2]) * times(e.Q, e.delta * e.delta);
    // Where it is infinite, so is the divergence.
    return k.c[kA] == 0 ? d : select(e.A < Real(INFINITY), d + Real(k.c[kA]) * e.A, e.A);
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Powers<Real>& e, const KindParams<Number>& k) {
    if (k.c[kSlopeOfPowers] == 0) return Real(k.c[kSlopeOfDelta]) * times(e.Q, e.delta);
    return Real(k.c[kSlopeOfPowers]) * (e.Q - e.A);
  }
};
// The same for a, b > 0, where no power is infinite: nearly twice as fast.
struct AlphaBeta : AnyAlphaBeta {
  template <class Real, class Number>
  SH_INLINE static Powers<Real> adjusted(const Element<Real>& e, const KindParams<Number>& k) {
    const Real a2(Number(k.a * kLog2e)), b2(Number(k.b * kLog2e)), s2(Number((k.a + k.b) * kLog2e));
    return {e, fast_exp2(mul_add(a2, e.lp, b2 * e.lq)), fast_exp2(s2 * e.lp), fast_exp2(s2 * e.lq)};
  }
  template <class Real, class Number>
  SH_INLINE static Real term(const Powers<Real>& e, const KindParams<Number>& k) {
    return mul_add(Real(k.c[kA]), e.A, mul_add(Real(k.c[kP]), e.P, Real(k.c[kQ]) * e.Q));
  }
  template <class Real, class Number>
  SH_INLINE static Real slope(const Powers<Real>& e, const KindParams<Number>& k) {
    return Real(k.c[kSlopeOfPowers]) * (e.Q - e.A);
  }
};

// [sum p^a q^(1 - a) - 1] / (a (a - 1)): AlphaBeta(a, 1 - a), whose other powers are p and q
struct Amari : Sum {
  static constexpr int kTerms = kMostTerms;
  enum { kA, kP, kQ };
  template <class Real, class Number>
  SH_INLINE static Powers<Real> adjusted(const Element<Real>& e, const KindParams<Number>& k) {
    return {e, power_product(e, k.a, k.b), e.p, e.q};
  }
  template <class Real, class Number>
  SH_INLINE static Real term(const Powers<Real>& e, const KindParams<Number>& k) {
    return mul_add(Real(k.c[kA]), e.A, mul_add(Real(k.c[kP]), e.p, Real(k.c[kQ]) * e.q));
  }
  // Without the multiple of q, so that the sum of slopes holds sum p^a q^(1 - a) to the last place.
  template <class Real, class Number>
  SH_INLINE static Real slope(const Powers<Real>& e, const KindParams<Number>& k) {
    return Real(-k.c[kQ]) * e.A;
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

}  // namespace stillhouse
