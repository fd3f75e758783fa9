// The nearest codes of a tile of rows. Scores of kRows rows and a part of a block stay in registers, and
// what is the best of a row so far is kept for each lane. Included by cpu.cpp inside the namespace of its
// instruction set.
#pragma once

#if defined(__AVX512F__)
constexpr int64_t kBytes = 64, kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int64_t kBytes = 32, kRows = 6, kVectors = 2;
#elif defined(__aarch64__)
constexpr int64_t kBytes = 16, kRows = 6, kVectors = 4;
#else
constexpr int64_t kBytes = 16, kRows = 4, kVectors = 2;
#endif

template <class Real>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(kBytes)));
  typedef int32_t Places __attribute__((vector_size(kBytes)));
};
template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(kBytes)));
  typedef int64_t Places __attribute__((vector_size(kBytes)));
};
template <class Real>
using Vector = typename Simd<Real>::Vector;
template <class Real>
constexpr int64_t kLane = kBytes / int64_t(sizeof(Real));

// a b + c in one rounding where the instruction set has that.
SH_INLINE Vector<float> fused(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return Vector<float>(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__)
  return Vector<float>(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__aarch64__)
  return Vector<float>(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}
SH_INLINE Vector<double> fused(Vector<double> a, Vector<double> b, Vector<double> c) {
  return a * b + c;
}

template <class Real>
SH_INLINE const Vector<Real>& vector_at(const Real* x) {
  return *reinterpret_cast<const Vector<Real>*>(x);
}
template <class Real>
SH_INLINE Vector<Real>& vector_at(Real* x) {
  return *reinterpret_cast<Vector<Real>*>(x);
}

// Rows r ... r + Rows - 1 of a tile against the part of a block that begins `from` codes into it. Of equal
// scores the first stays: codes of a lane come in order.
template <class Real, bool Second, int64_t Rows>
SH_INLINE void score_part(const Tile<Real>& tile, int64_t part, int64_t width, const Real* block,
                          int64_t number, int64_t from, int64_t r) {
  using V = Vector<Real>;
  using P = typename Simd<Real>::Places;
  constexpr int64_t lane = kLane<Real>;
  V score[Rows][kVectors];
#pragma GCC unroll 8
  for (int64_t i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) score[i][v] = vector_at(block + from + v * lane);
  const Real *codes = block + kCodes + from, *x = tile.residual + r * width;
  for (int64_t k = 0; k < width; ++k, codes += kCodes) {
    V code[kVectors];
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) code[v] = vector_at(codes + v * lane);
#pragma GCC unroll 8
    for (int64_t i = 0; i < Rows; ++i) {
      const V xi = x[i * width + k] - V{};
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v) score[i][v] = fused(xi, code[v], score[i][v]);
    }
  }
  const int64_t first = (number * kCodes + from) / lane;
#pragma GCC unroll 8
  for (int64_t i = 0; i < Rows; ++i) {
    const int64_t at = (part * tile.rows + r + i) * lane;
    V best = vector_at(tile.score + at);
    P& place = *reinterpret_cast<P*>(tile.place + at);
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) {
      const auto higher = score[i][v] > best;
      if constexpr (Second) {
        V& second = vector_at(tile.second + at);
        const V loser = higher ? best : score[i][v];
        second = loser > second ? loser : second;
      }
      best = higher ? score[i][v] : best;
      place = higher ? Place<Real>(first + v) - P{} : place;
    }
    vector_at(tile.score + at) = best;
  }
}

template <class Real, bool Second>
void score_block(const Tile<Real>& tile, int64_t part, int64_t width, const Real* block,
                 int64_t number) {
  for (int64_t from = 0; from < kCodes; from += kVectors * kLane<Real>) {
    int64_t r = 0;
    for (; r + kRows <= tile.rows; r += kRows)
      score_part<Real, Second, kRows>(tile, part, width, block, number, from, r);
    for (; r < tile.rows; ++r)
      score_part<Real, Second, 1>(tile, part, width, block, number, from, r);
  }
}

// What the parts and lanes of a row have found: the highest score, of equal ones the lower code.
template <class Real>
struct Nearest {
  Real score, second;
  int64_t code;
};
template <class Real>
SH_INLINE Nearest<Real> nearest(const Tile<Real>& tile, int64_t r) {
  Nearest<Real> found{-INFINITY, -INFINITY, -1};
  for (int64_t part = 0; part < tile.parts; ++part) {
    const int64_t at = (part * tile.rows + r) * kLane<Real>;
    for (int64_t lane = 0; lane < kLane<Real>; ++lane) {
      const Real score = tile.score[at + lane];
      const int64_t code = int64_t(tile.place[at + lane]) * kLane<Real> + lane;
      const bool higher = score > found.score || (score == found.score && code < found.code);
      const Real loser = higher ? found.score : score;
      found.second = loser > found.second ? loser : found.second;
      if (tile.second != nullptr && tile.second[at + lane] > found.second)
        found.second = tile.second[at + lane];
      if (higher && score > -INFINITY) found.score = score, found.code = code;
    }
  }
  // A row that is not finite has no score above where they began, or infinite ones.
  if (!(found.score < INFINITY)) found.code = -1;
  return found;
}
