// A teacher that is known at k columns of a row (sparse.h has the mathematics), a block of threads a row.
// A bit a column in shared memory says which ones. The columns of a chunk belong to its thread, those that
// are known to the thread of their place among the k: nobody else writes to them.
//   1. maximum and sum of exponentials of what is not known
//   2. the outcomes: value, slopes                  (over all columns, where each has a share of its own)
//   3. the gradient, of a column that is not known a multiple of its exponential
// All kinds are in one kernel, which calls a function for an outcome: there are few.
#pragma once
#include "normalised.cuh"
#include "prepare.cuh"

namespace stillhouse {

// What a kind makes of an outcome, and of the sums over all.
template <class Real>
struct Outcome {
  Real term, slope;
};
template <class Real>
__device__ SH_NOINLINE Outcome<Real> outcome_of(int kind, const Element<Real>& e,
                                                const KindParams<Real>& params) {
  switch (kind) {
    case kSupportKL:
      return {kind_term<ForwardKL>(e, params), ForwardKL::slope(e, params)};
#define SH_CASE(number, Kind)                                                    \
  case number:                                                                   \
    if constexpr (kTakesSparse<Kind>) {                                          \
      const auto adjusted = Kind::adjusted(e, params);                           \
      return {kind_term<Kind>(adjusted, params), Kind::slope(adjusted, params)}; \
    }                                                                            \
    break;
      SH_DIVERGENCE_KINDS(SH_CASE)
#undef SH_CASE
  }
  return {};
}

// teacher_mass: 1, or less of a teacher whose sum that is.
template <class Real>
__device__ Finished finish_outcomes(int kind, double (&sums)[2], double teacher_mass,
                                    const KindParams<Real>& params) {
  const auto finish = [&](auto of_kind) -> Finished {
    using Kind = decltype(of_kind);
    if (Kind::kForm == Form::unit) sums[1] = -teacher_mass;
    if (Kind::kSeries) sums[0] -= 1 - teacher_mass;
    return Kind::finish(sums[0], sums[1], params);
  };
  switch (kind) {
    case kSupportKL:
      return finish(ForwardKL());
#define SH_CASE(number, Kind)                                \
  case number:                                               \
    if constexpr (kTakesSparse<Kind>) return finish(Kind()); \
    break;
      SH_DIVERGENCE_KINDS(SH_CASE)
#undef SH_CASE
  }
  return {};
}

template <class Real, class In, int kThreads>
struct DeviceSparseRow : NormalisedRow<LabelsOnly, Real, In, kThreads, Hold::nothing, false> {
  using Base = NormalisedRow<LabelsOnly, Real, In, kThreads, Hold::nothing, false>;
  using Base::each_chunk, Base::kSize, Base::origin, Base::problem, Base::r, Base::scalars;
  using Base::label_value, Base::student, Base::weight, Base::with_cap, Base::with_label;
  using typename Base::Side;
  using typename Base::T;

  const SharedPointer<uint32_t> bits;
  const int32_t* const ids;
  const bool support_alone;  // k outcomes, both sides with sum 1 there
  const bool even;           // all columns are outcomes: the unknown ones share alike
  bool broken = false;       // a column that does not exist, or one twice
  int64_t count = 0;         // of the known columns
  const Real t_gain;
  Exponential<Real> of_row,
      of_rest;  // relative to all columns' largest logit, to the unknown ones'
  Real log_rest = 0;
  Real t_shift = 0;                      // of the known log-probabilities at their temperature
  double rest_sum = 0, rest_in_row = 0;  // of exponentials of_rest, of_row
  double z_lse = 0, t_lse = 0;           // of the outcomes, the student's relative to the shift
  double teacher_mass = 1;
  double given_log_rest = 0;  // log of what the others have; 0, which no rest can be, if not given

  __device__ DeviceSparseRow(const Problem<Real>& problem, int64_t r, SharedPointer<uint32_t> bits)
      : Base(problem, r, typename Base::Pair(problem, r), SharedVectors<In>(SharedPointer<In>())),
        bits(bits),
        ids(problem.sparse.ids + r * problem.sparse.k),
        support_alone(problem.kind == kSupportKL),
        even(problem.sparse.tail == kUniform && !support_alone),
        t_gain(Real(1 / problem.teacher.temperature)) {}

