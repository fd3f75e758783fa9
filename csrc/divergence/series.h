// Taylor coefficients of each kind's term around delta = 0, computed once a call in double.
// With E = e^delta and r_b = log(1 + b (E - 1)) = log(m / q), every kind is a short expression.
#pragma once
#include <array>

#include "math.h"

namespace stillhouse {

constexpr int kOrder = kSeriesTerms + 2;  // d starts at delta^2
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

inline Series exp_series() {
  Series e{};
  double factorial = 1;
  for (int i = 0; i < kOrder; ++i) {
    e[i] = 1 / factorial;
    factorial *= i + 1;
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

// Fills params.series for a kind with kSeries; the others leave it at zero.
template <class Real>
void set_series(int kind, double a, KindParams<Real>& params) {
  Series one{}, delta{}, d{};
  one[0] = 1;
  delta[1] = 1;
  const Series e = exp_series();
  const Series growth = combine(1, e, -1, one);  // E - 1
  switch (kind) {
    case 1:  // p delta - p + q
      d = combine(1, multiply(e, delta), -1, growth);
      break;
    case 2:  // -q delta - q + p
      d = combine(1, growth, -1, delta);
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
    default:
      break;
  }
  params.a = Real(a);
  for (int i = 0; i < kSeriesTerms; ++i) params.series[i] = Real(d[i + 2]);
}

}  // namespace stillhouse
