// The steps of a problem's solution, over sweeps of the costs: nothing but potentials is stored.
// Included by cpu.cpp inside the namespace of its instruction set.
//
// An iteration is one sweep. A row's e_j = 2^(alpha_i + beta_j - c_ij) is the plan's row of the
// iteration before; its sum gives the new alpha_i, whose factor makes the row of the plan that the
// columns' sums are taken of. So every element has one exponential, whether rows or columns are
// updated.
#pragma once

template <class Real>
Real gain_of(double epsilon) {
  return Real(kLog2e / epsilon);
}
template <class Real>
Real marginal(const Real* x, int64_t at) {
  return x == nullptr ? Real(1) : x[at];
}
template <class Real>
Real log2_of(Real x) {
  return x > 0 ? fast_log(x) * Real(kLog2e) : Real(-INFINITY);
}

// mass_j = 2^(beta_j - gain c_j + shift); returns its sum.
template <class Real>
Real exponentials(int64_t n, const Real* cost, const Real* beta, Real gain, Real shift,
                  Real* mass) {
  Lanes<Real> sum;
  const Lane<Real> minus_gain(-gain), by(shift);
  each_step<Real>(n, [&](int64_t j, int64_t at) {
    const Lane<Real> e = fast_exp2(mul_add(minus_gain, lane(cost + j), lane(beta + j)) + by);
    store(e, mass + j);
    sum[at] += e;
  });
  return fold_sum(sum);
}

template <class Real>
Real largest_exponent(int64_t n, const Real* cost, const Real* beta, Real gain) {
  Lanes<Real> top;
  for (auto& lane : top.at) lane = Lane<Real>(-INFINITY);
  const Lane<Real> minus_gain(-gain);
  each_step<Real>(n, [&](int64_t j, int64_t at) {
    top[at] = larger(mul_add(minus_gain, lane(cost + j), lane(beta + j)), top[at]);
  });
  for (int64_t i = 1; i < kSteps<Real>; ++i) top[0] = larger(top[i], top[0]);
  return max_of(top[0]);
}

template <class Real>
void add_scaled(int64_t n, const Real* x, Real factor, Real* sum) {
  const Lane<Real> by(factor);
  each_step<Real>(
      n, [&](int64_t j, int64_t) { store(mul_add(lane(x + j), by, lane(sum + j)), sum + j); });
}

// What the rows' sums are where an iteration leaves them alone: a, or for marginals that may give
// way a e^(-f / rho).
template <class Real>
Real expected_sum(Real marginal, double lambda, Real alpha) {
  return lambda == 1 ? marginal : marginal * fast_exp2(Real(1 - 1 / lambda) * alpha);
}

// Whether a row has no cost that is negative or NaN.
template <class Real>
bool all_costs(const Task<Real>& t, const Real* cost) {
  int wrong = 0;
#pragma omp simd reduction(+ : wrong)
  for (int64_t j = 0; j < t.m; ++j) wrong += cost[j] >= 0 ? 0 : 1;
  return wrong == 0;
}

// One row of an iteration: its exponent, its part of the columns' sums, and how far its own sum was
// off.
template <class Real>
void update_row(const Task<Real>& t, int64_t i, const RowScratch<Real>& w, Real* columns,
                double* of_block) {
  const Real a = marginal(t.batch->a, t.group * t.batch->n + i), gain = gain_of<Real>(t.epsilon);
  const int64_t width = padded(t.m);
  const Real* cost = cost_row(t, i, w);
  if (t.is_first && !all_costs(t, cost)) of_block[kBroken] = 1;
  if (!(a > 0) && a == a) {
    t.alpha_next[i] = -INFINITY;
    return;
  }
  double& error = of_block[kError];
  Real shift = t.is_first ? Real(0) : t.alpha[i];
  Real sum = exponentials(width, cost, t.beta, gain, shift, w.mass);
  double own = double(sum);
  if (!in_range(sum)) {
    const Real before = shift;
    shift = -largest_exponent(width, cost, t.beta, gain);
    sum = exponentials(width, cost, t.beta, gain, shift, w.mass);
    own = double(sum) * ::exp2(double(before) - double(shift));
  }
  if (!t.is_first) {
    const double off = own - double(expected_sum(a, t.lambda_a, t.alpha[i]));
    if (!(off <= error && -off <= error)) error = off < 0 ? -off : off;  // and so for a NaN
  }
  const Real change = log2_of(Real(a / sum));
  if (t.lambda_a == 1) {
    t.alpha_next[i] = shift + change;
    return add_scaled(width, w.mass, Real(a / sum), columns);
  }
  t.alpha_next[i] = Real(t.lambda_a) * (shift + change);
  add_scaled(width, w.mass, fast_exp2(t.alpha_next[i] - shift), columns);
}

