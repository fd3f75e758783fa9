// A transport problem at work on CUDA: its numbers, its scratch, where its costs come from.
#pragma once
#include "../core/block.cuh"
#include "kernel.h"

namespace stillhouse {

// Of a block, but for large rows: two of them have a multiprocessor's registers.
constexpr int kCudaThreads = 128;
constexpr int kCudaWarps = kCudaThreads / kWarpSize;

// Rows whose sums over columns are added up together. Not kBlockRows: a GPU wants many blocks, and their
// number depends on the problem alone, not on those beside it or on the device.
constexpr int kMostParts = 256;
SH_INLINE int rows_a_part(int n) {
  return n <= 64 ? 4 : n <= 8 * kMostParts ? 8 : (n + kMostParts - 1) / kMostParts;
}
SH_INLINE int parts_of(int n) { return (n + rows_a_part(n) - 1) / rows_a_part(n); }
// Of any problem of at most n rows.
SH_INLINE int most_parts(int64_t n) {
  if (n <= 64) return int(n + 3) / 4;
  return n <= 128 ? 16 : n < 8 * kMostParts ? int(n + 7) / 8 : kMostParts;
}

// Potentials as exponents of 2, in which no epsilon is too small.
template <class Real>
struct Exponents {
  using Number = Real;
  static constexpr bool kLog = true;
  SH_INLINE static Real nothing() { return -INFINITY; }
  SH_INLINE static Real one() { return 0; }
  SH_INLINE static Real mass(Real row, Real column, Real cost, Real gain) {
    return fast_exp2(mul_add(-gain, cost, column) + row);
  }
  SH_INLINE static Real of_exponent(Real exponent) { return exponent; }
  SH_INLINE static Real exponent_of(Real number) { return number; }
};

// The scalings themselves, of costs that are held as K = e^(-cost / epsilon).
template <class Real>
struct Scalings {
  using Number = Real;
  static constexpr bool kLog = false;
  SH_INLINE static Real nothing() { return 0; }
  SH_INLINE static Real one() { return 1; }
  SH_INLINE static Real mass(Real row, Real column, Real kernel, Real) {
    return row * (column * kernel);
  }
  SH_INLINE static Real of_exponent(Real exponent) { return fast_exp2(exponent); }
  SH_INLINE static Real exponent_of(Real number) {
    return number > 0 ? fast_log(number) * Real(kLog2e) : Real(-INFINITY);
  }
};

template <class Real>
SH_INLINE Real log2_of(Real x) {
  return x > 0 ? fast_log(x) * Real(kLog2e) : x == x ? Real(-INFINITY) : x;
}
// x^lambda of a scaling.
template <class Real>
SH_INLINE Real power_of(Real x, double lambda) {
  return lambda == 1 || !(x > 0) ? x : fast_exp2(fast_log(x) * Real(kLog2e) * Real(lambda));
}

struct Progress {
  double start;            // the largest cost
  double product, target;  // of the solver's residual with itself, and where it is small enough
  int64_t stopped;         // the iteration that was not done any more
  int64_t is_solved;
};

// What a problem keeps in global memory; the same where its costs are held in shared memory.
template <class Real>
struct DeviceScratch {
  Progress* progress;
  double* of_part;      // [parts, kBlockSums]
  Real *alpha, *beta;   // numbers of the last two iterations [2, n], of the last one [m]
  Real *sums, *factor;  // [parts, m] of columns, where they are not in shared memory; [n]
  Real* transposed;     // [d, m], points of the other side
  Real* column_sums;    // [m], of the plan
  Real* row_sums;       // [n]
  Real *row_seed, *column_seed;
  Real *row_number, *of_row, *bar_alpha;            // [iterations, n]: u, 1 / r and adjoints
  Real *tau, *before, *bar_beta;                    // [iterations, m]: 1 / s, v before it, adjoints
  Real *direction, *residual, *solution, *applied;  // [m], of the solver

