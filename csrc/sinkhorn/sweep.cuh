// One sweep over the costs on CUDA, of any step (steps.cuh). A team takes a part of the rows, one after the
// other: terms of each element, their sum over the row, what the step makes of it, and the element's share
// of its column's sum. Columns' sums are added up over the parts afterwards.
//
// A thread has the same columns in every row, so what it keeps of them needs no barrier.
#pragma once
#include "task.cuh"

namespace stillhouse {

// The terms of some rows, element by element, in `held`; `sum` their sums of this thread.
template <int kThreads, int kHeld, int kRows, class Step, class Source>
__device__ __forceinline__ void take_rows(Step& step, const Source& source, int first, int last,
                                          typename Step::Row (&row)[kRows],
                                          typename Step::Number (&held)[kRows][kHeld],
                                          typename Step::Number (&sum)[kRows]) {
  using Real = typename Step::Number;
  const int m = step.t.m;
#pragma unroll
  for (int r = 0; r < kRows; ++r) sum[r] = 0;
  for (int base = 0; base < m; base += kThreads * kHeld) {
    Real x[kRows][kHeld], cost[kRows][kHeld];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + r < last ? first + r : last - 1;
      source.template load<kThreads>(i, base, x[r]);
      if constexpr (Step::kReadsCosts)
        if (step.wants_costs()) Spread<Real>{step.t}.template load<kThreads>(i, base, cost[r]);
    }
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (base + kThreads * h >= m) break;
      const auto column = step.column(base + Team<kThreads>::rank() + kThreads * h);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if constexpr (!Step::kReadsCosts) cost[r][h] = x[r][h];
        sum[r] += step.term(row[r], column, x[r][h], cost[r][h], held[r][h]);
      }
    }
  }
}

// The largest exponent of each row, for sums that are out of range relative to the last one.
template <int kThreads, int kHeld, int kRows, class Step, class Source>
__device__ void shift_rows(Step& step, const Source& source, int first, int last,
                           typename Step::Row (&row)[kRows],
                           const typename Step::Number (&sum)[kRows]) {
  using Real = typename Step::Number;
  Real top[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) top[r] = -INFINITY;
  for (int base = 0; base < step.t.m; base += kThreads * kHeld) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Real x[kHeld];
      source.template load<kThreads>(first + r < last ? first + r : last - 1, base, x);
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int j = base + Team<kThreads>::rank() + kThreads * h;
        const Real exponent = mul_add(-step.t.gain, x[h], step.column(j).beta);
        top[r] = exponent > top[r] ? exponent : top[r];
      }
    }
  }
  Team<kThreads>::reduce(top, Largest());
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (step.is_far(row[r], sum[r])) row[r].shift = -top[r];
}

template <int kThreads, int kHeld, int kRows, class Step, class Source, class Sums>
__device__ void sweep_part(Step& step, const Source& source, int part, const Sums& sums) {
  using Real = typename Step::Number;
  auto& t = step.t;
  const int count = rows_a_part(t.n), begin = part * count;
  const int last = begin + count < t.n ? begin + count : t.n;
  const bool keeps = t.m <= kThreads * kHeld;
  const bool writes = Team<kThreads>::rank() == 0;
  Real columns[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) columns[h] = 0;
  for (int first = begin; first < last; first += kRows) {
    typename Step::Row row[kRows];
    Real held[kRows][kHeld], sum[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) row[r] = step.row(first + r < last ? first + r : last - 1);
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      take_rows<kThreads>(step, source, first, last, row, held, sum);
      if constexpr (Step::kSums) Team<kThreads>::reduce(sum, Add());
      bool far = false;
      if constexpr (Step::kShifts) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) far = far || step.is_far(row[r], sum[r]);
        // The same for all of the team.
        if (turn == 0 && far) shift_rows<kThreads, kHeld>(step, source, first, last, row, sum);
      }
      if (!far) break;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= last) break;
      const Real factor = step.finish(row[r], first + r, sum[r], writes);
      if (!keeps && writes) t.factor[first + r] = factor;
