// The kernel: a team of threads for each row that counts.
#pragma once
#include "row.cuh"

namespace stillhouse {

// Rows that do not count, and columns beyond the vocabulary: a gradient of zero.
template <int kThreads>
__device__ void zero_columns(const Rows& rows, int64_t r, int64_t from, int64_t to) {
  with_type(rows.dtype, row_of(rows, r), [&](auto* out) {
    using Number = decltype(widen(*out));
    for (int64_t j = from + Team<kThreads>::rank(); j < to; j += kThreads)
      narrow(Number(0), out[j]);
  });
}

// A kernel's block: its threads, and how many blocks an SM must have registers for without spilling.
template <int kThreads>
constexpr int kBlockThreads = kThreads < 128 ? 128 : kThreads;
template <class Kind, int kThreads, Hold kHold, bool kPlain>
constexpr int kBlocks = !kPlain || kThreads > 256                    ? 1
                        : kOnePass<Kind> && kHold != Hold::registers ? 3
                                                                     : 2;

template <class Kind, class Real, class In, int kThreads, Hold kHold, bool kPlain>
__global__ void __launch_bounds__(kBlockThreads<kThreads>, (kBlocks<Kind, kThreads, kHold, kPlain>))
    divergence_kernel(const Problem<Real> problem) {
  SHARED_DYNAMIC(In, shared);
  const int64_t teams = int64_t(blockDim.x) / kThreads;
  const int64_t r = int64_t(blockIdx.x) * teams + int64_t(threadIdx.x) / kThreads;
  if (r >= problem.rows) return;  // a whole team
  const bool counted = counts(problem, r);
  if (problem.gradient.data != nullptr)
    zero_columns<kThreads>(problem.gradient, r, counted ? problem.vocab : 0, problem.width);
  if (!counted) {
    if (Team<kThreads>::rank() != 0) return;
    if (problem.value != nullptr) problem.value[r] = 0;
    for (int i = 0; i < kStats && problem.stats != nullptr; ++i)
      problem.stats[i * problem.rows + r] = 0;
    return;
  }
  DeviceRow<Kind, Real, In, kThreads, kHold, kPlain> row(problem, r, shared);
  row.normalise();
  row.run();
  row.write();
}

}  // namespace stillhouse
