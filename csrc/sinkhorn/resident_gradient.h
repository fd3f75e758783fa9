// The gradient of small problems, from K in cache as their solution.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

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
struct ResidentGradient : Resident<Real> {
  using Base = Resident<Real>;
  using Base::t, Base::rows, Base::width, Base::kernel, Base::transposed, Base::held;
  using Base::u, Base::v, Base::a, Base::b, Base::row_sums, Base::column_sums, Base::cost_of;
  Real* written;  // the gradient of costs [rows, width] that can be written as it lies, or null
  // What it is K times the product of: of each iteration the rows' scalings and adjoints, [terms, rows],
  // and the columns' adjoints and scalings before it, [terms, width].
  Real *of_rows, *right;

  explicit ResidentGradient(Task<Real>& t)
      : Base(t), written(Base::as_it_lies(t.batch->d_cost)), of_rows(Base::end) {
    right = of_rows + 2 * t.batch->iterations * rows;
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

// Makes a problem's gradient at once where it can be held; false: by sweeps.
template <class Real>
bool differentiated_resident(Task<Real>& t, const RowScratch<Real>& w) {
  const Batch<Real>& b = *t.batch;
  if (!b.can_be_resident()) return false;
  const bool gives_way = b.rho_a < INFINITY || b.rho_b < INFINITY;
  if (b.mode != kImplicit && b.objective == kEntropic && gives_way)
    return false;  // its seeds are sums of the plan
  ResidentGradient<Real> problem(t);
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
