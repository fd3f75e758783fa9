// Rows of draft trees on CUDA: sums of spans of all rows at once, by warps, and what a walk asks of one
// block, whose threads walk together.
#pragma once
#include "../core/block.cuh"
#include "walk.h"

namespace stillhouse {

constexpr int kWalkThreads = 256;
constexpr int kOfLane = int(kSpan) / kWarpSize;  // elements of a span: lane, lane + 32, ...

// What is measured of every span before the walks, [rows, spans]; rows: B T of target, then of draft.
struct SpanTable {
  double *extremes, *sums;
  double* largest;  // of greedy walks
  int64_t* index;   // of those, -1: not finite
};

__device__ inline int span_length(int64_t columns, int64_t span) {
  const int64_t left = columns - span * kSpan;
  return int(left < kSpan ? left : kSpan);
}

// A lane's numbers of a span; beyond the end, what changes no maximum of logits and no sum.
template <class Real>
__device__ inline void load_lane(const TreeRow& row, int64_t columns, int64_t span,
                                 Real (&x)[kOfLane]) {
  const int lane = int(threadIdx.x) % kWarpSize, n = span_length(columns, span);
  const Real beyond = row.probabilities ? Real(0) : Real(-INFINITY);
  with_type(row.dtype, const_cast<char*>(row.data), [&](auto* numbers) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int j = lane + i * kWarpSize;
      x[i] = j < n ? Real(widen(numbers[span * kSpan + j])) : beyond;
    }
  });
}

template <class Real>
__device__ inline Real probability(const TreeRow& row, Real x) {
  if (row.probabilities) return x * Real(row.scale);
  return fast_exp2((x - Real(row.max)) * Real(row.factor)) * Real(row.scale);
}

template <class Real>
__device__ void measure_span(const TreeRow& row, int64_t columns, int64_t span, double& extreme,
                             double& sum) {
  Real x[kOfLane];
  load_lane(row, columns, span, x);
  const int lane = int(threadIdx.x) % kWarpSize, n = span_length(columns, span);
  Real found[1] = {Real(-INFINITY)}, total[1] = {Real(0)};
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    // Of probabilities the least, as the largest of their negatives.
    const bool is = lane + i * kWarpSize < n;
    const Real each = row.probabilities ? -x[i] : x[i];
    if (is && each > found[0]) found[0] = each;
  }
  Team<kWarpSize>::reduce(found, Largest());
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    // NaN, which no maximum sees, comes through to the sum; so does +inf, as NaN.
    if (row.probabilities)
      total[0] += x[i];
    else if (found[0] > Real(-INFINITY) || x[i] != x[i])
      total[0] += fast_exp2((x[i] - found[0]) * Real(row.factor));
  }
  Team<kWarpSize>::reduce(total, Add());
  extreme = row.probabilities ? -double(found[0]) : double(found[0]);
  sum = double(total[0]);
}

template <class Real>
__device__ void largest_of_span(const TreeRow& row, int64_t columns, int64_t span, double& best,
                                int64_t& index) {
  Real x[kOfLane];
  load_lane(row, columns, span, x);
  const int lane = int(threadIdx.x) % kWarpSize;
  Real most[1] = {Real(-INFINITY)};
  bool odd = false;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    odd |= !(x[i] < Real(INFINITY));
    if (x[i] > most[0]) most[0] = x[i];
  }
  Team<kWarpSize>::reduce(most, Largest());
  int first = int(kSpan);
#pragma unroll
  for (int i = kOfLane - 1; i >= 0; --i)
    if (x[i] == most[0]) first = lane + i * kWarpSize;
  int before[1] = {-first};
  Team<kWarpSize>::reduce(before, Largest());
  best = double(most[0]);
  index = __any_sync(kFullMask, odd) ? -1 : span * kSpan - before[0];
}

// Whether extremes and sums are asked for.
inline __host__ __device__ bool measures(const TreeProblem& t) {
  return t.mode != TreeMode::greedy || t.probabilities;
}

