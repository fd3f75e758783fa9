// The value's gradient with respect to costs and marginals, in sweeps as the solution's.
// Included by cpu.cpp inside the namespace of its instruction set.
//
// With natural logarithms A, B of the scalings and C / epsilon = M, an iteration is
//   A_i = lambda_a (log a_i - log r_i),  r_i = sum_j e^(B'_j - M_ij)     B': of the iteration before
//   B_j = lambda_b (log b_j - log s_j),  s_j = sum_i e^(A_i - M_ij)
// and S_ij = e^(B'_j - M_ij) / r_i, T_ij = e^(A_i - M_ij) / s_j are what derivatives are made of:
// dA = lambda_a (da / a - S (dB' - dM)), dB = lambda_b (db / b - T^t (dA - dM)). Adjoints go back
// from the last iteration, each a sweep; all of them together make the gradient of a row of costs
// in one last sweep.
#pragma once

// log2 of 1 / r_i and 1 / s_j of an iteration, from the exponents that it left.
template <class Real>
Real minus_log2_sum(Real exponent, double lambda, Real marginal) {
  return marginal > 0 ? exponent / Real(lambda) - log2_of(marginal) : Real(-INFINITY);
}

template <class Real>
const Real* kept_exponents(const Task<Real>& t, int64_t iteration) {
  const Batch<Real>& b = *t.batch;
  return b.history + (t.group * b.iterations + iteration - 1) * (b.n + b.m);
}

// Exponents of the solution, from f and g.
template <class Real>
void restore(Task<Real>& t) {
  const Batch<Real>& b = *t.batch;
  t.iteration = b.used[t.group];
  set_epsilon(t, annealed(t, t.iteration));
  const Real unit = Real(1 / (t.epsilon * kLn2));
  for (int64_t i = 0; i < t.n; ++i) t.alpha[i] = b.f[t.group * b.n + i] * unit;
  for (int64_t j = 0; j < padded(t.m); ++j)
    t.beta[j] = j < t.m ? b.g[t.group * b.m + j] * unit : Real(-INFINITY);
  if (b.mode != kUnrolled) return;
  const Real* const kept = kept_exponents(t, t.iteration);
  for (int64_t i = 0; i < t.n; ++i) t.alpha[i] = kept[i];
  for (int64_t j = 0; j < t.m; ++j) t.beta[j] = kept[b.n + j];
}

template <class Real>
void plan_sums_row(const Task<Real>& t, int64_t i, const RowScratch<Real>& w, Real* columns) {
  t.row_sums[i] = Real(plan_row(t, i, cost_row(t, i, w), w.mass).sum);
  add_scaled(padded(t.m), w.mass, Real(1), columns);
}

// The derivative of the value with respect to P_ij beside the costs': costs, or R_i + Q_j.
template <class Real>
bool by_sides(const Task<Real>& t) {
  return t.batch->objective == kEntropic;
}

template <class Real>
void set_side_seeds(Task<Real>& t) {
  const Batch<Real>& b = *t.batch;
  const Real unit = Real(t.epsilon * kLn2);
  const auto seed = [&](Real exponent, double rho, Real sum, Real marginal) {
    if (!(exponent > -INFINITY)) return Real(0);  // of what has no mass
    Real log_ratio = 0;
    if (rho < INFINITY) log_ratio = Real(rho * kLn2) * log2_of(Real(sum / marginal));
    return exponent * unit + log_ratio;
  };
  for (int64_t i = 0; i < t.n; ++i)
    t.row_seed[i] = seed(t.alpha[i], b.rho_a, t.row_sums[i], marginal(b.a, t.group * b.n + i));
  for (int64_t j = 0; j < padded(t.m); ++j)
    t.column_seed[j] =
        j < t.m ? seed(t.beta[j], b.rho_b, t.column_sums[j], marginal(b.b, t.group * b.m + j))
                : Real(0);
}

