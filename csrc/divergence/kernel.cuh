// The kernel: a team of threads for each row that counts.
#pragma once
#include "prepare.cuh"
#include "row.cuh"

namespace stillhouse {

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
  if (!prepare_row<kThreads>(problem, r)) return;
  DeviceRow<Kind, Real, In, kThreads, kHold, kPlain> row(problem, r, shared);
  row.normalise();
  row.run();
  row.write();
}

}  // namespace stillhouse
