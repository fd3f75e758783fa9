// Rows of costs: as they lie in a matrix, widened, or made of points.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

template <class Real>
void fill(Real* x, int64_t n, Real value) {
  for (int64_t j = 0; j < n; ++j) x[j] = value;
}

// What a thread works on a row with.
template <class Real>
struct RowScratch {
  Real *cost, *mass, *weight;  // [padded(m)] each
  Real *point, *d_point;       // [padded(d)] each

  RowScratch(const Batch<Real>& b, void* scratch) {
    cost = reinterpret_cast<Real*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
    mass = cost + padded(b.m);
    weight = mass + padded(b.m);
    point = weight + padded(b.m);
    d_point = point + padded(b.cost.width);
  }
};

// The widened row of a source, or the row itself where it can be read as it lies. Beyond its width
// up to a multiple of kLanes there is 0.
template <class Real>
const Real* widened(const Matrix& source, int64_t r, Real* buffer) {
  const Real* found = buffer;
  with_type(source.dtype, source.row(r), [&](const auto* x) {
    using In = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    if constexpr (std::is_same<In, Real>::value) {
      if (source.width % kLanes == 0) {
        found = x;
        return;
      }
    }
    widen_first(source.width, x, buffer);
    for (int64_t j = source.width; j < padded(source.width); ++j) buffer[j] = 0;
  });
  return found;
}

// d(x, y_j) for 32 points at a time, from their transpose.
template <class Real, class Term>
void distances(const Real* x, int64_t d, const Real* transposed, int64_t m, bool take_root,
               Real* out, Term term) {
  const int64_t width = padded(m);
  for (int64_t j = 0; j < width; j += kLanes) {
    Lanes<Real> sum;
    for (int64_t k = 0; k < d; ++k) {
      const Lane<Real> xk(x[k]);
      SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
        Lane<Real> y;
        load(transposed + k * width + j + i * kWidth<Real>, y);
        sum[i] += term(xk - y);
      }
    }
    for (int64_t i = 0; i < kSteps<Real>; ++i)
      store(take_root ? root(sum[i]) : sum[i], out + j + i * kWidth<Real>);
  }
}

// Costs [padded(m)] of a row; what lies beyond m is some number.
template <class Real>
const Real* cost_row(const Task<Real>& t, int64_t i, const RowScratch<Real>& w) {
  const Batch<Real>& b = *t.batch;
  const int64_t r = t.group * b.n + i;
  if (b.ground == kMatrix) return widened(b.cost, r, w.cost);
  const Real* x = widened(b.cost, r, w.point);
  const int64_t d = b.cost.width;
  if (b.ground == kL1)
    distances(x, d, t.transposed, b.m, false, w.cost,
              [](Lane<Real> difference) { return magnitude(difference); });
  else
    distances(x, d, t.transposed, b.m, b.ground == kEuclidean, w.cost,
              [](Lane<Real> difference) { return difference * difference; });
  return w.cost;
}

template <class Real>
void transpose_points(Task<Real>& t) {
  const Batch<Real>& b = *t.batch;
  if (b.ground == kMatrix) return;
  const int64_t d = b.other.width, width = padded(b.m);
  const int64_t size = b.point_size();
  const bool by_rows = b.by_dimension();
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t k = 0; by_rows && k < size; ++k) t.points[j * size + k] = 0;
    for (int64_t k = 0; k < d; ++k) t.transposed[k * width + j] = 0;
    if (j >= t.m) continue;
    with_type(b.other.dtype, b.other.row(t.group * b.m + j), [&](const auto* y) {
      for (int64_t k = 0; k < d; ++k) {
        const Real x = Real(widen(y[k]));
        t.transposed[k * width + j] = x;
        if (by_rows) t.points[j * size + k] = x;
      }
    });
  }
}

