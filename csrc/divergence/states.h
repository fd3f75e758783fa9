// The state (state.h) of a part of a row: one read of both sides.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// Of a block, relative to the shifts.
template <class Real>
RowState block_state(int64_t n, const Real* z, const Real* t, Real z_gain, Real t_gain,
                     Real z_shift, Real t_shift) {
  Lanes<Real> z_sum, t_sum, z_cross, t_cross;
  const Lane<Real> log2e{Real(kLog2e)};
  for (int64_t j = 0; j < n; j += kLanes) {
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      Lane<Real> zi, ti;
      load_step(z + j, i, zi);
      load_step(t + j, i, ti);
      const Lane<Real> a = (zi - Lane<Real>(z_shift)) * Lane<Real>(z_gain);
      const Lane<Real> b = (ti - Lane<Real>(t_shift)) * Lane<Real>(t_gain);
      const Lane<Real> z_e = fast_exp2(a * log2e), t_e = fast_exp2(b * log2e);
      z_sum[i] += z_e;
      t_sum[i] += t_e;
      z_cross[i] += times(z_e, a - b);
      t_cross[i] += times(t_e, b - a);
    }
  }
  RowState state;
  state.z_sum = fold_sum(z_sum), state.t_sum = fold_sum(t_sum);
  state.z_cross = fold_sum(z_cross), state.t_cross = fold_sum(t_cross);
  return state;
}

template <class Real>
RowState state_of_row(const Problem<Real>& problem, int64_t r, const Workspace<Real>& w) {
  const bool two_sides = problem.teacher.rows.data != nullptr;
  Source<Real> student(problem.student, r, problem.vocab, w.student);
  Source<Real> teacher(two_sides ? problem.teacher : problem.student, r, problem.vocab, w.teacher);
  RowState row;
  Real z_shift = 0, t_shift = 0;
  for (int64_t start = 0; start < problem.vocab; start += kBlock) {
    const Real *z = student.load(start), *t = two_sides ? teacher.load(start) : z;
    const int64_t n = padded(student.columns(start));
    const Real z_top = block_max<Real>(n, z), t_top = block_max<Real>(n, t);
    if (z_top > z_shift || !(row.z_max > -INFINITY)) z_shift = z_top > -INFINITY ? z_top : 0;
    if (t_top > t_shift || !(row.t_max > -INFINITY)) t_shift = t_top > -INFINITY ? t_top : 0;
    const auto logit = [](const Source<Real>& side, Real shift, double max, Real top) {
      return max > -INFINITY || top > -INFINITY ? double(side.gain) * double(shift) : -INFINITY;
    };
    row.move_to(logit(student, z_shift, row.z_max, z_top),
                logit(teacher, t_shift, row.t_max, t_top));
    const RowState part = block_state(n, z, t, student.gain, teacher.gain, z_shift, t_shift);
    row.z_sum += part.z_sum, row.t_sum += part.t_sum;
    row.z_cross += part.z_cross, row.t_cross += part.t_cross;
  }
  if (!two_sides) row.t_max = -INFINITY, row.t_sum = row.z_cross = row.t_cross = 0;
  return row;
}

template <class Real>
void states(const Problem<Real>& problem, double* out, int64_t lo, int64_t hi, void* scratch) {
  Workspace<Real> w;
  w.lay_out(problem,
            reinterpret_cast<Real*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63)));
  for (int64_t r = lo; r < hi; ++r) {
    const RowState row = counts(problem, r) ? state_of_row(problem, r, w) : RowState();
    const double numbers[kStateNumbers] = {row.z_max, row.z_sum,   row.t_max,
                                           row.t_sum, row.z_cross, row.t_cross};
    for (int i = 0; i < kStateNumbers; ++i) out[i * problem.rows + r] = numbers[i];
  }
}