// w.mass = P_ij, w.weight = P_ij G_ij; returns the sum of these.
template <class Real>
double seed_row(const Task<Real>& t, int64_t i, const Real* cost, const RowScratch<Real>& w) {
  plan_row(t, i, cost, w.mass);
  Lanes<Real> sum;
  const bool sides = by_sides(t);
  const Lane<Real> of_row(sides ? t.row_seed[i] : Real(0)), none(Real(0));
  const Real* const other = sides ? t.column_seed : cost;
  each_step<Real>(padded(t.m), [&](int64_t j, int64_t at) {
    const Lane<Real> p = lane(w.mass + j);
    const Lane<Real> product = select(p > none, p * (lane(other + j) + of_row), none);
    store(product, w.weight + j);
    sum[at] += product;
  });
  return double(fold_sum(sum));
}

template <class Real>
Real* adjoint_rows(const Task<Real>& t) {
  return t.bar_alpha + (t.batch->mode == kUnrolled ? t.iteration - 1 : 0) * padded(t.batch->n);
}

// The seeds of the last iteration's adjoints: sums of P G over columns and rows. Where the fixed
// point is solved for, without what the rows answer for.
template <class Real>
void seeds_row(const Task<Real>& t, int64_t i, const RowScratch<Real>& w, Real* columns) {
  const Real upstream = t.batch->upstream[t.group];
  Real* const bar = adjoint_rows(t) + i;
  *bar = 0;
  if (!(t.alpha[i] > -INFINITY)) return;
  *bar = Real(double(upstream) * seed_row(t, i, cost_row(t, i, w), w));
  add_scaled(padded(t.m), w.weight, upstream, columns);
  if (t.batch->mode == kImplicit)
    add_scaled(padded(t.m), w.mass, -*bar * Real(t.lambda_a) / t.row_sums[i], columns);
}

// ---- unrolled

// Back through an iteration: from bar_beta to bar_alpha and, over the columns, to bar_beta before
// it.
template <class Real>
void reverse_row(const Task<Real>& t, int64_t i, const RowScratch<Real>& w, Real* columns) {
  const Batch<Real>& b = *t.batch;
  const Real a = marginal(b.a, t.group * b.n + i), gain = gain_of<Real>(t.epsilon);
  const Real exponent = kept_exponents(t, t.iteration)[i];
  Real& bar = adjoint_rows(t)[i];
  if (!(a > 0)) {
    bar = 0;
    return;
  }
  const int64_t width = padded(t.m), offset = (t.iteration - 1) * padded(b.m);
  const Real* const cost = cost_row(t, i, w);
  const Lane<Real> minus_gain(-gain), alpha(exponent);
  const Lane<Real> of_row(minus_log2_sum(exponent, t.lambda_a, a));
  Lanes<Real> sum;
  each_step<Real>(width, [&](int64_t j, int64_t at) {
    const Lane<Real> c = lane(cost + j), tau = lane(t.tau + offset + j);
    const Lane<Real> before = lane(t.before + offset + j);
    sum[at] += lane(t.bar_beta + offset + j) * fast_exp2(mul_add(minus_gain, c, tau) + alpha);
    store(fast_exp2(mul_add(minus_gain, c, before) + of_row), w.mass + j);
  });
  const Real seed = t.iteration == b.used[t.group] ? bar : Real(0);
  bar = seed - Real(t.lambda_b) * fold_sum(sum);
  add_scaled(width, w.mass, Real(-t.lambda_a) * bar, columns);
}

