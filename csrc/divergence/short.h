// Short rows, kLanes at a time: column by column side by side, so that what a row has for itself (its
// maximum, its sums, its factor) is one lane of a vector, and nothing waits for a sum across a vector.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

#if defined(__AVX512F__)
constexpr int64_t kShortLimit = 320;
#else
constexpr int64_t kShortLimit = 128;  // interleaving costs more without transpose()
#endif

// tile[j kLanes + i] = rows[i][j] for j < n. Rows can be read up to a multiple of kLanes.
template <class Real>
void interleave(int64_t n, const Real* const (&rows)[kLanes], Real* tile) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) {
    for (int64_t j = 0; j < n; j += 16) {
      for (int64_t half = 0; half < kLanes; half += 16) {
        __m512 x[16];
        for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(rows[half + i] + j);
        transpose(x);
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(tile + (j + i) * kLanes + half, x[i]);
      }
    }
    return;
  }
#endif
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < kLanes; ++i) tile[j * kLanes + i] = rows[i][j];
}

// rows[i pitch + j] = tile[j kLanes + i] for j < n, and anything up to a multiple of kLanes.
template <class Real>
void deinterleave(int64_t n, const Real* tile, Real* rows, int64_t pitch) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) {
    for (int64_t j = 0; j < n; j += 16) {
      for (int64_t half = 0; half < kLanes; half += 16) {
        __m512 x[16];
        for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(tile + (j + i) * kLanes + half);
        transpose(x);
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(rows + (half + i) * pitch + j, x[i]);
      }
    }
    return;
  }
#endif
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < n; ++j) rows[i * pitch + j] = tile[j * kLanes + i];
}

template <class Real>
SH_INLINE Lanes<Real> to_lanes(const Real (&x)[kLanes]) {
  Lanes<Real> lanes;
  for (int64_t i = 0; i < kSteps<Real>; ++i) load(x + i * kWidth<Real>, lanes[i]);
  return lanes;
}
template <class Real>
SH_INLINE void from_lanes(const Lanes<Real>& lanes, Real (&x)[kLanes]) {
  for (int64_t i = 0; i < kSteps<Real>; ++i) store(lanes[i], x + i * kWidth<Real>);
}
// What is summed up for each row.
using RowSums = double[kLanes];
template <class Real>
void add_lanes(const Lanes<Real>& lanes, RowSums& sums) {
  Real x[kLanes];
  from_lanes(lanes, x);
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) sums[i] += double(x[i]);
}

template <class Real>
MinusTwoPart<Lanes<Real>> minus_two_part(const double (&x)[kLanes]) {
  Real high[kLanes], low[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    high[i] = -Real(x[i]);
    low[i] = Real(-double(high[i]) - x[i]);
  }
  return {to_lanes(high), to_lanes(low)};
}

// One side of kLanes rows, its exponentials and what makes probabilities of them.
template <class Real>
struct Side {
  Source<Real> source[kLanes];
  const Real* x[kLanes];
  Real *tile, *e;
  double lse[kLanes];
  Real shift[kLanes], factor[kLanes];

  // student: TAID's mixture is with its rows.
  Side(const Logits& logits, const Problem<Real>& problem, const int64_t* r, Real* rows, Real* tile,
       Real* e, Side* student)
      : tile(tile), e(e) {
    const int64_t n = problem.vocab;
    const Source<Real> first(logits, r[0], n, rows);
    for (int i = 0; i < kLanes; ++i) {
      source[i] = first.at(row_of(logits.rows, r[i]), rows + i * padded(n));
      if (student != nullptr) source[i].mix_with(student->source[i], problem.params.a);
      x[i] = source[i].load(0);
    }
    interleave(n, x, tile);
    const Lanes<Real> max = lane_max<Real>(n * kLanes, tile);
    from_lanes(max, shift);
    Real sum[kLanes];
    from_lanes(block_exp(n * kLanes, tile, source[0].gain2(), max, e, Prefetch::none(tile)), sum);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      lse[i] = source[0].origin(shift[i]) + fast_log(double(sum[i]));
      factor[i] = 1 / sum[i];
    }
  }
};