// A warp for each span of each row that a walk may visit.
template <class Real>
__global__ void __launch_bounds__(kWalkThreads)
    span_kernel(TreeProblem t, const int32_t* parents, SpanTable table) {
  const int64_t spans = spans_of(t.columns), all = t.trees * t.nodes;
  const int64_t item = int64_t(blockIdx.x) * (kWalkThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int64_t row = item / spans, span = item % spans;
  if (row >= all * (t.draft == nullptr ? 1 : 2)) return;
  const int64_t node = row % all;
  const bool of_draft = row >= all;
  if (node % t.nodes > 0 && parents[node] < 0) return;  // padded
  if (of_draft && t.first_child[node] < 0) return;
  const TreeRow numbers = of_draft
                              ? t.row(t.draft, t.draft_dtype, node / t.nodes, node % t.nodes)
                              : t.row(t.target, t.target_dtype, node / t.nodes, node % t.nodes);
  const bool writes = threadIdx.x % kWarpSize == 0;
  if (t.mode == TreeMode::greedy) {
    double largest = 0;
    int64_t index = 0;
    largest_of_span<Real>(numbers, t.columns, span, largest, index);
    if (writes) table.largest[item] = largest, table.index[item] = index;
  }
  if (measures(t)) {
    double extreme = 0, sum = 0;
    measure_span<Real>(numbers, t.columns, span, extreme, sum);
    if (writes) table.extremes[item] = extreme, table.sums[item] = sum;
  }
}

// The first place in n numbers where their sum passes `wanted`, else the last that is positive, -1: none;
// `before`: the sum in front of it. Numbers are summed in 32 pieces, then from the first on.
template <class Numbers>
__device__ int64_t first_above(Numbers numbers, int64_t n, double wanted, double& before) {
  SHARED_ARRAY(double, pieces, kWarpSize);
  const int64_t length = (n + kWarpSize - 1) / kWarpSize;
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    double sum = 0;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t at = int64_t(threadIdx.x) * length + i;
      if (at < n) sum += numbers[at];
    }
    pieces[int(threadIdx.x)] = sum;
  }
  __syncthreads();
  int piece = -1;
  double sum = before, found = before;
  for (int i = 0; i < kWarpSize && sum <= wanted; ++i) {
    if (pieces[i] > 0) piece = i, found = sum;
    sum += pieces[i];
  }
  if (piece < 0) return -1;
  int64_t place = -1;
  sum = found;
  for (int64_t i = piece * length; i < n && i < (piece + 1) * length && sum <= wanted; ++i) {
    if (numbers[i] > 0) place = i, before = sum;
    sum += numbers[i];
  }
  return place;
}

// What a walk asks of its block.
template <class Real>
struct BlockRows {
  using Block = Team<kWalkThreads>;
  const TreeProblem& t;
  const SpanTable& table;
  const int64_t tree, spans;
  double* const aside;  // [spans]
  const TreeWalk<BlockRows>* walk = nullptr;

  template <class F>
  __device__ void write(F f) const {
    __syncthreads();
    if (threadIdx.x == 0) f();
    __syncthreads();
  }

  __device__ double total(const double* numbers) const {
    double sum[1] = {0};
    for (int64_t s = threadIdx.x; s < spans; s += kWalkThreads) sum[0] += numbers[s];
    Block::reduce(sum, Add());
    return sum[0];
  }

  // The row's largest logit and scale from its spans, and their masses.
  __device__ int32_t combine(TreeRow& row, bool of_draft, int32_t node, double* masses) const {
    const int64_t at = (((of_draft ? t.trees : 0) + tree) * t.nodes + node) * spans;
    const double *extremes = table.extremes + at, *sums = table.sums + at;
    double most[2] = {-INFINITY, -INFINITY};  // largest, and minus the least
    int odd = 0;
    for (int64_t s = threadIdx.x; s < spans; s += kWalkThreads) {
      most[0] = extremes[s] > most[0] ? extremes[s] : most[0];
      most[1] = -extremes[s] > most[1] ? -extremes[s] : most[1];
      odd |= !(sums[s] < INFINITY);
    }
    if (__syncthreads_or(odd)) return kNotFinite;
    Block::reduce(most, Largest());
    const bool finite = most[0] > -INFINITY && most[0] < INFINITY;
    if (!row.probabilities && !finite) return kNotFinite;
    double sum[1] = {0};
    for (int64_t s = threadIdx.x; s < spans; s += kWalkThreads)
      sum[0] += sums[s] * (row.probabilities ? 1 : exp2((extremes[s] - most[0]) * row.factor));
    Block::reduce(sum, Add());
    if (row.probabilities && (-most[1] < 0 || !(fabs(sum[0] - 1) <= 1e-3))) return kNotNormalised;
    const double scale = 1 / sum[0];
    if (masses != nullptr)
      for (int64_t s = threadIdx.x; s < spans; s += kWalkThreads)
        masses[s] =
            sums[s] * (row.probabilities ? 1 : exp2((extremes[s] - most[0]) * row.factor)) * scale;
    write([&] {
      if (!row.probabilities) row.max = most[0];
      row.scale = scale;
    });
    return 0;
  }

  __device__ int32_t measure(Frame& f, bool with_q) const {
    const int32_t of_q = with_q ? combine(f.q, true, f.node, nullptr) : 0;
    return combine(f.p, false, f.node, f.masses) | of_q;
  }