// The numbers of an iteration.
template <class Real>
void load_iteration(Task<Real>& t, int64_t iteration) {
  const Batch<Real>& b = *t.batch;
  const Real* const now = kept_exponents(t, iteration) + b.n;
  t.iteration = iteration;
  t.epsilon = 0;  // no exponents to carry over
  set_epsilon(t, annealed(t, iteration));
  const Real ratio = Real(iteration > 1 ? annealed(t, iteration - 1) / t.epsilon : 1);
  Real* const tau = t.tau + (iteration - 1) * padded(b.m);
  Real* const before = t.before + (iteration - 1) * padded(b.m);
  for (int64_t j = 0; j < padded(t.m); ++j) {
    tau[j] = before[j] = -INFINITY;
    if (j >= t.m) continue;
    tau[j] = minus_log2_sum(now[j], t.lambda_b, marginal(b.b, t.group * b.m + j));
    before[j] = iteration > 1 ? kept_exponents(t, iteration - 1)[b.n + j] * ratio : Real(0);
  }
}

// Sums over the blocks' columns as the adjoints of an iteration's.
template <class Real>
void take_bar_beta(Task<Real>& t, int64_t iteration, double factor) {
  const Batch<Real>& b = *t.batch;
  add_blocks(t);
  Real* const bar = t.bar_beta + (iteration - 1) * padded(b.m);
  for (int64_t j = 0; j < padded(t.m); ++j) {
    const bool counts = j < t.m && marginal(b.b, t.group * b.m + j) > 0;
    bar[j] = counts ? Real(factor * t.totals[j]) : Real(0);
  }
}

// Adds an iteration's part to the gradient of a row of costs: (lambda_b bar_beta_j T_ij + lambda_a
// bar_alpha_i S_ij) / epsilon.
template <class Real>
void add_iteration(const Task<Real>& t, int64_t k, int64_t i, const Real* cost, Real* weight) {
  const Batch<Real>& b = *t.batch;
  const double epsilon = annealed(t, k);
  const double lambda_a = lambda_of(b.rho_a, epsilon), lambda_b = lambda_of(b.rho_b, epsilon);
  const int64_t offset = (k - 1) * padded(b.m);
  const Real exponent = kept_exponents(t, k)[i], a = marginal(b.a, t.group * b.n + i);
  const Lane<Real> minus_gain(-gain_of<Real>(epsilon)), alpha(exponent);
  const Lane<Real> of_row(minus_log2_sum(exponent, lambda_a, a));
  const Lane<Real> x(Real(lambda_a / epsilon) * t.bar_alpha[(k - 1) * padded(b.n) + i]);
  const Lane<Real> y_gain(Real(lambda_b / epsilon));
  each_step<Real>(padded(t.m), [&](int64_t j, int64_t) {
    const Lane<Real> c = lane(cost + j), tau = lane(t.tau + offset + j);
    const Lane<Real> before = lane(t.before + offset + j), y = lane(t.bar_beta + offset + j);
    const Lane<Real> of_columns = fast_exp2(mul_add(minus_gain, c, tau) + alpha);
    const Lane<Real> of_rows = fast_exp2(mul_add(minus_gain, c, before) + of_row);
    store(lane(weight + j) + (y * y_gain * of_columns + x * of_rows), weight + j);
  });
}

// ---- implicit: at the fixed point, with D the sums of rows and columns over their lambda,
//   D_r x + P y = q_r,  D_c y + P^t x = q_c
// By conjugate gradients of (D_c - P^t D_r^-1 P) y = q_c - P^t D_r^-1 q_r.

template <class Real>
Real dot(const Task<Real>& t, const Real* x, const Real* y) {
  Lanes<Real> sum;
  each_step<Real>(padded(t.m),
                  [&](int64_t j, int64_t at) { sum[at] += lane(x + j) * lane(y + j); });
  return fold_sum(sum);
}

template <class Real>
void conjugate_row(const Task<Real>& t, int64_t i, const RowScratch<Real>& w, Real* columns) {
  if (!(t.alpha[i] > -INFINITY)) return;
  plan_row(t, i, cost_row(t, i, w), w.mass);
  const Real x = dot(t, w.mass, t.direction) * Real(t.lambda_a) / t.row_sums[i];
  add_scaled(padded(t.m), w.mass, x, columns);
}

