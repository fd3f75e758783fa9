// What a kind makes of its parameters once a call, in double: the Taylor coefficients of its term around
// delta = 0, and coefficients of its own.
// With E = e^delta and r_b = log(1 + b (E - 1)) = log(m / q), every kind is a short expression.
#pragma once
#include <array>
#include <cmath>

#include "math.h"

namespace stillhouse {

constexpr int kOrder = kMostTerms + 3;  // d starts at delta^2; one more for the remainder
using Series = std::array<double, kOrder>;

inline Series multiply(const Series& x, const Series& y) {
  Series z{};
  for (int i = 0; i < kOrder; ++i)
    for (int j = 0; i + j < kOrder; ++j) z[i + j] += x[i] * y[j];
  return z;
}

inline Series combine(double a, const Series& x, double b, const Series& y) {
  Series z{};
  for (int i = 0; i < kOrder; ++i) z[i] = a * x[i] + b * y[i];
  return z;
}

// e^(a delta)
inline Series exp_series(double a = 1) {
  Series e{};
  double coefficient = 1;
  for (int i = 0; i < kOrder; ++i) {
    e[i] = coefficient;
    coefficient *= a / (i + 1);
  }
  return e;
}

// log(1 + b (E - 1)), from r' (1 + b (E - 1)) = b E
inline Series log_mixture_series(double b) {
  const Series e = exp_series();
  Series r{};
  for (int n = 0; n + 1 < kOrder; ++n) {
    double slope = b * e[n];
    for (int k = 1; k <= n; ++k) slope -= b * e[k] * r[n - k + 1] * (n - k + 1);
    r[n + 1] = slope / (n + 1);
  }
  return r;
}

// Of AlphaBeta, in the order of its enum.
inline std::array<double, kCoefficients> alpha_beta(double a, double b) {
  const double s = a + b;
  if (a == 0 && b == 0) return {0, 0, 0, 0, 0, 0.5, 0, -1};
  if (a == 0) return {0, 1 / (b * b), -1 / (b * b), 0, -1 / b, 0, 0, -1};
  if (b == 0) return {0, -1 / (a * a), 1 / (a * a), 1 / a, 0, 0, 1 / a, 0};
  if (s == 0) return {1 / (a * a), 0, -1 / (a * a), 0, -1 / a, 0, 1 / a, 0};
  return {-1 / (a * b), 1 / (b * s), 1 / (a * s), 0, 0, 0, 1 / a, 0};
}

// |delta| at which the first term that is left out is `share` of the first that is not. Beyond it the
// direct form has lost a few digits to cancellation, not all.
inline double near_limit(const Series& d, int terms, double share) {
  const double first = std::abs(d[2]), left_out = std::abs(d[terms + 2]);
  if (!(left_out > share * first)) return 1;
  return std::fmin(1, std::pow(share * first / left_out, 1.0 / terms));
}

// Fills params for kinds by their number; a series stays zero for those without.
template <class Real>
void set_params(int kind, double a, double b, KindParams<Real>& params) {
  Series one{}, delta{}, d{};
  one[0] = 1;
  delta[1] = 1;
  const Series e = exp_series();
  const Series growth = combine(1, e, -1, one);  // E - 1
  const auto forward = [&] { return combine(1, multiply(e, delta), -1, growth); };
  const auto reverse = [&] { return combine(1, growth, -1, delta); };
  std::array<double, kCoefficients> c{};
  int terms = Sum::kTerms;
  switch (kind) {
    case 1:
    case 19:
    case 25:  // p delta - p + q
      d = forward();
      break;
    case 2:  // -q delta - q + p
      d = reverse();
      break;
    case 3: {  // a p (delta - r) - (1 - a) q r
      const Series r = log_mixture_series(a);
      d = combine(a, multiply(e, combine(1, delta, -1, r)), a - 1, r);
      break;
    }
    case 4: {  // p (delta - r) - p + m
      const Series r = log_mixture_series(a);
      d = combine(1, multiply(e, combine(1, delta, -1, r)), a - 1, growth);
      break;
    }
    case 5:  // -q r - q + m
      d = combine(1 - a, growth, -1, log_mixture_series(1 - a));
      break;
    case 9:
      d = combine(1 - a, forward(), a, reverse());
      break;
    case 20:  // 9 with a's of the rows: both parts, to be mixed by the kernel
      d = forward();
      for (int i = 0; i < Sum::kTerms; ++i) c[i] = reverse()[i + 2];
      break;
    case 21:
      d = combine(b, forward(), 0, one);
      break;
    case 10: {  // q (E^(1/2) - 1)^2
      const Series half = combine(1, exp_series(0.5), -1, one);
      d = multiply(half, half);
      break;
    }
    case 11:  // q (E - 1)^2
      d = multiply(growth, growth);
      break;
    case 14:
    case 15:
      b = 1 - a;
      [[fallthrough]];
    case 23:
    case 13: {  // q^s times what stands in AlphaBeta::term, with P / Q = E^s
      c = alpha_beta(a, b);
      terms = kMostTerms;
      const Series P = exp_series(a + b);
      d = combine(c[0], exp_series(a), c[1], P);
      d = combine(1, d, c[2], one);
      d = combine(1, d, c[3], multiply(P, delta));
      d = combine(1, d, c[4], delta);
      d = combine(1, d, c[5], multiply(delta, delta));
      break;
    }
    default:
      break;
  }
  params.a = Real(a);
  params.b = Real(b);
  for (int i = 0; i < kCoefficients; ++i) params.c[i] = Real(c[i]);
  for (int i = 0; i < kMostTerms; ++i) params.series[i] = Real(d[i + 2]);
  const double share = sizeof(Real) == 4 ? 1e-6 : 1e-15;
  params.near = Real(near_limit(d, terms, share));
  if (kind == 20) params.near = Real(std::fmin(params.near, near_limit(reverse(), terms, share)));
}

}  // namespace stillhouse
