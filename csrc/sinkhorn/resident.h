// Small problems in the kernel domain: K = e^(-cost / epsilon) and its transpose stay in cache, and
// an iteration is two products with vectors. Included by cpu.cpp inside the namespace of its
// instruction set.
//
// Scalings must stay within what floats hold: costs / epsilon of at most 80, sums in range. Where
// they do not, the problem is solved by the sweeps of solve.h instead.
#pragma once

// out = sum_r x_r matrix_r, of rows of `width`, a multiple of kLanes.
template <class Real>
void combine(int64_t rows, int64_t width, const Real* matrix, const Real* x, Real* out) {
  constexpr int kUnroll = kWidth<Real> > 1 ? 4 : 1;  // chains of additions side by side
  for (int64_t j = 0; j < width; j += kLanes) {
    Lanes<Real> sum[kUnroll];
    const Real* at = matrix + j;
    int64_t r = 0;
    for (; r + kUnroll <= rows; r += kUnroll, at += kUnroll * width) {
      for (int u = 0; u < kUnroll; ++u) {
        const Lane<Real> xr(x[r + u]);
        SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) {
          Lane<Real> m;
          load(at + u * width + s * kWidth<Real>, m);
          sum[u][s] = mul_add(m, xr, sum[u][s]);
        }
      }
    }
    for (; r < rows; ++r, at += width) {
      const Lane<Real> xr(x[r]);
      SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) {
        Lane<Real> m;
        load(at + s * kWidth<Real>, m);
        sum[0][s] = mul_add(m, xr, sum[0][s]);
      }
    }
    SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) {
      Lane<Real> total = sum[0][s];
      for (int u = 1; u < kUnroll; ++u) total += sum[u][s];
      store(total, out + j + s * kWidth<Real>);
    }
  }
}