template <class Real>
double diagonal(const Task<Real>& t, int64_t j) {
  return double(t.column_sums[j]) / t.lambda_b;
}

// Where the residual's product with itself is small enough, and how long it may take.
constexpr int64_t kMostSteps = 1000;
template <class Real>
double solver_target(double product) {
  const double least = sizeof(Real) == 4 ? 1e-7 : 1e-14;
  return product * least * least;
}

// Where both marginals are kept, y may be moved by a constant: the equations leave it open, and what
// rounding puts into the residual along it would be answered by the largest of steps.
template <class Real>
bool has_constants(const Task<Real>& t) {
  return t.lambda_a == 1 && t.lambda_b == 1;
}

// Takes that out of the residual; returns its product with itself.
template <class Real>
double measure_residual(Task<Real>& t) {
  double sum = 0, total = 0, product = 0;
  for (int64_t j = 0; j < t.m; ++j) sum += double(t.residual[j]), total += double(t.column_sums[j]);
  const double share = has_constants(t) && total > 0 ? sum / total : 0;
  for (int64_t j = 0; j < t.m; ++j) {
    const double d = diagonal(t, j);
    t.residual[j] -= Real(share * double(t.column_sums[j]));
    if (d > 0) product += double(t.residual[j]) * double(t.residual[j]) / d;
  }
  return product;
}

template <class Real>
void start_solver(Task<Real>& t) {
  add_blocks(t);
  for (int64_t j = 0; j < padded(t.m); ++j) {
    const double d = j < t.m ? diagonal(t, j) : 0;
    t.residual[j] = d > 0 ? Real(t.totals[j]) : Real(0);
    t.solution[j] = 0;
  }
  t.product = measure_residual(t);
  for (int64_t j = 0; j < padded(t.m); ++j) {
    const double d = j < t.m ? diagonal(t, j) : 0;
    t.direction[j] = d > 0 ? Real(double(t.residual[j]) / d) : Real(0);
  }
  t.target = solver_target<Real>(t.product);
  t.iteration = 0;
}

// Whether the residual is small enough, or as small as it gets.
template <class Real>
bool advance_solver(Task<Real>& t) {
  add_blocks(t);
  double curvature = 0;
  for (int64_t j = 0; j < t.m; ++j)
    curvature += double(t.direction[j]) * (diagonal(t, j) * double(t.direction[j]) - t.totals[j]);
  if (!(curvature > 0) || ++t.iteration > kMostSteps) return true;
  const double step = t.product / curvature;
  for (int64_t j = 0; j < t.m; ++j) {
    t.solution[j] += Real(step * double(t.direction[j]));
    t.residual[j] -= Real(step * (diagonal(t, j) * double(t.direction[j]) - t.totals[j]));
  }
  const double product = measure_residual(t);
  const double ratio = product / t.product;
  t.product = product;
  for (int64_t j = 0; j < t.m; ++j) {
    const double d = diagonal(t, j);
    if (d > 0) t.direction[j] = Real(double(t.residual[j]) / d + ratio * double(t.direction[j]));
  }
  return product <= t.target;
}

// ---- the last sweep

