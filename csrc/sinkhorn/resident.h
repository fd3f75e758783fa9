// Small problems in the kernel domain: K = e^(-cost / epsilon) and its transpose stay in cache, and
// an iteration is two products with vectors. Included by cpu.cpp inside the namespace of its
// instruction set.
//
// Scalings must stay within what floats hold: costs / epsilon of at most 80, sums in range. Where
// they do not, the problem is solved by the sweeps of solve.h instead.
#pragma once

// out = sum_r x_r matrix_r, of rows of `width`, a multiple of kLanes. There are rows up to a multiple of
// kLanes too, of which those beyond `rows` are 0, as their x.
template <class Real>
SH_INLINE void combine(int64_t rows, int64_t width, const Real* matrix, const Real* x, Real* out) {
  constexpr int kUnroll = kWidth<Real> > 1 ? 4 : 1;  // chains of additions side by side
  for (int64_t j = 0; j < width; j += kLanes) {
    Lanes<Real> sum[kUnroll];
    const Real* at = matrix + j;
    for (int64_t r = 0; r < rows; r += kUnroll, at += kUnroll * width) {
      for (int u = 0; u < kUnroll; ++u) {
        const Lane<Real> xr(x[r + u]);
        SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) {
          Lane<Real> m;
          load(at + u * width + s * kWidth<Real>, m);
          sum[u][s] = mul_add(m, xr, sum[u][s]);
        }
      }
    }
    SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) {
      for (int half = kUnroll / 2; half > 0; half /= 2)
        for (int u = 0; u < half; ++u) sum[u][s] += sum[u + half][s];
      store(Lane<Real>(sum[0][s]), out + j + s * kWidth<Real>);
    }
  }
}

template <class Real>
struct Resident {
  Task<Real>& t;
  const int64_t rows, width;  // padded n and m
  Real *kernel, *transposed;  // [rows, width], [width, rows]
  Real *u, *v, *a, *b;        // scalings and marginals; 0 beyond n and m
  Real *row_sums, *column_sums;
  Real* costs;       // [rows, width] of points, or null
  const Real* held;  // costs [rows, width] that can be read as they lie, or null
  Real* end;         // of what it takes of the scratch
  bool is_held = true, goes_on = true;

  explicit Resident(Task<Real>& t) : t(t), rows(padded(t.batch->n)), width(padded(t.batch->m)) {
    Real* at = t.resident;
    const auto take = [&at](int64_t n) {
      Real* const part = at;
      at += n;
      return part;
    };
    kernel = take(rows * width), transposed = take(rows * width);
    u = take(rows), a = take(rows), row_sums = take(rows);
    v = take(width), b = take(width), column_sums = take(width);
    costs = t.batch->ground != kMatrix ? take(rows * width) : nullptr;
    held = as_it_lies(t.batch->cost), end = at;
  }
  // A matrix of this problem where its rows can be read or written in whole steps.
  Real* as_it_lies(const Matrix& x) const {
    const bool plain = t.batch->ground == kMatrix && x.data != nullptr && t.batch->m == width &&
                       x.dtype == DtypeOf<Real>::value;
    return plain ? reinterpret_cast<Real*>(x.row(t.group * t.batch->n)) : nullptr;
  }

  // Whether the costs are small enough; makes the kernel then, and its transpose.
  bool make_kernel(bool with_transpose, const RowScratch<Real>& w) {
    for (int64_t i = 0; i < rows; ++i)
      a[i] = i < t.n ? marginal(t.batch->a, t.group * t.batch->n + i) : Real(0);
    for (int64_t j = 0; j < width; ++j) {
      b[j] = j < t.m ? marginal(t.batch->b, t.group * t.batch->m + j) : Real(0);
      v[j] = j < t.m ? Real(1) : Real(0);
    }
    const Lane<Real> gain(gain_of<Real>(t.epsilon)), none{Real(0)}, one{Real(1)};
    const Lane<Real> limit{Real(kKernelRange * kLog2e)};
    Lanes<Real> wrong;
    if (costs != nullptr) make_costs(w);
    for (int64_t i = 0; i < t.n; ++i) {
      const Real* const cost = cost_of(i, w);
      Real* const row = kernel + i * width;
      each_step<Real>(width, [&](int64_t j, int64_t at) {
        const Lane<Real> there = lane(v + j);
        const Lane<Real> x = select(there > none, gain * lane(cost + j), none);
        // Negative costs and NaN are the sweeps' to tell.
        wrong[at] += select(x < limit, select(x < none, one, none), one);
        store(there * fast_exp2(-x), row + j);
      });
    }
    if (fold_sum(wrong) != 0) return false;
    fill(kernel + t.n * width, (rows - t.n) * width, Real(0));
    if (with_transpose) transpose_of(rows, width, kernel, transposed);
    return true;
  }

