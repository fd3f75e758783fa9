// Entropic transport on CUDA: which kernels are launched for which problems, and the ops' registration.
#include "../core/cuda.h"
#include "problem.h"
#include "slopes.cuh"
#include "spread.cuh"

namespace stillhouse {
namespace {

// Scratch of problems that are worked on at the same time: more of them take turns.
constexpr int64_t kMostScratch = int64_t(256) << 20;
// Derivatives with respect to points' costs that are there at the same time: as many as keep a multiprocessor
// at work, and L2 can hold.
int64_t most_weights(const Launcher& launch) { return launch.multiprocessors() << 16; }

template <class Real>
using N = Exponents<Real>;

int64_t at_least_one(int64_t x) { return x > 1 ? x : 1; }
int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

Tensor bytes_of(const Tensor& like, int64_t bytes) {
  return new_output(like, {(bytes + 7) / 8}, ScalarType::Double);
}
char* address_of(const Tensor& x) { return static_cast<char*>(x.data_ptr()); }

// Rows of `matrix` from `first` on.
Matrix from_row(Matrix matrix, int64_t first) {
  if (matrix.data != nullptr) matrix.data = matrix.row(first);
  return matrix;
}

// Points: hands on the derivatives with respect to costs, [count, end - begin, m], of rows [begin, end) of
// groups [first, first + count).
template <class Real>
void hand_on(const Batch<Real>& b, int64_t first, int64_t count, int64_t begin, int64_t end,
             const Real* weight, const Matrix& d_other, Launcher& launch) {
  const int64_t n = b.n, m = b.m, d = b.cost.width, rows = end - begin;
  Slopes<Real> s{};
  s.weight = weight;
  s.groups = count, s.group_stride = rows * m;
  s.is_sign = b.ground == kL1;
  const auto go = [&] {
    const auto blocks = [&](int64_t wide) {
      const int64_t at_once = 4 * kPairThreads / wide;
      return count * ((d + wide - 1) / wide) * ((s.own_count + at_once - 1) / at_once);
    };
    if (d <= 16)
      return launch("slopes", slopes_kernel<Real, 16>, Grid{blocks(16), kPairThreads}, s);
    launch("slopes", slopes_kernel<Real, 64>, Grid{blocks(64), kPairThreads}, s);
  };
  const Matrix x = from_row(b.cost, first * n), y = from_row(b.other, first * m);
  if (b.d_cost.data != nullptr) {
    s.own = x, s.other = y, s.out = from_row(b.d_cost, first * n);
    s.own_stride = m, s.other_stride = 1;
    s.own_first = begin, s.own_count = rows, s.own_rows = n;
    s.other_first = 0, s.other_count = m, s.other_rows = m;
    go();
  }
  if (d_other.data == nullptr) return;
  s.own = y, s.other = x, s.out = from_row(d_other, first * m);
  s.own_stride = 1, s.other_stride = m;
  s.own_first = 0, s.own_count = m, s.own_rows = m;
  s.other_first = begin, s.other_count = rows, s.other_rows = n;
  s.adds = begin > 0;
  go();
}

// ---- problems that are held

// Columns of a held problem: a lane has one of 32 each, in registers.
template <class Real>
constexpr int64_t kMostHeld = sizeof(Real) == 4 ? 256 : 64;

// Columns a lane; 0: the problem is spread out.
template <class Real>
int held_columns(const Batch<Real>& b, const Launcher& launch) {
  if (b.m > kMostHeld<Real> || held_bytes<Real>(b.n, b.m) > launch.most_shared()) return 0;
  return b.m <= 32 ? 1 : b.m <= kMostHeld<double> ? 2 : 8;
}

template <class Real, int kHeld>
Grid held_grid(const Batch<Real>& b, int64_t groups, const Launcher& launch) {
  Grid grid{groups, kCudaThreads, held_bytes<Real>(b.n, b.m)};
  grid.blocks = smaller(groups, launch.resident_blocks(grid, 2));
  return grid;
}

template <class Real, int kHeld>
void solve_held(const Batch<Real>& b, const Tensor& like, Launcher& launch) {
  const Grid grid = held_grid<Real, kHeld>(b, b.groups, launch);
  const int64_t bytes = DeviceScratch<Real>().lay_out(b, false, false, nullptr);
  const Tensor scratch = bytes_of(like, grid.blocks * bytes);
  launch("solve held", solve_held_kernel<Real, kHeld>, grid, b, address_of(scratch), bytes);
}

template <class Real, int kHeld>
void differentiate_held(const Batch<Real>& b, const Tensor& like, Launcher& launch) {
  const bool of_points =
      b.ground != kMatrix && (b.d_cost.data != nullptr || b.d_other.data != nullptr);
  const int64_t at_once =
      of_points ? smaller(b.groups, at_least_one(most_weights(launch) / (b.n * b.m))) : b.groups;
  const Grid grid = held_grid<Real, kHeld>(b, at_once, launch);
  const int64_t bytes = DeviceScratch<Real>().lay_out(b, true, false, nullptr);
  const Tensor scratch = bytes_of(like, grid.blocks * bytes);
  const Tensor weight = new_output(like, {of_points ? at_once * b.n * b.m : 0}, wide_type(like));
  for (int64_t first = 0; first < b.groups; first += at_once) {
    const int64_t count = smaller(at_once, b.groups - first);
    Weights weights{b.d_cost, 0};
    if (b.ground != kMatrix)
      weights = {{of_points ? address_of(weight) : nullptr, DtypeOf<Real>::value, b.m},
                 first * b.n};
    launch("differentiate held", differentiate_held_kernel<Real, kHeld>, grid, b, first, count,
           weights, address_of(scratch), bytes);
    if (of_points)
      hand_on(b, first, count, 0, b.n, reinterpret_cast<const Real*>(address_of(weight)), b.d_other,
              launch);
  }
}

// ---- problems that are spread out

template <class Real, int kThreads>
struct SpreadProblems {
  static constexpr int64_t kCapacity = kThreads * kRowHeld<Real, kThreads>;
  const Batch<Real>& b;
  Launcher& launch;
  Several<Real> several;
  int64_t count;  // problems at the same time
  Tensor scratch;