template <class Real>
void gradient_row(const Task<Real>& t, int64_t block, int64_t i, const RowScratch<Real>& w) {
  const Batch<Real>& b = *t.batch;
  const Real* const cost = cost_row(t, i, w);
  const Real upstream = b.upstream[t.group], by_epsilon = Real(1 / t.epsilon);
  const int64_t width = padded(t.m);
  if (!(t.alpha[i] > -INFINITY)) {
    for (int64_t j = 0; j < width; ++j) w.weight[j] = 0;
    return leave_gradient(t, block, i, cost, w);
  }
  if (b.mode == kEnvelope) {
    plan_row(t, i, cost, w.mass);
    for (int64_t j = 0; j < width; ++j) w.weight[j] = upstream * w.mass[j];
    return leave_gradient(t, block, i, cost, w);
  }
  const double sum = seed_row(t, i, cost, w);
#pragma omp simd
  for (int64_t j = 0; j < width; ++j)
    w.weight[j] = upstream * (w.mass[j] - by_epsilon * w.weight[j]);
  if (b.mode == kImplicit) {
    const double inner = double(dot(t, w.mass, t.solution));
    const Real x = Real((double(upstream) * sum - inner) * t.lambda_a / double(t.row_sums[i]));
    t.bar_alpha[i] = x;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j)
      w.weight[j] += by_epsilon * (w.mass[j] * (x + t.solution[j]));
  } else {
    for (int64_t k = 1; k <= b.used[t.group]; ++k) add_iteration(t, k, i, cost, w.weight);
  }
  leave_gradient(t, block, i, cost, w);
}

// Gradients of a side's marginals. bar: its adjoints; at a fixed point the solution.
template <class Real>
void marginal_gradient(const Task<Real>& t, bool rows, Real* out) {
  const Batch<Real>& b = *t.batch;
  const int64_t count = rows ? t.n : t.m, whole = rows ? b.n : b.m;
  const Real* const given = rows ? b.a : b.b;
  const Real* const exponent = rows ? t.alpha : t.beta;
  const Real* const sums = rows ? t.row_sums : t.column_sums;
  const double rho = rows ? b.rho_a : b.rho_b, upstream = double(b.upstream[t.group]);
  for (int64_t i = 0; i < whole; ++i) {
    const double mass = i < count ? double(marginal(given, t.group * whole + i)) : 0;
    double d = 0;
    if (mass > 0 && b.mode == kUnrolled) {
      for (int64_t k = 1; k <= b.used[t.group]; ++k) {
        const Real* const bar =
            rows ? t.bar_alpha + (k - 1) * padded(b.n) : t.bar_beta + (k - 1) * padded(b.m);
        d += lambda_of(rho, annealed(t, k)) * double(bar[i]) / mass;
      }
    } else if (mass > 0 && b.mode == kImplicit) {
      d = double((rows ? t.bar_alpha : t.solution)[i]) * double(sums[i]) / mass;
    } else if (mass > 0 && !(rho < INFINITY)) {
      d = upstream * t.epsilon * kLn2 * double(exponent[i]);
    }
    if (mass > 0 && b.objective == kEntropic && rho < INFINITY)
      d += upstream * rho * (1 - double(sums[i]) / mass);
    out[t.group * whole + i] = Real(d);
  }
}

template <class Real>
void after_gradient(Task<Real>& t) {
  const Batch<Real>& b = *t.batch;
  t.step = Step::done;
  if (b.d_a != nullptr) marginal_gradient(t, true, b.d_a);
  if (b.d_b != nullptr) marginal_gradient(t, false, b.d_b);
  for (int64_t i = t.n; i < b.n && b.d_cost.data != nullptr; ++i) {
    with_type(b.d_cost.dtype, b.d_cost.row(t.group * b.n + i), [&](auto* out) {
      for (int64_t j = 0; j < b.d_cost.width; ++j) narrow(Real(0), out[j]);
    });
  }
  if (t.other_points == nullptr) return;
  const int64_t width = padded(b.m), d = b.other.width, size = b.point_size();
  for (int64_t j = 0; j < b.m; ++j) {
    with_type(b.d_other.dtype, b.d_other.row(t.group * b.m + j), [&](auto* out) {
      if (t.blocks == 1 && b.by_dimension()) return narrow_first(d, t.other_points + j * size, out);
      for (int64_t k = 0; k < d; ++k) {
        double sum = 0;
        for (int64_t block = 0; block < t.blocks; ++block)
          sum += double(t.other_points[block * size * width +
                                       (b.by_dimension() ? j * size + k : k * width + j)]);
        narrow(Real(sum), out[k]);
      }
    });
  }
}
