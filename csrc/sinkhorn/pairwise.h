// L1 distances of all pairs of rows, and their gradient, without a tensor of all differences.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

constexpr int64_t kTile = 1024;  // columns of a few rows that stay in L1

// Columns of a row as they lie, or widened.
template <class Real>
const Real* tile_of(const Matrix& rows, int64_t r, int64_t start, int64_t columns, Real* buffer) {
  const Real* found = buffer;
  with_type(rows.dtype, rows.row(r), [&](const auto* x) {
    using In = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    if constexpr (std::is_same<In, Real>::value)
      found = x + start;
    else
      for (int64_t k = 0; k < columns; ++k) buffer[k] = Real(widen(x[start + k]));
  });
  return found;
}

// out[j] = |x - y_j| summed over the columns.
template <class Real>
void l1_row(const Pairs<Real>& p, int64_t group, int64_t i, Real* x_tile, Real* y_tile) {
  Real* const out = p.out + (group * p.n + i) * p.m;
  for (int64_t j = 0; j < p.m; ++j) out[j] = 0;
  for (int64_t start = 0; start < p.d; start += kTile) {
    const int64_t columns = p.d - start < kTile ? p.d - start : kTile;
    const Real* const x = tile_of(p.x, group * p.n + i, start, columns, x_tile);
    for (int64_t j = 0; j < p.m; ++j) {
      const Real* const y = tile_of(p.y, group * p.m + j, start, columns, y_tile);
      Lanes<Real> sum;
      int64_t k = 0;
      for (; k + kLanes <= columns; k += kLanes) {
        SH_STEPS for (int64_t s = 0; s < kSteps<Real>; ++s) {
          Lane<Real> a, b;
          load(x + k + s * kWidth<Real>, a);
          load(y + k + s * kWidth<Real>, b);
          sum[s] += magnitude(a - b);
        }
      }
      Real rest = 0;
      for (; k < columns; ++k) rest += magnitude(x[k] - y[k]);
      out[j] += fold_sum(sum) + rest;
    }
  }
}

// d_x = sum_j upstream_j sign(x - y_j) of row i; `from` is the other side, upstream has this
// stride.
template <class Real>
void l1_gradient_row(const Pairs<Real>& p, const Matrix& own, const Matrix& from, const Matrix& to,
                     int64_t at, int64_t first, int64_t count, const Real* upstream, int64_t stride,
                     Real* x_tile, Real* y_tile, Real* sum) {
  for (int64_t start = 0; start < p.d; start += kTile) {
    const int64_t columns = p.d - start < kTile ? p.d - start : kTile;
    const Real* const x = tile_of(own, at, start, columns, x_tile);
    for (int64_t k = 0; k < columns; ++k) sum[k] = 0;
    for (int64_t j = 0; j < count; ++j) {
      const Real* const y = tile_of(from, first + j, start, columns, y_tile);
      const Real up = upstream[j * stride];
#pragma omp simd
      for (int64_t k = 0; k < columns; ++k)
        sum[k] += x[k] > y[k] ? up : x[k] < y[k] ? -up : Real(0);
    }
    with_type(to.dtype, to.row(at), [&](auto* out) { narrow_first(columns, sum, out + start); });
  }
}

template <class Real>
void pairwise_l1(const Pairs<Real>& p, int64_t lo, int64_t hi) {
  Real x_tile[kTile], y_tile[kTile];
  for (int64_t r = lo; r < hi; ++r) l1_row(p, r / p.n, r % p.n, x_tile, y_tile);
}

template <class Real>
void pairwise_l1_gradient(const Pairs<Real>& p, bool of_x, int64_t lo, int64_t hi) {
  Real x_tile[kTile], y_tile[kTile], sum[kTile];
  for (int64_t r = lo; r < hi; ++r) {
    const int64_t own = of_x ? p.n : p.m, other = of_x ? p.m : p.n, group = r / own;
    const Real* const upstream = p.upstream + group * p.n * p.m + (of_x ? r % own * p.m : r % own);
    l1_gradient_row(p, of_x ? p.x : p.y, of_x ? p.y : p.x, of_x ? p.d_x : p.d_y, r, group * other,
                    other, upstream, of_x ? 1 : p.m, x_tile, y_tile, sum);
  }
}
