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
         p.kind != kTAID && p.lse == nullptr;
}

template <class Kind, class Real, class In, int kThreads, Hold kHold, bool kPlain>
struct NormalisedRow : HeldRow<Real, In, kThreads, kHold, kPlain, kHasTeacher<Kind>> {
  using Held = HeldRow<Real, In, kThreads, kHold, kPlain, kHasTeacher<Kind>>;
  using Held::chunks, Held::each_chunk, Held::each_group, Held::place, Held::teacher_gain;
  using Held::kRegisters, Held::kSize, Held::origin, Held::shared;
  using Held::student, Held::teacher, Held::z, Held::t, Held::z_e, Held::t_e;
  using typename Held::Side;
  using typename Held::T;

  const Problem<Real>& problem;
  const int64_t r;
  KindParams<Real> params;
  double means[2] = {};  // of the tempered logits, for kinds without them
  Exponential<Real> of_z, of_t, of_label;
  double z_lse = 0, t_lse = 0;
  RowScalars<Real, Uniform<Real>> scalars{};
  Real weight = 0;
  bool labelled = false;
  Real label_factor = 0, label_weight = 0, uniform = 0, label_value = 0;
  int label = -1;  // -1 of one outside the row, too
  // Of a kind whose rows are without the label's column: that column.
  static constexpr bool kWithout = Kind::kRow == RowNumbers::label;
  int without = -1;
  Real z_without = 0, t_without = 0, label_probability = 0;
  LabelColumn column;
  RowScalars<Real, Uniform<Real>> whole{};  // scalars of the rows with it
  Real agreement = 0;
  int turn = 0;  // 0 and 1 in turn, from row to row of a team

  __device__ NormalisedRow(const Problem<Real>& problem, int64_t r, const typename Held::Pair& pair,
                           const SharedVectors<In>& shared)
      : Held(problem, pair, shared), problem(problem), r(r), params(problem.params) {}