  SH_INLINE int64_t lay_out(const Batch<Real>& b, bool gradient, bool keeps_sums, char* at) {
    char* const begin = at;
    const auto take = [&at](auto*& part, int64_t elements) {
      part = reinterpret_cast<decltype(&*part)>(at);
      at += (elements * int64_t(sizeof(*part)) + 15) / 16 * 16;
    };
    const int64_t n = b.n, m = b.m, parts = most_parts(n);
    take(progress, 1), take(of_part, parts * kBlockSums);
    take(alpha, 2 * n), take(beta, m);
    take(sums, keeps_sums ? parts * m : 0), take(factor, n);
    take(transposed, b.ground == kMatrix ? 0 : b.other.width * m);
    take(column_sums, m);
    if (gradient) {
      const int64_t iterations = b.mode == kUnrolled ? b.iterations : 1;
      take(row_sums, n), take(row_seed, n), take(column_seed, m);
      take(row_number, iterations * n), take(of_row, iterations * n),
          take(bar_alpha, iterations * n);
      take(tau, iterations * m), take(before, iterations * m), take(bar_beta, iterations * m);
      take(direction, m), take(residual, m), take(solution, m), take(applied, m);
    }
    return at - begin;
  }
};

template <class Real>
struct DeviceTask : DeviceScratch<Real> {
  const Batch<Real>& batch;
  const int64_t group;
  int n, m;
  bool is_valid;  // else nothing of it can be computed
  int iteration = 0;
  double epsilon = 0, lambda_a = 1, lambda_b = 1;
  Real gain = 0;   // of costs in exponents of 2
  Real ratio = 1;  // from exponents of the iteration before to this one's

  __device__ DeviceTask(const Batch<Real>& batch, int64_t group, bool gradient, bool keeps_sums,
                        char* scratch)
      : batch(batch), group(group), n(int(batch.n)), m(int(batch.m)), is_valid(true) {
    this->lay_out(batch, gradient, keeps_sums, scratch);
    if (batch.lengths != nullptr) {
      const int64_t rows = batch.lengths[2 * group], columns = batch.lengths[2 * group + 1];
      is_valid = rows >= 1 && rows <= n && columns >= 1 && columns <= m;
      if (is_valid) n = int(rows), m = int(columns);
    }
    if (gradient)
      is_valid = is_valid && batch.used[group] >= 1 && batch.used[group] <= batch.iterations;
  }

  __device__ Real a(int i) const {
    return batch.a == nullptr ? Real(1) : batch.a[group * batch.n + i];
  }
  __device__ Real b(int j) const {
    return batch.b == nullptr ? Real(1) : batch.b[group * batch.m + j];
  }

  __device__ double annealed(int64_t k) const {
    if (!(batch.annealing > 0)) return batch.epsilon;
    double now = this->progress->start;  // times annealing^k
    for (double power = batch.annealing; k > 0; k /= 2, power *= power)
      if (k % 2 == 1) now *= power;
    return now > batch.epsilon ? now : batch.epsilon;
  }
  // Sets the numbers of an iteration.
  __device__ void at(int64_t k) {
    iteration = int(k);
    epsilon = annealed(k);
    lambda_a = lambda_of(batch.rho_a, epsilon), lambda_b = lambda_of(batch.rho_b, epsilon);
    gain = Real(kLog2e / epsilon);
    ratio = Real(k > 1 && batch.annealing > 0 ? annealed(k - 1) / epsilon : 1);
  }

  __device__ bool is_steady() const { return annealed(iteration - 1) == epsilon; }