  // Of points, a few rows at a time where these can be read as they lie.
  void make_costs(const RowScratch<Real>& w) {
    constexpr int kRows = kWidth<Real> > 1 ? 4 : 1;
    const Batch<Real>& batch = *t.batch;
    const bool plain = batch.cost.dtype == DtypeOf<Real>::value;
    int64_t i = 0;
    for (; plain && i + kRows <= t.n; i += kRows)
      point_costs<kRows>(t, reinterpret_cast<Real*>(batch.cost.row(t.group * batch.n + i)),
                         costs + i * width);
    for (; i < t.n; ++i)
      point_costs<1>(t, widened(batch.cost, t.group * batch.n + i, w.point), costs + i * width);
    held = costs;
  }

  // Those of points are made once.
  const Real* cost_of(int64_t i, const RowScratch<Real>& w) const {
    return held != nullptr ? held + i * width : cost_row(t, i, w);
  }
  // scaling = (marginal / sum)^lambda, 0 for no marginal; returns whether all sums were in range.
  static bool update(int64_t n, const Real* mass, const Real* sum, double lambda, Real* scaling) {
    Lanes<Real> wrong;
    const Lane<Real> none{Real(0)}, one{Real(1)}, least{Real(kLeastSum)}, most{Real(kMostSum)};
    each_step<Real>(n, [&](int64_t j, int64_t at) {
      const Lane<Real> m = lane(mass + j), s = lane(sum + j);
      store(select(m > none, m / s, none), scaling + j);
      const Lane<Real> fine = select(s > least, select(s < most, none, one), one);
      wrong[at] += select(m > none, fine, none);
    });
    if (lambda != 1) {
      const Lane<Real> by{Real(lambda)}, unit{Real(kLog2e)};
      each_step<Real>(n, [&](int64_t j, int64_t) {
        const Lane<Real> x = lane(scaling + j);
        store(select(x > none, fast_exp2(fast_log(x) * unit * by), none), scaling + j);
      });
    }
    return fold_sum(wrong) == 0;
  }

  // log2, of rows of any length.
  static void exponents(int64_t n, const Real* scaling, Real* padded_out, Real* out) {
    const Lane<Real> none{Real(0)}, unit{Real(kLog2e)}, nothing{Real(-INFINITY)};
    each_step<Real>(padded(n), [&](int64_t j, int64_t) {
      const Lane<Real> x = lane(scaling + j);
      store(select(x > none, fast_log(x) * unit, nothing), padded_out + j);
    });
    for (int64_t i = 0; i < n && out != padded_out; ++i) out[i] = padded_out[i];
  }

  // Half of iteration k each, of a problem that goes on; else nothing. `is_held` ends where scalings leave
  // the range of floats, `goes_on` also where the tolerance is met, t.iteration being the last one done.
  void rows_of_iteration(int64_t k) {
    if (!goes_on) return;
    const double tolerance = t.batch->tolerance;
    if (k == 1) fill(u, rows, Real(0));
    combine(t.m, rows, transposed, v, row_sums);
    goes_on = !(tolerance >= 0 && k > 1 && (k - 1) % kTestEvery == 0 && off() <= tolerance);
    if (goes_on) is_held = goes_on = update(rows, a, row_sums, t.lambda_a, u);
  }
  void columns_of_iteration(int64_t k) {
    if (!goes_on) return;
    const Batch<Real>& batch = *t.batch;
    combine(t.n, width, kernel, u, column_sums);
    is_held = goes_on = update(width, b, column_sums, t.lambda_b, v);
    t.iteration = k;
    if (batch.history == nullptr) return;
    Real* const kept = batch.history + (t.group * batch.iterations + k - 1) * (batch.n + batch.m);
    exponents(t.n, u, row_sums, kept);
    exponents(t.m, v, column_sums, kept + batch.n);
  }

