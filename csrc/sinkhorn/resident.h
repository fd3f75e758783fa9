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

// out [rows, width] = left^T right, of [terms, rows] and [terms, width]; some rows at a time, which share
// what is loaded. rows is a multiple of kLanes.
template <class Real>
void multiply(int64_t rows, int64_t terms, int64_t width, const Real* left, const Real* right,
              Real* out) {
  constexpr int kRows = kWidth<Real> > 1 ? 8 : 1;
  for (int64_t i = 0; i < rows; i += kRows) {
    for (int64_t j = 0; j < width; j += kLanes) {
      Lanes<Real> sum[kRows];
      for (int64_t k = 0; k < terms; ++k) {
        Lanes<Real> y;
        SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s)
            load(right + k * width + j + s * kWidth<Real>, y[s]);
        for (int r = 0; r < kRows; ++r) {
          const Lane<Real> x(left[k * rows + i + r]);
          SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) sum[r][s] =
              mul_add(x, Lane<Real>(y[s]), Lane<Real>(sum[r][s]));
        }
      }
      for (int r = 0; r < kRows; ++r)
        SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s)
            store(Lane<Real>(sum[r][s]), out + (i + r) * width + j + s * kWidth<Real>);
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
  Real* written;     // the same of their gradient
  // Of the gradient, which is K times their product: of each iteration the rows' scalings and
  // adjoints, [terms, rows], and the columns' adjoints and scalings before it, [terms, width].
  Real *of_rows, *right;
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
    const Batch<Real>& batch = *t.batch;
    const auto as_it_lies = [&](const Matrix& x) -> Real* {
      const bool plain = batch.ground == kMatrix && x.data != nullptr && batch.m == width &&
                         x.dtype == DtypeOf<Real>::value;
      return plain ? reinterpret_cast<Real*>(x.row(t.group * batch.n)) : nullptr;
    };
    held = as_it_lies(batch.cost), written = as_it_lies(batch.d_cost);
    if (t.bar_alpha == nullptr) return;
    const int64_t terms = 2 * t.batch->iterations;
    of_rows = take(terms * rows), right = take(terms * width);
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
  // Where the gradient of costs is made, and what becomes of it. The transpose is done with by then.
  Real* gradient_of() const { return written != nullptr ? written : transposed; }
  void leave(const RowScratch<Real>& w) const {
    RowScratch<Real> own = w;
    for (int64_t i = 0; i < t.n && written == nullptr; ++i) {
      own.weight = transposed + i * width;
      leave_gradient(t, i / kBlockRows, i, cost_of(i, w), own);
    }
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

  // out = 2^exponents, 0 beyond n; whether they are in the range of floats.
  static bool scalings(int64_t n, int64_t whole, const Real* exponent, Real* out) {
    widen_first(n, exponent, out);
    fill(out + padded(n), whole - padded(n), Real(-INFINITY));
    Lanes<Real> wrong;
    const Lane<Real> none{Real(0)}, one{Real(1)}, most{Real(60)};
    each_step<Real>(whole, [&](int64_t j, int64_t at) {
      const Lane<Real> x = lane(out + j);
      wrong[at] += select(x > most, one, none);
      store(fast_exp2(x), out + j);
    });
    return fold_sum(wrong) == 0;
  }

  // out = lambda bar / sum, with the sums that an iteration's scalings were made from: mass /
  // scaling^(1 / lambda). `over` is lambda / mass, or 0 for no mass.
  static void over_sums(int64_t n, const Real* bar, const Real* scaling, const Real* over,
                        double lambda, Real* out) {
    const Lane<Real> none{Real(0)}, power{Real(kLog2e / lambda)};
    each_step<Real>(n, [&](int64_t j, int64_t) {
      const Lane<Real> by = lane(over + j);
      Lane<Real> x = lane(scaling + j);
      if (lambda != 1) x = fast_exp2(fast_log(x) * power);
      store(select(by > none, lane(bar + j) * (x * by), none), out + j);
    });
  }
  static void invert(int64_t n, Real* mass, double lambda) {
    const Lane<Real> none{Real(0)}, by{Real(lambda)}, least{Real(0x1p-126)};
    each_step<Real>(n, [&](int64_t j, int64_t) {
      const Lane<Real> m = lane(mass + j);
      store(select(m > none, by / larger(m, least), none), mass + j);
    });
  }

  // The plan as the gradient.
  bool envelope(const RowScratch<Real>& w) {
    if (!scalings(t.n, rows, t.alpha, u) || !scalings(t.m, width, t.beta, v)) return false;
    for (int64_t i = 0; i < t.n; ++i) {
      const Lane<Real> ui(u[i] * t.batch->upstream[t.group]);
      Real* const weight = gradient_of() + i * width;
      each_step<Real>(width, [&](int64_t j, int64_t) {
        store(ui * lane(kernel + i * width + j) * lane(v + j), weight + j);
      });
    }
    leave(w);
    return true;
  }

  // The unrolled gradient; false where it is to be taken by sweeps. Leaves adjoints as they do.
  bool unrolled(const RowScratch<Real>& w) {
    const Batch<Real>& batch = *t.batch;
    const int64_t count = batch.used[t.group];
    const Real upstream = batch.upstream[t.group];
    for (int64_t j = 0; j < width; ++j) right[count * width + j] = j < t.m ? Real(1) : Real(0);
    for (int64_t k = 1; k <= count; ++k) {
      const Real* const kept = kept_exponents(t, k);
      Real* const columns = k < count ? right + (count + k) * width : v;
      if (!scalings(t.n, rows, kept, of_rows + (k - 1) * rows)) return false;
      if (!scalings(t.m, width, kept + batch.n, columns)) return false;
    }
    u = of_rows + (count - 1) * rows;
    invert(rows, a, t.lambda_a), invert(width, b, t.lambda_b);
    Real* const bar_beta = t.bar_beta + (count - 1) * width;
    seeds(upstream, t.bar_alpha + (count - 1) * rows, bar_beta, w);
    for (int64_t k = count; k >= 1; --k) back(k);
    Real* const product = transposed;
    multiply(rows, 2 * count, width, of_rows, right, product);
    leave_costs(w, [&](int64_t i, int64_t j) { return lane(product + i * width + j); });
    return true;
  }

  // The gradient of the fixed point that the solution is close to: reverse.h has the equations.
  bool implicit(const RowScratch<Real>& w) {
    if (!scalings(t.n, rows, t.alpha, u) || !scalings(t.m, width, t.beta, v)) return false;
    for (int64_t i = 0; i < t.n; ++i) {
      const Lane<Real> ui(u[i]);
      Real* const row = kernel + i * width;
      each_step<Real>(
          width, [&](int64_t j, int64_t) { store(ui * lane(row + j) * lane(v + j), row + j); });
    }
    transpose_of(rows, width, kernel, transposed);
    // From here on K is the plan, of scalings that are 1.
    for (int64_t i = 0; i < rows; ++i) u[i] = i < t.n ? Real(1) : Real(0);
    for (int64_t j = 0; j < width; ++j) v[j] = j < t.m ? Real(1) : Real(0);
    combine(t.m, rows, transposed, v, t.row_sums);
    combine(t.n, width, kernel, u, t.column_sums);
    if (by_sides(t)) set_side_seeds(t);
    Real *const over_rows = a, *const over_columns = b, *const q = t.bar_alpha;
    for (int64_t i = 0; i < rows; ++i) over_rows[i] = t.row_sums[i];
    for (int64_t j = 0; j < width; ++j) over_columns[j] = t.column_sums[j];
    invert(rows, over_rows, t.lambda_a), invert(width, over_columns, t.lambda_b);
    seeds(t.batch->upstream[t.group], q, t.bar_beta, w);
    solve_columns(over_rows, over_columns, q, t.bar_beta);
    // x, from what the columns' y leaves of q.
    combine(t.m, rows, transposed, t.solution, row_sums);
    each_step<Real>(rows, [&](int64_t i, int64_t) {
      store((lane(q + i) - lane(row_sums + i)) * lane(over_rows + i), q + i);
    });
    leave_costs(w, [&](int64_t i, int64_t j) { return Lane<Real>(q[i]) + lane(t.solution + j); });
    return true;
  }

 private:
  // weight_j = P_ij G_ij; returns the sum.
  Real value_row(int64_t i, const Real* cost, Real* weight) const {
    const bool sides = by_sides(t);
    const Real* const other = sides ? t.column_seed : cost;
    const Real* const row = kernel + i * width;
    const Lane<Real> ui(u[i]), of_row(sides ? t.row_seed[i] : Real(0)), none{Real(0)};
    Lanes<Real> sum;
    for (int64_t j = 0; j < width; j += kLanes) {
      SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) {
        const int64_t at = j + s * kWidth<Real>;
        Lane<Real> k, vj, g;
        load(row + at, k);
        load(v + at, vj);
        load(other + at, g);
        const Lane<Real> p = ui * k * vj;
        const Lane<Real> product = select(p > none, p * (g + of_row), none);
        store(product, weight + at);
        sum[s] += product;
      }
    }
    return fold_sum(sum);
  }

  // Sums of P G over rows and columns, with which adjoints begin.
  void seeds(Real upstream, Real* of_row, Real* of_column, const RowScratch<Real>& w) const {
    fill(of_row, rows, Real(0));
    fill(of_column, width, Real(0));
    for (int64_t i = 0; i < t.n; ++i) {
      of_row[i] = upstream * value_row(i, cost_of(i, w), w.weight);
      add_scaled(width, w.weight, upstream, of_column);
    }
  }

  // The gradient of costs, P - G P / epsilon and K sum(i, j) / epsilon of what came back.
  template <class Sum>
  void leave_costs(const RowScratch<Real>& w, Sum sum) const {
    const bool sides = by_sides(t);
    const Lane<Real> up(t.batch->upstream[t.group]), over{Real(1 / t.epsilon)}, none{Real(0)};
    for (int64_t i = 0; i < t.n; ++i) {
      const Real* const row = kernel + i * width;
      const Real* const other = sides ? t.column_seed : cost_of(i, w);
      Real* const weight = gradient_of() + i * width;
      const Lane<Real> ui(u[i]), of_row(sides ? t.row_seed[i] : Real(0));
      each_step<Real>(width, [&](int64_t j, int64_t) {
        const Lane<Real> k = lane(row + j), p = ui * k * lane(v + j);
        const Lane<Real> slope = select(p > none, p * (lane(other + j) + of_row), none);
        store(up * (p - over * slope) + over * (k * sum(i, j)), weight + j);
      });
    }
    leave(w);
  }

  // t.solution y of (D_c - P^T D_r^-1 P) y = q_c - P^T D_r^-1 q_r, by conjugate gradients. Given are the
  // inverses of both D.
  void solve_columns(const Real* over_rows, const Real* over_columns, const Real* of_row,
                     const Real* of_column) {
    const Lane<Real> none{Real(0)}, by{Real(1 / t.lambda_b)};
    Real *const y = t.solution, *const left = t.residual, *const along = t.direction;
    // column_sums = P^T D_r^-1 x
    const auto back_and_forth = [&](const Real* x) {
      each_step<Real>(rows, [&](int64_t i, int64_t) {
        store(lane(x + i) * lane(over_rows + i), row_sums + i);
      });
      combine(t.n, width, kernel, row_sums, column_sums);
    };
    Lanes<Real> mass;
    each_step<Real>(width, [&](int64_t j, int64_t at) { mass[at] += lane(t.column_sums + j); });
    const Real total = has_constants(t) ? fold_sum(mass) : Real(0);
    // The residual without what no y answers for, and its product with itself.
    const auto measured = [&](Lanes<Real> sum) {
      const Lane<Real> share{total > 0 ? fold_sum(sum) / total : Real(0)};
      Lanes<Real> own;
      each_step<Real>(width, [&](int64_t j, int64_t at) {
        const Lane<Real> r = lane(left + j) - share * lane(t.column_sums + j);
        store(r, left + j);
        own[at] += r * r * lane(over_columns + j);
      });
      return double(fold_sum(own));
    };
    back_and_forth(of_row);
    Lanes<Real> first;
    each_step<Real>(width, [&](int64_t j, int64_t at) {
      const Lane<Real> there = lane(over_columns + j);
      const Lane<Real> r = select(there > none, lane(of_column + j) - lane(column_sums + j), none);
      store(none, y + j), store(r, left + j), store(none, along + j);
      first[at] += r;
    });
    double product = measured(first), before = 1;
    const double target = solver_target<Real>(product);
    for (int64_t k = 0; product > target && k < kMostSteps; ++k) {
      const Lane<Real> ratio{Real(product / before)};
      each_step<Real>(width, [&](int64_t j, int64_t) {
        const Lane<Real> z = lane(left + j) * lane(over_columns + j);
        store(mul_add(ratio, lane(along + j), z), along + j);
      });
      combine(t.m, rows, transposed, along, row_sums);
      back_and_forth(row_sums);
      Lanes<Real> sum, next;
      each_step<Real>(width, [&](int64_t j, int64_t at) {
        const Lane<Real> p = lane(along + j), d = by * lane(t.column_sums + j);
        const Lane<Real> moved = mul_add(d, p, -lane(column_sums + j));
        store(moved, column_sums + j);
        sum[at] += p * moved;
      });
      const double curvature = double(fold_sum(sum));
      if (!(curvature > 0)) return;
      const Lane<Real> step{Real(product / curvature)};
      each_step<Real>(width, [&](int64_t j, int64_t at) {
        store(mul_add(step, lane(along + j), lane(y + j)), y + j);
        const Lane<Real> there = lane(over_columns + j);
        const Lane<Real> r = lane(left + j) - step * lane(column_sums + j);
        store(select(there > none, r, none), left + j);
        next[at] += select(there > none, r, none);
      });
      before = product;
      product = measured(next);
    }
  }

  // Back through iteration k, and its part of the two factors.
  void back(int64_t k) {
    const int64_t count = t.batch->used[t.group];
    Real *const bar_alpha = t.bar_alpha + (k - 1) * rows, *const bar_beta =
                                                              t.bar_beta + (k - 1) * width;
    const Real* const own = of_rows + (k - 1) * rows;
    Real *const x = of_rows + (count + k - 1) * rows, *const y = right + (k - 1) * width;
    const Real* const now = k < count ? right + (count + k) * width : v;
    const Real* const before = right + (count + k - 1) * width;
    over_sums(width, bar_beta, now, b, t.lambda_b, y);
    combine(t.m, rows, transposed, y, row_sums);
    if (k < count) fill(bar_alpha, rows, Real(0));
    each_step<Real>(rows, [&](int64_t i, int64_t) {
      store(lane(bar_alpha + i) - lane(own + i) * lane(row_sums + i), bar_alpha + i);
    });
    over_sums(rows, bar_alpha, own, a, t.lambda_a, x);
    if (k == 1) return;
    combine(t.n, width, kernel, x, column_sums);
    const Lane<Real> none{Real(0)};
    each_step<Real>(width, [&](int64_t j, int64_t) {
      const Lane<Real> bar = -lane(before + j) * lane(column_sums + j);
      store(select(lane(b + j) > none, bar, none), bar_beta - width + j);
    });
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

// Makes a problem's gradient at once where it can be held; false: by sweeps.
template <class Real>
bool differentiated_resident(Task<Real>& t, const RowScratch<Real>& w) {
  const Batch<Real>& b = *t.batch;
  if (!b.can_be_resident()) return false;
  const bool gives_way = b.rho_a < INFINITY || b.rho_b < INFINITY;
  if (b.mode != kImplicit && b.objective == kEntropic && gives_way)
    return false;  // its seeds are sums of the plan
  Resident<Real> problem(t);
  set_epsilon(t, b.epsilon);
  if (!problem.make_kernel(b.mode == kUnrolled, w)) return false;
  restore(t);
  if (by_sides(t) && b.mode != kImplicit) set_side_seeds(t);
  if (t.other_points != nullptr) {
    const int64_t count = t.blocks * b.point_size() * padded(b.m);
    for (int64_t i = 0; i < count; ++i) t.other_points[i] = 0;
  }
  if (!(b.mode == kEnvelope   ? problem.envelope(w)
        : b.mode == kImplicit ? problem.implicit(w)
                              : problem.unrolled(w)))
    return false;
  after_gradient(t);
  return true;
}
