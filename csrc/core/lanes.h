// Rows in steps of kLanes elements: sums and maxima of lanes, and elements of any type widened to
// them. Included by a family's cpu.cpp inside the namespace of its instruction set.
#pragma once

// A number for each of kLanes lanes: sums of a long row, folded once a block, or what belongs to
// each of kLanes short rows.
template <class Real>
constexpr int64_t kSteps = kLanes / kWidth<Real>;
template <class Real>
struct Lanes {
  Lane<Real> at[kSteps<Real>] = {};
  SH_INLINE Lane<Real>& operator[](int64_t i) { return at[i]; }
  SH_INLINE Lane<Real> operator[](int64_t i) const { return at[i]; }
};

template <class Real>
SH_INLINE Real fold_sum(Lanes<Real> sum) {
  for (int64_t width = kSteps<Real> / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum_of(sum[0]);
}

// x_0 ... x_(n - 1), then -inf up to a multiple of kLanes.
template <class In, class Real>
void widen_first(int64_t n, const In* x, Real* out) {
  constexpr bool loads_vectors = std::is_same<In, Real>::value || std::is_same<In, Bf16>::value;
  if constexpr (kWidth<Real> > 1 && loads_vectors) {
    for (int64_t j = 0; j < padded(n); j += kWidth<Real>) {
      Lane<Real> xj;
      load_first(n - j, x + j, xj);
      store(xj, out + j);
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = Real(widen(x[j]));
    for (int64_t j = n; j < padded(n); ++j) out[j] = -INFINITY;
  }
}

// The way back, of the n alone.
template <class Real, class Out>
void narrow_first(int64_t n, const Real* x, Out* out) {
  constexpr bool stores_vectors = std::is_same<Out, Real>::value || std::is_same<Out, Bf16>::value;
  if constexpr (kWidth<Real> > 1 && stores_vectors) {
    for (int64_t j = 0; j < n; j += kWidth<Real>) {
      Lane<Real> xj;
      load(x + j, xj);
      store_first(n - j, xj, out + j);
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) narrow(x[j], out[j]);
  }
}

template <class Real, class In>
Lanes<Real> lane_max(int64_t n, const In* x) {
  Lanes<Real> max;
  for (auto& lane : max.at) lane = Lane<Real>(-INFINITY);
  for (int64_t j = 0; j < n; j += kLanes) {
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      Lane<Real> xi;
      load_step(x + j, i, xi);
      max[i] = larger(xi, max[i]);
    }
  }
  return max;
}

template <class Real, class In>
Real block_max(int64_t n, const In* x) {
  Lanes<Real> max = lane_max<Real>(n, x);
  for (int64_t i = 1; i < kSteps<Real>; ++i) max[0] = larger(max[i], max[0]);
  return max_of(max[0]);
}

template <class Real>
SH_INLINE Lane<Real> lane(const Real* x) {
  Lane<Real> found;
  load(x, found);
  return found;
}

// f(j, lane of kLanes) of every step of n elements, a multiple of kLanes.
template <class Real, class F>
SH_INLINE void each_step(int64_t n, F f) {
  for (int64_t j = 0; j < n; j += kLanes)
    SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) f(j + s * kWidth<Real>, s);
}
