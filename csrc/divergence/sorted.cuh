// The divergence of sorted rows (sorted.h has the mathematics), a block of threads a row: the ranks of a
// probability are known from counts of bins in shared memory; where those of the two sides meet in a bin,
// its columns go to scratch in global memory and are sorted there.
#pragma once
#include "../core/block.cuh"
#include "order.h"
#include "prepare.cuh"
#include "side.cuh"

namespace stillhouse {

// Sorted columns of a row that a block works on: at the place of their rank.
template <class Real>
struct SortScratch {
  Real* key[2];
  int32_t* column[2];
  int8_t* sign[2];  // of columns

  SH_INLINE static int64_t bytes(int64_t columns) {
    return (columns + 15) / 16 * 16 * 2 * int64_t(sizeof(Real) + sizeof(int32_t) + 1);
  }
  __device__ SortScratch(char* at, int64_t columns) {
    const int64_t n = (columns + 15) / 16 * 16;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      key[s] = reinterpret_cast<Real*>(at) + s * n;
      column[s] = reinterpret_cast<int32_t*>(at + 2 * n * sizeof(Real)) + s * n;
      sign[s] = reinterpret_cast<int8_t*>(at + 2 * n * (sizeof(Real) + sizeof(int32_t))) + s * n;
    }
  }
};

// Keys in descending order, equal ones by column: a bitonic network whose first steps mirror, so that
// all of it goes one way and a length that is no power of two needs no padding.
template <int kThreads, class Real>
__device__ void sort_descending(Real* key, int32_t* column, int64_t n) {
  using T = Team<kThreads>;
  for (int64_t width = 2; width / 2 < n; width *= 2) {
    for (int64_t step = width / 2; step > 0; step /= 2) {
      for (int64_t pair = T::rank(); pair < (n + 1) / 2 + step; pair += kThreads) {
        const int64_t in_step = pair & (step - 1), begin = (pair - in_step) * 2;
        const int64_t i = begin + in_step;
        const int64_t j = step == width / 2 ? begin + width - 1 - in_step : i + step;
        if (j >= n) continue;
        const Real ki = key[i], kj = key[j];
        const int32_t ci = column[i], cj = column[j];
        if (kj > ki || (kj == ki && cj < ci)) {
          key[i] = kj, key[j] = ki;
          column[i] = cj, column[j] = ci;
        }
      }
      T::sync();
    }
  }
}

template <class Real, int kThreads, int kBins>
struct DeviceSortedRow {
  using T = Team<kThreads>;
  using Side = DeviceSide<Mixed, Real, false>;
  static constexpr int kSize = Side::kSize;
  static constexpr int kBinsEach = kBins / kThreads;
  static constexpr int kByWarp = 256;  // columns that are sorted by a warp, not by the block
  static constexpr int64_t kShared = 4 * kBins + 2;  // elements of `bins`

  const Problem<Real>& problem;
  const int64_t r;
  const SortScratch<Real> scratch;
  Side side[2];
  SharedPointer<int32_t> left[2];  // [kBins], columns of a bin; as they go to scratch, what is left
  SharedPointer<int32_t> before[2];  // [kBins + 1], columns of the bins before
  Exponential<Real> of[2], of_label;
  Real factor[2];
  double lse[2];
  bool labelled = false;
  Real label_gain = 0, label_factor = 0, label_value = 0;
  enum { kSlope, kOther, kStudentEntropy, kTeacherEntropy, kSums };
  double sums[kSums] = {};

