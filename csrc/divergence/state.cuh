// The state (state.h) of a part of a row, by a block of threads.
#pragma once
#include "../core/block.cuh"
#include "side.cuh"
#include "state.h"

namespace stillhouse {

template <class Real, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    state_kernel(const Problem<Real> problem, double* out) {
  using T = Team<kThreads>;
  using Side = DeviceSide<Mixed, Real, false>;
  const int64_t r = blockIdx.x;
  RowState row;
  if (counts(problem, r)) {
    const bool two_sides = problem.teacher.rows.data != nullptr;
    const Side student(problem.student, r, int(problem.vocab));
    const Side teacher(two_sides ? problem.teacher : problem.student, r, int(problem.vocab));
    Real maxima[2] = {-INFINITY, -INFINITY};
    const auto each = [&](auto f) {
      for (int64_t j = T::rank(); j < problem.vocab; j += kThreads)
        f(student.column(j), teacher.column(j));
    };
    each([&](Real z, Real t) {
      maxima[0] = z > maxima[0] ? z : maxima[0];
      maxima[1] = t > maxima[1] ? t : maxima[1];
    });
    T::reduce(maxima, Largest());
    const Real z_shift = RunningSum<Real>::shift_of(maxima[0]);
    const Real t_shift = RunningSum<Real>::shift_of(maxima[1]);
    double sums[4] = {};
    each([&](Real z, Real t) {
      const Real a = (z - z_shift) * student.gain, b = (t - t_shift) * teacher.gain;
      const Real z_e = fast_exp2(a * Real(kLog2e)), t_e = fast_exp2(b * Real(kLog2e));
      sums[0] += double(z_e);
      sums[1] += double(t_e);
      sums[2] += double(times(z_e, a - b));
      sums[3] += double(times(t_e, b - a));
    });
    T::reduce(sums, Add());
    row.z_max = double(student.gain) * double(maxima[0]);
    row.z_sum = sums[0];
    if (two_sides) {
      row.t_max = double(teacher.gain) * double(maxima[1]);
      row.t_sum = sums[1], row.z_cross = sums[2], row.t_cross = sums[3];
    }
  }
  if (T::rank() != 0) return;
  const double numbers[kStateNumbers] = {row.z_max, row.z_sum,   row.t_max,
                                         row.t_sum, row.z_cross, row.t_cross};
  for (int i = 0; i < kStateNumbers; ++i) out[i * problem.rows + r] = numbers[i];
}

}  // namespace stillhouse