// d_x of a row, w.d_point, and what it takes from the other side's points: sum_j weight_j times x - y_j,
// or its signs. A vector of points at a time, for each dimension.
template <class Real, class Slope>
void slopes_by_points(const Task<Real>& t, const Real* x, const RowScratch<Real>& w, Real* others,
                      Slope slope) {
  const int64_t width = padded(t.batch->m);
  for (int64_t k = 0; k < t.batch->other.width; ++k) {
    const Lane<Real> xk(x[k]);
    Lanes<Real> sum;
    for (int64_t j = 0; j < width; j += kLanes) {
      SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) {
        const int64_t at = j + s * kWidth<Real>;
        Lane<Real> y, weight, before;
        load(t.transposed + k * width + at, y);
        load(w.weight + at, weight);
        const Lane<Real> each = slope(weight, xk - y);
        sum[s] += each;
        if (others == nullptr) continue;
        load(others + k * width + at, before);
        store(before - each, others + k * width + at);
      }
    }
    w.d_point[k] = fold_sum(sum);
  }
}

// The same with a vector of dimensions at a time, for each point.
template <class Real, class Slope>
void slopes_by_dimension(const Task<Real>& t, const Real* x, const RowScratch<Real>& w,
                         Real* others, Slope slope) {
  const int64_t size = t.batch->point_size();
  for (int64_t k = 0; k < size; k += kLanes) {
    Lanes<Real> own, sum;
    for (int64_t s = 0; s < kSteps<Real>; ++s) load(x + k + s * kWidth<Real>, own[s]);
    for (int64_t j = 0; j < t.m; ++j) {
      const Lane<Real> weight(w.weight[j]);
      SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) {
        const int64_t at = j * size + k + s * kWidth<Real>;
        Lane<Real> y, before;
        load(t.points + at, y);
        const Lane<Real> each = slope(weight, own[s] - y);
        sum[s] += each;
        if (others == nullptr) continue;
        load(others + at, before);
        store(before - each, others + at);
      }
    }
    for (int64_t s = 0; s < kSteps<Real>; ++s) store(sum[s], w.d_point + k + s * kWidth<Real>);
  }
}

// Hands on the derivative with respect to a row of costs, w.weight: to the matrix, or to the
// points.
template <class Real>
void leave_gradient(const Task<Real>& t, int64_t block, int64_t i, const Real* cost,
                    const RowScratch<Real>& w) {
  const Batch<Real>& b = *t.batch;
  const int64_t r = t.group * b.n + i;
  if (b.d_cost.data == nullptr && t.other_points == nullptr) return;  // of marginals alone
  if (b.ground == kMatrix) {
    with_type(b.d_cost.dtype, b.d_cost.row(r), [&](auto* out) {
      narrow_first(t.m, w.weight, out);
      for (int64_t j = t.m; j < b.m; ++j) narrow(Real(0), out[j]);
    });
    return;
  }
  const Real* const x = widened(b.cost, r, w.point);
  const int64_t width = padded(b.m);
  if (b.ground == kEuclidean) {
    for (int64_t j = 0; j < t.m; ++j) w.weight[j] = cost[j] > 0 ? w.weight[j] / cost[j] : Real(0);
  } else if (b.ground == kSquared) {
    for (int64_t j = 0; j < t.m; ++j) w.weight[j] *= 2;
  }
  fill(w.weight + t.m, width - t.m, Real(0));
  Real* const others =
      t.other_points == nullptr ? nullptr : t.other_points + block * b.point_size() * width;
  const auto along = [&](auto slope) {
    if (b.by_dimension()) return slopes_by_dimension(t, x, w, others, slope);
    slopes_by_points(t, x, w, others, slope);
  };
  if (b.ground == kL1) {
    along([](Lane<Real> weight, Lane<Real> difference) {
      const Lane<Real> none{Real(0)};
      return select(difference > none, weight, select(difference < none, -weight, none));
    });
  } else {
    along([](Lane<Real> weight, Lane<Real> difference) { return weight * difference; });
  }
  if (b.d_cost.data == nullptr) return;
  with_type(b.d_cost.dtype, b.d_cost.row(r),
            [&](auto* out) { narrow_first(b.other.width, w.d_point, out); });
}
