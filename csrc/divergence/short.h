// Short rows, kLanes at a time: column by column side by side, so that what a row has for itself (its
// maximum, its sums, its factor) is one lane of a vector, and nothing waits for a sum across a vector.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

#if defined(__AVX512F__)
constexpr int64_t kShortLimit = 320;
#else
constexpr int64_t kShortLimit = 128;  // interleaving costs more without transpose()
#endif

template <class In, class Real>
constexpr bool kTransposed =
    kWidth<Real> == 16 && (std::is_same<In, Real>::value || std::is_same<In, Bf16>::value);

// tile[j kLanes + i] = rows[i][j] for j < n.
template <class In, class Real>
void interleave(int64_t n, char* const (&rows)[kLanes], Real* tile) {
  if constexpr (kTransposed<In, Real>) {
    for (int64_t j = 0; j < n; j += 16) {
      for (int64_t half = 0; half < kLanes; half += 16) {
        Lane<Real> x[16];
        for (int i = 0; i < 16; ++i)
          load_first(n - j, reinterpret_cast<const In*>(rows[half + i]) + j, x[i]);
        transpose(x);
        for (int i = 0; i < 16; ++i) store(x[i], tile + (j + i) * kLanes + half);
      }
    }
  } else {
    for (int64_t i = 0; i < kLanes; ++i) {
      const In* x = reinterpret_cast<const In*>(rows[i]);
      for (int64_t j = 0; j < n; ++j) tile[j * kLanes + i] = Real(widen(x[j]));
    }
  }
}