  SpreadProblems(const Batch<Real>& b, bool gradient, int64_t most, const Tensor& like,
                 Launcher& launch)
      : b(b), launch(launch), several{} {
    several.is_gradient = gradient, several.keeps_sums = b.m <= kCapacity;
    several.bytes = DeviceScratch<Real>().lay_out(b, gradient, several.keeps_sums, nullptr);
    count = smaller(smaller(b.groups, most), at_least_one(kMostScratch / several.bytes));
    scratch = bytes_of(like, count * several.bytes);
    several.scratch = address_of(scratch);
  }

  template <class Kernel, class... Arguments>
  void over(const char* name, Kernel kernel, int64_t blocks, Arguments... arguments) {
    launch_over(name, kernel, blocks, kCudaThreads, arguments...);
  }
  template <class Kernel, class... Arguments>
  void over_rows(const char* name, Kernel kernel, int64_t parts, Arguments... arguments) {
    launch_over(name, kernel, (parts + kTeams<kThreads> - 1) / kTeams<kThreads>,
                kRowThreads<kThreads>, arguments...);
  }

  template <class Step>
  void sweep(int64_t k = 0, bool has_columns = true) {
    over_rows("rows", rows_kernel<Step, kThreads>, most_parts(b.n), k);
    if (has_columns) over("columns", columns_kernel<Step>, (b.m + 31) / 32, k, int(kCapacity));
  }

  void start(int64_t first, int64_t groups) {
    several.first = first, of_turn = groups;
    over("start", start_kernel<Real>, b.ground == kMatrix ? 1 : 32);
    if (!(b.annealing > 0)) return;
    over_rows("largest", largest_kernel<Real, kThreads>, most_parts(b.n));
    over("found", found_kernel<Real>, 1);
  }

  void solve() {
    for (int64_t first = 0; first < b.groups; first += count) {
      start(first, smaller(count, b.groups - first));
      for (int64_t k = 1; k <= b.iterations; ++k) sweep<UpdateStep<N<Real>>>(k);
      sweep<ResultStep<N<Real>>>(0, b.objective == kEntropic);
      over("solution", solution_kernel<Real>, b.plan != nullptr && b.lengths != nullptr ? 32 : 1);
    }
  }

  void differentiate(const Tensor& like) {
    const bool of_points =
        b.ground != kMatrix && (b.d_cost.data != nullptr || b.d_other.data != nullptr);
    // Rows of points' costs that are there at the same time: of `count` problems, or of a part of one.
    const int64_t at_once =
        !of_points || b.n * b.m <= most_weights(launch)
            ? b.n
            : smaller(b.n,
                      at_least_one(most_weights(launch) / b.m / kGradientRows) * kGradientRows);
    const Tensor weight =
        new_output(like, {of_points ? count * at_once * b.m : 0}, wide_type(like));
    // Sums over parts are added up in the result itself where that is wide enough.
    const bool sums_apart =
        b.d_other.data != nullptr && at_once < b.n && b.d_other.dtype != DtypeOf<Real>::value;
    const int64_t others = b.groups * b.m * b.other.width;
    const Tensor apart = new_output(like, {sums_apart ? others : 0}, wide_type(like));
    Matrix d_other = b.d_other;
    if (sums_apart) d_other = {address_of(apart), DtypeOf<Real>::value, b.other.width};
    for (int64_t first = 0; first < b.groups; first += count) {
      start(first, smaller(count, b.groups - first));
      adjoints();
      for (int64_t begin = 0; begin < b.n; begin += at_once) {
        const int64_t end = smaller(begin + at_once, b.n);
        Weights weights{b.d_cost, 0};
        if (b.ground != kMatrix)
          weights = {{of_points ? address_of(weight) : nullptr, DtypeOf<Real>::value, b.m},
                     first * b.n + begin};
        over_rows("gradient", gradient_kernel<Real, kThreads>,
                  (end - begin + kGradientRows - 1) / kGradientRows, int(begin), int(end), weights);
        if (of_points)
          hand_on(b, first, of_turn, begin, end, reinterpret_cast<const Real*>(address_of(weight)),
                  d_other, launch);
      }
      if (b.d_a != nullptr) over("marginals", marginals_kernel<Real>, 1);
    }
    if (sums_apart)
      launch("narrow", narrow_kernel<Real>, Grid{smaller((others + 255) / 256, 4096), kPairThreads},
             reinterpret_cast<const Real*>(address_of(apart)), b.d_other, others);
  }