  __device__ DeviceSortedRow(const Problem<Real>& problem, int64_t r, SharedPointer<int32_t> bins,
                             char* scratch, int64_t columns)
      : problem(problem), r(r), scratch(scratch, columns) {
    side[0] = Side(problem.student, r, int(problem.vocab));
    side[1] = Side(problem.teacher, r, int(problem.teacher_vocab));
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      left[s] = bins + s * kBins;
      before[s] = bins + 2 * kBins + s * (kBins + 1);
      side[s].aligned = false;
    }
  }

  // f(first column, logits) for the chunks of this thread.
  template <class F>
  __device__ void each_chunk(int s, F f) const {
    for (int start = T::rank() * kSize; start < side[s].vocab; start += kThreads * kSize) {
      Real x[kSize];
      side[s].load(start, x);
      f(start, x);
    }
  }
  // f(column, probability)
  template <class F>
  __device__ void each(int s, F f) const {
    each_chunk(s, [&](int start, const Real(&x)[kSize]) {
      for (int i = 0; i < kSize; ++i)
        if (start + i < side[s].vocab) f(start + i, probability(s, x[i]));
    });
  }
  // kBins for none of them.
  __device__ static int bin_of(Real q) { return rank_bin(q) / (kRankBins / kBins); }
  __device__ Real probability(int s, Real x) const { return factor[s] * of[s](x); }

  __device__ void normalise() {
    labelled = stillhouse::labelled(problem, r);
    const Real ratio = Real(problem.student.temperature / problem.label_temperature);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const Real gain2 = Real(side[s].gain * kLog2e);
      const bool with_label = labelled && s == 0;
      if (with_label) label_gain = side[0].gain * ratio;
      const Real label_gain2 = with_label ? Real(label_gain * kLog2e) : Real(0);
      RunningSum<Real> running;
      each_chunk(s, [&](int, const Real(&x)[kSize]) { running.add(x, gain2, label_gain2); });
      Real top[1] = {running.max};
      T::reduce(top, Largest());
      of[s] = Exponential<Real>(side[s].gain, RunningSum<Real>::shift_of(top[0]));
      running.rescale(of[s].shift, gain2, label_gain2);
      double total[2] = {double(running.sum), double(running.label_sum)};
      T::reduce(total, Add());
      lse[s] = fast_log(total[0]) + of[s].to_zero(double(side[s].gain));
      factor[s] = Real(1 / total[0]);
      if (!with_label) continue;
      of_label = Exponential<Real>(label_gain, of[0].shift);
      label_factor = Real(1 / total[1]);
      const int64_t y = problem.labels[r];
      const bool inside = y >= 0 && y < problem.vocab;  // to raise, the host would have to wait
      const double label_lse = fast_log(total[1]) + of_label.to_zero(double(label_gain));
      label_value =
          inside ? Real(label_lse - double(label_gain) * double(side[0].column(y))) : Real(NAN);
    }
  }

  // Counts, and how many there are in the bins before. Returns whether the whole block has to sort.
  __device__ bool count_bins() {
    for (int i = 0; i < 2 * kBinsEach; ++i) left[0][T::rank() + i * kThreads] = 0;
    __syncthreads();
#pragma unroll
    for (int s = 0; s < 2; ++s)
      each(s, [&](int64_t, Real q) {
        const int b = bin_of(q);
        if (b < kBins) shared_add<int32_t>(left[s], b, 1);
      });
    __syncthreads();
    bool large = false;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      int32_t own = 0;
      for (int i = 0; i < kBinsEach; ++i) own += left[s][T::rank() * kBinsEach + i];
      int32_t sum = T::sum_before(own);
      for (int i = 0; i < kBinsEach; ++i) {
        const int b = T::rank() * kBinsEach + i;
        const int32_t n = left[s][b];
        before[s][b] = sum;
        sum += n;
        large = large || n > kByWarp;
      }
      if (T::rank() == kThreads - 1) before[s][kBins] = sum;
    }
    return __syncthreads_or(large);
  }

  // The sign that all ranks of a bin have, or 0.
  __device__ int sign_of(int b) const {
    const int32_t n = before[0][b], n_after = before[0][b + 1];
    const int32_t m = before[1][b], m_after = before[1][b + 1];
    return n >= m_after ? 1 : n_after <= m ? -1 : 0;
  }

  __device__ void to_scratch(int s) {
    each(s, [&](int64_t j, Real q) {
      const int b = bin_of(q);
      if (b == kBins || sign_of(b) != 0) return;
      const int64_t at = before[s][b] + shared_add<int32_t>(left[s], b, -1) - 1;
      scratch.key[s][at] = q;
      scratch.column[s][at] = int32_t(j);
    });
  }

  // Rank by rank.
  template <int kTeam>
  __device__ void match(int b) {
    const int32_t first[2] = {before[0][b], before[1][b]};
    const int32_t n[2] = {before[0][b + 1] - first[0], before[1][b + 1] - first[1]};
#pragma unroll
    for (int s = 0; s < 2; ++s)
      sort_descending<kTeam>(scratch.key[s] + first[s], scratch.column[s] + first[s], n[s]);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int other = 1 - s, side_sign = s == 0 ? 1 : -1;
      for (int64_t i = Team<kTeam>::rank(); i < n[s]; i += kTeam) {
        const int64_t rank = first[s] + i;
        const Real own = scratch.key[s][rank];
        int larger = rank < first[other] ? -1 : 1;  // than what has the same rank on the other side
        if (rank >= first[other] && rank < first[other] + n[other]) {
          const Real partner = scratch.key[other][rank];
          larger = int(own > partner) - int(own < partner);
        }
        scratch.sign[s][scratch.column[s][rank]] = int8_t(larger * side_sign);
      }
    }
  }

  __device__ Real sign(int s, int64_t j, Real q) const {
    const int b = bin_of(q);
    if (b == kBins) return 0;
    const int of_bin = sign_of(b);
    return Real(of_bin != 0 ? of_bin : scratch.sign[s][j]);
  }

  __device__ void run() {
    normalise();
    const bool large = count_bins();
#pragma unroll
    for (int s = 0; s < 2; ++s) to_scratch(s);
    __syncthreads();
    for (int b = int(threadIdx.x) / kWarpSize; b < kBins; b += T::kWarps)
      if (sign_of(b) == 0 && !is_large(b)) match<kWarpSize>(b);
    for (int b = 0; large && b < kBins; ++b)
      if (sign_of(b) == 0 && is_large(b)) match<kThreads>(b);
    __syncthreads();
    Real part[2] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) each(s, [&](int64_t j, Real q) { part[s] += q * sign(s, j, q); });
    sums[kSlope] = double(part[0]), sums[kOther] = double(part[1]);
    if (problem.stats != nullptr) add_entropies();
    T::reduce(sums, Add());
    if (problem.gradient.data != nullptr) write_gradient();
    write();
  }
  __device__ bool is_large(int b) const {
    return before[0][b + 1] - before[0][b] > kByWarp || before[1][b + 1] - before[1][b] > kByWarp;
  }

  __device__ void add_entropies() {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const auto minus_lse = minus_two_part<Real>(lse[s]);
      Real part = 0;
      each_chunk(s, [&](int64_t, const Real(&x)[kSize]) {
        for (int i = 0; i < kSize; ++i)
          part -= times(probability(s, x[i]),
                        mul_add(side[s].gain, x[i], minus_lse.high.value) + minus_lse.low.value);
      });
      sums[kStudentEntropy + s] = double(part);
    }
  }

  // A NaN is in no bin, but in these.
  __device__ double nan() const { return (lse[0] - lse[0]) + (lse[1] - lse[1]); }

  __device__ void write_gradient() {
    const Side& student = side[0];
    const Real of_row = row_weight(problem, r);
    const Real weight = of_row * Real((1 - problem.label_weight) * problem.factor) * student.gain;
    const Real label_weight = of_row * Real(problem.label_weight) * label_gain;
    const Real H = Real(sums[kSlope] + nan());
    const int64_t y = labelled ? problem.labels[r] : -1;
    char* const row = row_of(problem.gradient, r);
    each_chunk(0, [&](int start, const Real(&x)[kSize]) {
      Real g[kSize];
      for (int i = 0; i < kSize; ++i) {
        const int j = start + i;
        const Real q = probability(0, x[i]);
        g[i] = 0;
        if (j >= student.vocab) continue;
        g[i] = (sign(0, j, q) - H) * q * weight;
        if (labelled) {
          g[i] += label_weight * (label_factor * of_label(x[i]) - Real(j == y));
        }
        if (student.cap > 0) {
          const Real share = x[i] / student.cap;
          g[i] = x[i] > -INFINITY ? g[i] * student.scale * (1 - share * share) : Real(0);
        }
      }
      store_chunk<Mixed>(row, problem.gradient.dtype, false, start, student.vocab, g);
    });
  }

  __device__ void write() const {
    if (T::rank() != 0) return;
    if (problem.value != nullptr) {
      Real value = Real(problem.factor * (sums[kSlope] - sums[kOther] + nan()));
      if (problem.label_weight > 0)
        value = Real(1 - problem.label_weight) * value + Real(problem.label_weight) * label_value;
      problem.value[r] = value;
    }
    if (problem.stats == nullptr) return;
    const Real none = NAN;  // a column of one side has nothing to do with that of the other
    const Real values[kStats] = {
        none,         none, Real(sums[kStudentEntropy]), Real(sums[kTeacherEntropy]), Real(lse[0]),
        Real(lse[1]), none};
    for (int i = 0; i < kStats; ++i) problem.stats[i * problem.rows + r] = values[i];
  }
};

// Blocks take rows in turn, so that there is scratch for as many rows as there are blocks.
template <class Real, int kThreads, int kBins>
__global__ void __launch_bounds__(kThreads, 1)
    sorted_kernel(const Problem<Real> problem, char* scratch, int64_t columns) {
  SHARED_DYNAMIC(int32_t, bins);
  char* const own = scratch + int64_t(blockIdx.x) * SortScratch<Real>::bytes(columns);
  for (int64_t r = blockIdx.x; r < problem.rows; r += gridDim.x) {
    if (!prepare_row<kThreads>(problem, r)) continue;
    DeviceSortedRow<Real, kThreads, kBins> row(problem, r, bins, own, columns);
    row.run();  // the next row takes the bins behind the barriers of its normalise()
  }
}

}  // namespace stillhouse
