// The value's gradient on CUDA, beside the sweeps of steps.cuh: what they begin with, the solver's numbers,
// the last sweep, and the marginals' part.
#pragma once
#include "steps.cuh"

namespace stillhouse {

// log2 of 1 / r_i or 1 / s_j of an iteration, from the exponent that it left.
template <class Real>
SH_INLINE Real minus_log2_sum(Real exponent, double lambda, Real mass) {
  return mass > 0 ? exponent / Real(lambda) - log2_of(mass) : Real(-INFINITY);
}

// The numbers that all sweeps read, by `share` of `shares` blocks: of the solution, and unrolled of each
// iteration. Returns whether a scaling leaves the range of floats.
template <class N>
__device__ bool prepare(DeviceTask<typename N::Number>& t, int share, int shares) {
  using Real = typename N::Number;
  constexpr Real kMost = 60;
  const Batch<Real>& b = t.batch;
  const int64_t used = b.used[t.group];
  bool wrong = false;
  const auto number = [&](Real exponent) {
    wrong = wrong || exponent > kMost;
    return N::of_exponent(exponent);
  };
  const int first = share * kCudaThreads + int(threadIdx.x), step = shares * kCudaThreads;
  t.at(used);
  const Real unit = Real(1 / (t.epsilon * kLn2));
  for (int i = first; i < t.n; i += step)
    t.alpha_of(t.iteration)[i] =
        number(b.mode == kUnrolled ? t.history(used)[i] : b.f[t.group * b.n + i] * unit);
  for (int j = first; j < t.m; j += step)
    t.beta[j] =
        number(b.mode == kUnrolled ? t.history(used)[b.n + j] : b.g[t.group * b.m + j] * unit);
  if (b.mode != kUnrolled) return wrong;
  for (int64_t k = 1; k <= used; ++k) {
    t.at(k);
    const Real *const now = t.history(k), *const last = k > 1 ? t.history(k - 1) : nullptr;
    for (int i = first; i < t.n; i += step) {
      const int64_t at = (k - 1) * b.n + i;
      t.row_number[at] = number(now[i]);
      t.of_row[at] = number(minus_log2_sum(now[i], t.lambda_a, t.a(i)));
    }
    for (int j = first; j < t.m; j += step) {
      const int64_t at = (k - 1) * b.m + j;
      t.tau[at] = number(minus_log2_sum(now[b.n + j], t.lambda_b, t.b(j)));
      t.before[at] = last == nullptr ? N::one() : number(last[b.n + j] * t.ratio);
    }
  }
  t.at(used);
  return wrong;
}

// The value's derivative with respect to P where the costs are not a part of it: f and g, and what sums
// that differ from their marginals cost.
template <class N>
__device__ void seed_sides(DeviceTask<typename N::Number>& t, int share, int shares) {
  using Real = typename N::Number;
  const Batch<Real>& b = t.batch;
  const auto seed = [&](Real number, double rho, const Real* sums, int at, Real mass) {
    if (!PlanStep<N>::has_mass(number)) return Real(0);
    const Real own = N::exponent_of(number) * Real(t.epsilon * kLn2);
    if (!(rho < INFINITY)) return own;
    return own + Real(rho * kLn2) * log2_of(Real(sums[at] / mass));
  };
  const int first = share * kCudaThreads + int(threadIdx.x), step = shares * kCudaThreads;
  for (int i = first; i < t.n; i += step)
    t.row_seed[i] = seed(t.alpha_of(t.iteration)[i], b.rho_a, t.row_sums, i, t.a(i));
  for (int j = first; j < t.m; j += step)
    t.column_seed[j] = seed(t.beta[j], b.rho_b, t.column_sums, j, t.b(j));
}

// ---- the solver: conjugate gradients of the Schur complement (reverse.h)

constexpr int kMostSolverSteps = 1000;
// Where each is three launches, which cost something when nothing is left to do, too.
constexpr int kMostSolverLaunches = 200;

template <class Real>
__device__ Real diagonal(const DeviceTask<Real>& t, int j) {
  return t.column_sums[j] / Real(t.lambda_b);
}

// By all threads of a block, as all of these: takes out of the residual what lies along the constant that
// the equations leave open where both marginals are kept; returns its product with itself.
template <class Real>
__device__ double measure_residual(DeviceTask<Real>& t) {
  double sums[2] = {0, 0}, product[1] = {0};
  if (t.lambda_a == 1 && t.lambda_b == 1) {
    for (int j = int(threadIdx.x); j < t.m; j += kCudaThreads)
      sums[0] += double(t.residual[j]), sums[1] += double(t.column_sums[j]);
    Team<kCudaThreads>::reduce(sums, Add());
  }
  const double share = sums[1] > 0 ? sums[0] / sums[1] : 0;
  for (int j = int(threadIdx.x); j < t.m; j += kCudaThreads) {
    const double d = double(diagonal(t, j));
    const Real residual = t.residual[j] -= Real(share * double(t.column_sums[j]));
    if (d > 0) product[0] += double(residual) * double(residual) / d;
  }
  Team<kCudaThreads>::reduce(product, Add());
  return product[0];
}

template <class Real>
__device__ void start_solver(DeviceTask<Real>& t) {
  const double product = measure_residual(t);
  for (int j = int(threadIdx.x); j < t.m; j += kCudaThreads) {
    const Real d = diagonal(t, j);
    t.direction[j] = d > 0 ? t.residual[j] / d : Real(0);
    t.solution[j] = 0;
  }
  if (threadIdx.x != 0) return;
  const double least = sizeof(Real) == 4 ? 1e-7 : 1e-14;
  t.progress->product = product;
  t.progress->target = product * least * least;
  t.progress->is_solved = !(product > 0);
}

// One step; is_solved where the residual is small enough, or as small as it gets.
template <class Real>
__device__ void advance_solver(DeviceTask<Real>& t) {
  const double before = t.progress->product, target = t.progress->target;
  double curvature[1] = {0};
  for (int j = int(threadIdx.x); j < t.m; j += kCudaThreads) {
    const double direction = double(t.direction[j]);
    curvature[0] += direction * (double(diagonal(t, j)) * direction - double(t.applied[j]));
  }
  Team<kCudaThreads>::reduce(curvature, Add());
  if (!(curvature[0] > 0)) {
    if (threadIdx.x == 0) t.progress->is_solved = 1;
    return;
  }
  const double step = before / curvature[0];
  for (int j = int(threadIdx.x); j < t.m; j += kCudaThreads) {
    const double d = double(diagonal(t, j)), direction = double(t.direction[j]);
    t.solution[j] += Real(step * direction);
    t.residual[j] -= Real(step * (d * direction - double(t.applied[j])));
  }
  const double product = measure_residual(t), ratio = product / before;
  for (int j = int(threadIdx.x); j < t.m; j += kCudaThreads) {
    const double d = double(diagonal(t, j));
    if (d > 0) t.direction[j] = Real(double(t.residual[j]) / d + ratio * double(t.direction[j]));
  }
  if (threadIdx.x != 0) return;
  t.progress->product = product;
  t.progress->is_solved = product <= target;
}

// ---- the last sweep

// Where the gradient of costs is left: the tensor of costs itself, or for points rows of it for a while,
// times what the difference of two points is multiplied with (slopes.cuh). The first row is `row` of all.
struct Weights {
  Matrix to;
  int64_t row;
};

// Of rows [begin, end) of a problem, by a team.
template <int kThreads, int kHeld, int kRows, class N, class Source>
__device__ void gradient_rows(DeviceTask<typename N::Number>& t, const Source& source, int begin,
                              int end, const Weights& weights) {
  using Real = typename N::Number;
  const Batch<Real>& b = t.batch;
  SlopeStep<N> step(t);
  const Real upstream = b.upstream[t.group], by_epsilon = Real(1 / t.epsilon);
  const int rank = Team<kThreads>::rank();
  const int last = !t.is_valid ? begin : end < t.n ? end : t.n;
  const bool is_envelope = b.mode == kEnvelope, is_implicit = b.mode == kImplicit;
  const bool scales = b.ground == kEuclidean,
             reads = !N::kLog && (scales || (!is_envelope && step.wants_costs()));
  for (int first = begin; first < last; first += kRows) {
    typename SlopeStep<N>::Row row[kRows];
    Real x_of[kRows];  // the solver's, of rows
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row[r] = step.row(first + r < last ? first + r : last - 1);
      x_of[r] = 0;
    }
    const auto fetch = [&](int base, Real(&x)[kRows][kHeld], Real(&cost)[kRows][kHeld]) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        source.template load<kThreads>(row[r].i, base, x[r]);
        if (reads) Spread<Real>{t}.template load<kThreads>(row[r].i, base, cost[r]);
#pragma unroll
        for (int h = 0; h < kHeld && !reads; ++h) cost[r][h] = x[r][h];
      }
    };
    Real x[kRows][kHeld], cost[kRows][kHeld], weight[kRows][kHeld];
    if (is_implicit) {
      for (int base = 0; base < t.m; base += kThreads * kHeld) {
        fetch(base, x, cost);
#pragma unroll
        for (int h = 0; h < kHeld; ++h) {
          const int j = base + rank + kThreads * h;
          const auto column = step.column(j);
          const Real y = j < t.m ? t.solution[j] : Real(0);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const Real p = step.plan(row[r], column, x[r][h]);
            x_of[r] += upstream * step.moved(p, row[r], column, cost[r][h]) - p * y;
          }
        }
      }
      Team<kThreads>::reduce(x_of, Add());
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Real sum = t.row_sums[row[r].i];
        x_of[r] = sum > 0 ? x_of[r] * Real(t.lambda_a) / sum : Real(0);
        if (rank == 0 && first + r < last) t.bar_alpha[row[r].i] = x_of[r];
      }
    }
    if (weights.to.data == nullptr) continue;  // of marginals alone
    for (int base = 0; base < t.m; base += kThreads * kHeld) {
      fetch(base, x, cost);
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int j = base + rank + kThreads * h;
        const auto column = step.column(j);
        const Real y = is_implicit && j < t.m ? t.solution[j] : Real(0);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Real p = step.plan(row[r], column, x[r][h]);
          Real w = upstream * p;
          if (!is_envelope)
            w = upstream * (p - by_epsilon * step.moved(p, row[r], column, cost[r][h]));
          if (is_implicit) w += by_epsilon * (p * (x_of[r] + y));
          weight[r][h] = w;
        }
      }
      if (b.mode == kUnrolled) {
        const int used = t.iteration;
        Real of_x = Real(t.lambda_a / t.epsilon), of_y = Real(t.lambda_b / t.epsilon);
        for (int k = 1; k <= used; ++k) {
          if (b.annealing > 0) {
            t.at(k);
            of_x = Real(t.lambda_a / t.epsilon), of_y = Real(t.lambda_b / t.epsilon);
          }
          Real number[kRows], over_sum[kRows], bar[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int64_t at = (k - 1) * b.n + row[r].i;
            number[r] = t.row_number[at], over_sum[r] = t.of_row[at];
            bar[r] = of_x * t.bar_alpha[at];
          }
#pragma unroll
          for (int h = 0; h < kHeld; ++h) {
            const int j = base + rank + kThreads * h;
            if (j >= t.m) continue;
            const int64_t at = (k - 1) * b.m + j;
            const Real tau = t.tau[at], before = t.before[at], y = of_y * t.bar_beta[at];
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              weight[r][h] += y * N::mass(number[r], tau, x[r][h], t.gain) +
                              bar[r] * N::mass(over_sum[r], before, x[r][h], t.gain);
          }
        }
        if (b.annealing > 0) t.at(used);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r >= last) break;
        const bool has_mass = PlanStep<N>::has_mass(row[r].alpha);
        with_type(weights.to.dtype, weights.to.row(t.group * b.n + first + r - weights.row),
                  [&](auto* out) {
#pragma unroll
                    for (int h = 0; h < kHeld; ++h) {
                      const int j = base + rank + kThreads * h;
                      if (j >= t.m) continue;
                      Real w = has_mass ? weight[r][h] : Real(0);
                      if (scales) w = cost[r][h] > 0 ? w / cost[r][h] : Real(0);
                      if (b.ground == kSquared) w *= 2;
                      narrow(w, out[j]);
                    }
                  });
      }
    }
  }
  // What does not count has none; a problem that cannot be has no number.
  if (weights.to.data == nullptr) return;
  const Real rest = t.is_valid ? Real(0) : Real(NAN);
  for (int i = begin; i < end && i < int(b.n); ++i) {
    with_type(weights.to.dtype, weights.to.row(t.group * b.n + i - weights.row), [&](auto* out) {
      for (int j = (i < t.n && t.is_valid ? t.m : 0) + rank; j < int(b.m); j += kThreads)
        narrow(rest, out[j]);
    });
  }
}