  // [n], of iteration k.
  __device__ Real* alpha_of(int k) const { return this->alpha + (k % 2) * batch.n; }
  // Exponents that an iteration has left, [n + m].
  __device__ Real* history(int64_t k) const {
    return batch.history + (group * batch.iterations + k - 1) * (batch.n + batch.m);
  }
  // What a row's sum is where an iteration leaves it alone.
  __device__ Real expected(Real mass, Real exponent) const {
    return lambda_a == 1 ? mass : mass * fast_exp2(Real(1 - 1 / lambda_a) * exponent);
  }
  __device__ bool by_sides() const { return batch.objective == kEntropic; }
  __device__ bool gives_way() const { return batch.rho_a < INFINITY || batch.rho_b < INFINITY; }
};

// Costs where they lie, or made of points: elements base + rank, base + rank + kThreads, ... of row i, 0
// beyond the last.
template <class Real>
struct Spread {
  const DeviceTask<Real>& t;

  template <int kThreads, int kHeld>
  __device__ void load(int i, int base, Real (&x)[kHeld]) const {
    const int first = base + Team<kThreads>::rank(), m = t.m;
    const Batch<Real>& b = t.batch;
    const int64_t r = t.group * b.n + i;
    if (b.ground == kMatrix) {
      with_type(b.cost.dtype, b.cost.row(r), [&](const auto* row) {
#pragma unroll
        for (int h = 0; h < kHeld; ++h) {
          const int j = first + kThreads * h;
          x[h] = j < m ? Real(widen(row[j])) : Real(0);
        }
      });
      return;
    }
#pragma unroll
    for (int h = 0; h < kHeld; ++h) x[h] = 0;
    const int64_t d = b.cost.width;
    with_type(b.cost.dtype, b.cost.row(r), [&](const auto* point) {
      for (int64_t k = 0; k < d; ++k) {
        const Real own = Real(widen(point[k]));
        const Real* const others = t.transposed + k * b.m;
#pragma unroll
        for (int h = 0; h < kHeld; ++h) {
          const int j = first + kThreads * h;
          if (j < m) x[h] += term(own - others[j]);
        }
      }
    });
    if (b.ground != kEuclidean) return;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) x[h] = root(x[h]);
  }

  __device__ Real at(int i, int j) const {
    const Batch<Real>& b = t.batch;
    const int64_t r = t.group * b.n + i;
    Real x = 0;
    with_type(b.cost.dtype, b.cost.row(r), [&](const auto* row) {
      if (b.ground == kMatrix) {
        x = Real(widen(row[j]));
        return;
      }
      for (int64_t k = 0; k < b.cost.width; ++k)
        x += term(Real(widen(row[k])) - t.transposed[k * b.m + j]);
    });
    return b.ground == kEuclidean ? root(x) : x;
  }

 private:
  __device__ Real term(Real difference) const {
    return t.batch.ground == kL1 ? magnitude(difference) : difference * difference;
  }
};

// Costs, or K, in shared memory.
template <class Real>
struct Held {
  SharedPointer<Real> x;  // [n, m]
  int m;

  template <int kThreads, int kHeld>
  __device__ void load(int i, int base, Real (&out)[kHeld]) const {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int j = base + Team<kThreads>::rank() + kThreads * h;
      out[h] = j < m ? Real(x[i * m + j]) : Real(0);
    }
  }
  __device__ Real at(int i, int j) const { return x[i * m + j]; }
};

// By all threads of a block: the points of the other side, transposed, by `share` of `shares` blocks.
template <class Real>
__device__ void transpose_points(const DeviceTask<Real>& t, int share, int shares) {
  const Batch<Real>& b = t.batch;
  if (b.ground == kMatrix) return;
  const int64_t d = b.other.width;
  with_type(b.other.dtype, b.other.row(t.group * b.m), [&](const auto* points) {
    const int64_t first = int64_t(share) * kCudaThreads + threadIdx.x;
    for (int64_t at = first; at < t.m * d; at += int64_t(shares) * kCudaThreads)
      t.transposed[at / t.m * b.m + at % t.m] = Real(widen(points[at % t.m * d + at / t.m]));
  });
}

}  // namespace stillhouse