  // A bit for each column of a chunk that is known, in its order.
  __device__ __forceinline__ uint32_t known_of(int start) const {
    const int word = start >> 5, last = (student.vocab - 1) >> 5;
    const uint32_t low = word >= 0 ? uint32_t(bits[word]) : 0u;
    uint32_t found = low >> (start & 31);
    if ((start & 31) > 32 - kSize && word < last)
      found |= uint32_t(bits[word + 1]) << (32 - (start & 31));
    return found & ((1u << kSize) - 1);
  }
  // f(place, column) for the known columns of this thread.
  template <class F>
  __device__ void each_known(F f) const {
    for (int64_t i = T::rank(); i < problem.sparse.k; i += kThreads)
      if (ids[i] >= 0 && ids[i] < problem.vocab) f(i, int64_t(ids[i]));
  }
  __device__ Real log_p(int64_t i) const {
    Real x = 0;
    with_type(problem.teacher.rows.dtype, row_of(problem.teacher.rows, r),
              [&](auto* in) { x = Real(widen(in[i])); });
    return x;
  }

  __device__ void mark() {
    for (int64_t j = T::rank(); j < (problem.vocab + 31) / 32; j += kThreads) bits[j] = 0;
    T::sync();
    double found[3] = {};
    for (int64_t i = T::rank(); i < problem.sparse.k; i += kThreads) {
      if (ids[i] >= problem.vocab || ids[i] < kRestId) found[1] = 1;
      if (ids[i] == kRestId) found[2] = double(log_p(i));
      if (ids[i] < 0 || ids[i] >= problem.vocab) continue;
      const uint32_t bit = 1u << (ids[i] % 32);
      // A sum is the union as long as no bit comes twice; one that does is seen.
      if (shared_add(bits, ids[i] / 32, bit) & bit) found[1] = 1;
      found[0] += 1;
    }
    T::sync();
    T::reduce(found, Add());
    count = int64_t(found[0]);
    broken = found[1] > 0;
    given_log_rest = found[2];
  }

  // Pass 1, and the log-sum-exps of both sides' outcomes.
  __device__ void normalise_outcomes() {
    const Real gain2 = Real(student.gain * kLog2e);
    RunningSum<Real> rest;
    if (!support_alone) {
      each_chunk([&](int, int start) {
        this->load(0, start);
        Real(&x)[kSize] = this->z[0];
        if (const uint32_t known = known_of(start)) {
#pragma unroll
          for (int i = 0; i < kSize; ++i)
            if (known >> i & 1) x[i] = -INFINITY;
        }
        rest.add(x, gain2, Real(0));
      });
    }
    Real maxima[3] = {rest.max, Real(-INFINITY), Real(-INFINITY)};
    each_known([&](int64_t i, int64_t j) {
      const Real x = student.column(j), y = log_p(i) * t_gain;
      maxima[1] = x > maxima[1] ? x : maxima[1];
      maxima[2] = y > maxima[2] ? y : maxima[2];
    });
    T::reduce(maxima, Largest());
    of_rest = Exponential<Real>(student.gain, RunningSum<Real>::shift_of(maxima[0]));
    of_row = Exponential<Real>(student.gain,
                               RunningSum<Real>::shift_of(Largest()(maxima[0], maxima[1])));
    const bool as_they_are = problem.sparse.tail == kDrop && !support_alone;
    const bool bucket = problem.sparse.tail == kBucket && !support_alone;
    double mass[1] = {0};  // of the known columns
    each_known([&](int64_t i, int64_t) { mass[0] += ::exp(double(log_p(i))); });
    T::reduce(mass, Add());
    if (!support_alone && mass[0] > kMostMass) broken = true;
    const double left = 1 - mass[0], least = sizeof(Real) == 4 ? 0x1p-24 : 0x1p-53;
    double log_of_rest = given_log_rest < 0 ? given_log_rest : ::log(left > least ? left : least);
    if (count == problem.vocab || !(bucket || even)) log_of_rest = -INFINITY;
    if (even) log_of_rest -= ::log(double(problem.vocab - count));
    log_rest = Real(log_of_rest);
    // Probabilities that are to be scaled may all be small.
    if (!as_they_are && !bucket) {
      const Real share = log_rest * t_gain;
      t_shift = RunningSum<Real>::shift_of(even && share > maxima[2] ? share : maxima[2]);
    }
    rest.rescale(of_rest.shift, gain2, Real(0));
    double sums[3] = {double(rest.sum), 0, 0};  // of the rest; of the known: q, p
    each_known([&](int64_t i, int64_t j) {
      sums[1] += double(known_q(student.column(j)));
      sums[2] += double(known_p(log_p(i)));
    });
    T::reduce(sums, Add());
    rest_sum = sums[0];
    rest_in_row =
        sums[0] > 0 ? sums[0] * ::exp2(double(of_rest.offset) - double(of_row.offset)) : sums[0];
    const double total = support_alone ? sums[1] : sums[1] + rest_in_row;
    double teacher_total = sums[2];
    if (even && log_rest > -INFINITY)
      teacher_total += double(problem.vocab - count) *
                       ::exp(double(t_gain) * double(log_rest) - double(t_shift));
    if (bucket) teacher_total += ::exp(log_of_rest);
    if (as_they_are) {
      teacher_mass = sums[2];
      teacher_total = 1;
    }
    z_lse = ::log(total) + of_row.to_shift();
    t_lse = double(t_shift) + ::log(teacher_total);
    scalars.z_gain = student.gain;
    scalars.t_gain = t_gain;
    scalars.ratio = student.gain / t_gain;
    scalars.lse_difference = minus_two_part<Real>(t_lse - z_lse);
    scalars.z_lse = minus_two_part<Real>(z_lse);
    scalars.t_lse = minus_two_part<Real>(t_lse);
    scalars.q_factor = Real(1 / total);
    scalars.p_factor = Real(1 / teacher_total);
  }

