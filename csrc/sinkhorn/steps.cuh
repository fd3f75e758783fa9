// The steps of a problem on CUDA: what each does to an element, a row's sum, a column's sum. N: the numbers
// that potentials are kept as. kernel.h and reverse.h have the mathematics.
//
//   row(i), column(j)   what an element needs of its row and its column; nothing has mass beyond the last
//   term(...)           an element's part of the row's sum; `held`: of its column's, but for a factor
//   finish(...)         what becomes of the row; the factor
//   leave_part(...)     what a part of the rows leaves beside the columns' sums
//   finish_column(...)  what becomes of the column
#pragma once
#include "sweep.cuh"

namespace stillhouse {

// What most steps have none of.
template <class N>
struct StepOf {
  using Number = typename N::Number;
  using Real = Number;
  static constexpr bool kShifts = false;  // sums may be out of range, relative to what they were
  static constexpr bool kSums = true, kColumns = true;
  static constexpr bool kReadsCosts = false;  // beside what is held
  static constexpr bool kIterates = false;    // a problem may be done before it
  static constexpr bool kIsSolver = false;    // a solver may be
  DeviceTask<Real>& t;

  __device__ explicit StepOf(DeviceTask<Real>& t) : t(t) {}
  __device__ bool wants_costs() const { return false; }
  template <int kThreads>
  __device__ void leave_part(double*) {}
  __device__ void finish_column(int, double) {}
};

// The largest cost, which epsilon comes down from.
template <class N>
struct LargestStep : StepOf<N> {
  using Real = typename N::Number;
  using StepOf<N>::t;
  static constexpr bool kSums = false, kColumns = false;
  struct Row {};
  struct Column {};
  Real most = 0;

  using StepOf<N>::StepOf;
  __device__ Row row(int) const { return {}; }
  __device__ Column column(int) const { return {}; }
  __device__ Real term(const Row&, Column, Real x, Real, Real& held) {
    most = x > most && x < INFINITY ? x : most;
    held = 0;
    return 0;
  }
  __device__ Real finish(const Row&, int, Real, bool) const { return 0; }
  template <int kThreads>
  __device__ void leave_part(double* sums) {
    Real top[1] = {most};
    Team<kThreads>::reduce(top, Largest());
    if (Team<kThreads>::rank() == 0) sums[kLargest] = double(top[0]);
    most = 0;
  }
};

// One iteration. The plan's row of the iteration before gives the new scaling of the row, and scaled by the
// change the columns' sums.
template <class N>
struct UpdateStep : StepOf<N> {
  using Real = typename N::Number;
  using StepOf<N>::t;
  static constexpr bool kShifts = N::kLog, kIterates = true;
  struct Row {
    Real mass, before, shift;
  };
  struct Column {
    Real beta;
  };
  double off = 0;      // how far the rows' sums were off
  bool wrong = false;  // costs that cannot be; of scalings, sums out of range

  using StepOf<N>::StepOf;
  __device__ bool is_first() const { return t.iteration == 1; }
  __device__ Real older(Real number) const { return N::kLog ? number * t.ratio : number; }
  __device__ Row row(int i) const {
    const Real before = is_first() ? N::one() : older(t.alpha_of(t.iteration - 1)[i]);
    return {t.a(i), before, N::kLog ? before : N::one()};
  }
  __device__ Column column(int j) const {
    if (j >= t.m) return {N::nothing()};
    return {is_first() ? N::one() : older(t.beta[j])};
  }
  __device__ Real term(const Row& row, Column column, Real x, Real, Real& held) {
    if (N::kLog && is_first()) wrong = wrong || !(x >= 0);
    return held = N::mass(row.shift, column.beta, x, t.gain);
  }
  __device__ static bool counts(const Row& row) { return row.mass > 0 || row.mass != row.mass; }
  __device__ bool is_far(const Row& row, Real sum) const { return counts(row) && !in_range(sum); }