// out [rows, width] = left [rows, stride] right [terms, width], of the first `terms` columns of left; some
// rows at a time, which share what is loaded. rows is a multiple of kLanes.
template <class Real>
void multiply(int64_t rows, int64_t terms, int64_t width, const Real* left, int64_t stride,
              const Real* right, Real* out) {
  constexpr int kRows = kWidth<Real> > 1 ? 4 : 1;
  for (int64_t i = 0; i < rows; i += kRows) {
    for (int64_t j = 0; j < width; j += kLanes) {
      Lanes<Real> sum[kRows];
      for (int64_t k = 0; k < terms; ++k) {
        Lanes<Real> y;
        SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s)
            load(right + k * width + j + s * kWidth<Real>, y[s]);
        for (int r = 0; r < kRows; ++r) {
          const Lane<Real> x(left[(i + r) * stride + k]);
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

// [rows, width] to [columns, other_width]; the sizes are multiples of kLanes.
template <class Real>
void transpose_of(int64_t rows, int64_t width, const Real* x, Real* out) {
#if defined(__AVX512F__)
  if constexpr (kWidth<Real> == 16) {
    for (int64_t i = 0; i < rows; i += 16) {
      for (int64_t j = 0; j < width; j += 16) {
        Lane<Real> tile[16];
        for (int k = 0; k < 16; ++k) load(x + (i + k) * width + j, tile[k]);
        transpose(tile);
        for (int k = 0; k < 16; ++k) store(tile[k], out + (j + k) * rows + i);
      }
    }
    return;
  }
#endif
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) out[j * rows + i] = x[i * width + j];
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
  // adjoints, [terms, rows] and its transpose, and the columns' adjoints and scalings before it,
  // [terms, width].
  Real *of_rows, *left, *right;

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
    const int64_t terms = padded(2 * t.batch->iterations);
    of_rows = take(terms * rows), left = take(terms * rows), right = take(terms * width);
  }

  // Whether the costs are small enough; makes the kernel then.
  bool make_kernel(const RowScratch<Real>& w) {
    for (int64_t i = 0; i < rows; ++i)
      a[i] = i < t.n ? marginal(t.batch->a, t.group * t.batch->n + i) : Real(0);
    for (int64_t j = 0; j < width; ++j) {
      b[j] = j < t.m ? marginal(t.batch->b, t.group * t.batch->m + j) : Real(0);
      v[j] = j < t.m ? Real(1) : Real(0);
    }
    const Lane<Real> gain(gain_of<Real>(t.epsilon)), none{Real(0)}, one{Real(1)};
    const Lane<Real> limit{Real(kKernelRange * kLog2e)};
    Lanes<Real> wrong;
    for (int64_t i = 0; i < t.n; ++i) {
      const Real* const cost = cost_of(i, w);
      for (int64_t j = 0; costs != nullptr && j < width; ++j) costs[i * width + j] = cost[j];
      Real* const row = kernel + i * width;
      each_step<Real>(width, [&](int64_t j, int64_t at) {
        const Lane<Real> there = lane(v + j);
        const Lane<Real> x = select(there > none, gain * lane(cost + j), none);
        // Negative costs and NaN are the sweeps' to tell.
        wrong[at] += select(x < limit, select(x < none, one, none), one);
        store(there * fast_exp2(-x), row + j);
      });
    }
    if (costs != nullptr) held = costs;
    if (fold_sum(wrong) != 0) return false;
    fill(kernel + t.n * width, (rows - t.n) * width, Real(0));
    transpose_of(rows, width, kernel, transposed);
    return true;
  }

  // Those of points are made once.
  const Real* cost_of(int64_t i, const RowScratch<Real>& w) const {
    return held != nullptr ? held + i * width : cost_row(t, i, w);
  }
  // Where the gradient of a row of costs is made, and what becomes of it.
  Real* weight_of(int64_t i, const RowScratch<Real>& w) const {
    return written != nullptr ? written + i * width : w.weight;
  }
  void leave(int64_t i, const RowScratch<Real>& w) const {
    if (written == nullptr) leave_gradient(t, i / kBlockRows, i, cost_of(i, w), w);
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

  // All iterations; false where they left the range of floats.
  bool solve(int64_t& used) {
    used = 0;
    const Batch<Real>& batch = *t.batch;
    fill(u, rows, Real(0));
    const bool test = batch.tolerance >= 0;
    for (int64_t k = 1; k <= batch.iterations; ++k) {
      combine(t.m, rows, transposed, v, row_sums);
      if (test && k > 1 && (k - 1) % kTestEvery == 0 && off() <= batch.tolerance) return true;
      if (!update(rows, a, row_sums, t.lambda_a, u)) return false;
      combine(t.n, width, kernel, u, column_sums);
      if (!update(width, b, column_sums, t.lambda_b, v)) return false;
      used = k;
      if (batch.history == nullptr) continue;
      Real* const kept = batch.history + (t.group * batch.iterations + k - 1) * (batch.n + batch.m);
      exponents(t.n, u, row_sums, kept);
      exponents(t.m, v, column_sums, kept + batch.n);
    }
    return true;
  }

  // Value, error and plan of the solution.
  void result(const RowScratch<Real>& w) {
    const Batch<Real>& batch = *t.batch;
    combine(t.m, rows, transposed, v, row_sums);
    const double error = off();
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
      value =
          of_side(t.n, u, row_sums, a, batch.rho_a) + of_side(t.m, v, column_sums, b, batch.rho_b);
    }
    Real* const plan = batch.plan == nullptr ? nullptr : batch.plan + t.group * batch.n * batch.m;
    for (int64_t i = 0; plan != nullptr && i < t.n; ++i) {
      const Real* const row = kernel + i * width;
      const Real ui = u[i];
#pragma omp simd
      for (int64_t j = 0; j < batch.m; ++j) plan[i * batch.m + j] = ui * row[j] * v[j];
    }
    exponents(t.n, u, t.alpha, t.alpha);
    exponents(t.m, v, t.beta, t.beta);
    leave_solution(t, value, error);
  }

  // A side's part of <P, C> + epsilon sum P (log P - 1), in which the costs cancel, and of what its
  // marginals cost.
  double of_side(int64_t n, const Real* scaling, const Real* sums, const Real* mass,
                 double rho) const {
    double value = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double sum = double(sums[i]);
      if (sum > 0) value += t.epsilon * sum * (::log(double(scaling[i])) - 0.5);
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
    for (int64_t i = 0; i < whole; ++i) out[i] = i < n ? exponent[i] : Real(-INFINITY);
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
  // scaling^(1 / lambda).
  static void over_sums(int64_t n, const Real* bar, const Real* scaling, const Real* mass,
                        double lambda, Real* out) {
    const Lane<Real> none{Real(0)}, by{Real(lambda)}, power{Real(kLog2e / lambda)};
    each_step<Real>(n, [&](int64_t j, int64_t) {
      const Lane<Real> m = lane(mass + j);
      Lane<Real> x = lane(scaling + j);
      if (lambda != 1) x = by * fast_exp2(fast_log(x) * power);
      store(select(m > none, lane(bar + j) * x / m, none), out + j);
    });
  }

  // The plan as the gradient.
  bool envelope(const RowScratch<Real>& w) {
    if (!scalings(t.n, rows, t.alpha, u) || !scalings(t.m, width, t.beta, v)) return false;
    for (int64_t i = 0; i < t.n; ++i) {
      const Lane<Real> ui(u[i] * t.batch->upstream[t.group]);
      Real* const weight = weight_of(i, w);
      each_step<Real>(width, [&](int64_t j, int64_t) {
        store(ui * lane(kernel + i * width + j) * lane(v + j), weight + j);
      });
      leave(i, w);
    }
    return true;
  }

  // The unrolled gradient; false where it is to be taken by sweeps. Leaves adjoints as they do.
  bool unrolled(const RowScratch<Real>& w) {
    const Batch<Real>& batch = *t.batch;
    const int64_t count = batch.used[t.group], terms = padded(2 * count);
    const Real upstream = batch.upstream[t.group], by_epsilon = Real(1 / t.epsilon);
    fill(of_rows + 2 * count * rows, (terms - 2 * count) * rows, Real(0));
    for (int64_t j = 0; j < width; ++j) right[count * width + j] = j < t.m ? Real(1) : Real(0);
    for (int64_t k = 1; k <= count; ++k) {
      const Real* const kept = kept_exponents(t, k);
      Real* const columns = k < count ? right + (count + k) * width : v;
      if (!scalings(t.n, rows, kept, of_rows + (k - 1) * rows)) return false;
      if (!scalings(t.m, width, kept + batch.n, columns)) return false;
    }
    u = of_rows + (count - 1) * rows;
    // The last one's adjoints begin with the sums of P G over rows and columns.
    Real* const bar_beta = t.bar_beta + (count - 1) * width;
    Real* const bar_alpha = t.bar_alpha + (count - 1) * rows;
    fill(bar_beta, width, Real(0));
    fill(bar_alpha, rows, Real(0));
    for (int64_t i = 0; i < t.n; ++i) {
      bar_alpha[i] = upstream * value_row(i, cost_of(i, w), w.weight);
      add_scaled(width, w.weight, upstream, bar_beta);
    }
    for (int64_t k = count; k >= 1; --k) back(k);
    transpose_of(terms, rows, of_rows, left);
    Real* const product = transposed;  // which is done with
    multiply(rows, 2 * count, width, left, terms, right, product);
    const bool sides = by_sides(t);
    for (int64_t i = 0; i < t.n; ++i) {
      const Real *const row = kernel + i * width, *const of_k = product + i * width;
      const Real* const other = sides ? t.column_seed : cost_of(i, w);
      Real* const weight = weight_of(i, w);
      const Lane<Real> ui(u[i]), up(upstream), over(by_epsilon), none{Real(0)};
      const Lane<Real> of_row(sides ? t.row_seed[i] : Real(0));
      each_step<Real>(width, [&](int64_t j, int64_t) {
        const Lane<Real> k = lane(row + j), p = ui * k * lane(v + j);
        const Lane<Real> slope = select(p > none, p * (lane(other + j) + of_row), none);
        store(up * (p - over * slope) + over * (k * lane(of_k + j)), weight + j);
      });
      leave(i, w);
    }
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

// Solves a problem, or makes its gradient, at once where it can be held; false: by sweeps.
template <class Real>
bool solved_resident(Task<Real>& t, bool gradient, const RowScratch<Real>& w) {
  const Batch<Real>& b = *t.batch;
  if (!b.can_be_resident() || (gradient && b.mode == kImplicit)) return false;
  if (gradient && b.objective == kEntropic && (b.rho_a < INFINITY || b.rho_b < INFINITY))
    return false;  // its seeds are sums of the plan
  Resident<Real> problem(t);
  t.iteration = 1;
  set_epsilon(t, b.epsilon);
  if (!problem.make_kernel(w)) return false;
  if (gradient) {
    restore(t);
    if (by_sides(t)) set_side_seeds(t);
    if (t.other_points != nullptr) {
      const int64_t count = t.blocks * b.point_size() * padded(b.m);
      for (int64_t i = 0; i < count; ++i) t.other_points[i] = 0;
    }
    if (!(b.mode == kEnvelope ? problem.envelope(w) : problem.unrolled(w))) return false;
    after_gradient(t);
    return true;
  }
  if (!problem.solve(t.iteration)) return false;
  problem.result(w);
  return true;
}