  // What rejections have left of P at a lane's elements of a span.
  __device__ void left_of(const Residual& r, int64_t span, Real (&p)[kOfLane]) const {
    load_lane(r.p, r.columns, span, p);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) p[i] = probability(r.p, p[i]);
    Real q[kOfLane] = {};
    if (r.count > 0 && r.q.data != nullptr) {
      load_lane(r.q, r.columns, span, q);
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) q[i] = probability(r.q, q[i]);
    }
    for (int32_t k = 0; k < r.count; ++k) {
      const Real a = Real(r.rejections[k].a), share = Real(r.rejections[k].share);
      const Real scale = Real(r.rejections[k].scale);
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const Real rest = p[i] * a - q[i] * share;
        p[i] = (rest > 0 ? rest : Real(0)) * scale;
      }
    }
    const int64_t first = span * kSpan + threadIdx.x % kWarpSize;
    for (int32_t k = 0; k < r.patched; ++k) {
      const int64_t at = r.patches[k].token - first;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i)
        if (at == i * kWarpSize) p[i] = Real(r.patches[k].value);
    }
  }

  // numbers[s] = sum of f(P) over span s, for spans lo ... hi.
  template <class F>
  __device__ void of_spans(const Residual& r, int64_t lo, int64_t hi, double* numbers, F f) const {
    __syncthreads();  // the last readers are done
    for (int64_t s = lo + threadIdx.x / kWarpSize; s < hi; s += kWalkThreads / kWarpSize) {
      Real p[kOfLane], sum[1] = {Real(0)};
      left_of(r, s, p);
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) sum[0] += f(p[i]);
      Team<kWarpSize>::reduce(sum, Add());
      if (threadIdx.x % kWarpSize == 0) numbers[s] = double(sum[0]);
    }
    __syncthreads();
  }

  __device__ double sums(Frame& f) const {
    of_spans(walk->residual(f), 0, spans, aside, [](Real p) { return p; });
    return total(aside);
  }
  __device__ double sums_at(Frame& f, int32_t x) const {
    const int64_t span = x / kSpan;
    copy(aside, f.masses, 1);
    of_spans(walk->residual(f), span, span + 1, aside, [](Real p) { return p; });
    return total(aside);
  }
  __device__ void keep(Frame& f, double by) const { copy(f.masses, aside, by); }
  __device__ double rest(const Frame& f, int32_t patched) const {
    const Residual q{f.q, {}, nullptr, walk->memory.patches, 0, patched, t.columns};
    of_spans(q, 0, spans, aside, [](Real p) { return p; });
    return total(aside);
  }
  __device__ void copy(double* to, const double* from, double by) const {
    __syncthreads();
    for (int64_t s = threadIdx.x; s < spans; s += kWalkThreads) to[s] = from[s] * by;
    __syncthreads();
  }

  __device__ double entropy(Frame& f) const {
    of_spans(walk->residual(f), 0, spans, aside,
             [](Real p) { return p > Real(1.1754944e-38) ? -p * fast_log(p) : Real(0); });
    return total(aside);
  }

  __device__ int32_t pick(Frame& f, double u) const {
    SHARED_ARRAY(Real, values, int(kSpan));
    const double wanted = u * total(f.masses);
    double before = 0;
    const int64_t span = first_above(f.masses, spans, wanted, before);
    if (span < 0) return -1;
    const Residual r = walk->residual(f);
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      Real p[kOfLane];
      left_of(r, span, p);
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) values[int(threadIdx.x) + i * kWarpSize] = p[i];
    }
    __syncthreads();
    const int64_t at = first_above(values, span_length(t.columns, span), wanted, before);
    return at < 0 ? -1 : int32_t(span * kSpan + at);
  }

  __device__ int32_t largest(const TreeRow&, int32_t node) const {
    const int64_t at = (tree * t.nodes + node) * spans;
    double most[1] = {-INFINITY};
    int odd = 0;
    for (int64_t s = threadIdx.x; s < spans; s += kWalkThreads) {
      most[0] = table.largest[at + s] > most[0] ? table.largest[at + s] : most[0];
      odd |= table.index[at + s] < 0;
    }
    if (__syncthreads_or(odd)) return -1;
    Block::reduce(most, Largest());
    int64_t first[1] = {-(int64_t(1) << 40)};
    for (int64_t s = threadIdx.x; s < spans; s += kWalkThreads)
      if (table.largest[at + s] == most[0] && -table.index[at + s] > first[0])
        first[0] = -table.index[at + s];
    Block::reduce(first, Largest());
    return most[0] == -INFINITY ? -1 : int32_t(-first[0]);
  }
};

// A block for each tree, with all registers that it can use: trees are fewer than blocks that a GPU holds.
// `memory`: of all trees, as of one.
template <class Real>
__global__ void __launch_bounds__(kWalkThreads, 1)
    walk_kernel(TreeProblem t, SpanTable table, WalkMemory memory, int64_t levels) {
  const int64_t tree = blockIdx.x, spans = spans_of(t.columns), row = tree * (t.depth + 1);
  for (int64_t i = threadIdx.x; i <= t.depth; i += kWalkThreads) {
    t.path[row + i] = i == 0 ? 0 : -1;
    t.out_tokens[row + i] = -1;
  }
  const WalkMemory own{memory.frames + tree * levels, memory.rejections + tree * t.nodes,
                       memory.rejected + tree * t.nodes, memory.patches + tree * t.nodes,
                       memory.masses + tree * (levels + 1) * spans};
  BlockRows<Real> rows{t, table, tree, spans, own.masses + levels * spans};
  TreeWalk<BlockRows<Real>> walk{t, tree, own, rows};
  rows.walk = &walk;
  walk.run();
}

__global__ void __launch_bounds__(kWarpSize) links_kernel(TreeLinks links) {
  const int64_t tree = int64_t(blockIdx.x) * kWarpSize + threadIdx.x;
  if (tree < links.trees) links.build(tree);
}

}  // namespace stillhouse