// The largest exponent of each column, and the sums relative to them.
template <class Real>
void column_maxima(const Task<Real>& t, int64_t i, const RowScratch<Real>& w, Real* columns) {
  const Real* cost = cost_row(t, i, w);
  const Real gain = gain_of<Real>(t.epsilon), alpha = t.alpha[i];
#pragma omp simd
  for (int64_t j = 0; j < padded(t.m); ++j) {
    const Real x = mul_add(-gain, cost[j], alpha);
    columns[j] = x > columns[j] ? x : columns[j];
  }
}
template <class Real>
void column_sums(const Task<Real>& t, int64_t i, const RowScratch<Real>& w, Real* columns) {
  const Real* cost = cost_row(t, i, w);
  const Real gain = gain_of<Real>(t.epsilon), alpha = t.alpha[i];
#pragma omp simd
  for (int64_t j = 0; j < padded(t.m); ++j)
    columns[j] += fast_exp2(mul_add(-gain, cost[j], alpha) - Real(t.totals[j]));
}

template <class Real>
struct RowResult {
  double sum, cost, entropy;  // of the plan: P, P C, P log2 P
};

// The plan's row in w.mass, and its sums.
template <class Real>
RowResult<Real> plan_row(const Task<Real>& t, int64_t i, const Real* cost, Real* mass) {
  Lanes<Real> sum, costs, entropy;
  const Real gain = gain_of<Real>(t.epsilon);
  const Lane<Real> minus_gain(-gain), alpha(t.alpha[i]), none(Real(0));
  each_step<Real>(padded(t.m), [&](int64_t j, int64_t at) {
    const Lane<Real> c = lane(cost + j);
    const Lane<Real> x = mul_add(minus_gain, c, lane(t.beta + j)) + alpha, e = fast_exp2(x);
    store(e, mass + j);
    sum[at] += e;
    // An infinite cost has no mass, and no part in the sums.
    costs[at] += select(e > none, e * c, none);
    entropy[at] += select(e > none, e * x, none);
  });
  return {double(fold_sum(sum)), double(fold_sum(costs)), double(fold_sum(entropy))};
}

template <class Real>
void result_row(const Task<Real>& t, int64_t i, const RowScratch<Real>& w, Real* columns,
                double* of_block) {
  const Batch<Real>& b = *t.batch;
  const Real a = marginal(b.a, t.group * b.n + i);
  Real* const plan = b.plan == nullptr ? nullptr : b.plan + (t.group * b.n + i) * b.m;
  const bool has_mass = t.alpha[i] > -INFINITY || t.alpha[i] != t.alpha[i];
  RowResult<Real> row{};
  if (has_mass) {
    row = plan_row(t, i, cost_row(t, i, w), w.mass);
    if (columns != nullptr) add_scaled(padded(t.m), w.mass, Real(1), columns);
  }
  for (int64_t j = 0; plan != nullptr && j < b.m; ++j)
    plan[j] = has_mass && j < t.m ? w.mass[j] : Real(0);
  const double off = has_mass ? row.sum - double(expected_sum(a, t.lambda_a, t.alpha[i])) : 0.;
  if (!(off <= of_block[kError] && -off <= of_block[kError]))
    of_block[kError] = off < 0 ? -off : off;
  of_block[kValue] += row.cost;
  // epsilon P (log P - 1)
  if (b.objective == kEntropic) {
    of_block[kValue] += t.epsilon * (kLn2 * row.entropy - row.sum);
    if (t.lambda_a != 1) of_block[kValue] += b.rho_a * relative_entropy(row.sum, double(a));
  }
}

