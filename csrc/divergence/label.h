// Cross-entropy to labels: mixed into a divergence's row, or a row's whole loss.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// -(1 - s) log q1_y - s mean_j log q1_j over the columns that are not -inf, q1 = softmax of the
// student's logits at the label's own temperature.
template <class Real>
struct LabelTerm {
  bool on = false;
  Real gain = 1, gain2 = 1;
  Normaliser<Real> normaliser;
  Real weight = 0, uniform = 0, hot = 0, value = 0;
  int64_t label = 0;

  LabelTerm() = default;
  LabelTerm(const Problem<Real>& problem, int64_t r, const Source<Real>& student,
            const Normaliser<Real>& student_normaliser, const Workspace<Real>& w,
            bool same_normaliser = true) {
    on = labelled(problem, r);
    if (!on) return;
    normaliser = student_normaliser;
    label = problem.labels[r];
    const double ratio = problem.student.temperature / problem.label_temperature;
    Source<Real> source = student.with_buffer(w.gradient);
    source.gain = gain = Real(student.gain * ratio);
    gain2 = source.gain2();
    weight = row_weight(problem, r) * Real(problem.label_weight) * gain;
    if (ratio != 1 || !same_normaliser)
      normaliser =
          exponentials<Real>(source, nullptr, nullptr, w.label_e, Prefetch::none(source.row));
    double finite_sum = 0;
    int64_t finite = 0;
    const Real smoothing = Real(problem.label_smoothing);
    if (smoothing > 0) {
      for (int64_t start = 0; start < source.vocab; start += kBlock) {
        const Real* x = source.load(start);
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
    const Real x_label = source.load(start)[label - start];
    value = hot * Real(normaliser.lse - double(gain) * x_label);
    if (smoothing > 0) value += Real(smoothing * normaliser.lse - uniform * gain * finite_sum);
  }

  void add_gradient(int64_t start, int64_t n, const Real* x, Real* gradient) const {
    n &= ~(kLanes - 1);
    const Exponent<Real> exponent(gain2, normaliser.shift);
    const Real factor = normaliser.factor;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const Real q1 = factor * fast_exp2(exponent(x[j]));
      gradient[j] += weight * (q1 - (x[j] > -INFINITY ? uniform : Real(0)));
    }
    if (label >= start && label < start + n) gradient[label - start] -= weight * hot;
  }
};
