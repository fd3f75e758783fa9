// Small problems on CUDA: a block each, from the first iteration to the last in one launch. Costs, or K where
// costs / epsilon are small enough, stay in shared memory; where a scaling leaves the range of floats, the
// problem begins again with exponents.
#pragma once
#include "gradient.cuh"

namespace stillhouse {

// Shared memory of a problem: [n, m] numbers and the columns' sums of the parts.
template <class Real>
SH_INLINE size_t held_bytes(int64_t n, int64_t m) {
  return size_t((n + most_parts(n)) * m) * sizeof(Real);
}

template <class Real, int kHeld>
struct HeldProblem {
  static constexpr int kRows = sizeof(Real) == 8 || kHeld > 4 ? 1 : kHeld == 1 ? 4 : 2;
  DeviceTask<Real>& t;
  const Held<Real> held;
  const SharedPointer<Real> sums;

  __device__ HeldProblem(DeviceTask<Real>& t, SharedPointer<Real> shared)
      : t(t), held{shared, t.m}, sums(shared + t.batch.n * t.batch.m) {}

  __device__ static int warp() { return int(threadIdx.x) / kWarpSize; }

  // What f(i, x) makes of each row's costs, by a warp a row, goes to shared memory.
  template <class F>
  __device__ void each_row(F f) const {
    for (int i = warp(); i < t.n; i += kCudaWarps) {
      Real x[kHeld];
      Spread<Real>{t}.template load<kWarpSize>(i, 0, x);
      f(i, x);
    }
  }
  __device__ int column(int h) const { return Team<kWarpSize>::rank() + kWarpSize * h; }

  __device__ void load_costs() const {
    each_row([&](int i, const Real(&x)[kHeld]) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h)
        if (column(h) < t.m) held.x[i * t.m + column(h)] = x[h];
    });
    __syncthreads();
  }
  // K; whether costs are too large for it, or cannot be.
  __device__ bool load_kernel() const {
    bool wrong = false;
    each_row([&](int i, const Real(&x)[kHeld]) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        if (column(h) >= t.m) continue;
        const Real exponent = t.gain * x[h];
        wrong = wrong || !(exponent >= 0 && exponent < Real(kKernelRange * kLog2e));
        held.x[i * t.m + column(h)] = fast_exp2(-exponent);
      }
    });
    return __syncthreads_or(wrong);
  }
  // The largest cost that is finite, where epsilon begins; those who read it have loaded costs before.
  __device__ void find_start() const {
    Real most[1] = {0};
    each_row([&](int, const Real(&x)[kHeld]) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h)
        if (column(h) < t.m && x[h] > most[0] && x[h] < INFINITY) most[0] = x[h];
    });
    Team<kCudaThreads>::reduce(most, Largest());
    if (threadIdx.x == 0) t.progress->start = double(most[0]);
  }
  // Kernel domain: where it is not ruled out, and epsilon stays what it is.
  __device__ bool may_hold_kernel() const {
    return t.batch.domain != kLog && !(t.batch.annealing > 0);
  }

  template <class Step>
  __device__ void sweep(Step& step) const {
    for (int part = warp(); part < parts_of(t.n); part += kCudaWarps)
      sweep_part<kWarpSize, kHeld, kRows>(step, held, part, sums);
    __syncthreads();
    if (!Step::kColumns) return;
    for (int tile = warp(); tile * kWarpSize < t.m; tile += kCudaWarps)
      finish_columns<1>(step, held, kWarpSize * kHeld, sums, tile);
    __syncthreads();
  }

  // All iterations; false where scalings left the range of floats. No iteration: costs that cannot be.
  template <class N>
  __device__ bool iterate() const {
    const Batch<Real>& b = t.batch;
    for (int64_t k = 1; k <= b.iterations; ++k) {
      t.at(k);
      UpdateStep<N> step(t);
      for (int part = warp(); part < parts_of(t.n); part += kCudaWarps)
        sweep_part<kWarpSize, kHeld, kRows>(step, held, part, sums);
      bool wrong = __syncthreads_or(step.wrong);
      if (N::kLog && wrong) {
        t.iteration = 0;
        return true;
      }
      if (b.tolerance >= 0 && k > 1 && (k - 1) % kTestEvery == 0 && t.is_steady() &&
          over_parts(t, kError, Largest()) <= b.tolerance) {
        t.at(k - 1);
        return true;
      }
      for (int tile = warp(); tile * kWarpSize < t.m; tile += kCudaWarps)
        finish_columns<1>(step, held, kWarpSize * kHeld, sums, tile);
      wrong = __syncthreads_or(step.wrong);
      if (!N::kLog && wrong) return false;
    }
    return true;
  }

  template <class N>
  __device__ bool solve() const;
  template <class N>
  __device__ bool differentiate(const Weights& weights) const;
};

