// One row by a team of threads. A row is cut into chunks of 16 bytes of the student; chunk k belongs to
// thread k modulo the team's size in every pass, so that a thread only ever writes a gradient over
// logits that itself has read.
//   1. maxima and sums of exponentials of both sides             (a label's own softmax beside them)
//   2. terms: value, statistics, slopes; with a known H the gradient
//   3. (h - q H) weight, elsewhere
// Where a row pair stays from pass to pass decides what the passes cost (Hold).
#pragma once
#include "normalised.cuh"

namespace stillhouse {

template <class Kind, class Real, class In, int kThreads, Hold kHold, bool kPlain>
struct DeviceRow : NormalisedRow<Kind, Real, In, kThreads, kHold, kPlain> {
  using Base = NormalisedRow<Kind, Real, In, kThreads, kHold, kPlain>;
  using Base::chunks, Base::copy_chunk, Base::kSize, Base::origin;
  using Base::each_chunk, Base::each_group, Base::fetch, Base::element, Base::kRegisters;
  using Base::kWithout, Base::without, Base::z_without, Base::column, Base::whole;
  using Base::label_value, Base::label_probability, Base::agreement;
  using Base::labelled, Base::label_weight, Base::with_cap, Base::with_label;
  using Base::problem, Base::r, Base::params, Base::scalars, Base::means, Base::weight;
  using Base::student, Base::z, Base::t, Base::z_e, Base::t_e, Base::z_lse, Base::t_lse;
  using typename Base::Pair, typename Base::Side;
  using typename Base::T;

  char* gradient = nullptr;
  bool gradient_aligned = false;
  // Where the gradient is known without them and the value no function of them, slopes are not summed.
  static constexpr bool kSumsSlopes = !kOnePass<Kind> || Kind::kFinish;
  // Slopes stay in shared memory from pass 2 to pass 3.
  static constexpr bool kLeavesSlopes =
      kHold == Hold::shared && Kind::kForm == Form::sum && Kind::kRow == RowNumbers::none;
  enum { kValue, kSlope, kAcceptance, kBelow, kStudentEntropy, kTeacherEntropy };
  static constexpr int kSums = !kPlain ? 6 : kSumsSlopes ? 2 : 1;
  double sums[kSums] = {};
  Pair next;  // whose chunks take the places of this row's as these are done with
  bool has_next = false;

  __device__ DeviceRow(const Problem<Real>& problem, int64_t r, const Pair& pair,
                       const SharedVectors<In>& shared)
      : Base(problem, r, pair, shared) {
    if (problem.gradient.data != nullptr) {
      gradient = row_of(problem.gradient, r);
      gradient_aligned = Side::on_16_bytes(gradient, origin);
    }
  }

  // f(slot, first column) for the chunks of this thread; last: nobody looks at them again.
  template <class F>
  __device__ __forceinline__ void each_chunk_of_pass(bool last, F f) {
    if constexpr (kHold == Hold::shared) {
      const bool copies = last && has_next;
      each_group([](int) {},
                 [&](int chunk) {
                   if (chunk < chunks) f(0, origin + chunk * kSize);
                   if (copies) copy_chunk(next, chunk);
                 },
                 [&](int) {
                   if (copies) copy_async_commit();
                 });
    } else {
      each_chunk(f);
    }
  }