// ---- what follows a step

template <class Real>
double block_total(const Task<Real>& t, int64_t which, bool largest) {
  double total = largest ? -INFINITY : 0;
  for (int64_t block = 0; block < t.blocks; ++block) {
    const double x = t.of_block[kBlockSums * block + which];
    if (!largest) total += x;
    if (largest && !(x <= total)) total = x;
  }
  return total;
}

template <class Real>
void add_blocks(Task<Real>& t) {
  const int64_t width = padded(t.m);
  for (int64_t j = 0; j < width; ++j) t.totals[j] = double(t.columns[j]);
  for (int64_t block = 1; block < t.blocks; ++block) {
    const Real* const part = t.columns + block * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) t.totals[j] += double(part[j]);
  }
}

template <class Real>
void set_epsilon(Task<Real>& t, double epsilon) {
  const double ratio = t.epsilon > 0 ? t.epsilon / epsilon : 1;
  if (ratio != 1) {  // potentials stay, their exponents do not
    for (int64_t i = 0; i < t.n; ++i) t.alpha[i] *= Real(ratio);
    for (int64_t j = 0; j < t.m; ++j) t.beta[j] *= Real(ratio);
  }
  t.epsilon = epsilon;
  t.lambda_a = lambda_of(t.batch->rho_a, epsilon);
  t.lambda_b = lambda_of(t.batch->rho_b, epsilon);
}

// Of iteration k.
template <class Real>
double annealed(const Task<Real>& t, int64_t iteration) {
  if (!(t.batch->annealing > 0)) return t.batch->epsilon;
  const double now = t.start * ::pow(t.batch->annealing, double(iteration));
  return now > t.batch->epsilon ? now : t.batch->epsilon;
}

template <class Real>
void start_task(Task<Real>& t, int64_t group) {
  const Batch<Real>& b = *t.batch;
  t.group = group;
  t.n = b.lengths == nullptr ? b.n : b.lengths[2 * group];
  t.m = b.lengths == nullptr ? b.m : b.lengths[2 * group + 1];
  t.blocks = (t.n + kBlockRows - 1) / kBlockRows;
  t.epsilon = 0, t.start = 0;
  transpose_points(t);
}

template <class Real>
void start_iterations(Task<Real>& t) {
  t.iteration = 1, t.is_first = true;
  for (int64_t i = 0; i < t.n; ++i) t.alpha[i] = 0;
  for (int64_t j = 0; j < padded(t.m); ++j) t.beta[j] = j < t.m ? Real(0) : Real(-INFINITY);
  set_epsilon(t, annealed(t, 1));
  t.step = Step::rows;
}

template <class Real>
void keep_history(const Task<Real>& t) {
  const Batch<Real>& b = *t.batch;
  if (b.history == nullptr) return;
  Real* const kept = b.history + (t.group * b.iterations + t.iteration - 1) * (b.n + b.m);
  for (int64_t i = 0; i < b.n; ++i) kept[i] = i < t.n ? t.alpha[i] : Real(0);
  for (int64_t j = 0; j < b.m; ++j) kept[b.n + j] = j < t.m ? t.beta[j] : Real(0);
}

template <class Real>
void end_iteration(Task<Real>& t) {
  keep_history(t);
  t.is_first = false;
  if (t.iteration == t.batch->iterations) {
    t.step = Step::result;
    return;
  }
  ++t.iteration;
  set_epsilon(t, annealed(t, t.iteration));
  t.step = Step::rows;
}

// The columns' exponents from log2 of their sums with beta = 0.
template <class Real>
void set_beta(Task<Real>& t, int64_t j, Real log2_sum) {
  const Real b = marginal(t.batch->b, t.group * t.batch->m + j);
  t.beta[j] = b > 0 ? Real(t.lambda_b) * (log2_of(b) - log2_sum) : log2_of(b);
}