// What is known of a solution after the sweep over its plan, by all threads of a block.
template <class N>
__device__ void leave_solution(DeviceTask<typename N::Number>& t) {
  using Real = typename N::Number;
  const Batch<Real>& b = t.batch;
  double value[1] = {over_parts(t, kValue, Add())};
  const double error = over_parts(t, kError, Largest());
  if (t.by_sides()) {
    double of_columns[1] = {0};
    for (int j = int(threadIdx.x); j < t.m; j += kCudaThreads)
      of_columns[0] += double(t.column_sums[j]);
    Team<kCudaThreads>::reduce(of_columns, Add());
    value[0] += of_columns[0];
  }
  if (threadIdx.x == 0) {
    b.value[t.group] = Real(value[0]);
    b.error[t.group] = Real(error);
    b.used[t.group] = t.iteration;
  }
  const Real unit = Real(t.epsilon * kLn2);
  for (int i = int(threadIdx.x); i < int(b.n); i += kCudaThreads)
    b.f[t.group * b.n + i] = i < t.n ? N::exponent_of(t.alpha_of(t.iteration)[i]) * unit : Real(0);
  for (int j = int(threadIdx.x); j < int(b.m); j += kCudaThreads)
    b.g[t.group * b.m + j] = j < t.m ? N::exponent_of(t.beta[j]) * unit : Real(0);
}

// Costs that cannot be: NaN, and -1 iterations.
template <class Real>
__device__ void refuse(DeviceTask<Real>& t) {
  const Batch<Real>& b = t.batch;
  if (threadIdx.x == 0) {
    b.value[t.group] = b.error[t.group] = Real(NAN);
    b.used[t.group] = -1;
  }
  const auto fill = [](Real* x, int64_t count) {
    for (int64_t i = threadIdx.x; i < count; i += kCudaThreads) x[i] = Real(NAN);
  };
  fill(b.f + t.group * b.n, b.n);
  fill(b.g + t.group * b.m, b.m);
  if (b.plan != nullptr) fill(b.plan + t.group * b.n * b.m, b.n * b.m);
}

// Zeroes of the plan beyond the rows and columns that count, by `share` of `shares` blocks.
template <class Real>
__device__ void clear_rest(DeviceTask<Real>& t, int share, int shares) {
  const Batch<Real>& b = t.batch;
  if (b.plan == nullptr || (t.n == b.n && t.m == b.m)) return;
  const int64_t first = int64_t(share) * kCudaThreads + threadIdx.x;
  for (int64_t at = first; at < b.n * b.m; at += int64_t(shares) * kCudaThreads)
    if (at / b.m >= t.n || at % b.m >= t.m) b.plan[t.group * b.n * b.m + at] = 0;
}

template <class Real, int kHeld>
template <class N>
__device__ bool HeldProblem<Real, kHeld>::solve() const {
  t.at(1);
  if constexpr (N::kLog) {
    load_costs();
  } else if (load_kernel()) {
    return false;
  }
  if (!iterate<N>()) return false;
  if (t.iteration == 0) {
    refuse(t);
    return true;
  }
  ResultStep<N> step(t);
  for (int part = warp(); part < parts_of(t.n); part += kCudaWarps)
    sweep_part<kWarpSize, kHeld, kRows>(step, held, part, sums);
  __syncthreads();
  for (int tile = warp(); t.by_sides() && tile * kWarpSize < t.m; tile += kCudaWarps)
    finish_columns<1>(step, held, kWarpSize * kHeld, sums, tile);
  leave_solution<N>(t);
  clear_rest(t, 0, 1);
  return true;
}

