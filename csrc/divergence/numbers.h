// The numbers of a row that some kinds need before their terms (RowNumbers in math.h).
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// Sums of both f(x) over the finite part of a row.
template <class Real, class F, class G>
void sum_finite(Source<Real>& source, double& f_sum, double& g_sum, F f, G g) {
  for (int64_t start = 0; start < source.vocab; start += kBlock) {
    const Real* x = source.load(start);
    const int64_t n = source.columns(start);
    double f_part = 0, g_part = 0;  // in double: logits may have a large offset
#pragma omp simd reduction(+ : f_part, g_part)
    for (int64_t j = 0; j < n; ++j) {
      const bool finite = x[j] != -INFINITY;
      f_part += finite ? double(f(x[j])) : 0;
      g_part += finite ? double(g(x[j])) : 0;
    }
    f_sum += f_part;
    g_sum += g_part;
  }
}

template <class Kind, class Real>
Moments moments(Source<Real>& source) {
  const auto nothing = [](Real) { return Real(0); };
  Moments m{};
  double none = 0;
  if constexpr (kTakesMean<Kind>)
    sum_finite(source, m.count, m.sum, [](Real) { return Real(1); }, [](Real x) { return x; });
  const Real origin = kTakesMean<Kind> ? Real(m.sum / m.count) : Real(0);
  if constexpr (kTakesSquares<Kind>)
    sum_finite(
        source, m.squares, none, [=](Real x) { return (x - origin) * (x - origin); }, nothing);
  return m;
}

// Those of the logits, before pass 1.
template <class Kind, class Real>
void numbers_of_logits(const Problem<Real>& problem, Source<Real>& student, Source<Real>& teacher,
                       KindParams<Real>& k, double (&means)[2]) {
  if constexpr (!kTakesMean<Kind> && !kTakesSquares<Kind>) return;
  if (Kind::kRow == RowNumbers::means && k.a == 0) return;
  Real of_teacher = 0;
  means[0] =
      take_moments<Kind>(moments<Kind>(student), problem.student.temperature, student.gain, k.r[0]);
  means[1] = take_moments<Kind>(moments<Kind>(teacher), problem.teacher.temperature, teacher.gain,
                                of_teacher);
  k.r[1] = of_teacher;
}

// Those of the probabilities, after it: sum q^2 is the sum of exponentials of twice the logits.
template <class Kind, class Real>
void numbers_of_probabilities(const Source<Real>& student, const Normaliser<Real>& z,
                              const Source<Real>& teacher, const Normaliser<Real>& t,
                              const Workspace<Real>& w, KindParams<Real>& k, double (&means)[2]) {
  if constexpr (Kind::kRow == RowNumbers::means) {  // no sum would tell the row of a NaN
    means[0] += z.lse - z.lse;
    means[1] += t.lse - t.lse;
  }
  if constexpr (Kind::kRow == RowNumbers::standard)
    k.r[1] = Real((z.lse - means[0]) - (t.lse - means[1]));
  if constexpr (Kind::kRow == RowNumbers::probability_norms) {
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
}
