// The kernel: a team of threads for each row that counts.
#pragma once
#include "prepare.cuh"
#include "row.cuh"

namespace stillhouse {

// A kernel's block: its threads, and how many blocks an SM must have registers for without spilling, which
// is one less for kinds that need more of them.
template <int kThreads>
constexpr int kBlockThreads = kThreads < 128 ? 128 : kThreads;
template <class Kind, class... Others>
constexpr bool kIsOneOf = (std::is_same<Kind, Others>::value || ...);
template <class Kind, class Real, int kThreads, Hold kHold, bool kPlain>
constexpr int kBlocks = [] {
  constexpr int kLess =
      kIsOneOf<Kind, AlphaBeta, AnyAlphaBeta, Amari, Renyi, Chi2, Hellinger, SkewReverseKL, DKD>;
  if (kThreads > 256 || sizeof(Real) == 8 || (!kPlain && kHold == Hold::nothing)) return 1;
  return (kThreads == 256 ? 2 : kPlain ? 5 : 4) - (kPlain && kThreads == 256 ? 0 : kLess);
}();

template <class Kind, class Real, class In, int kThreads, Hold kHold, bool kPlain>
__global__ void __launch_bounds__(kBlockThreads<kThreads>,
                                  (kBlocks<Kind, Real, kThreads, kHold, kPlain>))
    divergence_kernel(const Problem<Real> problem) {
  using Row = DeviceRow<Kind, Real, In, kThreads, kHold, kPlain>;
  SHARED_DYNAMIC(In, dynamic);
  const int team = int(threadIdx.x) / kThreads, teams = int(blockDim.x) / kThreads;
  const size_t of_team = kHold == Hold::shared ? pair_bytes<In>(int(problem.vocab)) : 0;
  const SharedVectors<In> shared(dynamic + team * int(of_team / sizeof(In)));
  // Teams take rows in turn, and those that count as they come to them.
  const int64_t step = int64_t(gridDim.x) * teams;
  const auto from = [&](int64_t r) {
    while (r < problem.rows && !prepare_row<kThreads>(problem, r)) r += step;
    return r;
  };
  const int64_t own = int64_t(blockIdx.x) * teams + team;
  prefetch_row(problem, own + step);
  int64_t r = from(own), last = -1;
  if (r >= problem.rows) return;  // a whole team
  typename Row::Pair pair(problem, r);
  typename Row::Raw raw;
  if constexpr (kHold == Hold::registers) raw = Row::fetch_row(pair);
  for (int turn = 0; r < problem.rows; turn ^= 1) {
    Row row(problem, r, pair, shared);
    row.turn = turn;
    if constexpr (kHold == Hold::shared) {
      if (last < 0) row.copy_to_shared();
    }
    if constexpr (kHold == Hold::registers) row.raw = raw;
    const int64_t next = from(r + step);
    prefetch_row(problem, next + step);
    row.has_next = next < problem.rows;
    if (row.has_next) {
      row.next = pair = typename Row::Pair(problem, next);
      if constexpr (kHold == Hold::registers) raw = Row::fetch_row(pair);
    }
    row.normalise();
    if constexpr (Row::kWritesLater) {
      if (last >= 0) Row::write_value(problem, last, turn ^ 1);
    }
    row.run();
    row.write();
    last = r, r = next;
    if constexpr (Row::kWritesLater) {
      if (row.has_next) continue;
      __syncthreads();
      Row::write_value(problem, last, turn);
    }
  }
}

}  // namespace stillhouse
