// Pass 1 of a row by a team of threads: maxima and sums of exponentials of both sides, a label's own softmax
// beside them, and the numbers of the row that a kind asks for.
#pragma once
#include "head.cuh"
#include "held.cuh"

namespace stillhouse {

// Cross-entropy to labels: no teacher, the label's part alone.
struct LabelsOnly : Sum {
  static constexpr Form kForm = Form::unit;
};
template <class Kind>
constexpr bool kHasTeacher = !std::is_same<Kind, LabelsOnly>::value;

// Plain: no statistics, no labels, no soft-cap, no mixture. Their registers are worth a kernel of its own.
template <class Real>
bool is_plain(const Problem<Real>& p) {
  return p.stats == nullptr && !has_labels(p) && p.student.cap == 0 && p.teacher.cap == 0 &&
         p.kind != kTAID;
}

template <class Kind, class Real, class In, int kThreads, Hold kHold, bool kPlain>
struct NormalisedRow : HeldRow<Real, In, kThreads, kHold, kPlain, kHasTeacher<Kind>> {
  using Held = HeldRow<Real, In, kThreads, kHold, kPlain, kHasTeacher<Kind>>;
  using Held::each_chunk, Held::copy_to_shared, Held::teacher_gain;
  using Held::kRegisters, Held::kSize, Held::origin;
  using Held::student, Held::teacher, Held::z, Held::t, Held::z_e, Held::t_e;
  using typename Held::Side;
  using typename Held::T;

  const Problem<Real>& problem;
  const int64_t r;
  KindParams<Real> params;
  double means[2] = {};  // of the tempered logits, for kinds without them
  Real z_shift = 0, t_shift = 0;
  double z_lse = 0, t_lse = 0;
  RowScalars<Real, Uniform<Real>> scalars{};
  Real weight = 0;
  bool labelled = false;
  Real label_gain2 = 0, label_factor = 0, label_weight = 0, uniform = 0, label_value = 0;
  int64_t label = -1;
  // Of a kind whose rows are without the label's column: that column.
  static constexpr bool kWithout = Kind::kRow == RowNumbers::label;
  int64_t without = -1;
  Real z_without = 0, t_without = 0, label_probability = 0;
  LabelColumn column;
  RowScalars<Real, Uniform<Real>> whole{};  // scalars of the rows with it
  Real agreement = 0;

  __device__ NormalisedRow(const Problem<Real>& problem, int64_t r, SharedPointer<In> shared)
      : Held(problem, r, shared), problem(problem), r(r), params(problem.params) {}

  __device__ void load(int slot, int64_t start) {
    Held::load(slot, start);
    if constexpr (kWithout) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (start + i == without) z[slot][i] = t[slot][i] = -INFINITY;
    }
  }

  // Returns their sum.
  __device__ static Real exponentials(const Real (&x)[kSize], Real shift, Real gain2,
                                      Real (&e)[kSize]) {
    Real sum = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += e[i] = fast_exp2((x[i] - shift) * gain2);
    return sum;
  }

  // RowNumbers of the logits, before pass 1.
  __device__ void numbers_of_logits() {
    if (Kind::kRow == RowNumbers::means && params.a == 0) return;
    Moments of_z{}, of_t{};
    Real z_origin = 0, t_origin = 0;
    if constexpr (kTakesMean<Kind>) {
      double s[4] = {};
      each_chunk([&](int slot, int64_t start) {
        load(slot, start);
        add_finite(z[slot], s[0], s[1], [](Real x) { return x; });
        add_finite(t[slot], s[2], s[3], [](Real x) { return x; });
      });
      T::reduce(s, Add());
      of_z = {s[0], s[1], 0}, of_t = {s[2], s[3], 0};
      z_origin = Real(s[1] / s[0]), t_origin = Real(s[3] / s[2]);
    }
    if constexpr (kTakesSquares<Kind>) {
      double s[4] = {};
      each_chunk([&](int slot, int64_t start) {
        load(slot, start);
        add_finite(z[slot], s[0], s[1], [=](Real x) { return (x - z_origin) * (x - z_origin); });
        add_finite(t[slot], s[2], s[3], [=](Real x) { return (x - t_origin) * (x - t_origin); });
      });
      T::reduce(s, Add());
      of_z.squares = s[1], of_t.squares = s[3];
    }
    Real of_teacher = 0;
    means[0] = take_moments<Kind>(of_z, problem.student.temperature, student.gain, params.r[0]);
    means[1] = take_moments<Kind>(of_t, problem.teacher.temperature, teacher.gain, of_teacher);
    params.r[1] = of_teacher;
  }