#pragma unroll
      for (int h = 0; h < kHeld; ++h)
        if (keeps && kThreads * h < t.m) columns[h] = mul_add(held[r][h], factor, columns[h]);
    }
  }
  step.template leave_part<kThreads>(t.of_part + part * kBlockSums);
  if constexpr (Step::kColumns) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int j = Team<kThreads>::rank() + kThreads * h;
      if (keeps && j < t.m) sums[part * t.m + j] = columns[h];
    }
  }
}

// x of the kSlices warps that work on the same columns.
template <int kSlices, class Op>
__device__ double over_slices(double x, Op op) {
  if constexpr (kSlices == 1) {
    return x;
  } else {
    static_assert(kSlices == kCudaWarps, "all warps of a block");
    SHARED_ARRAY(double, of_slice, kCudaThreads);
    __syncthreads();  // the last call's readers are done
    of_slice[threadIdx.x] = x;
    __syncthreads();
    const int lane = int(threadIdx.x) % kWarpSize;
    double total = of_slice[lane];
#pragma unroll
    for (int slice = 1; slice < kSlices; ++slice)
      total = op(total, double(of_slice[slice * kWarpSize + lane]));
    return total;
  }
}

// What a step does to 32 columns with their sums: by a warp, or by all warps of a block in slices.
template <int kSlices, class Step, class Source, class Sums>
__device__ void finish_columns(Step& step, const Source& source, int capacity, const Sums& sums,
                               int tile) {
  using Real = typename Step::Number;
  auto& t = step.t;
  const int slice = kSlices == 1 ? 0 : int(threadIdx.x) / kWarpSize;
  const int j = tile * kWarpSize + int(threadIdx.x) % kWarpSize;
  const bool is_there = j < t.m, keeps = t.m <= capacity;
  double total = 0;
  if (is_there && keeps) {
    const int parts = parts_of(t.n);
    for (int part = slice; part < parts; part += kSlices)
      total += double(Real(sums[part * t.m + j]));
  } else if (is_there && !Step::kShifts) {
    for (int i = slice; i < t.n; i += kSlices) {
      auto row = step.row(i);
      const Real x = source.at(i, j);
      Real held, cost = x;
      if constexpr (Step::kReadsCosts)
        if (step.wants_costs()) cost = Spread<Real>{t}.at(i, j);
      step.term(row, step.column(j), x, cost, held);
      total += double(held * t.factor[i]);
    }
  }
  total = over_slices<kSlices>(total, Add());
  if constexpr (Step::kShifts) {
    bool far = is_there && (!keeps || step.is_far_column(j, total));
    if constexpr (kSlices > 1) far = __syncthreads_or(far);
    if (far) {
      Real top = -INFINITY;
      double sum = 0;
      for (int i = slice; i < t.n && is_there; i += kSlices) {
        const Real exponent = step.exponent(i, source.at(i, j));
        top = exponent > top ? exponent : top;
      }
      top = Real(over_slices<kSlices>(double(top), Largest()));
      if (!(top > -INFINITY)) top = 0;
      for (int i = slice; i < t.n && is_there; i += kSlices)
        sum += double(fast_exp2(step.exponent(i, source.at(i, j)) - top));
      sum = over_slices<kSlices>(sum, Add());
      if (is_there && slice == 0) step.set_column(j, top + log2_of(Real(sum)));
      return;
    }
  }
  if (is_there && slice == 0) step.finish_column(j, total);
}

// By all threads of a block: the sum, or with Largest the largest, of what the parts have left.
template <class Real, class Op>
__device__ double over_parts(const DeviceTask<Real>& t, BlockSum which, Op op) {
  double x[1] = {0};  // nothing of it is negative
  for (int part = int(threadIdx.x); part < parts_of(t.n); part += kCudaThreads)
    x[0] = op(x[0], t.of_part[part * kBlockSums + which]);
  Team<kCudaThreads>::reduce(x, op);
  return x[0];
}

}  // namespace stillhouse
