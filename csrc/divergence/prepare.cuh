// What every kernel of the family does to a row before its own work.
#pragma once
#include "../core/block.cuh"
#include "kernel.h"

namespace stillhouse {

template <int kThreads>
__device__ void zero_columns(const Rows& rows, int64_t r, int64_t from, int64_t to) {
  with_type(rows.dtype, row_of(rows, r), [&](auto* out) {
    using Number = decltype(widen(*out));
#pragma unroll 1
    for (int64_t j = from + Team<kThreads>::rank(); j < to; j += kThreads)
      narrow(Number(0), out[j]);
  });
}

// What prepare_row() will look at.
template <class Real>
__device__ void prefetch_row(const Problem<Real>& problem, int64_t r) {
  if (r >= problem.rows) return;
  if (problem.weight != nullptr) prefetch(problem.weight + r);
  if (problem.mask != nullptr) prefetch(problem.mask + r);
}

// A gradient of zero for a row that does not count, and for columns beyond the vocabulary. Returns
// whether the row counts; if not, all of it has been written.
template <int kThreads, class Real>
__device__ bool prepare_row(const Problem<Real>& problem, int64_t r) {
  const bool counted = counts(problem, r);
  if (problem.gradient.data != nullptr && (!counted || problem.width > problem.vocab))
    zero_columns<kThreads>(problem.gradient, r, counted ? problem.vocab : 0, problem.width);
  if (counted || Team<kThreads>::rank() != 0) return counted;
  if (problem.value != nullptr) problem.value[r] = 0;
  for (int i = 0; i < kStats && problem.stats != nullptr; ++i)
    problem.stats[i * problem.rows + r] = 0;
  return false;
}

}  // namespace stillhouse