  // Value, error and plan of the solution.
  void result(const RowScratch<Real>& w) {
    const Batch<Real>& batch = *t.batch;
    combine(t.m, rows, transposed, v, row_sums);
    const double error = off();
    exponents(t.n, u, t.alpha, t.alpha);
    exponents(t.m, v, t.beta, t.beta);
    for (int64_t i = 0; i < rows; ++i) row_sums[i] *= u[i];
    double value = 0;
    if (batch.objective == kTransport) {
      Lanes<Real> sum;
      const Lane<Real> none{Real(0)};
      for (int64_t i = 0; i < t.n; ++i) {
        const Real* const cost = cost_of(i, w);
        const Lane<Real> ui(u[i]);
        each_step<Real>(width, [&](int64_t j, int64_t at) {
          const Lane<Real> p = ui * lane(kernel + i * width + j) * lane(v + j);
          sum[at] += select(p > none, p * lane(cost + j), none);
        });
      }
      value = double(fold_sum(sum));
    } else {
      combine(t.n, width, kernel, u, column_sums);
      for (int64_t j = 0; j < width; ++j) column_sums[j] *= v[j];
      value = of_side(t.n, t.alpha, row_sums, a, batch.rho_a) +
              of_side(t.m, t.beta, column_sums, b, batch.rho_b);
    }
    Real* const plan = batch.plan == nullptr ? nullptr : batch.plan + t.group * batch.n * batch.m;
    for (int64_t i = 0; plan != nullptr && i < t.n; ++i) {
      const Real* const row = kernel + i * width;
      const Real ui = u[i];
#pragma omp simd
      for (int64_t j = 0; j < batch.m; ++j) plan[i * batch.m + j] = ui * row[j] * v[j];
    }
    leave_solution(t, value, error);
  }

  // A side's part of <P, C> + epsilon sum P (log P - 1), in which the costs cancel, and of what its
  // marginals cost.
  double of_side(int64_t n, const Real* exponent, const Real* sums, const Real* mass,
                 double rho) const {
    double value = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double sum = double(sums[i]);
      if (sum > 0) value += t.epsilon * sum * (kLn2 * double(exponent[i]) - 0.5);
      if (rho < INFINITY) value += rho * relative_entropy(sum, double(mass[i]));
    }
    return value;
  }

  double off() const {
    double most = 0;
    if (t.lambda_a == 1) {
      Lanes<Real> top;
      const Lane<Real> none{Real(0)};
      each_step<Real>(rows, [&](int64_t i, int64_t at) {
        const Lane<Real> m = lane(a + i);
        const Lane<Real> own = lane(u + i) * lane(row_sums + i) - m;
        top[at] = larger(select(m > none, magnitude(own), none), top[at]);
      });
      for (int64_t s = 1; s < kSteps<Real>; ++s) top[0] = larger(top[s], top[0]);
      return double(max_of(top[0]));
    }
    for (int64_t i = 0; i < t.n; ++i) {
      if (!(a[i] > 0)) continue;
      const double own = double(u[i]) * double(row_sums[i]) -
                         double(expected_sum(a[i], t.lambda_a, log2_of(u[i])));
      if (!(own <= most && -own <= most)) most = own < 0 ? -own : own;
    }
    return most;
  }
};

// Solves a pair of problems, or one, at once where they can be held, half an iteration of each in turn: one's
// work covers what the other waits for. Returns whether each is solved; else it is to be by sweeps.
template <class Real>
Pair<bool> solve_resident(const Pair<Task<Real>*>& tasks, int64_t count,
                          const RowScratch<Real>& w) {
  const Batch<Real>& b = *tasks.at[0]->batch;
  Pair<bool> solved{};
  if (!b.can_be_resident()) return solved;
  Resident<Real> problems[2] = {Resident<Real>(*tasks.at[0]), Resident<Real>(*tasks.at[count - 1])};
  for (int64_t i = 0; i < count; ++i) {
    set_epsilon(*tasks.at[i], b.epsilon);
    problems[i].is_held = problems[i].goes_on = problems[i].make_kernel(true, w);
  }
  for (int64_t k = 1; k <= b.iterations; ++k) {
    for (int64_t i = 0; i < count; ++i) problems[i].rows_of_iteration(k);
    for (int64_t i = 0; i < count; ++i) problems[i].columns_of_iteration(k);
  }
  for (int64_t i = 0; i < count; ++i) {
    solved.at[i] = problems[i].is_held;
    if (solved.at[i]) problems[i].result(w);
  }
  return solved;
}
