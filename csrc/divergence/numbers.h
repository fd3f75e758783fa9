// The numbers of a row that some kinds need before their terms (RowNumbers in math.h).
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// Of the x that are not -inf: how many, their mean, and the sum of squares about the mean or about 0.
struct Moments {
  double count = 0, mean = 0, squares = 0;
};

// sum of f(x) over a row, of its finite part.
template <class Real, class F>
double sum_of_finite(Source<Real>& source, F f) {
  double sum = 0;
  for (int64_t start = 0; start < source.vocab; start += kBlock) {
    const Real* x = source.load(start);
    const int64_t n = source.columns(start);
    double part = 0;  // logits may have a large offset
#pragma omp simd reduction(+ : part)
    for (int64_t j = 0; j < n; ++j) part += double(x[j] == -INFINITY ? Real(0) : f(x[j]));
    sum += part;
  }
  return sum;
}

template <class Real>
Moments moments(Source<Real>& source, bool centred) {
  Moments m;
  m.count = sum_of_finite(source, [](Real) { return Real(1); });
  m.mean = sum_of_finite(source, [](Real x) { return x; }) / m.count;
  const Real origin = centred ? Real(m.mean) : Real(0);
  m.squares = sum_of_finite(source, [=](Real x) { return (x - origin) * (x - origin); });
  return m;
}

// Those of the logits: k.r, means of the tempered ones, and for standardised ones another gain.
template <class Kind, class Real>
void numbers_before(const Problem<Real>& problem, Source<Real>& student, Source<Real>& teacher,
                    KindParams<Real>& k, double (&means)[2]) {
  constexpr RowNumbers kRow = Kind::kRow;
  if constexpr (kRow == RowNumbers::none || kRow == RowNumbers::probability_norms) return;
  Source<Real>* const sides[2] = {&student, &teacher};
  for (int side = 0; side < 2; ++side) {
    Source<Real>& source = *sides[side];
    const double temperature = (side == 0 ? problem.student : problem.teacher).temperature;
    const Moments m = moments(source, kRow == RowNumbers::standard);
    if (kRow == RowNumbers::norms) k.r[side] = Real(1 / (source.gain * std::sqrt(m.squares)));
    if (kRow == RowNumbers::standard) {
      source.gain = Real(1 / (temperature * std::sqrt(m.squares / (m.count - 1))));
      if (side == 0) k.r[0] = Real(temperature / std::sqrt(m.count - 1));
    }
    // An infinite mean is NaN: it makes the whole row NaN.
    const double share = kRow == RowNumbers::means ? double(k.a) : 1;
    if (kRow != RowNumbers::norms)
      means[side] = double(source.gain) * m.mean * share + (m.mean - m.mean);
  }
}

// Those of the probabilities: sum q^2 is the sum of exponentials of twice the logits.
template <class Kind, class Real>
void numbers_after(const Source<Real>& student, const Normaliser<Real>& z,
                   const Source<Real>& teacher, const Normaliser<Real>& t, const Workspace<Real>& w,
                   KindParams<Real>& k) {
  if constexpr (Kind::kRow != RowNumbers::probability_norms) return;
  const auto inverse_norm = [&](const Source<Real>& side, double lse) {
    Source<Real> twice = side.with_buffer(w.gradient);
    twice.gain *= 2;
    const Normaliser<Real> squares =
        exponentials<Real>(twice, nullptr, nullptr, w.label_e, Prefetch::none(side.row));
    return Real(std::exp(lse - squares.lse / 2));
  };
  k.r[0] = inverse_norm(student, z.lse);
  k.r[1] = inverse_norm(teacher, t.lse);
}