  __device__ void load(int slot, int start) {
    Held::load(slot, start);
    if constexpr (kWithout) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (start + i == without) z[slot][i] = t[slot][i] = -INFINITY;
    }
  }

  // Returns their sum.
  __device__ static Real exponentials(const Real (&x)[kSize], const Exponential<Real>& of,
                                      Real (&e)[kSize]) {
    Real sum = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += e[i] = of(x[i]);
    return sum;
  }

  // RowNumbers of the logits, before pass 1.
  __device__ void numbers_of_logits() {
    if (Kind::kRow == RowNumbers::means && params.a == 0) return;
    Moments of_z{}, of_t{};
    Real z_origin = 0, t_origin = 0;
    if constexpr (kTakesMean<Kind>) {
      double s[4] = {};
      each_chunk([&](int slot, int start) {
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
      each_chunk([&](int slot, int start) {
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
  __device__ void numbers_of_probabilities() {
    if constexpr (Kind::kRow == RowNumbers::means) {  // no sum would tell the row of a NaN
      means[0] += z_lse - z_lse;
      means[1] += t_lse - t_lse;
    }
    if constexpr (Kind::kRow == RowNumbers::standard)
      params.r[1] = Real((z_lse - means[0]) - (t_lse - means[1]));
    if constexpr (Kind::kRow == RowNumbers::probability_norms) {
      params.r[0] = inverse_probability_norm(z[0], student.gain, z_lse);
      params.r[1] = inverse_probability_norm(t[0], teacher.gain, t_lse);
    }
    scalars.z_mean = minus_two_part<Real>(means[0]);
    scalars.t_mean = minus_two_part<Real>(means[1]);
  }

  // sum q^2 is the sum of exponentials of twice the logits.
  __device__ Real inverse_probability_norm(const Real (&x)[kSize], Real gain, double lse) {
    RunningSum<Real> running;
    each_chunk([&](int slot, int start) {
      load(slot, start);
      running.add(x, Real(2 * gain * kLog2e), Real(0));
    });
    Real maximum[1] = {running.max};
    T::reduce(maximum, Largest());
    const Exponential<Real> twice(2 * gain, RunningSum<Real>::shift_of(maximum[0]));
    running.rescale(twice.shift, twice.gain2, Real(0));
    double sum[1] = {double(running.sum)};
    T::reduce(sum, Add());
    return Real(::exp(lse - (fast_log(sum[0]) + twice.to_zero(2 * double(gain))) / 2));
  }

  // RowNumbers::head, after pass 1.
  __device__ void set_share_of_tail(const Real (&maxima)[2]) {
    const double mu = double(params.a);
    const Real least =
        Real((t_lse + ::log(least_in_head(mu, problem.vocab))) / double(teacher.gain));
    const uint64_t top = order_of(of_t.shift), most = fixed_mass(mu);
    const uint64_t bottom = order_of(least - Real(1e-3) * (1 + magnitude(least)));
    int first[2];
    first_columns(maxima, first);
    const auto each = [&](auto f) {  // f(offset, column, probability)
      each_chunk([&](int slot, int start) {
        fetch(slot, start);
        for (int i = 0; i < kSize; ++i) {
          if (!(t[slot][i] > -INFINITY)) continue;
          f(top - order_of(t[slot][i]), start + i, element(slot, i));
        }
      });
    };
    const HeadEnd by_size = find_head_end<kThreads>(top - bottom, most, [&](auto f) {
      each([&](uint64_t offset, int, const Element<Real>& e) {
        f(offset, fixed_mass(double(e.p)));
      });
    });
    HeadEnd by_column{0, 0, 0};  // of those that are equal to the border
    if (by_size.size > 0)
      by_column = find_head_end<kThreads>(
          uint64_t(problem.vocab), by_size.room / by_size.size, [&](auto f) {
            each([&](uint64_t offset, int column, const Element<Real>&) {
              if (offset == by_size.end) f(uint64_t(column), uint64_t(1));
            });
          });
    double gaps[2] = {};
    each([&](uint64_t offset, int column, const Element<Real>& e) {
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
      const int64_t y = problem.labels[r];
      const bool inside = y >= 0 && y < problem.vocab;
      without = inside ? int(y) : -1;
      z_without = inside ? student.column(without) : Real(NAN);
      t_without = inside ? teacher.column(without) : Real(NAN);
    }
    if constexpr (kTakesMean<Kind> || kTakesSquares<Kind>) {
      if constexpr (kHold == Hold::shared) copy_async_wait<0>();
      numbers_of_logits();
    }
    if constexpr (kTakesParts) {
      if (problem.lse != nullptr) return take_known();
    }
    const Real gain2 = Real(student.gain * kLog2e), t_gain2 = Real(teacher_gain() * kLog2e);
    Real label_gain = 0, own_label_gain2 = 0;
    bool inside = false;
    if (!kPlain && stillhouse::labelled(problem, r)) {
      labelled = true;
      inside = problem.labels[r] >= 0 && problem.labels[r] < problem.vocab;
      label = inside ? int(problem.labels[r]) : -1;
      const double ratio = problem.student.temperature / problem.label_temperature;
      label_gain = Real(plain_gain * ratio);
      if (ratio != 1 || Kind::kRow == RowNumbers::standard)
        own_label_gain2 = Real(label_gain * kLog2e);
    }
    RunningSum<Real> z_sum, t_sum;
    Real x_label = 0, finite_sum = 0, finite = 0;
    const bool smooth = labelled && problem.label_smoothing > 0;
    const auto look_for_label = [&](int slot, int start) {
      if constexpr (!kPlain) {
        if (!labelled) return;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          if (start + i == label) x_label = z[slot][i];
          if (smooth && z[slot][i] > -INFINITY) finite_sum += z[slot][i], finite += 1;
        }
      }
    };
    const auto add = [&](int slot, Real z_top, Real t_top, int start) {
      z_sum.add(z[slot], z_top, gain2, own_label_gain2);
      if constexpr (kHasTeacher<Kind>) t_sum.add(t[slot], t_top, t_gain2, Real(0));
      look_for_label(slot, start);
    };
    if constexpr (kHold == Hold::shared) {
      each_group([&](int group) { Held::wait_for(group); },
                 [&](int chunk) {
                   if (chunk >= chunks) return;
                   const int start = origin + chunk * kSize;
                   if constexpr (kPlain) {
                     const Vector16<In> of_z = shared.load(place(0, chunk)),
                                        of_t = shared.load(place(1, chunk));
                     Side::widen_all(of_z, z[0]);
                     Side::widen_all(of_t, t[0]);
                     add(0, largest_of<Real>(of_z), largest_of<Real>(of_t), start);
                   } else {
                     load(0, start);
                     add(0, largest_of(z[0]), largest_of(t[0]), start);
                   }
                 },
                 [](int) {});
    } else {
      each_chunk([&](int slot, int start) {
        load(slot, start);
        if constexpr (kRegisters) {
          z_sum.max = Largest()(largest_of(z[slot]), z_sum.max);
          if constexpr (kHasTeacher<Kind>) t_sum.max = Largest()(largest_of(t[slot]), t_sum.max);
          look_for_label(slot, start);
        } else {
          add(slot, largest_of(z[slot]), largest_of(t[slot]), start);
        }
      });
    }

    Real maxima[2];
    constexpr int kTotals = kPlain ? 2 : 3;
    double totals[kTotals];
    if constexpr (kRegisters) {
      maxima[0] = z_sum.max, maxima[1] = t_sum.max;
      T::reduce(maxima, Largest());
      set_shifts(maxima, label_gain);
      each_chunk([&](int slot, int) {
        z_sum.sum += exponentials(z[slot], of_z, z_e[slot]);
        if constexpr (kHasTeacher<Kind>) t_sum.sum += exponentials(t[slot], of_t, t_e[slot]);
        if (own_label_gain2 > 0) {
          for (int i = 0; i < kSize; ++i) z_sum.label_sum += of_label(z[slot][i]);
        }
      });
      totals[0] = double(z_sum.sum), totals[1] = double(t_sum.sum);
      if constexpr (!kPlain) totals[2] = double(z_sum.label_sum);
      T::reduce(totals, Add());
    } else {
      combine(z_sum, t_sum, own_label_gain2, label_gain, maxima, totals);
    }
    // Of the two sides, by lanes of even and odd rank.
    const double total = T::rank() % 2 == 0 ? totals[0] : totals[1];
    const double log_total = fast_log(total), inverse = 1 / total;
    z_lse = __shfl_sync(kFullMask, log_total, 0) + of_z.to_zero(double(student.gain));
    const Real z_factor = kept(Real(__shfl_sync(kFullMask, inverse, 0)));
    if constexpr (kHasTeacher<Kind>)
      t_lse = __shfl_sync(kFullMask, log_total, 1) + of_t.to_zero(double(teacher_gain()));
    set_scalars(z_factor, kept(Real(__shfl_sync(kFullMask, inverse, 1))));

    if constexpr (Kind::kRow != RowNumbers::none) numbers_of_probabilities();
    if constexpr (Kind::kRow == RowNumbers::head) set_share_of_tail(maxima);
    if constexpr (kWithout) {
      column = LabelColumn(double(student.gain) * double(z_without), z_lse,
                           double(teacher.gain) * double(t_without), t_lse);
      whole = column.whole(scalars);
      params.r[0] = Real(double(params.b) - double(params.a) * (column.q - column.p));
    }
    const Real of_row = row_weight(problem, r);
    weight = of_row * Real((1 - problem.label_weight) * problem.factor) * student.gain;
    if constexpr (!kPlain) {
      if (labelled) {
        Real parts[3] = {x_label, finite_sum, finite};
        T::reduce(parts, Add());
        const bool own = own_label_gain2 > 0;
        double lse = own ? fast_log(totals[2]) + of_label.to_zero(double(label_gain)) : z_lse;
        label_factor = own ? Real(1 / totals[2]) : z_factor;
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
        label_value = inside ? hot * Real(lse - double(label_gain) * parts[0]) : Real(NAN);
        if (smooth) {
          uniform = smoothing / parts[2];
          label_value += Real(double(smoothing) * lse - double(uniform * label_gain) * parts[1]);
        }
      }
      if (problem.stats != nullptr) agree(maxima);
    }
  }

  // Rows of a part of the vocabulary come with what belongs to whole rows.
  static constexpr bool kTakesParts = !kPlain && kHold == Hold::nothing && kHasTeacher<Kind>;
  __device__ void take_known() {
    z_lse = problem.lse[r], t_lse = problem.lse[problem.rows + r];
    const double gain = double(student.gain), t_gain = double(teacher_gain());
    const Real maxima[2] = {Real(z_lse / gain), Real(t_lse / t_gain)};
    set_shifts(maxima, Real(0));
    set_scalars(Real(::exp(of_z.to_zero(gain) - z_lse)), Real(::exp(of_t.to_zero(t_gain) - t_lse)));
    weight = row_weight(problem, r) * Real(problem.factor) * student.gain;
  }

  __device__ void set_scalars(Real z_factor, Real t_factor) {
    scalars.z_gain = student.gain;
    scalars.z_lse = minus_two_part<Real>(z_lse);
    scalars.q_factor = z_factor;
    if constexpr (kHasTeacher<Kind>) {
      scalars.t_gain = teacher_gain();
      scalars.ratio = student.gain / teacher_gain();
      scalars.t_lse = minus_two_part<Real>(t_lse);
      scalars.lse_difference = minus_two_part<Real>(t_lse - z_lse);
      scalars.p_factor = t_factor;
    }
  }

  __device__ void set_shifts(const Real (&maxima)[2], Real label_gain) {
    of_z = Exponential<Real>(student.gain, RunningSum<Real>::shift_of(maxima[0]));
    of_t = Exponential<Real>(teacher_gain(), RunningSum<Real>::shift_of(maxima[1]));
    of_label = Exponential<Real>(label_gain, of_z.shift);
  }

  // Maxima of the team and sums relative to them, of threads that each have their own: lane by lane, then
  // warp by warp, with one barrier.
  template <int kTotals>
  __device__ void combine(RunningSum<Real> z_sum, RunningSum<Real> t_sum, Real own_label_gain2,
                          Real label_gain, Real (&maxima)[2], double (&totals)[kTotals]) {
    const Real gain2 = Real(student.gain * kLog2e), t_gain2 = Real(teacher_gain() * kLog2e);
    maxima[0] = z_sum.max, maxima[1] = t_sum.max;
    T::of_warp(maxima, Largest());
    z_sum.rescale(RunningSum<Real>::shift_of(maxima[0]), gain2, own_label_gain2);
    t_sum.rescale(RunningSum<Real>::shift_of(maxima[1]), t_gain2, Real(0));
    totals[0] = double(z_sum.sum), totals[1] = double(t_sum.sum);
    if constexpr (kTotals > 2) totals[2] = double(z_sum.label_sum);
    T::of_warp(totals, Add());
    if constexpr (T::kWarps > 1) {
      // Two places, for rows in turn: whoever writes to one has passed the barrier of the row between,
      // and so have all who read there.
      constexpr int kNumbers = 2 + kTotals;
      SHARED_ARRAY(double, places, 2 * T::kWarps * kNumbers);
      const SharedPointer<double> place = places + turn * T::kWarps * kNumbers;
      double numbers[kNumbers] = {double(maxima[0]), double(maxima[1])};
      for (int i = 0; i < kTotals; ++i) numbers[2 + i] = totals[i];
      T::leave(place, numbers);
      T::sync();
      T::find(place, numbers);
      const Real own[2] = {Real(numbers[0]), Real(numbers[1])};
      maxima[0] = own[0], maxima[1] = own[1];
      T::of_warps(maxima, Largest());
      set_shifts(maxima, label_gain);
      const auto at_maximum = [](double sum, Real own, Real gain2, const Exponential<Real>& of) {
        return own > -INFINITY ? sum * double(fast_exp2(own * gain2 - of.offset)) : sum;
      };
      totals[0] = at_maximum(numbers[2], own[0], gain2, of_z);
      totals[1] = at_maximum(numbers[3], own[1], t_gain2, of_t);
      if constexpr (kTotals > 2)
        totals[2] = at_maximum(numbers[4], own[0], own_label_gain2, of_label);
      T::of_warps(totals, Add());
    } else {
      set_shifts(maxima, label_gain);
    }
  }

  // The first column of each maximum.
  __device__ void first_columns(const Real (&maxima)[2], int (&first)[2]) {
    first[0] = first[1] = -student.vocab;  // negated: the largest is the first
    each_chunk([&](int slot, int start) {
      if constexpr (!kRegisters) load(slot, start);
      for (int i = kSize - 1; i >= 0; --i) {
        if (start + i < 0 || start + i >= student.vocab) continue;
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
    int first[2];
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
  __device__ void fetch(int slot, int start) {
    if constexpr (kRegisters) return;
    load(slot, start);
    exponentials(z[slot], of_z, z_e[slot]);
    if constexpr (kHasTeacher<Kind>) exponentials(t[slot], of_t, t_e[slot]);
  }

  // A column's gradient with the label's part, and what the soft-cap makes of it.
  __device__ Real with_label(Real g, Real x, int at) const {
    if (!labelled) return g;
    const Real q1 = label_factor * of_label(x);
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
