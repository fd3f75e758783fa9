// What crosses from op.cpp (torch tensors) to cpu.cpp (one copy an instruction set): a batch of
// transport problems, one of them at work, and the steps it goes through.
#pragma once
#include <cstdint>

#include "../core/rows.h"
#include "../core/simd.h"

namespace stillhouse {

// The numbers of these are those of stillhouse.ops.sinkhorn.
enum Ground : int32_t { kMatrix, kL1, kSquared, kEuclidean };  // where costs come from
enum Domain : int32_t { kAuto, kKernel, kLog };
enum Objective : int32_t { kTransport, kEntropic };
enum Mode : int32_t { kUnrolled, kImplicit, kEnvelope };

// What a block of rows leaves beside its columns' sums: how far its rows' sums are off, its part of
// the value, its largest cost, whether there is one that is negative or NaN.
enum BlockSum : int64_t { kError, kValue, kLargest, kBroken, kBlockSums };

constexpr int64_t kBlockRows = 64;      // rows whose sums over columns are added up together
constexpr int64_t kResident = 1 << 16;  // elements of a matrix that is held with its transpose
constexpr int64_t kDimensions = 16;     // of points that are worked on by dimension, at a time
constexpr int64_t kTestEvery = 5;       // iterations between two looks at the tolerance
constexpr double kKernelRange = 80;     // of costs over epsilon: e^-80 is a normal float

// What a device's kernels share of the mathematics. A sum outside of this range is taken once more, relative
// to its largest term, or its problem by exponents.
constexpr double kLeastSum = 1e-18, kMostSum = 1e18;
template <class Real>
SH_INLINE bool in_range(Real sum) {
  return sum >= Real(kLeastSum) && sum <= Real(kMostSum);
}
// The power that marginals which may give way take; 1: they are kept.
SH_INLINE double lambda_of(double rho, double epsilon) {
  return rho < INFINITY ? rho / (rho + epsilon) : 1;
}
// r log(r / s) - r + s, of a marginal that may give way.
SH_INLINE double relative_entropy(double r, double s) {
  return (r > 0 ? r * ::log(r / s) : 0.) - r + s;
}

// Rows [G, n] of costs or of points, one after the other, as numbers of any type.
struct Matrix {
  char* data;
  Dtype dtype;
  int64_t width;  // m, or the points' dimension
  SH_INLINE char* row(int64_t r) const { return data + r * width * element_size(dtype); }
};

template <class Real>
struct Batch {
  int64_t groups, n, m;
  const int64_t* lengths;  // [G, 2], the rows and columns of each that count; null: all
  Matrix cost, other;      // a matrix' rows and nothing, or the points of both sides
  int32_t ground, domain, objective, mode;
  const Real *a, *b;  // [G, n], [G, m]; null: ones
  double epsilon;
  double rho_a, rho_b;  // infinite: the marginals are kept
  double annealing;     // 0: none; else each iteration has this share of the last one's epsilon
  double tolerance;     // negative: all iterations
  int64_t iterations;

  // Out; f and g are also the gradient's input, as `used` and `history` are. [G] each, [G, n] and
  // [G, m]; the plan [G, n, m] or null; exponents of both sides after each iteration, [G,
  // iterations, n + m], or null.
  Real *value, *error, *f, *g, *history, *plan;
  int64_t* used;

  // The gradient: of the value [G], to costs [G, n, m] or points, and to marginals or null.
  const Real* upstream;
  Matrix d_cost, d_other;
  Real *d_a, *d_b;

  SH_INLINE int64_t blocks() const { return (n + kBlockRows - 1) / kBlockRows; }
  // Points of many dimensions have their gradient added up dimension by dimension, others point by point;
  // and what a point takes in scratch then.
  SH_INLINE bool by_dimension() const { return other.width >= 8; }
  SH_INLINE int64_t point_size() const {
    return by_dimension() ? (other.width + kDimensions - 1) / kDimensions * kDimensions
                          : other.width;
  }
  // Whether K and its transpose stay in a core's cache.
  SH_INLINE bool can_be_resident() const {
    return domain != kLog && !(annealing > 0) && padded(n) * padded(m) <= kResident;
  }
};

// A step: what the rows of all blocks do in it, before next() says which one follows.
enum class Step : int32_t {
  done,
  largest,        // cost, which epsilon comes down from
  rows,           // update the rows' potentials, add up the columns
  column_maxima,  // where sums of columns are out of range: once more, relative to their maxima
  column_sums,
  result,     // plan, value, error
  sums,       // of the plan's rows and columns
  seeds,      // the value's derivative with respect to the last potentials
  reverse,    // one iteration back
  conjugate,  // one step of the implicit gradient's solver
  gradient,   // of costs
};

// One problem at work. Exponents: of a side, log2 of the scalings u and v of K = e^(-cost /
// epsilon), that is potentials over epsilon in units of log 2. All pointers but the batch's are
// scratch.
template <class Real>
struct Task {
  const Batch<Real>* batch;
  int64_t group, n, m, blocks;
  Step step;
  int64_t iteration;          // 1 is the first
  double epsilon;             // of this iteration
  double start;               // the largest cost
  double lambda_a, lambda_b;  // at this epsilon; 1: balanced
  bool is_first, has_range;

