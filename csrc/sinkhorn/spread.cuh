// Large problems on CUDA: each step a launch over the parts of its rows, and one over its columns. Nothing is
// held but numbers of rows and columns; nothing waits for the host: a problem that is done leaves its blocks
// with nothing to do.
#pragma once
#include "held.cuh"

namespace stillhouse {

// Problems [first, first + gridDim.x / blocks) of a batch, some blocks each, and where their scratch begins.
template <class Real>
struct Several {
  int64_t first, bytes;
  char* scratch;
  int blocks;
  bool is_gradient, keeps_sums;

  __device__ int share() const { return int(blockIdx.x) % blocks; }
  __device__ DeviceTask<Real> task(const Batch<Real>& batch) const {
    const int64_t at = int64_t(blockIdx.x) / blocks;
    return DeviceTask<Real>(batch, first + at, is_gradient, keeps_sums, scratch + at * bytes);
  }
};

// A team of kThreads takes a part of the rows, and kHeld columns a thread are read once; threads of a block,
// teams of a block, and blocks that registers must be there for.
template <int kThreads>
constexpr int kRowThreads = kThreads > kCudaThreads ? kThreads : kCudaThreads;
template <int kThreads>
constexpr int kTeams = kRowThreads<kThreads> / kThreads;
// Numbers of a row that a thread keeps: rows of 8,192 columns in float, 4,096 in double.
template <class Real, int kThreads>
constexpr int kRowHeld = sizeof(Real) == 4 || kThreads == 256 ? 16 : 8;
template <class Real, int kThreads>
constexpr int kRowBlocks = sizeof(Real) == 4 && kThreads < 512 ? 512 / kRowThreads<kThreads> : 1;

// What a launch is about: iteration k of the solution, or of the way back; 0: the solution itself.
template <class Real>
__device__ bool is_at_work(DeviceTask<Real>& t, bool is_gradient, int64_t k) {
  if (!t.is_valid) return false;
  if (!is_gradient) {
    // An iteration that others of this launch find not to be needed has not stopped before it.
    if (k > 0 && t.progress->stopped < k) return false;
    if (k == 0 && t.progress->stopped == 1) return false;  // costs that cannot be
    t.at(k > 0 ? k : t.progress->stopped - 1);
    return true;
  }
  const int64_t used = t.batch.used[t.group];
  if (k > used) return false;
  t.at(k > 0 ? k : used);
  return true;
}

template <class Step, int kThreads>
__global__ void __launch_bounds__(kRowThreads<kThreads>,
                                  (kRowBlocks<typename Step::Number, kThreads>))
    rows_kernel(const Batch<typename Step::Number> batch, Several<typename Step::Number> several,
                int64_t k) {
  using Real = typename Step::Number;
  DeviceTask<Real> t = several.task(batch);
  if (!is_at_work(t, several.is_gradient, k)) return;
  if (Step::kIsSolver && t.progress->is_solved) return;
  const int part = several.share() * kTeams<kThreads> + int(threadIdx.x) / kThreads;
  Step step(t);
  if (part < parts_of(t.n))
    sweep_part<kThreads, kRowHeld<Real, kThreads>, 1>(step, Spread<Real>{t}, part, t.sums);
}

template <class Step>
__global__ void __launch_bounds__(kCudaThreads, 4)
    columns_kernel(const Batch<typename Step::Number> batch, Several<typename Step::Number> several,
                   int64_t k, int capacity) {
  using Real = typename Step::Number;
  DeviceTask<Real> t = several.task(batch);
  if (!is_at_work(t, several.is_gradient, k)) return;
  if (Step::kIsSolver && t.progress->is_solved) return;
  if constexpr (Step::kIterates) {
    const bool is_broken = k == 1 && over_parts(t, kBroken, Largest()) > 0;
    const bool is_close = batch.tolerance >= 0 && k > 1 && (k - 1) % kTestEvery == 0 &&
                          t.is_steady() && over_parts(t, kError, Largest()) <= batch.tolerance;
    if (is_broken || is_close) {
      if (several.share() == 0 && threadIdx.x == 0) t.progress->stopped = k;
      return;
    }
  }
  Step step(t);
  finish_columns<kCudaWarps>(step, Spread<Real>{t}, capacity, t.sums, several.share());
}

// Before the first sweep; epsilon comes down from the largest cost, which another one finds.
template <class Real>
__global__ void __launch_bounds__(kCudaThreads, 4)
    start_kernel(const Batch<Real> batch, Several<Real> several) {
  DeviceTask<Real> t = several.task(batch);
  if (!t.is_valid) return;
  transpose_points(t, several.share(), several.blocks);
  if (several.share() != 0 || threadIdx.x != 0) return;
  t.progress->start = 0;
  t.progress->stopped = batch.iterations + 1;
  t.progress->is_solved = 0;
}
template <class Real, int kThreads>
__global__ void __launch_bounds__(kRowThreads<kThreads>, (kRowBlocks<Real, kThreads>))
    largest_kernel(const Batch<Real> batch, Several<Real> several) {
  DeviceTask<Real> t = several.task(batch);
  if (!t.is_valid) return;
  const int part = several.share() * kTeams<kThreads> + int(threadIdx.x) / kThreads;
  LargestStep<Exponents<Real>> step(t);
  if (part < parts_of(t.n))
    sweep_part<kThreads, kRowHeld<Real, kThreads>, 1>(step, Spread<Real>{t}, part, t.sums);
}
template <class Real>
__global__ void __launch_bounds__(kCudaThreads, 4)
    found_kernel(const Batch<Real> batch, Several<Real> several) {
  DeviceTask<Real> t = several.task(batch);
  if (!t.is_valid) return;
  const double most = over_parts(t, kLargest, Largest());
  if (threadIdx.x == 0) t.progress->start = most;
}

template <class Real>
__global__ void __launch_bounds__(kCudaThreads, 4)
    solution_kernel(const Batch<Real> batch, Several<Real> several) {
  DeviceTask<Real> t = several.task(batch);
  if (!is_at_work(t, false, 0)) {
    if (several.share() == 0) refuse(t);
    return;
  }
  if (several.share() == 0) leave_solution<Exponents<Real>>(t);
  clear_rest(t, several.share(), several.blocks);
}

// ---- the gradient

template <class Real>
__global__ void __launch_bounds__(kCudaThreads, 4)
    prepare_kernel(const Batch<Real> batch, Several<Real> several) {
  DeviceTask<Real> t = several.task(batch);
  if (t.is_valid) prepare<Exponents<Real>>(t, several.share(), several.blocks);
}
template <class Real>
__global__ void __launch_bounds__(kCudaThreads, 4)
    sides_kernel(const Batch<Real> batch, Several<Real> several) {
  DeviceTask<Real> t = several.task(batch);
  if (!is_at_work(t, true, 0)) return;
  seed_sides<Exponents<Real>>(t, several.share(), several.blocks);
}
template <class Real>
__global__ void __launch_bounds__(kCudaThreads, 4)
    solver_kernel(const Batch<Real> batch, Several<Real> several, bool starts) {
  DeviceTask<Real> t = several.task(batch);
  if (!is_at_work(t, true, 0) || (!starts && t.progress->is_solved)) return;
  starts ? start_solver(t) : advance_solver(t);
}

// The last sweep over rows [begin, end) of each problem, some a team: no sums depend on how many.
constexpr int kGradientRows = 4;
template <class Real, int kThreads>
__global__ void __launch_bounds__(kRowThreads<kThreads>, (kRowBlocks<Real, kThreads>))
    gradient_kernel(const Batch<Real> batch, Several<Real> several, int begin, int end,
                    const Weights weights) {
  DeviceTask<Real> t = several.task(batch);
  is_at_work(t, true, 0);
  const int rows = rows_a_part(int(batch.n));
  const int first =
      begin + (several.share() * kTeams<kThreads> + int(threadIdx.x) / kThreads) * rows;
  const int last = first + rows < end ? first + rows : end;
  if (first < last)
    gradient_rows<kThreads, kRowHeld<Real, kThreads> / 2, 1, Exponents<Real>>(t, Spread<Real>{t},
                                                                              first, last, weights);
}
template <class Real>
__global__ void __launch_bounds__(kCudaThreads, 4)
    marginals_kernel(const Batch<Real> batch, Several<Real> several) {
  DeviceTask<Real> t = several.task(batch);
  is_at_work(t, true, 0);
  marginal_gradients<Exponents<Real>>(t);
}

}  // namespace stillhouse