template <class Real, int kHeld>
__global__ void __launch_bounds__(kCudaThreads, 2)
    solve_held_kernel(const Batch<Real> batch, char* scratch, int64_t bytes) {
  SHARED_DYNAMIC(Real, shared);
  for (int64_t group = blockIdx.x; group < batch.groups; group += gridDim.x) {
    DeviceTask<Real> t(batch, group, false, false, scratch + blockIdx.x * bytes);
    if (!t.is_valid) {
      refuse(t);
      continue;
    }
    transpose_points(t, 0, 1);
    __syncthreads();  // and the last problem's readers are done
    const HeldProblem<Real, kHeld> problem(t, shared);
    if (batch.annealing > 0) problem.find_start();
    // Whether it is done is a vote, after which nobody reads K any more.
    const bool done = problem.may_hold_kernel() && problem.template solve<Scalings<Real>>();
    if (!done) problem.template solve<Exponents<Real>>();
  }
}

// ---- the gradient

template <class Real, int kHeld>
template <class N>
__device__ bool HeldProblem<Real, kHeld>::differentiate(const Weights& weights) const {
  const Batch<Real>& b = t.batch;
  t.at(b.used[t.group]);
  bool wrong = false;
  if constexpr (N::kLog) {
    load_costs();
  } else {
    wrong = load_kernel();
  }
  if (__syncthreads_or(prepare<N>(t, 0, 1) || wrong) && !N::kLog) return false;
  if (b.mode == kImplicit || (t.by_sides() && t.gives_way())) {
    SumsStep<N> step(t);
    sweep(step);
  }
  if (t.by_sides()) {
    seed_sides<N>(t, 0, 1);
    __syncthreads();
  }
  if (b.mode != kEnvelope) {
    SeedsStep<N> step(t);
    sweep(step);
  }
  if (b.mode == kImplicit) {
    SolverStep<N, true> correction(t);
    sweep(correction);
    start_solver(t);
    __syncthreads();
    for (int turn = 0; turn < kMostSolverSteps && !t.progress->is_solved; ++turn) {
      SolverStep<N, false> step(t);
      sweep(step);
      advance_solver(t);
      __syncthreads();
    }
  }
  for (int64_t k = b.used[t.group]; b.mode == kUnrolled && k >= 1; --k) {
    t.at(k);
    ReverseStep<N> step(t);
    for (int part = warp(); part < parts_of(t.n); part += kCudaWarps)
      sweep_part<kWarpSize, kHeld, kRows>(step, held, part, sums);
    __syncthreads();
    for (int tile = warp(); k > 1 && tile * kWarpSize < t.m; tile += kCudaWarps)
      finish_columns<1>(step, held, kWarpSize * kHeld, sums, tile);
    __syncthreads();
  }
  t.at(b.used[t.group]);
  if (weights.to.data != nullptr || b.mode == kImplicit) {
    const int rows = rows_a_part(int(b.n));
    for (int begin = warp() * rows; begin < int(b.n); begin += kCudaWarps * rows)
      gradient_rows<kWarpSize, kHeld, kRows, N>(t, held, begin, begin + rows, weights);
    __syncthreads();
  }
  marginal_gradients<N>(t);
  return true;
}

// Of groups [first, first + count).
template <class Real, int kHeld>
__global__ void __launch_bounds__(kCudaThreads, 2)
    differentiate_held_kernel(const Batch<Real> batch, int64_t first, int64_t count,
                              const Weights weights, char* scratch, int64_t bytes) {
  SHARED_DYNAMIC(Real, shared);
  for (int64_t group = first + blockIdx.x; group < first + count; group += gridDim.x) {
    DeviceTask<Real> t(batch, group, true, false, scratch + blockIdx.x * bytes);
    const HeldProblem<Real, kHeld> problem(t, shared);
    if (!t.is_valid) {
      gradient_rows<kCudaThreads, kHeld, 1, Exponents<Real>>(t, problem.held, 0, int(batch.n),
                                                             weights);
      marginal_gradients<Exponents<Real>>(t);
      continue;
    }
    transpose_points(t, 0, 1);
    __syncthreads();  // and the last problem's readers are done
    if (batch.annealing > 0) problem.find_start();
    const bool done =
        problem.may_hold_kernel() && problem.template differentiate<Scalings<Real>>(weights);
    if (!done) problem.template differentiate<Exponents<Real>>(weights);
  }
}

}  // namespace stillhouse
