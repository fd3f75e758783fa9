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

// d(x_i, y_j) of kRows points i, for 32 points j at a time, from the transpose of these. Rows of x are d
// apart, of costs padded(m).
template <int kRows, class Real, class Term>
void distances(const Real* x, int64_t d, const Real* transposed, int64_t m, bool take_root,
               Real* out, Term term) {
  const int64_t width = padded(m);
  for (int64_t j = 0; j < width; j += kLanes) {
    Lanes<Real> sum[kRows];
    for (int64_t k = 0; k < d; ++k) {
      for (int r = 0; r < kRows; ++r) {
        const Lane<Real> xk(x[r * d + k]);
        SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
          Lane<Real> y;
          load(transposed + k * width + j + i * kWidth<Real>, y);
          sum[r][i] = term(xk - y, sum[r].at[i]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int64_t i = 0; i < kSteps<Real>; ++i)
        store(take_root ? root(sum[r][i]) : sum[r][i], out + r * width + j + i * kWidth<Real>);
    }
  }
}

// Costs of kRows points.
template <int kRows, class Real>
void point_costs(const Task<Real>& t, const Real* x, Real* out) {
  const Batch<Real>& b = *t.batch;
  const int64_t d = b.cost.width;
  if (b.ground == kL1)
    distances<kRows>(x, d, t.transposed, b.m, false, out,
                     [](Lane<Real> by, Lane<Real> sum) { return sum + magnitude(by); });
  else
    distances<kRows>(x, d, t.transposed, b.m, b.ground == kEuclidean, out,
                     [](Lane<Real> by, Lane<Real> sum) { return mul_add(by, by, sum); });
}

// Costs [padded(m)] of a row; what lies beyond m is some number.
template <class Real>
const Real* cost_row(const Task<Real>& t, int64_t i, const RowScratch<Real>& w) {
  const Batch<Real>& b = *t.batch;
  const int64_t r = t.group * b.n + i;
  if (b.ground == kMatrix) return widened(b.cost, r, w.cost);
  point_costs<1>(t, widened(b.cost, r, w.point), w.cost);
  return w.cost;
}

// [rows, width] to [width, rows]; the sizes are multiples of 16.
template <class Real>
void transpose_of(int64_t rows, int64_t width, const Real* x, Real* out) {
#if defined(__AVX512F__)
  if constexpr (kWidth<Real> == 16) {
    for (int64_t i = 0; i < rows; i += 16) {
      for (int64_t j = 0; j < width; j += 16) {
        Lane<Real> tile[16];
        for (int k = 0; k < 16; ++k) load(x + (i + k) * width + j, tile[k]);
        transpose(tile);
        for (int k = 0; k < 16; ++k) store(tile[k], out + (j + k) * rows + i);
      }
    }
    return;
  }
#endif
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) out[j * rows + i] = x[i * width + j];
}

// The other side's points as both passes read them; 0 beyond m and the dimension.
template <class Real>
void transpose_points(Task<Real>& t) {
  const Batch<Real>& b = *t.batch;
  if (b.ground == kMatrix) return;
  const int64_t d = b.other.width, width = padded(b.m), size = b.point_size();
  const bool by_rows = b.by_dimension();
  if (!by_rows) fill(t.transposed, d * width, Real(0));
  for (int64_t j = 0; j < t.m; ++j) {
    with_type(b.other.dtype, b.other.row(t.group * b.m + j), [&](const auto* y) {
      if (by_rows) {
        Real* const point = t.points + j * size;
#pragma omp simd
        for (int64_t k = 0; k < d; ++k) point[k] = Real(widen(y[k]));
        for (int64_t k = d; k < size; ++k) point[k] = 0;
        return;
      }
      for (int64_t k = 0; k < d; ++k) t.transposed[k * width + j] = Real(widen(y[k]));
    });
  }
  if (!by_rows) return;
  fill(t.points + t.m * size, (width - t.m) * size, Real(0));
  transpose_of(width, size, t.points, t.transposed);
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

// The same with a vector of dimensions at a time, for each point; kDimensions of them in registers, and
// the sums of a few points side by side.
template <bool kOthers, class Real, class Slope>
void slopes_by_dimension(const Task<Real>& t, const Real* x, const RowScratch<Real>& w,
                         Real* others, Slope slope) {
  constexpr int64_t kParts = kDimensions / kWidth<Real>;
  constexpr int kSums = kWidth<Real> > 1 ? 4 : 1;
  const int64_t size = t.batch->point_size();
  for (int64_t k = 0; k < size; k += kDimensions) {
    Lane<Real> own[kParts], sum[kSums][kParts] = {};
    for (int64_t s = 0; s < kParts; ++s) load(x + k + s * kWidth<Real>, own[s]);
    for (int64_t j = 0; j < t.m; j += kSums) {  // beyond m weights are 0
      _Pragma("GCC unroll 4") for (int u = 0; u < kSums; ++u) {
        const Lane<Real> weight(w.weight[j + u]);
        SH_STEPS for (int64_t s = 0; s < kParts; ++s) {
          const int64_t at = (j + u) * size + k + s * kWidth<Real>;
          Lane<Real> y, before;
          load(t.points + at, y);
          const Lane<Real> each = slope(weight, own[s] - y);
          sum[u][s] += each;
          if constexpr (kOthers) {
            load(others + at, before);
            store(before - each, others + at);
          }
        }
      }
    }
    for (int64_t s = 0; s < kParts; ++s) {
      for (int half = kSums / 2; half > 0; half /= 2)
        for (int u = 0; u < half; ++u) sum[u][s] += sum[u + half][s];
      store(sum[0][s], w.d_point + k + s * kWidth<Real>);
    }
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
    const Lane<Real> none{Real(0)};
    each_step<Real>(width, [&](int64_t j, int64_t) {
      const Lane<Real> c = lane(cost + j);
      store(select(c > none, lane(w.weight + j) / c, none), w.weight + j);
    });
  } else if (b.ground == kSquared) {
    for (int64_t j = 0; j < t.m; ++j) w.weight[j] *= 2;
  }
  fill(w.weight + t.m, width - t.m, Real(0));
  Real* const others =
      t.other_points == nullptr ? nullptr : t.other_points + block * b.point_size() * width;
  const auto along = [&](auto slope) {
    if (!b.by_dimension()) return slopes_by_points(t, x, w, others, slope);
    if (others == nullptr) return slopes_by_dimension<false>(t, x, w, others, slope);
    slopes_by_dimension<true>(t, x, w, others, slope);
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