  __device__ Real finish(const Row& row, int i, Real sum, bool writes) {
    Real next = N::nothing(), factor = 0;
    if (counts(row)) {
      const Real share = row.mass / sum;
      double own = double(sum);  // the old row's
      if constexpr (N::kLog) {
        if (row.shift != row.before) own *= ::exp2(double(row.before) - double(row.shift));
        next = Real(t.lambda_a) * (row.shift + log2_of(share));
        factor = t.lambda_a == 1 ? share : fast_exp2(next - row.shift);
      } else {
        wrong = wrong || !in_range(sum);
        own *= double(row.before);
        next = factor = power_of(share, t.lambda_a);
      }
      if (!is_first()) {
        own = ::fabs(own - double(t.expected(row.mass, N::exponent_of(row.before))));
        off = own <= off ? off : own == own ? own : double(INFINITY);
      }
    }
    if (writes) {
      t.alpha_of(t.iteration)[i] = next;
      if (t.batch.history != nullptr) t.history(t.iteration)[i] = N::exponent_of(next);
    }
    return factor;
  }
  template <int kThreads>
  __device__ void leave_part(double* sums) {
    int32_t any[1] = {wrong};
    if (is_first()) Team<kThreads>::reduce(any, Largest());
    if (Team<kThreads>::rank() == 0) sums[kError] = off, sums[kBroken] = any[0];
    off = 0;
  }

  __device__ Real exponent(int i, Real cost) const {
    return mul_add(-t.gain, cost, t.alpha_of(t.iteration)[i]);
  }
  __device__ bool is_far_column(int j, double total) const {
    return t.b(j) != 0 && (!in_range(total) || !(column(j).beta > -INFINITY));
  }
  // From log2 of the sum of what has no factor of the column.
  __device__ void set_column(int j, Real sum) {
    leave_column(j, Real(t.lambda_b) * (log2_of(t.b(j)) - sum));
  }
  __device__ void finish_column(int j, double total) {
    const Real before = column(j).beta;
    if constexpr (N::kLog) {
      if (t.b(j) == 0) return leave_column(j, N::nothing());
      set_column(j, log2_of(Real(total)) - before);
    } else {
      if (!(t.b(j) > 0)) return leave_column(j, N::nothing());
      const Real sum = Real(total) / before;
      wrong = wrong || !in_range(sum);
      leave_column(j, power_of(t.b(j) / sum, t.lambda_b));
    }
  }
  __device__ void leave_column(int j, Real number) {
    t.beta[j] = number;
    if (t.batch.history != nullptr) t.history(t.iteration)[t.batch.n + j] = N::exponent_of(number);
  }
};

// Steps over the plan of the solution.
template <class N>
struct PlanStep : StepOf<N> {
  using Real = typename N::Number;
  using StepOf<N>::t;
  struct Row {
    Real alpha;
    int i;
  };
  struct Column {
    Real beta;
    int j;
  };

  using StepOf<N>::StepOf;
  __device__ Row row(int i) const { return {t.alpha_of(t.iteration)[i], i}; }
  __device__ Column column(int j) const { return {j < t.m ? t.beta[j] : N::nothing(), j}; }
  __device__ static bool has_mass(Real number) { return number > N::nothing() || number != number; }
  __device__ Real plan(const Row& row, const Column& column, Real x) const {
    return N::mass(row.alpha, column.beta, x, t.gain);
  }
};

// The plan, the value, and how far the rows' sums are off. The entropic value is a sum over both sides, in
// which the costs cancel: of P (f + g - epsilon), and of what the marginals cost.
template <class N>
struct ResultStep : PlanStep<N> {
  using Real = typename N::Number;
  using Base = PlanStep<N>;
  using Base::t;
  using typename Base::Column;
  static constexpr bool kReadsCosts = !N::kLog;
  struct Row {
    Real alpha, value;
    int i;
  };
  double off = 0, value = 0;