  // Of a column that is not known; x is its logit.
  __device__ Element<Real> element(Real x, Real log_p) const {
    return make_element(scalars, x - of_row.shift, log_p, of_row(x),
                        fast_exp2((log_p * t_gain - t_shift) * Real(kLog2e)), 0);
  }
  // Of one that is. They are few and have most of the mass: their exponentials are made in double.
  __device__ Real known_q(Real x) const {
    return Real(::exp2(mul_add(double(x), double(of_row.gain2), -double(of_row.offset))));
  }
  __device__ Real known_p(Real log_p) const {
    return Real(::exp2((double(log_p) * double(t_gain) - double(t_shift)) * kLog2e));
  }
  __device__ Element<Real> known_element(Real x, Real log_p) const {
    return make_element(scalars, x - of_row.shift, log_p, known_q(x), known_p(log_p), 0);
  }
  // Of all columns that are not known.
  __device__ Element<Real> rest_outcome() const {
    const double x = (::log(rest_sum) + of_rest.to_shift()) / double(student.gain) +
                     (double(of_rest.shift) - double(of_row.shift));
    return make_element(scalars, Real(x), log_rest, Real(rest_in_row),
                        fast_exp2(log_rest * t_gain * Real(kLog2e)), 0);
  }
  // f(element) for the outcomes of this thread.
  template <class F>
  __device__ void each_outcome(F f) {
    each_known([&](int64_t i, int64_t j) { f(known_element(student.column(j), log_p(i))); });
    if (even) {
      each_unknown([&](int, Real x) { f(element(x, log_rest)); });
    } else if (!support_alone && T::rank() == 0) {
      f(rest_outcome());
    }
  }
  // f(column, logit)
  template <class F>
  __device__ void each_unknown(F f) {
    each_chunk([&](int, int start) {
      this->load(0, start);
      const Real(&x)[kSize] = this->z[0];
      const uint32_t known = known_of(start);
      for (int i = 0; i < kSize; ++i)
        if (start + i >= 0 && start + i < student.vocab && !(known >> i & 1)) f(start + i, x[i]);
    });
  }

  __device__ void run() {
    const KindParams<Real>& params = problem.params;
    double sums[2] = {};  // value, slope
    each_outcome([&](const Element<Real>& e) {
      const Outcome<Real> outcome = outcome_of(problem.kind, e, params);
      sums[0] += double(outcome.term);
      sums[1] += double(outcome.slope);
    });
    T::reduce(sums, Add());
    const Finished finished = finish_outcomes(problem.kind, sums, teacher_mass, params);
    sums[0] = finished.value;
    weight *= Real(finished.factor);
    if (broken) sums[0] = NAN, weight = NAN;
    if (problem.stats != nullptr) write_statistics();
    if (T::rank() == 0 && problem.value != nullptr) {
      const Real value = Real(problem.factor * sums[0]);
      problem.value[r] = problem.label_weight > 0 ? Real(1 - problem.label_weight) * value +
                                                        Real(problem.label_weight) * label_value
                                                  : value;
    }
    if (problem.gradient.data != nullptr) write_gradient(Real(sums[1]));
  }

  __device__ Real slope_of(const Element<Real>& e, Real H) const {
    return mul_add(-e.q, H, outcome_of(problem.kind, e, problem.params).slope) * weight;
  }