// rows[i][j] = tile[j kLanes + i] for j < n, i < count.
template <class Out, class Real>
void deinterleave(int64_t n, const Real* tile, char* const (&rows)[kLanes], int count) {
  if constexpr (kTransposed<Out, Real>) {
    for (int64_t j = 0; j < n; j += 16) {
      for (int64_t half = 0; half < count; half += 16) {
        Lane<Real> x[16];
        for (int i = 0; i < 16; ++i) load(tile + (j + i) * kLanes + half, x[i]);
        transpose(x);
        for (int i = 0; i < 16 && half + i < count; ++i)
          store_first(n - j, x[i], reinterpret_cast<Out*>(rows[half + i]) + j);
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      Out* x = reinterpret_cast<Out*>(rows[i]);
      for (int64_t j = 0; j < n; ++j) narrow(tile[j * kLanes + i], x[j]);
    }
  }
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

// One side of kLanes rows.
template <class Real>
struct Side {
  Source<Real> first;  // of row 0; the others differ in their place
  char* row[kLanes];
  Real *rows, *tile, *e;  // three tiles: rows as source(i) loads them, x, exponentials of x
  double lse[kLanes];
  Real shift[kLanes], factor[kLanes];

  Side(const Logits& logits, const Problem<Real>& problem, const int64_t* r, Real* const* tiles)
      : first(logits, r[0], problem.vocab, tiles[0]), rows(tiles[0]), tile(tiles[1]), e(tiles[2]) {
    for (int i = 0; i < kLanes; ++i) row[i] = row_of(logits.rows, r[i]);
    if (first.cap == 0 && first.dtype == DtypeOf<Real>::value) {
      interleave<Real>(first.vocab, row, tile);
    } else if (first.cap == 0 && first.dtype == Dtype::bf16) {
      interleave<Bf16>(first.vocab, row, tile);
    } else {
      interleave_loaded();
    }
  }

  // What cannot be read as it lies.
  void interleave_loaded() {
    char* loaded[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      loaded[i] = reinterpret_cast<char*>(rows + i * padded(first.vocab));
      source(i).load(0);
    }
    interleave<Real>(first.vocab, loaded, tile);
  }

  Source<Real> source(int i) const { return first.at(row[i], rows + i * padded(first.vocab)); }

  // TAID's target, as Source::mix_with has it for one row.
  void mix_with(const Side& other, Real t) {
    const Real a = t * first.gain, b = (1 - t) * other.first.gain;
#pragma omp simd
    for (int64_t j = 0; j < first.vocab * kLanes; ++j)
      tile[j] = mul_add(a, tile[j], b * other.tile[j]);
    first.gain = 1;
  }

  // Pass 1. touch: memory of the rows that are taken next.
  void exponentials(Prefetch touch) {
    const int64_t n = first.vocab * kLanes;
    const Lanes<Real> max = lane_max<Real>(n, tile);
    from_lanes(max, shift);
    Real sum[kLanes];
    from_lanes(block_exp(n, tile, first.gain2(), max, e, touch), sum);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      lse[i] = first.origin(shift[i]) + fast_log(double(sum[i]));
      factor[i] = 1 / sum[i];
    }
  }

  void argmax(int64_t (&index)[kLanes]) const {
    Real top[kLanes];
    for (int i = 0; i < kLanes; ++i) top[i] = -INFINITY, index[i] = 0;
    for (int64_t j = 0; j < first.vocab; ++j)
      for (int i = 0; i < kLanes; ++i)
        if (tile[j * kLanes + i] > top[i]) top[i] = tile[j * kLanes + i], index[i] = j;
  }
};

// r: kLanes rows, of which the first `count` are wanted; next: the first of those that are taken next.
template <class Kind, class Real>
void short_rows(const Problem<Real>& problem, const int64_t* r, int count, int64_t next,
                const Workspace<Real>& w) {
  const int64_t n = problem.vocab;
  const Real t = problem.kind == kTAID ? problem.params.a : Real(1);
  Side<Real> student(problem.student, problem, r, w.tiles);
  Side<Real> teacher(t == 0 ? problem.student : problem.teacher, problem, r, w.tiles + 3);
  if (t > 0 && t < 1) teacher.mix_with(student, t);
  const auto memory_of = [](const Rows& rows, int64_t row) {
    return Prefetch{row_of(rows, row), kLanes * element_size(rows.dtype)};
  };
  student.exponentials(memory_of(problem.student.rows, next));
  teacher.exponentials(memory_of(problem.teacher.rows, next));

  double lse_difference[kLanes];
  Real weight[kLanes];
  const Real gain = student.first.gain, teacher_gain = teacher.first.gain;
  for (int i = 0; i < kLanes; ++i) {
    lse_difference[i] = teacher.lse[i] - student.lse[i];
    weight[i] = divergence_weight(problem, r[i]) * gain;
  }
  const Block<Real, Real, Lanes<Real>> whole{n * kLanes,
                                             student.tile,
                                             teacher.tile,
                                             student.e,
                                             teacher.e,
                                             {gain,
                                              teacher_gain,
                                              gain / teacher_gain,
                                              minus_two_part<Real>(lse_difference),
                                              minus_two_part<Real>(student.lse),
                                              minus_two_part<Real>(teacher.lse),
                                              to_lanes(student.factor),
                                              to_lanes(teacher.factor),
                                              {},
                                              {}}};
  const bool with_gradient = problem.gradient.data != nullptr;
  Real* g = whole.q;  // the gradient takes the place of q
  Prefetch touch = with_gradient ? memory_of(problem.gradient, r[0]) : Prefetch::none(student.tile);
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
    if (!with_gradient && !Kind::kFinish) {
      add_lanes(block_value<Kind>(b, problem.params, touch), value);
    } else if constexpr (kOnePass<Kind>) {
      add_lanes(block_gradient<Kind, true>(b, problem.params, to_lanes(weight), g + at, touch),
                value);
    } else {
      const Slopes<Real> s = block_slopes<Kind, true>(b, problem.params, touch);
      add_lanes(s.value, value);
      add_lanes(s.slope, slope);
    }
    touch.at += touch.step * kColumns;
  }
  if (Kind::kFinish) {
    for (int i = 0; i < kLanes; ++i) {
      const Finished finished = Kind::finish(value[i], slope[i], problem.params);
      value[i] = finished.value;
      weight[i] *= Real(finished.factor);
    }
  }
  if (with_gradient && !kOnePass<Kind>) {
    Real H[kLanes];
    for (int i = 0; i < kLanes; ++i) H[i] = Real(slope[i]);
    block_combine(whole.n, whole.q, whole.p, to_lanes(H), to_lanes(weight), g);
  }

  if (problem.stats != nullptr) {
    int64_t student_top[kLanes], teacher_top[kLanes];
    student.argmax(student_top);
    teacher.argmax(teacher_top);
    for (int i = 0; i < count; ++i) {
      const Real agreement = student_top[i] == teacher_top[i];
      write_stats<Real>(
          problem, r[i],
          {Real(acceptance[i]), agreement, Real(student_entropy[i]), Real(teacher_entropy[i]),
           Real(student.lse[i]), Real(teacher.lse[i]), Real(below[i])});
    }
  }
  char* gradient[kLanes];
  for (int i = 0; i < kLanes && with_gradient; ++i) gradient[i] = row_of(problem.gradient, r[i]);
  const bool plain = student.first.cap == 0 && !has_labels(problem);
  if (plain) {
    for (int i = 0; i < count; ++i) write_value(problem, r[i], value[i], {});
    if (!with_gradient) return;
    if (problem.gradient.dtype == DtypeOf<Real>::value)
      return deinterleave<Real>(n, g, gradient, count);
    if (problem.gradient.dtype == Dtype::bf16) return deinterleave<Bf16>(n, g, gradient, count);
  }
  // Row by row, through what held the teacher's rows.
  char* rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<char*>(teacher.rows + i * padded(n));
  if (with_gradient) deinterleave<Real>(n, g, rows, count);
  for (int i = 0; i < count; ++i) {
    Source<Real> source = student.source(i);
    Normaliser<Real> normaliser;
    normaliser.lse = student.lse[i];
    normaliser.shift = student.shift[i];
    normaliser.factor = student.factor[i];
    const LabelTerm<Real> label(problem, r[i], source, normaliser, w);
    write_value(problem, r[i], value[i], label);
    if (with_gradient)
      finish_gradient(source, label, 0, plain ? nullptr : source.load(0),
                      reinterpret_cast<Real*>(rows[i]), problem.gradient.dtype, gradient[i]);
  }
}