  using Base::Base;
  __device__ bool wants_costs() const { return kReadsCosts && !t.by_sides(); }
  __device__ Row row(int i) const { return {t.alpha_of(t.iteration)[i], Real(0), i}; }
  __device__ Real term(Row& row, const Column& column, Real x, Real cost, Real& held) {
    const Real p = held = N::mass(row.alpha, column.beta, x, t.gain);
    if (!t.by_sides() && p > 0) row.value += p * cost;  // an infinite cost has no mass
    if (t.batch.plan != nullptr && column.j < t.m)
      t.batch.plan[(t.group * t.batch.n + row.i) * t.batch.m + column.j] = p;
    return p;
  }
  // A thread's part of the value: leave_part adds them up.
  __device__ Real finish(const Row& row, int i, Real sum, bool writes) {
    const Real mass = t.a(i);
    value += double(row.value);
    if (!Base::has_mass(row.alpha)) return 1;
    const Real exponent = N::exponent_of(row.alpha);
    const double own = ::fabs(double(sum) - double(t.expected(mass, exponent)));
    off = own <= off ? off : own == own ? own : double(INFINITY);
    if (writes && t.by_sides())
      value += of_side(double(sum), double(mass), exponent, t.batch.rho_a);
    return 1;
  }
  template <int kThreads>
  __device__ void leave_part(double* sums) {
    double total[1] = {value};
    Team<kThreads>::reduce(total, Add());
    if (Team<kThreads>::rank() == 0) sums[kError] = off, sums[kValue] = total[0];
    off = value = 0;
  }
  __device__ double of_side(double sum, double mass, Real exponent, double rho) const {
    double part = rho < INFINITY ? rho * relative_entropy(sum, mass) : 0;
    if (sum > 0) part += t.epsilon * sum * (kLn2 * double(exponent) - 0.5);
    return part;
  }
  // Its part of the value, in the place of its sum.
  __device__ void finish_column(int j, double total) {
    t.column_sums[j] =
        Real(of_side(total, double(t.b(j)), N::exponent_of(t.beta[j]), t.batch.rho_b));
  }
};

// Sums of the plan's rows and columns.
template <class N>
struct SumsStep : PlanStep<N> {
  using Real = typename N::Number;
  using Base = PlanStep<N>;
  using Base::t;
  using typename Base::Column;
  using typename Base::Row;

  using Base::Base;
  __device__ Real term(const Row& row, const Column& column, Real x, Real, Real& held) {
    return held = Base::plan(row, column, x);
  }
  __device__ Real finish(const Row&, int i, Real sum, bool writes) {
    if (writes) t.row_sums[i] = sum;
    return 1;
  }
  __device__ void finish_column(int j, double total) { t.column_sums[j] = Real(total); }
};

// Steps that need the value's derivative with respect to P: the costs, or a sum of both sides' parts.
template <class N>
struct SlopeStep : PlanStep<N> {
  using Real = typename N::Number;
  using Base = PlanStep<N>;
  using Base::t;
  using typename Base::Column;
  using typename Base::Row;
  static constexpr bool kReadsCosts = !N::kLog;

  using Base::Base;
  __device__ bool wants_costs() const { return kReadsCosts && !t.by_sides(); }
  __device__ Real slope(const Row& row, const Column& column, Real cost) const {
    if (!t.by_sides()) return cost;
    return t.row_seed[row.i] + (column.j < t.m ? t.column_seed[column.j] : Real(0));
  }
  // P G, which an infinite cost has no part in.
  __device__ Real moved(Real p, const Row& row, const Column& column, Real cost) const {
    return p > 0 ? p * slope(row, column, cost) : Real(0);
  }
};

// Where adjoints begin: sums of P G over columns and rows.
template <class N>
struct SeedsStep : SlopeStep<N> {
  using Real = typename N::Number;
  using Base = SlopeStep<N>;
  using Base::t;
  using typename Base::Column;
  using typename Base::Row;