  __device__ void write_gradient(Real H) {
    char* row = row_of(problem.gradient, r);
    const Dtype dtype = problem.gradient.dtype;
    const bool aligned = Side::on_16_bytes(row, origin);
    const auto write = [&](int j, Real g, Real x) {
      with_type(dtype, row, [&](auto* out) { narrow(with_cap(with_label(g, x, j), x), out[j]); });
    };
    if (broken) {  // the bits may be wrong, too
      for (int j = T::rank(); j < student.vocab; j += kThreads) write(j, Real(NAN), Real(NAN));
      return;
    }
    Real factor = 0;  // of an unknown column's exponential
    if (!even && !support_alone && rest_sum != 0)
      factor = Real(double(slope_of(rest_outcome(), H)) / rest_sum);
    each_chunk([&](int, int start) {
      this->load(0, start);
      const Real(&x)[kSize] = this->z[0];
      Real g[kSize];
      if (even) {
        for (int i = 0; i < kSize; ++i) g[i] = slope_of(element(x[i], log_rest), H);
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) g[i] = factor != 0 ? factor * of_rest(x[i]) : Real(0);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) g[i] = with_cap(with_label(g[i], x[i], start + i), x[i]);
      const uint32_t known = known_of(start);
      if (known == 0) return store_chunk<In>(row, dtype, aligned, start, student.vocab, g);
      with_type(dtype, row, [&](auto* out) {
        for (int i = 0; i < kSize; ++i)
          if (start + i >= 0 && start + i < student.vocab && !(known >> i & 1))
            narrow(g[i], out[start + i]);
      });
    });
    each_known([&](int64_t i, int64_t j) {
      const Real x = student.column(j);
      write(int(j), slope_of(known_element(x, log_p(i)), H), x);
    });
  }

  __device__ void write_statistics() {
    double sums[4] = {};  // acceptance, below, entropies
    each_outcome([&](const Element<Real>& e) {
      const bool below = e.q < e.p;
      sums[0] += double(below ? e.q : e.p);
      sums[1] += double(below ? e.q : Real(0));
      if (even || support_alone) sums[2] += double(times(e.q, -e.lq));
      sums[3] += double(times(e.p, -e.lp));
    });
    if (!even && !support_alone) {  // the student's is that of its columns
      const auto add = [&](Real x) {
        const Element<Real> e = element(x, log_rest);
        sums[2] += double(times(e.q, -e.lq));
      };
      each_unknown([&](int, Real x) { add(x); });
      each_known([&](int64_t, int64_t j) { add(student.column(j)); });
    }
    T::reduce(sums, Add());
    Real top[2] = {-INFINITY, -INFINITY};
    each_known([&](int64_t i, int64_t j) {
      top[0] = student.column(j) > top[0] ? student.column(j) : top[0];
      top[1] = log_p(i) > top[1] ? log_p(i) : top[1];
    });
    if (even) top[1] = log_rest > top[1] ? log_rest : top[1];
    if (!support_alone) top[0] = of_row.shift;
    T::reduce(top, Largest());
    int64_t first[2] = {-problem.vocab, -problem.vocab};  // negated: the largest is the first
    const auto look = [&](int side, Real x, int64_t j) {
      if (x == top[side] && -j > first[side]) first[side] = -j;
    };
    each_known([&](int64_t i, int64_t j) {
      look(0, student.column(j), j);
      look(1, log_p(i), j);
    });
    if (!support_alone) {
      each_unknown([&](int j, Real x) {
        look(0, x, j);
        if (even) look(1, log_rest, j);
      });
    }
    T::reduce(first, Largest());
    if (T::rank() != 0) return;
    const Real values[kStats] = {Real(sums[0]),
                                 Real(first[0] == first[1]),
                                 Real(sums[2]),
                                 Real(sums[3]),
                                 Real(double(student.gain) * double(of_row.shift) + z_lse),
                                 Real(t_lse),
                                 Real(sums[1])};
    for (int i = 0; i < kStats; ++i) problem.stats[i * problem.rows + r] = values[i];
  }
};

template <class Real, class In, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) sparse_kernel(const Problem<Real> problem) {
  SHARED_DYNAMIC(uint32_t, bits);
  const int64_t r = blockIdx.x;
  if (!prepare_row<kThreads>(problem, r)) return;
  DeviceSparseRow<Real, In, kThreads> row(problem, r, bits);
  row.weight =
      row_weight(problem, r) * Real((1 - problem.label_weight) * problem.factor) * row.student.gain;
  if (labelled(problem, r)) row.normalise();  // the label's own softmax
  row.mark();
  row.normalise_outcomes();
  row.run();
}

}  // namespace stillhouse