  template <class F>
  __device__ static void add_finite(const Real (&x)[kSize], double& count, double& sum, F f) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (x[i] == -INFINITY) continue;
      count += 1;
      sum += double(f(x[i]));
    }
  }

  // Those of the probabilities, after it.
  __device__ void numbers_of_probabilities(Real gain2, Real t_gain2) {
    if constexpr (Kind::kRow == RowNumbers::means) {  // no sum would tell the row of a NaN
      means[0] += z_lse - z_lse;
      means[1] += t_lse - t_lse;
    }
    if constexpr (Kind::kRow == RowNumbers::standard)
      params.r[1] = Real((z_lse - means[0]) - (t_lse - means[1]));
    if constexpr (Kind::kRow == RowNumbers::probability_norms) {
      params.r[0] = inverse_probability_norm(z[0], 2 * gain2, student.gain, z_lse);
      params.r[1] = inverse_probability_norm(t[0], 2 * t_gain2, teacher.gain, t_lse);
    }
    scalars.z_mean = minus_two_part<Real>(means[0]);
    scalars.t_mean = minus_two_part<Real>(means[1]);
  }

  // sum q^2 is the sum of exponentials of twice the logits.
  __device__ Real inverse_probability_norm(const Real (&x)[kSize], Real gain2, Real gain,
                                           double lse) {
    RunningSum<Real> running;
    each_chunk([&](int slot, int64_t start) {
      load(slot, start);
      running.add(x, gain2, Real(0));
    });
    Real maximum[1] = {running.max};
    T::reduce(maximum, Largest());
    const Real shift = RunningSum<Real>::shift_of(maximum[0]);
    running.rescale(shift, gain2, Real(0));
    double sum[1] = {double(running.sum)};
    T::reduce(sum, Add());
    return Real(::exp(lse - double(gain) * double(shift) - fast_log(sum[0]) / 2));
  }

  // RowNumbers::head, after pass 1.
  __device__ void set_share_of_tail(const Real (&maxima)[2]) {
    const double mu = double(params.a);
    const Real least =
        Real((t_lse + ::log(least_in_head(mu, problem.vocab))) / double(teacher.gain));
    const uint64_t top = order_of(t_shift), most = fixed_mass(mu);
    const uint64_t bottom = order_of(least - Real(1e-3) * (1 + magnitude(least)));
    int64_t first[2];
    first_columns(maxima, first);
    const auto each = [&](auto f) {  // f(offset, column, probability)
      each_chunk([&](int slot, int64_t start) {
        fetch(slot, start);
        for (int i = 0; i < kSize; ++i) {
          if (!(t[slot][i] > -INFINITY)) continue;
          f(top - order_of(t[slot][i]), start + i, element(slot, i));
        }
      });
    };
    const HeadEnd by_size = find_head_end<kThreads>(top - bottom, most, [&](auto f) {
      each([&](uint64_t offset, int64_t, const Element<Real>& e) {
        f(offset, fixed_mass(double(e.p)));
      });
    });
    HeadEnd by_column{0, 0, 0};  // of those that are equal to the border
    if (by_size.size > 0)
      by_column = find_head_end<kThreads>(
          uint64_t(problem.vocab), by_size.room / by_size.size, [&](auto f) {
            each([&](uint64_t offset, int64_t column, const Element<Real>&) {
              if (offset == by_size.end) f(uint64_t(column), uint64_t(1));
            });
          });
    double gaps[2] = {};
    each([&](uint64_t offset, int64_t column, const Element<Real>& e) {
      const bool in_head = offset < by_size.end || column == first[1] ||
                           (offset == by_size.end && uint64_t(column) < by_column.end);
      const double gap = double(magnitude(e.p - e.q));
      gaps[0] += gap;
      if (!in_head) gaps[1] += gap;
    });
    T::reduce(gaps, Add());
    AdaptiveKL::set_share(params, gaps[1], gaps[0] + (t_lse - t_lse));
  }

  // Pass 1.
  __device__ void normalise() {
    const Real plain_gain = student.gain;
    if constexpr (kWithout) {
      without = problem.labels[r];
      const bool inside = without >= 0 && without < problem.vocab;
      z_without = inside ? student.column(without) : Real(NAN);
      t_without = inside ? teacher.column(without) : Real(NAN);
    }
    if constexpr (kTakesMean<Kind> || kTakesSquares<Kind>) numbers_of_logits();
    const Real gain2 = Real(student.gain * kLog2e), t_gain2 = Real(teacher_gain() * kLog2e);
    Real own_label_gain2 = 0;
    if (!kPlain && stillhouse::labelled(problem, r)) {
      labelled = true;
      label = problem.labels[r];
      const double ratio = problem.student.temperature / problem.label_temperature;
      label_gain2 = Real(Real(plain_gain * ratio) * kLog2e);
      if (ratio != 1 || Kind::kRow == RowNumbers::standard) own_label_gain2 = label_gain2;
    }
    RunningSum<Real> of_z, of_t;
    Real x_label = 0, finite_sum = 0, finite = 0;
    const bool smooth = labelled && problem.label_smoothing > 0;
    if constexpr (kHold == Hold::shared) copy_to_shared();
    each_chunk([&](int slot, int64_t start) {
      load(slot, start);
      if constexpr (kHold != Hold::nothing) {
        of_z.widen_to(z[slot]);
        if constexpr (kHasTeacher<Kind>) of_t.widen_to(t[slot]);
      } else {
        of_z.add(z[slot], gain2, own_label_gain2);
        if constexpr (kHasTeacher<Kind>) of_t.add(t[slot], t_gain2, Real(0));
      }
      if (!kPlain && labelled) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          if (start + i == label) x_label = z[slot][i];
          if (smooth && z[slot][i] > -INFINITY) finite_sum += z[slot][i], finite += 1;
        }
      }
    });

    Real maxima[2] = {of_z.max, of_t.max};
    T::reduce(maxima, Largest());
    z_shift = RunningSum<Real>::shift_of(maxima[0]);
    t_shift = RunningSum<Real>::shift_of(maxima[1]);
    if constexpr (kHold != Hold::nothing) {
      each_chunk([&](int slot, int64_t start) {
        if constexpr (kHold == Hold::shared) load(slot, start);
        of_z.sum += exponentials(z[slot], z_shift, gain2, z_e[slot]);
        if constexpr (kHasTeacher<Kind>)
          of_t.sum += exponentials(t[slot], t_shift, t_gain2, t_e[slot]);
        if (own_label_gain2 > 0) {
          for (int i = 0; i < kSize; ++i)
            of_z.label_sum += fast_exp2((z[slot][i] - z_shift) * own_label_gain2);
        }
      });
    } else {
      of_z.rescale(z_shift, gain2, own_label_gain2);
      of_t.rescale(t_shift, t_gain2, Real(0));
    }
    double totals[3] = {double(of_z.sum), double(of_t.sum), double(of_z.label_sum)};
    T::reduce(totals, Add());
    z_lse = double(student.gain) * double(z_shift) + fast_log(totals[0]);
    const Real z_factor = Real(1 / totals[0]);
    scalars.z_gain = student.gain;
    scalars.z_lse = minus_two_part<Real>(z_lse);
    scalars.q_factor = z_factor;
    if constexpr (kHasTeacher<Kind>) {
      t_lse = double(teacher_gain()) * double(t_shift) + fast_log(totals[1]);
      scalars.t_gain = teacher_gain();
      scalars.ratio = student.gain / teacher_gain();
      scalars.t_lse = minus_two_part<Real>(t_lse);
      scalars.lse_difference = minus_two_part<Real>(t_lse - z_lse);
      scalars.p_factor = Real(1 / totals[1]);
    }

    if constexpr (Kind::kRow != RowNumbers::none) numbers_of_probabilities(gain2, t_gain2);
    if constexpr (Kind::kRow == RowNumbers::head) set_share_of_tail(maxima);
    if constexpr (kWithout) {
      column = LabelColumn(double(student.gain) * double(z_without), z_lse,
                           double(teacher.gain) * double(t_without), t_lse);
      whole = column.whole(scalars);
      params.r[0] = Real(double(params.b) - double(params.a) * (column.q - column.p));
    }
    const Real of_row = row_weight(problem, r);
    weight = of_row * Real((1 - problem.label_weight) * problem.factor) * student.gain;
    if (!kPlain && labelled) {
      Real parts[3] = {x_label, finite_sum, finite};
      T::reduce(parts, Add());
      const Real label_gain =
          Real(plain_gain * (problem.student.temperature / problem.label_temperature));
      double lse =
          own_label_gain2 > 0 ? double(label_gain) * double(z_shift) + fast_log(totals[2]) : z_lse;
      label_factor = own_label_gain2 > 0 ? Real(1 / totals[2]) : z_factor;
      if constexpr (kWithout) {
        parts[0] = z_without;
        const double of_column = double(label_gain) * double(z_without), of_rest = lse;
        lse = LabelColumn::log_sum(of_column, of_rest);
        label_factor *= Real(::exp(of_rest - lse));
        label_probability = Real(::exp(of_column - lse));
      }
      label_weight = of_row * Real(problem.label_weight) * label_gain;
      const Real smoothing = Real(problem.label_smoothing), hot = 1 - smoothing;
      // A label outside the row cannot raise from here without stopping the stream.
      const bool inside = label >= 0 && label < problem.vocab;
      label_value = inside ? hot * Real(lse - double(label_gain) * parts[0]) : Real(NAN);
      if (smooth) {
        uniform = smoothing / parts[2];
        label_value += Real(double(smoothing) * lse - double(uniform * label_gain) * parts[1]);
      }
    }
    if (!kPlain && problem.stats != nullptr) agree(maxima);
  }

  // The first column of each maximum.
  __device__ void first_columns(const Real (&maxima)[2], int64_t (&first)[2]) {
    first[0] = first[1] = -problem.vocab;  // negated: the largest is the first
    each_chunk([&](int slot, int64_t start) {
      if constexpr (!kRegisters) load(slot, start);
      for (int i = kSize - 1; i >= 0; --i) {
        if (start + i < 0 || start + i >= problem.vocab) continue;
        if (z[slot][i] == maxima[0] && -(start + i) > first[0]) first[0] = -(start + i);
        if (t[slot][i] == maxima[1] && -(start + i) > first[1]) first[1] = -(start + i);
      }
    });
    T::reduce(first, Largest());
    first[0] = -first[0], first[1] = -first[1];
  }

  __device__ void agree(const Real (&maxima)[2]) {
    if constexpr (!kHasTeacher<Kind>) {
      agreement = Real(NAN);
      return;
    }
    int64_t first[2];
    first_columns(maxima, first);
    if constexpr (
        kWithout) {  // of the rest; the label's column may be larger, or as large and before
      const Real x[2] = {z_without, t_without};
      for (int side = 0; side < 2; ++side)
        if (x[side] > maxima[side] || (x[side] == maxima[side] && without < first[side]))
          first[side] = without;
    }
    agreement = first[0] == first[1];
  }

  // The logits of a chunk and their exponentials, once more where registers do not hold them.
  __device__ void fetch(int slot, int64_t start) {
    if constexpr (kRegisters) return;
    load(slot, start);
    exponentials(z[slot], z_shift, Real(student.gain * kLog2e), z_e[slot]);
    if constexpr (kHasTeacher<Kind>)
      exponentials(t[slot], t_shift, Real(teacher_gain() * kLog2e), t_e[slot]);
  }

  // A column's gradient with the label's part, and what the soft-cap makes of it.
  __device__ Real with_label(Real g, Real x, int64_t at) const {
    if (!labelled) return g;
    const Real q1 = label_factor * fast_exp2((x - z_shift) * label_gain2);
    g += label_weight * (q1 - (x > -INFINITY ? uniform : Real(0)));
    return at == label ? g - label_weight * (1 - Real(problem.label_smoothing)) : g;
  }
  __device__ Real with_cap(Real g, Real x) const {
    if (!(student.cap > 0)) return g;
    const Real ratio = x / student.cap;
    return x > -INFINITY ? g * student.scale * (1 - ratio * ratio) : Real(0);
  }

  __device__ Element<Real> element(int slot, int i) const {
    return make_element(scalars, z[slot][i], t[slot][i], z_e[slot][i], t_e[slot][i], 0);
  }
};

}  // namespace stillhouse