  using Base::Base;
  __device__ Real term(const Row& row, const Column& column, Real x, Real cost, Real& held) {
    return held = Base::moved(Base::plan(row, column, x), row, column, cost);
  }
  __device__ Real finish(const Row&, int i, Real sum, bool writes) {
    const Real upstream = t.batch.upstream[t.group];
    if (writes) last(t.bar_alpha, t.batch.n)[i] = upstream * sum;
    return upstream;
  }
  __device__ void finish_column(int j, double total) {
    const bool counts = t.batch.mode == kImplicit ? t.column_sums[j] > 0 : t.b(j) > 0;
    (t.batch.mode == kImplicit ? t.residual : last(t.bar_beta, t.batch.m))[j] =
        counts ? Real(total) : Real(0);
  }
  __device__ Real* last(Real* adjoints, int64_t count) const {
    return adjoints + (t.batch.mode == kUnrolled ? t.iteration - 1 : 0) * count;
  }
};

// Back through an iteration: from its columns' adjoints to its rows', and to the columns' before it.
template <class N>
struct ReverseStep : StepOf<N> {
  using Real = typename N::Number;
  using StepOf<N>::t;
  struct Row {
    Real mass, seed, number, over_sum;
  };
  struct Column {
    Real bar, tau, before;
  };

  using StepOf<N>::StepOf;
  __device__ int64_t of_rows() const { return (t.iteration - 1) * t.batch.n; }
  __device__ int64_t of_columns() const { return (t.iteration - 1) * t.batch.m; }
  __device__ Row row(int i) const {
    const int64_t at = of_rows() + i;
    const bool is_last = t.iteration == int(t.batch.used[t.group]);
    return {t.a(i), is_last ? t.bar_alpha[at] : Real(0), t.row_number[at], t.of_row[at]};
  }
  __device__ Column column(int j) const {
    if (j >= t.m) return {Real(0), N::nothing(), N::nothing()};
    const int64_t at = of_columns() + j;
    return {t.bar_beta[at], t.tau[at], t.before[at]};
  }
  __device__ Real term(const Row& row, const Column& column, Real x, Real, Real& held) {
    held = N::mass(row.over_sum, column.before, x, t.gain);
    return column.bar * N::mass(row.number, column.tau, x, t.gain);
  }
  __device__ Real finish(const Row& row, int i, Real sum, bool writes) {
    const Real bar = row.mass > 0 ? row.seed - Real(t.lambda_b) * sum : Real(0);
    if (writes) t.bar_alpha[of_rows() + i] = bar;
    return Real(-t.lambda_a) * bar;
  }
  __device__ void finish_column(int j, double total) {
    t.bar_beta[of_columns() - t.batch.m + j] = t.b(j) > 0 ? Real(double(t.ratio) * total) : Real(0);
  }
};

// The solver of the fixed point's equations: products with P and its transpose. kCorrects: of the seeds,
// whose rows' part goes to the columns; else of the solver's direction.
template <class N, bool kCorrects>
struct SolverStep : PlanStep<N> {
  using Real = typename N::Number;
  using Base = PlanStep<N>;
  using Base::t;
  struct Row {
    Real alpha, over;
    int i;
  };
  struct Column {
    Real beta, direction;
  };
  static constexpr bool kSums = !kCorrects, kIsSolver = true;

  using Base::Base;
  __device__ Row row(int i) const {
    const Real alpha = t.alpha_of(t.iteration)[i], sum = t.row_sums[i];
    return {alpha, sum > 0 ? Real(t.lambda_a) / sum : Real(0), i};
  }
  __device__ Column column(int j) const {
    if (j >= t.m) return {N::nothing(), Real(0)};
    return {t.beta[j], kCorrects ? Real(0) : t.direction[j]};
  }
  __device__ Real term(const Row& row, const Column& column, Real x, Real, Real& held) {
    held = N::mass(row.alpha, column.beta, x, t.gain);
    return held * column.direction;
  }
  __device__ Real finish(const Row& row, int i, Real sum, bool) const {
    return kCorrects ? -t.bar_alpha[i] * row.over : sum * row.over;
  }
  __device__ void finish_column(int j, double total) {
    if (!kCorrects) t.applied[j] = Real(total);
    if (kCorrects && t.column_sums[j] > 0) t.residual[j] += Real(total);
  }
};

}  // namespace stillhouse