  __device__ void finish(int slot, int start, Real (&g)[kSize]) {
    if constexpr (!kPlain) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) g[i] = with_label(g[i], z[slot][i], start + i);
    }
    if constexpr (kWithout) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (start + i != without) continue;
        g[i] = weight * Real(double(params.a) * (column.q - column.p));
        if (labelled) g[i] += label_weight * (label_probability - 1);
        z[slot][i] = z_without;
      }
    }
    if constexpr (!kPlain) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) g[i] = with_cap(g[i], z[slot][i]);
    }
    store_chunk<In>(gradient, problem.gradient.dtype, gradient_aligned, start, student.vocab, g);
  }

  // Passes 2 and 3.
  __device__ void run() {
    const bool with_gradient = gradient != nullptr;
    Real part[kSums] = {};
    bool known_slope = false;
    if constexpr (Base::kTakesParts) known_slope = problem.slope != nullptr && !kOnePass<Kind>;
    // What is -inf on both sides, as columns beside the row are, adds nothing.
    const auto add_terms = [&](int slot, int start) {
      fetch(slot, start);
      Real g[kSize];  // the gradient where it is known, else slopes
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        g[i] = 0;
        if constexpr (kHasTeacher<Kind>) {
          const auto e = Kind::adjusted(element(slot, i), params);
          const Real slope = Kind::slope(e, params), basis = Kind::basis(e, params);
          part[kValue] += kind_term<Kind>(e, params);
          if constexpr (kSumsSlopes) part[kSlope] += summand<Kind>(slope, basis);
          g[i] = kOnePass<Kind> ? known_gradient<Kind>(e, slope) * weight : slope;
        }
        if constexpr (!kPlain) {
          if (problem.stats != nullptr) add_statistics(slot, i, part);
        }
        if constexpr (kRegisters && kHasTeacher<Kind> && !kOnePass<Kind>) {
          const auto e = Kind::adjusted(element(slot, i), params);
          z_e[slot][i] = Kind::basis(e, params), t_e[slot][i] = g[i];
        }
      }
      if (with_gradient && kOnePass<Kind>) finish(slot, start, g);
      if constexpr (kLeavesSlopes) {
        if (with_gradient) this->leave(start, g);
      }
    };
    if (!known_slope) each_chunk_of_pass(kOnePass<Kind> || !with_gradient, add_terms);
    for (int i = 0; i < kSums; ++i) sums[i] = double(part[i]);
    if constexpr (kWritesLater) {
      T::of_warp(sums, Add());
      T::leave(values() + this->turn * T::kWarps, sums);
      return;
    }
    T::reduce(sums, Add());

    bool whole_row = true;
    if constexpr (Base::kTakesParts) {
      whole_row = problem.lse == nullptr;
      if (problem.parts != nullptr) {
        if (T::rank() != 0) return;
        problem.parts[r] = sums[kValue], problem.parts[problem.rows + r] = sums[kSlope];
        return;
      }
      if (known_slope) sums[kSlope] = problem.slope[r];
    }
    if constexpr (Kind::kFinish) {
      if (whole_row) {
        const Finished finished = Kind::finish(sums[kValue], sums[kSlope], params);
        sums[kValue] = finished.value;
        weight *= Real(finished.factor);
      }
    }
    if constexpr (kWithout) sums[kValue] += double(params.a) * column.kl;
    if constexpr (!kOnePass<Kind>) {
      if (!with_gradient) return;
      const Real H = Real(sums[kSlope]);
      Vector16<In> ahead{};  // the student's next chunk, where slopes have taken its place
      constexpr bool kReadsAgain = kLeavesSlopes && !Base::kKeepsStudent;
      if constexpr (kReadsAgain) ahead = student.fetch(origin + T::rank() * kSize);
      each_chunk_of_pass(true, [&](int slot, int start) {
        Real g[kSize];
        if constexpr (kLeavesSlopes) {
          if constexpr (kReadsAgain) {
            student.widen(ahead, z[slot]);
            ahead = student.fetch(start + kThreads * kSize);
          } else {
            student.widen(this->shared.load(this->place(0, this->chunk_of(start))), z[slot]);
          }
          this->find_left(start, t_e[slot]);
          this->exponentials(z[slot], this->of_z, z_e[slot]);
        } else {
          fetch(slot, start);
        }
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          Real q = z_e[slot][i], h = t_e[slot][i];
          if constexpr (kLeavesSlopes) {
            q *= scalars.q_factor.value;
          } else if constexpr (!kRegisters) {
            const auto e = Kind::adjusted(element(slot, i), params);
            q = Kind::basis(e, params), h = Kind::slope(e, params);
          }
          g[i] = mul_add(-q, H, h) * weight;
        }
        finish(slot, start, g);
      });
    }
  }

  __device__ void add_statistics(int slot, int i, Real (&part)[kSums]) const {
    if constexpr (kHasTeacher<Kind>) {
      const Element<Real> e = make_element(kWithout ? whole : scalars, z[slot][i], t[slot][i],
                                           z_e[slot][i], t_e[slot][i], 0);
      const bool below = e.q < e.p;
      part[kAcceptance] += below ? e.q : e.p;
      part[kBelow] += below ? e.q : Real(0);
      part[kStudentEntropy] += times(e.q, -e.lq);
      part[kTeacherEntropy] += times(e.p, -e.lp);
    } else {
      const Real q = z_e[slot][i] * scalars.q_factor.value;
      const Real lq = mul_add(student.gain, z[slot][i], scalars.z_lse.high.value);
      part[kStudentEntropy] += times(q, -(lq + scalars.z_lse.low.value));
    }
  }

  // Where nothing but the value depends on the sums, the warps leave theirs, and who writes the value waits
  // for no barrier of its own: it does so behind the next row's.
  static constexpr bool kWritesLater = kPlain && kSums == 1 && T::kWarps > 1;
  __device__ static SharedPointer<double> values() {
    SHARED_ARRAY(double, of_warps, 2 * T::kWarps);
    return of_warps;
  }
  // turn: of the row r, behind a barrier after its run().
  __device__ static void write_value(const Problem<Real>& problem, int64_t r, int turn) {
    if (threadIdx.x >= kWarpSize || problem.value == nullptr) return;
    double sum[1];
    T::find(values() + turn * T::kWarps, sum);
    T::of_warps(sum, Add());
    if (threadIdx.x == 0) problem.value[r] = Real(problem.factor * sum[0]);
  }

  __device__ void write() {
    if (kWritesLater || T::rank() != 0) return;
    if (problem.value != nullptr) {
      Real value = Real(problem.factor * sums[kValue]);
      if (!kHasTeacher<Kind>) {
        value = label_value;
      } else if (problem.label_weight > 0) {
        value = Real(1 - problem.label_weight) * value + Real(problem.label_weight) * label_value;
      }
      problem.value[r] = value;
    }
    if constexpr (!kPlain) write_statistics();
  }

  __device__ void write_statistics() {
    if (problem.stats == nullptr) return;
    const Real none = kHasTeacher<Kind> ? Real(0) : Real(NAN);
    double lse[2] = {z_lse, t_lse};
    if constexpr (Kind::kRow == RowNumbers::standard) lse[0] -= means[0], lse[1] -= means[1];
    if constexpr (kWithout) {
      sums[kAcceptance] += column.acceptance();
      sums[kBelow] += column.below();
      sums[kStudentEntropy] += column.student_entropy();
      sums[kTeacherEntropy] += column.teacher_entropy();
      lse[0] = column.z_lse, lse[1] = column.t_lse;
    }
    const Real values[kStats] = {
        Real(sums[kAcceptance]) + none,     agreement,    Real(sums[kStudentEntropy]),
        Real(sums[kTeacherEntropy]) + none, Real(lse[0]), Real(lse[1]) + none,
        Real(sums[kBelow]) + none};
    for (int i = 0; i < kStats; ++i) problem.stats[i * problem.rows + r] = values[i];
  }
};

}  // namespace stillhouse