// A problem whose costs cannot be: NaN, and -1 iterations.
template <class Real>
void refuse(Task<Real>& t) {
  const Batch<Real>& b = *t.batch;
  b.value[t.group] = b.error[t.group] = NAN;
  b.used[t.group] = -1;
  fill(b.f + t.group * b.n, b.n, Real(NAN));
  fill(b.g + t.group * b.m, b.m, Real(NAN));
  if (b.plan != nullptr) fill(b.plan + t.group * b.n * b.m, b.n * b.m, Real(NAN));
  t.step = Step::done;
}

template <class Real>
void after_rows(Task<Real>& t) {
  const Batch<Real>& b = *t.batch;
  const int64_t before = t.iteration - 1;
  if (t.is_first && block_total(t, kBroken, false) > 0) return refuse(t);
  if (b.tolerance >= 0 && before > 0 && before % kTestEvery == 0 &&
      t.epsilon == annealed(t, before) && block_total(t, kError, true) <= b.tolerance) {
    t.iteration = before;
    t.step = Step::result;
    return;
  }
  Real* const alpha = t.alpha;
  t.alpha = t.alpha_next, t.alpha_next = alpha;
  add_blocks(t);
  for (int64_t j = 0; j < t.m; ++j) {
    if (!in_range(t.totals[j]) && marginal(b.b, t.group * b.m + j) != 0) {
      t.step = Step::column_maxima;
      return;
    }
  }
  for (int64_t j = 0; j < t.m; ++j) {
    const Real b_j = marginal(b.b, t.group * b.m + j);
    if (!(t.beta[j] > -INFINITY) && b_j > 0) {
      t.step = Step::column_maxima;
      return;
    }
    set_beta(t, j, log2_of(Real(t.totals[j])) - t.beta[j]);
  }
  end_iteration(t);
}

template <class Real>
void after_maxima(Task<Real>& t) {
  const int64_t width = padded(t.m);
  for (int64_t j = 0; j < width; ++j) {
    Real top = -INFINITY;
    for (int64_t block = 0; block < t.blocks; ++block) {
      const Real x = t.columns[block * width + j];
      top = x > top ? x : top;
    }
    t.totals[j] = top > -INFINITY ? double(top) : 0.;
  }
  t.step = Step::column_sums;
}

template <class Real>
void after_sums(Task<Real>& t) {
  const int64_t width = padded(t.m);
  for (int64_t j = 0; j < t.m; ++j) {
    double sum = 0;
    for (int64_t block = 0; block < t.blocks; ++block) sum += double(t.columns[block * width + j]);
    set_beta(t, j, Real(t.totals[j]) + log2_of(Real(sum)));
  }
  end_iteration(t);
}

// Everything that is known of the solution but the plan's rows.
template <class Real>
void leave_solution(Task<Real>& t, double value, double error) {
  const Batch<Real>& b = *t.batch;
  const Real unit = Real(t.epsilon * kLn2);
  b.value[t.group] = Real(value);
  b.error[t.group] = Real(error);
  b.used[t.group] = t.iteration;
  Real *const f = b.f + t.group * b.n, *const g = b.g + t.group * b.m;
  for (int64_t i = 0; i < b.n; ++i) f[i] = i < t.n ? t.alpha[i] * unit : Real(0);
  for (int64_t j = 0; j < b.m; ++j) g[j] = j < t.m ? t.beta[j] * unit : Real(0);
  if (b.plan != nullptr) fill(b.plan + (t.group * b.n + t.n) * b.m, (b.n - t.n) * b.m, Real(0));
  t.step = Step::done;
}

template <class Real>
void after_result(Task<Real>& t) {
  const Batch<Real>& b = *t.batch;
  double value = block_total(t, kValue, false);
  if (b.objective == kEntropic && t.lambda_b != 1) {
    add_blocks(t);
    for (int64_t j = 0; j < t.m; ++j)
      value += b.rho_b * relative_entropy(t.totals[j], double(marginal(b.b, t.group * b.m + j)));
  }
  leave_solution(t, value, block_total(t, kError, true));
}