// r: kLanes rows, of which the first `count` are wanted.
template <class Kind, class Real>
void short_rows(const Problem<Real>& problem, const int64_t* r, int count,
                const Workspace<Real>& w) {
  const int64_t n = problem.vocab, pitch = padded(n);
  Side<Real> student(problem.student, problem, r, w.tiles[0], w.tiles[1], w.tiles[2], nullptr);
  Side<Real> teacher(problem.teacher, problem, r, w.tiles[3], w.tiles[4], w.tiles[5],
                     problem.kind == kTAID ? &student : nullptr);
  double lse_difference[kLanes];
  Real weight[kLanes];
  const Real gain = student.source[0].gain, teacher_gain = teacher.source[0].gain;
  for (int i = 0; i < kLanes; ++i) {
    lse_difference[i] = teacher.lse[i] - student.lse[i];
    weight[i] = divergence_weight(problem, r[i]) * gain;
  }
  const Block<Real, Real, Lanes<Real>> whole{n * kLanes,
                                             student.tile,
                                             teacher.tile,
                                             student.e,
                                             teacher.e,
                                             gain,
                                             teacher_gain,
                                             gain / teacher_gain,
                                             minus_two_part<Real>(lse_difference),
                                             minus_two_part<Real>(student.lse),
                                             minus_two_part<Real>(teacher.lse),
                                             to_lanes(student.factor),
                                             to_lanes(teacher.factor)};
  const Prefetch touch = Prefetch::none(student.tile);
  const Lanes<Real> scale = to_lanes(weight);
  // The gradient takes the place of q, and its rows that of the teacher's.
  Real *g = whole.q, *rows = w.tiles[3];
  RowSums value = {}, slope = {};
  RowSums acceptance = {}, below = {}, student_entropy = {}, teacher_entropy = {};
  // A few columns at a time: a lane that took them all would round once a column.
  constexpr int64_t kColumns = 16;
  for (int64_t start = 0; start < n; start += kColumns) {
    auto b = whole;
    const int64_t at = start * kLanes;
    b.n = (n - start < kColumns ? n - start : kColumns) * kLanes;
    b.z += at, b.t += at, b.q += at, b.p += at;
    if (problem.stats != nullptr) {
      const StatSums<Real> s = block_stats(b);
      add_lanes(s.acceptance, acceptance);
      add_lanes(s.below, below);
      add_lanes(s.student_entropy, student_entropy);
      add_lanes(s.teacher_entropy, teacher_entropy);
    }
    if (problem.gradient.data == nullptr) {
      add_lanes(block_value<Kind>(b, problem.params, touch), value);
    } else if constexpr (Kind::kUnitSlope) {
      add_lanes(block_gradient<Kind>(b, problem.params, scale, g + at, touch), value);
    } else {
      const Slopes<Real> s = block_slopes<Kind>(b, problem.params, touch);
      add_lanes(s.value, value);
      add_lanes(s.slope, slope);
    }
  }
  if (problem.gradient.data != nullptr) {
    if (!Kind::kUnitSlope) {
      Real H[kLanes];
      for (int i = 0; i < kLanes; ++i) H[i] = Real(slope[i]);
      block_combine(whole.n, whole.q, whole.p, to_lanes(H), scale, g);
    }
    deinterleave(n, g, rows, pitch);
  }

  for (int i = 0; i < count; ++i) {
    Normaliser<Real> normaliser;
    normaliser.lse = student.lse[i];
    normaliser.shift = student.shift[i];
    normaliser.factor = student.factor[i];
    const LabelTerm<Real> label(problem, r[i], student.source[i], normaliser, w);
    write_value(problem, r[i], Real(value[i]), label);
    if (problem.stats != nullptr) {
      const Real agreement = first_argmax(student.source[i]) == first_argmax(teacher.source[i]);
      write_stats<Real>(
          problem, r[i],
          {Real(acceptance[i]), agreement, Real(student_entropy[i]), Real(teacher_entropy[i]),
           Real(student.lse[i]), Real(teacher.lse[i]), Real(below[i])});
    }
    if (problem.gradient.data != nullptr)
      finish_gradient(student.source[i], label, 0, student.x[i], rows + i * pitch,
                      problem.gradient.dtype, row_of(problem.gradient, r[i]));
  }
}