// Gradients of a side's marginals, by all threads of a block. At a fixed point from the solution.
template <class N>
__device__ void marginal_gradient(DeviceTask<typename N::Number>& t, bool of_rows,
                                  typename N::Number* out) {
  using Real = typename N::Number;
  const Batch<Real>& b = t.batch;
  if (out == nullptr) return;
  const int count = of_rows ? t.n : t.m, whole = int(of_rows ? b.n : b.m);
  const Real* const sums = of_rows ? t.row_sums : t.column_sums;
  const double rho = of_rows ? b.rho_a : b.rho_b, upstream = double(b.upstream[t.group]);
  const int used = t.iteration;
  for (int i = int(threadIdx.x); i < whole; i += kCudaThreads) {
    const double mass = i < count ? double(of_rows ? t.a(i) : t.b(i)) : 0;
    double d = t.is_valid ? 0 : double(NAN);
    if (t.is_valid && mass > 0) {
      if (b.mode == kUnrolled) {
        for (int k = 1; k <= used; ++k) {
          const Real bar = of_rows ? t.bar_alpha[(k - 1) * b.n + i] : t.bar_beta[(k - 1) * b.m + i];
          d += lambda_of(rho, t.annealed(k)) * double(bar) / mass;
        }
      } else if (b.mode == kImplicit) {
        d = double((of_rows ? t.bar_alpha : t.solution)[i]) * double(sums[i]) / mass;
      } else if (!(rho < INFINITY)) {
        const Real number = of_rows ? t.alpha_of(used)[i] : t.beta[i];
        d = upstream * t.epsilon * kLn2 * double(N::exponent_of(number));
      }
      if (b.objective == kEntropic && rho < INFINITY)
        d += upstream * rho * (1 - double(sums[i]) / mass);
    }
    out[t.group * whole + i] = Real(d);
  }
}
template <class N>
__device__ void marginal_gradients(DeviceTask<typename N::Number>& t) {
  marginal_gradient<N>(t, true, t.batch.d_a);
  marginal_gradient<N>(t, false, t.batch.d_b);
}

}  // namespace stillhouse