  Real *alpha, *alpha_next, *beta;  // [n], [n], [padded(m)]; beta is -inf beyond m
  Real* columns;                    // [blocks, padded(m)], sums of a block's rows
  double* totals;                   // [padded(m)]
  Real *transposed, *points;        // [d, padded(m)] and [padded(m), padded(d)], of the other side
  double* of_block;                 // [blocks, kBlockSums]
  // Of the gradient.
  Real *row_sums, *column_sums;  // [n], [padded(m)] of the plan
  Real *row_seed,
      *column_seed;            // the value's derivative to P_ij is C_ij, or these: [n], [padded(m)]
  Real *bar_alpha, *bar_beta;  // adjoints of each iteration, [iterations, n and padded(m)]
  Real *tau, *before;          // log2 1 / s_j, and beta before it, [iterations, padded(m)]
  Real *direction, *residual, *solution;  // of the implicit gradient's solver, [padded(m)]
  Real* other_points;                     // [blocks], their gradients, as one of these two
  Real* resident;                         // of a problem that is held (resident.h)
  double product, target;  // of the residual with itself, and where it is small enough

  // Lays the parts out from `at`, or from nothing to learn the size in bytes.
  SH_INLINE int64_t lay_out(const Batch<Real>& b, bool gradient, char* at) {
    const int64_t width = padded(b.m), rows = padded(b.n), count = b.blocks();
    char* const begin = at;
    const auto take = [&at](auto*& part, int64_t elements) {
      part = reinterpret_cast<decltype(&*part)>(at);
      at += (elements * int64_t(sizeof(*part)) + 63) / 64 * 64;
    };
    batch = &b;
    take(alpha, rows), take(alpha_next, rows), take(beta, width);
    take(columns, count * width);
    take(totals, width), take(of_block, count * kBlockSums);
    take(resident, b.can_be_resident()
                       ? (b.ground == kMatrix ? 2 : 3) * rows * width + 3 * (rows + width) +
                             (gradient ? 2 * b.iterations * (rows + width) : 0)
                       : 0);
    const bool of_points = b.ground != kMatrix;
    take(transposed, of_points ? b.point_size() * width : 0);
    take(points, of_points && b.by_dimension() ? b.point_size() * width : 0);
    if (gradient) {
      const int64_t iterations = b.mode == kUnrolled ? b.iterations : 1;
      take(row_sums, rows), take(column_sums, width);
      take(row_seed, rows), take(column_seed, width);
      take(bar_alpha, iterations * rows), take(bar_beta, iterations * width);
      take(tau, iterations * width), take(before, iterations * width);
      take(direction, width), take(residual, width), take(solution, width);
      const bool wanted = of_points && b.d_other.data != nullptr;
      take(other_points, wanted ? count * width * b.point_size() : 0);
      if (!wanted) other_points = nullptr;
    }
    return at - begin;
  }
};

// Bytes that a thread needs beside the task: a row of costs, and of what is made of them.
template <class Real>
SH_INLINE int64_t row_scratch_bytes(const Batch<Real>& b) {
  return (3 * padded(b.m) + 2 * padded(b.cost.width)) * int64_t(sizeof(Real)) + 64;
}

template <class T>
struct Pair {
  T at[2];
};

// begin(): the first steps of `count` groups, one or two, that are worked on by one thread; of a small one
// it is all there is to do. rows(): a step's work on blocks [lo, hi). next(): what follows.
template <class Real>
struct SinkhornSteps {
  void (*begin)(const Pair<Task<Real>*>&, int64_t count, int64_t group, bool gradient,
                void* scratch);
  void (*rows)(const Task<Real>&, int64_t lo, int64_t hi, void* scratch);
  void (*next)(Task<Real>&, bool gradient);
};

// Distances of all pairs of rows of G groups: out [G, n, m] from x [G, n, d] and y [G, m, d].
template <class Real>
struct Pairs {
  int64_t groups, n, m, d;
  Matrix x, y;
  Real* out;
  const Real* upstream;  // [G, n, m]
  Matrix d_x, d_y;
};

struct SinkhornKernels {
  SinkhornSteps<float> f32;
  SinkhornSteps<double> f64;
  // Rows [lo, hi) of the G n; of a gradient those of either side.
  void (*l1_f32)(const Pairs<float>&, int64_t lo, int64_t hi);
  void (*l1_f64)(const Pairs<double>&, int64_t lo, int64_t hi);
  void (*l1_gradient_f32)(const Pairs<float>&, bool of_x, int64_t lo, int64_t hi);
  void (*l1_gradient_f64)(const Pairs<double>&, bool of_x, int64_t lo, int64_t hi);
};

}  // namespace stillhouse
