// Cross-entropy to labels: mixed into a divergence's row, or a row's whole loss.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// -(1 - s) log q1_y - s mean_j log q1_j over the columns that are not -inf, q1 = softmax of the
// student's logits at the label's own temperature.
template <class Real>
struct LabelTerm {
  bool on = false;
  Real gain = 1, gain2 = 1, shift = 0, factor = 1;  // q1 = factor 2^exponent(x)
  Real weight = 0, uniform = 0, hot = 0, value = 0;
  int64_t label = 0;

  LabelTerm() = default;
  LabelTerm(const Problem<Real>& problem, int64_t label, const Source<Real>& student,
            double student_lse, Workspace<Real>& w)
      : on(true), label(label) {
    const double ratio = problem.student.temperature / problem.label_temperature;
    Source<Real> source = student;
    source.gain = gain = Real(student.gain * ratio);
    const double lse = ratio == 1 ? student_lse
                                  : exponentials<Real>(source, w.student, nullptr, nullptr,
                                                       w.student_e, {source.row, 0});
    gain2 = source.gain2();
    shift = Real(lse / gain);
    factor = source.factor(shift, lse);
    double finite_sum = 0;
    int64_t finite = 0;
    const Real smoothing = Real(problem.label_smoothing);
    if (smoothing > 0) {
      for (int64_t start = 0; start < source.vocab; start += kBlock) {
        const Real* x = source.load(start, w.student);
        for (int64_t j = 0; j < source.columns(start); ++j)
          if (x[j] > -INFINITY) {
            finite_sum += x[j];
            ++finite;
          }
      }
      uniform = smoothing / Real(finite);
    }
    hot = 1 - smoothing;
    const int64_t start = label / kBlock * kBlock;
    const Real x_label = source.load(start, w.student)[label - start];
    value = hot * Real(lse - double(gain) * x_label);
    if (smoothing > 0) value += Real(smoothing * lse - uniform * gain * finite_sum);
  }

  // -sum q1 log q1; e: [kBlock].
  Real entropy(const Source<Real>& source, Real lse, Real* buffer, Real* e) const {
    double sum = 0;
    for (int64_t start = 0; start < source.vocab; start += kBlock) {
      const Real* x = source.load(start, buffer);
      const int64_t n = padded(source.columns(start));
      block_exp(n, x, gain2, shift, e, {source.row, 0});
      Real part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < n; ++j) part += times(factor * e[j], lse - gain * x[j]);
      sum += part;
    }
    return Real(sum);
  }

  void add_gradient(int64_t start, int64_t n, const Real* x, Real* gradient) const {
    n &= ~(kLanes - 1);
    const Exponent<Real> exponent(gain2, shift);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const Real q1 = factor * fast_exp2(exponent(x[j]));
      gradient[j] += weight * (q1 - (x[j] > -INFINITY ? uniform : Real(0)));
    }
    if (label >= start && label < start + n) gradient[label - start] -= weight * hot;
  }
};