 private:
  int64_t of_turn = 0;  // problems of this turn

  template <class Kernel, class... Arguments>
  void launch_over(const char* name, Kernel kernel, int64_t blocks, int threads,
                   Arguments... arguments) {
    Several<Real> part = several;
    part.blocks = int(blocks);
    launch(name, kernel, Grid{of_turn * blocks, threads}, b, part, arguments...);
  }

  // All that the last sweep begins with.
  void adjoints() {
    over("prepare", prepare_kernel<Real>, 32);
    const bool by_sides = b.objective == kEntropic;
    const bool gives_way = b.rho_a < INFINITY || b.rho_b < INFINITY;
    if (b.mode == kImplicit || (by_sides && gives_way)) sweep<SumsStep<N<Real>>>();
    if (by_sides) over("sides", sides_kernel<Real>, 8);
    if (b.mode == kEnvelope) return;
    sweep<SeedsStep<N<Real>>>();
    for (int64_t k = b.iterations; b.mode == kUnrolled && k >= 1; --k)
      sweep<ReverseStep<N<Real>>>(k, k > 1);
    if (b.mode != kImplicit) return;
    sweep<SolverStep<N<Real>, true>>();
    over("solver", solver_kernel<Real>, 1, true);
    for (int turn = 0; turn < kMostSolverLaunches; ++turn) {
      sweep<SolverStep<N<Real>, false>>();
      over("solver", solver_kernel<Real>, 1, false);
    }
  }
};

// The smallest team that can keep a row, or the largest.
template <class Real, class F>
void with_team(const Batch<Real>& b, F f) {
  if (b.m <= SpreadProblems<Real, 32>::kCapacity) return f(std::integral_constant<int, 32>());
  if constexpr (sizeof(Real) == 4) {
    if (b.m > SpreadProblems<Real, 256>::kCapacity) return f(std::integral_constant<int, 512>());
  }
  f(std::integral_constant<int, 256>());
}

struct Cuda {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return new_output(like, shape, dtype);
  }

  template <class Real>
  static void check(const Batch<Real>& b) {
    STD_TORCH_CHECK(b.n < int64_t(1) << 22 && b.m < int64_t(1) << 22, "a problem of ", b.n, " x ",
                    b.m, " is too large");
  }

  template <class Real>
  static void solve(const Batch<Real>& b, const Tensor& like) {
    check(b);
    Launcher launch(like);
    switch (held_columns(b, launch)) {
      case 1:
        return solve_held<Real, 1>(b, like, launch);
      case 2:
        return solve_held<Real, 2>(b, like, launch);
      case 8:
        if constexpr (sizeof(Real) == 4) return solve_held<Real, 8>(b, like, launch);
    }
    with_team(b, [&](auto threads) {
      SpreadProblems<Real, decltype(threads)::value>(b, false, b.groups, like, launch).solve();
    });
  }

  template <class Real>
  static void differentiate(const Batch<Real>& b, const Tensor& like) {
    check(b);
    Launcher launch(like);
    switch (held_columns(b, launch)) {
      case 1:
        return differentiate_held<Real, 1>(b, like, launch);
      case 2:
        return differentiate_held<Real, 2>(b, like, launch);
      case 8:
        if constexpr (sizeof(Real) == 4) return differentiate_held<Real, 8>(b, like, launch);
    }
    const int64_t most =
        b.ground == kMatrix ? b.groups : at_least_one(most_weights(launch) / (b.n * b.m));
    with_team(b, [&](auto threads) {
      SpreadProblems<Real, decltype(threads)::value>(b, true, most, like, launch)
          .differentiate(like);
    });
  }

  template <class Real>
  static void distances(const Pairs<Real>& p, const Tensor& like) {
    Launcher launch(like);
    const int64_t tiles = ((p.n + kPairTile - 1) / kPairTile) * ((p.m + kPairTile - 1) / kPairTile);
    launch("pairs", pairs_kernel<Real>, Grid{p.groups * tiles, kPairThreads}, p);
  }
  template <class Real>
  static void distance_gradient(const Pairs<Real>& p, const Tensor& like) {
    Launcher launch(like);
    Batch<Real> b{};
    b.groups = p.groups, b.n = p.n, b.m = p.m, b.ground = kL1;
    b.cost = p.x, b.other = p.y, b.d_cost = p.d_x;
    hand_on(b, 0, p.groups, 0, p.n, p.upstream, p.d_y, launch);
  }
};

}  // namespace
}  // namespace stillhouse

STILLHOUSE_CUDA_LIBRARY(m) { stillhouse::SinkhornOps<stillhouse::Cuda>::register_ops(m); }
