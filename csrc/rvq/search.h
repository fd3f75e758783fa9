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

// Scores of Rows rows in registers, [Rows, kVectors] vectors of codes `from` ... of a block.
template <class Real, int64_t Rows>
struct Scores {
  Vector<Real> at[Rows][kVectors];

  // As they begin, the same for all rows (stride 0), or as `store` has left them.
  SH_INLINE void load(const Real* begin, int64_t stride) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v)
        at[i][v] = vector_at(begin + i * stride + v * kLane<Real>);
  }
  SH_INLINE void store(Real* to, int64_t stride) const {
#pragma GCC unroll 8
    for (int64_t i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v)
        vector_at(to + i * stride + v * kLane<Real>) = at[i][v];
  }
  // `count` features of rows that are `width` apart.
  SH_INLINE void add(const Real* x, int64_t width, const Real* codes, int64_t count) {
    using V = Vector<Real>;
    for (int64_t k = 0; k < count; ++k, codes += kCodes) {
      V code[kVectors];
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v) code[v] = vector_at(codes + v * kLane<Real>);
#pragma GCC unroll 8
      for (int64_t i = 0; i < Rows; ++i) {
        const V xi = x[i * width + k] - V{};
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v) at[i][v] = fused(xi, code[v], at[i][v]);
      }
    }
  }
};

// Features of a block that stay in the first-level cache while rows pass by; of wide rows unfinished scores
// wait in `waiting` [rows, kCodes], and are still summed feature by feature.
constexpr int64_t kAtOnce = 96, kNarrow = 160;

// What is read next is on its way to the second-level cache, piece by piece, while something is computed.
struct Ahead {
  const char *at, *end;
  int64_t piece;

  SH_INLINE Ahead(const void* begin, int64_t bytes, int64_t pieces)
      : at(static_cast<const char*>(begin)), end(at + bytes), piece(bytes / pieces + 64) {}
  SH_INLINE void fetch() {
    const char* const last = end - at < piece ? end : at + piece;
    for (; at < last; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// f(first row, code of the block, scores of kRows rows or of one) of all rows and all codes of a block;
// another block follows in memory if there are `more`.
template <class Real, class F>
SH_INLINE void each_part(const Real* x, int64_t rows, int64_t width, const Real* block, bool more,
                         Real* waiting, F f) {
  const int64_t chunks = width <= kNarrow ? 1 : (width + kAtOnce - 1) / kAtOnce;
  const int64_t calls = chunks * (rows / kRows) * kCodes / (kVectors * kLane<Real>);
  // Few rows are through with a block before another is there.
  const int64_t bytes =
      more && rows >= 4 * kRows ? block_numbers(width) * int64_t(sizeof(Real)) : 0;
  Ahead ahead(block + block_numbers(width), bytes, calls + 1);
  for (int64_t from = 0; from < kCodes; from += kVectors * kLane<Real>)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * width / chunks, last = (chunk + 1) * width / chunks;
      const auto go = [&](int64_t r, auto score) {
        if (chunk == 0)
          score.load(block + from, 0);
        else
          score.load(waiting + r * kCodes + from, kCodes);
        score.add(x + r * width + first, width, block + (1 + first) * kCodes + from, last - first);
        if (chunk + 1 < chunks)
          score.store(waiting + r * kCodes + from, kCodes);
        else
          f(r, from, score);
      };
      int64_t r = 0;
      for (; r + kRows <= rows; r += kRows) {
        ahead.fetch();
        go(r, Scores<Real, kRows>());
      }
      for (; r < rows; ++r) go(r, Scores<Real, 1>());
    }
}

// The best of a tile's rows so far against a part of a block. Of equal scores the first stays: codes of a
// lane come in order.
template <class Real, bool Second, int64_t Rows>
SH_INLINE void take_best(const Tile<Real>& tile, int64_t part, int64_t r, int64_t code,
                         const Scores<Real, Rows>& score) {
  using V = Vector<Real>;
  using P = typename Simd<Real>::Places;
  constexpr int64_t lane = kLane<Real>;
  const int64_t first = code / lane;
#pragma GCC unroll 8
  for (int64_t i = 0; i < Rows; ++i) {
    const int64_t at = (part * tile.rows + r + i) * lane;
    V best = vector_at(tile.score + at);
    P& place = *reinterpret_cast<P*>(tile.place + at);
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) {
      const auto higher = score.at[i][v] > best;
      if constexpr (Second) {
        V& second = vector_at(tile.second + at);
        const V loser = higher ? best : score.at[i][v];
        second = loser > second ? loser : second;
      }
      best = higher ? score.at[i][v] : best;
      place = higher ? Place<Real>(first + v) - P{} : place;
    }
    vector_at(tile.score + at) = best;
  }
}

template <class Real, bool Second>
void score_block(const Tile<Real>& tile, int64_t part, int64_t width, const Real* block,
                 int64_t number, bool more) {
  each_part(tile.residual, tile.rows, width, block, more, tile.waiting + part * tile.rows * kCodes,
            [&](int64_t r, int64_t from, const auto& score) {
              take_best<Real, Second>(tile, part, r, number * kCodes + from, score);
            });
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

// ---- several codes of a row, and draws

// The k highest values of a row so far, in order; of equal ones the lower code comes first.
struct Kept {
  double* value;
  int64_t* code;
  int64_t k;

  SH_INLINE double least() const { return value[k - 1]; }
  SH_INLINE void add(double new_value, int64_t new_code) {
    int64_t at = k - 1;
    for (; at > 0 && new_value > value[at - 1]; --at)
      value[at] = value[at - 1], code[at] = code[at - 1];
    value[at] = new_value, code[at] = new_code;
  }
};

// What a block's scores [kCodes] change in it.
template <class Real>
void keep(const Candidates<Real>& c, uint64_t position, int64_t first, const Real* score,
          Kept kept) {
  for (int64_t j = 0; j < kCodes; ++j) {
    if (c.sharpness == 0) {
      if (double(score[j]) > kept.least()) kept.add(score[j], first + j);
      continue;
    }
    // Few codes can still win: the noise of the others is not drawn.
    const double value = c.sharpness * double(score[j]);
    if (!(value + kMostGumbel > kept.least())) continue;
    const Words4 words = philox(c.seed, position, uint32_t(c.node), uint32_t((first + j) / 4));
    const double noisy = value + gumbel_of(words.word[(first + j) % 4]);
    if (noisy > kept.least()) kept.add(noisy, first + j);
  }
}
