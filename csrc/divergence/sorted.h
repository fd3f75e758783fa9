// The divergence of sorted rows (ULD): sum_k |q_(k) - p_(k)|, both sides in descending order, the shorter
// one continued by zeros. With s the sign of q_(k) - p_(k) at the rank k of a column,
//     D = sum q s - sum p s,    dD/dz_j = q_j (s_j - sum q s).
// No sort: probabilities fall into bins, and where the ranks of the two sides in a bin do not meet, all of
// the bin has one sign. Only where they meet is a bin sorted.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// A range of bins with one sign, or with sign 0 and to be sorted. n, m: how many of student and teacher
// it has; shift: how many more of the teacher than of the student are before it.
struct Range {
  int32_t first_bin, n, m, shift;
  int sign;
};

// The bins from the largest probabilities on, in ranges.
struct Ranges {
  static constexpr int32_t kFewest =
      32;  // a shorter range is cheaper sorted than told from its neighbours
  static constexpr int kFew = 10;  // more are looked up in a table
  Range at[kRankBins];
  int count = 0;

  void add(const Range& next) {
    if (count > 0 && at[count - 1].sign == next.sign) {
      at[count - 1].n += next.n, at[count - 1].m += next.m;
    } else {
      at[count++] = next;
    }
  }
  void fill(const int32_t* student, const int32_t* teacher) {
    int32_t n = 0, m = 0;
    Ranges& all = *this;
    for (int b = 0; b < kRankBins; ++b) {
      if (student[b] == 0 && teacher[b] == 0) continue;
      const int32_t n_after = n + student[b], m_after = m + teacher[b];
      const int sign = n >= m_after ? 1 : n_after <= m ? -1 : 0;
      all.add({b, student[b], teacher[b], m - n, sign});
      n = n_after, m = m_after;
    }
    const int before = count;
    count = 0;
    for (int i = 0; i < before; ++i) {
      Range range = at[i];
      if (range.n + range.m < kFewest) range.sign = 0;
      add(range);
    }
  }
};

// One side of a row.
template <class Real>
struct SortedSide {
  Source<Real> source;
  Normaliser<Real> normaliser;
  Real* q;  // [padded(vocab)], probabilities; of a plain bfloat16 block in the order of load_step()
  Real* key;        // [vocab], probabilities of the columns that are to be sorted, range by range
  int32_t* column;  // [vocab]
  int32_t count[kRankBins + 1];  // of bins
  int32_t end[kRankBins];        // of the lists of ranges
  int16_t range_of[kRankBins];   // bins

  // scratch: [kParts, n]
  static constexpr int kParts = 2;
  SortedSide(const Source<Real>& source, Real* q, Real* scratch, int64_t n)
      : source(source), q(q), key(scratch), column(reinterpret_cast<int32_t*>(scratch + n)) {
    for (int32_t& c : count) c = 0;
  }

  bool as_bf16(int64_t at) const { return source.as_bf16 && source.plain(at / kBlock * kBlock); }
  // What lies at a position of q, and the way back; the same but in a block in the order of load_step(),
  // where that has one of its own.
  bool reordered(int64_t at) const { return kWidth<Real> > 1 && as_bf16(at); }
  int64_t column_at(int64_t at) const {
    const int64_t i = at % kLanes, half = kLanes / 2;
    return reordered(at) ? at - i + (i < half ? 2 * i : 2 * (i - half) + 1) : at;
  }
  int64_t position_of(int64_t j) const {
    const int64_t i = j % kLanes;
    return reordered(j) ? j - i + i / 2 + (i % 2) * (kLanes / 2) : j;
  }

  // Exponentials to probabilities; counts the bins. buffer: [kBlock]
  void count_bins(const Real* shifts, int32_t* buffer) {
    for (int64_t start = 0; start < source.vocab; start += kBlock) {
      const Real factor = normaliser.factor_at(shifts[start / kBlock], source);
      const int64_t n = padded(source.columns(start));
      Real* const p = q + start;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        p[j] = p[j] * factor;
        buffer[j] = rank_bin(p[j]);
      }
      for (int64_t j = 0; j < n; ++j) ++count[buffer[j]];
    }
  }

  // q times the sign of its rank to signed_q, 0 where its range has none; returns their sum. The columns
  // of such a range are listed.
  double add_signs(const Ranges& ranges, Real* signed_q, int32_t* buffer) {
    const bool few = ranges.count <= Ranges::kFew;
    Real most[Ranges::kFew], sign[Ranges::kFew], of_bin[kRankBins + 1];
    int32_t listed = 0;
    for (int i = 0; i < Ranges::kFew; ++i) most[i] = -INFINITY, sign[i] = 0;
    for (int i = 0; i < ranges.count; ++i) {
      const Range& range = ranges.at[i];
      const int next = i + 1 < ranges.count ? ranges.at[i + 1].first_bin : kRankBins;
      if (few) most[i] = first_of_rank_bin(range.first_bin), sign[i] = Real(range.sign);
      for (int b = range.first_bin; b < next; ++b) of_bin[b] = Real(range.sign), range_of[b] = i;
      end[i] = listed;
      for (int b = range.first_bin; range.sign == 0 && b < next; ++b) listed += count[b];
    }
    of_bin[kRankBins] = 0;
    double sum = 0;
    for (int64_t start = 0; start < source.vocab; start += kBlock) {
      const int64_t n = padded(source.columns(start));
      const Real* const p = q + start;
      Real* const out = signed_q + start;
      if (!few) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) buffer[j] = rank_bin(p[j]);
        for (int64_t j = 0; j < n; ++j) out[j] = of_bin[buffer[j]];
      }
      Lanes<Real> part;
      for (int64_t j = 0; j < n; j += kLanes) {
        Lanes<Real> open;  // what has no sign
        SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
          Lane<Real> pi, s;
          load_step(p + j, i, pi);
          if (!few) {
            load_step(out + j, i, s);
          } else {
            s = Lane<Real>(sign[0]);
            for (int k = 1; k < Ranges::kFew; ++k)
              s = select(pi > Lane<Real>(most[k]), s, Lane<Real>(sign[k]));
          }
          const Lane<Real> h = pi * s;
          store(h, out + j + i * kWidth<Real>);
          part[i] += h;
          open[i] = pi - magnitude(h);
        }
        if (listed == 0 || !(fold_sum(open) > 0)) continue;
        uint32_t bits = 0;
        for (int64_t i = 0; i < kSteps<Real>; ++i)
          bits |= bits_of(open[i] > Lane<Real>(0)) << (i * kWidth<Real>);
        list(start + j, bits);
      }
      sum += double(fold_sum(part));
    }
    return sum;
  }

  // Of kLanes columns those that were given no sign.
  void list(int64_t start, uint32_t open) {
    for (; open != 0; open &= open - 1) {
      const int64_t at = start + __builtin_ctz(open);
      const int i = range_of[rank_bin(q[at])];
      key[end[i]] = q[at];
      column[end[i]++] = int32_t(column_at(at));
    }
  }

  bool before(Real a, int32_t a_column, Real b, int32_t b_column) const {
    return a > b || (a == b && a_column < b_column);
  }

  // A list in descending order, equal ones by column. Runs are merged by way of `spare`.
  void sort(int64_t begin, int64_t n, Real* spare_key, int32_t* spare_column) {
    constexpr int64_t kRun = 16;
    Real *from = key + begin, *to = spare_key;
    int32_t *from_column = column + begin, *to_column = spare_column;
    for (int64_t low = 0; low < n; low += kRun) {
      for (int64_t i = low + 1; i < n && i < low + kRun; ++i) {
        const Real k = from[i];
        const int32_t c = from_column[i];
        int64_t at = i;
        for (; at > low && before(k, c, from[at - 1], from_column[at - 1]); --at)
          from[at] = from[at - 1], from_column[at] = from_column[at - 1];
        from[at] = k, from_column[at] = c;
      }
    }
    for (int64_t run = kRun; run < n; run *= 2) {
      for (int64_t low = 0; low < n; low += 2 * run) {
        const int64_t middle = low + run < n ? low + run : n;
        const int64_t high = low + 2 * run < n ? low + 2 * run : n;
        int64_t i = low, j = middle;
        for (int64_t at = low; at < high; ++at) {
          const bool right =
              i == middle || (j < high && before(from[j], from_column[j], from[i], from_column[i]));
          const int64_t taken = right ? j++ : i++;
          to[at] = from[taken], to_column[at] = from_column[taken];
        }
      }
      Real* const other = from;
      int32_t* const other_column = from_column;
      from = to, from_column = to_column;
      to = other, to_column = other_column;
    }
    for (int64_t i = 0; i < n && from == spare_key; ++i)
      key[begin + i] = from[i], column[begin + i] = from_column[i];
  }
};

template <class Real>
struct SortedRow {
  const Problem<Real>& problem;
  const Workspace<Real>& w;
  SortedSide<Real> student, teacher;
  LabelTerm<Real> label;
  Real* signed_q;               // [padded(vocab)], q s
  double value = 0, slope = 0;  // slope: sum q s

  SortedRow(const Problem<Real>& problem, int64_t r, int64_t next, const Workspace<Real>& w)
      : problem(problem),
        w(w),
        student({problem.student, r, problem.vocab, w.student}, w.q, w.order, w.order_part),
        teacher({problem.teacher, r, problem.teacher_vocab, w.teacher}, w.p,
                w.order + SortedSide<Real>::kParts * w.order_part, w.order_part),
        signed_q(w.order + 2 * SortedSide<Real>::kParts * w.order_part) {
    static_assert(2 * SortedSide<Real>::kParts + 4 == kOrderParts, "what lay_out() makes room for");
    Source<Real>&z = student.source, &t = teacher.source;
    z.as_bf16 = z.dtype == Dtype::bf16 && !labelled(problem, r);
    t.as_bf16 = t.dtype == Dtype::bf16;
    const auto touch = [&](const Rows& rows) {
      return Prefetch{row_of(rows, next), kLanes * element_size(rows.dtype)};
    };
    student.normaliser = exponentials(z, w.q, w.q_shift, w.student_e, touch(problem.student.rows));
    teacher.normaliser = exponentials(t, w.p, w.p_shift, w.teacher_e, touch(problem.teacher.rows));
    label = LabelTerm<Real>(problem, r, z, student.normaliser, w);
  }

  void run() {
    int32_t* const buffer = reinterpret_cast<int32_t*>(w.gradient);
    student.count_bins(w.q_shift, buffer);
    teacher.count_bins(w.p_shift, buffer);
    Ranges ranges;
    ranges.fill(student.count, teacher.count);
    bool any_listed = false;
    for (int i = 0; i < ranges.count; ++i) any_listed = any_listed || ranges.at[i].sign == 0;
    if (problem.value != nullptr || any_listed)
      value -= teacher.add_signs(ranges, signed_q + w.order_part, buffer);
    slope += student.add_signs(ranges, signed_q, buffer);
    for (int i = 0; i < ranges.count; ++i)
      if (ranges.at[i].sign == 0) match(i, ranges.at[i]);
    value += slope;
  }

  // Rank by rank.
  void match(int range, const Range& r) {
    Real* const spare_key = signed_q + 2 * w.order_part;
    int32_t* const spare_column = reinterpret_cast<int32_t*>(spare_key + w.order_part);
    const int64_t z_begin = student.end[range] - r.n, t_begin = teacher.end[range] - r.m;
    student.sort(z_begin, r.n, spare_key, spare_column);
    teacher.sort(t_begin, r.m, spare_key, spare_column);
    const Real *q = student.key + z_begin, *p = teacher.key + t_begin;
    for (int64_t i = 0; i < r.n; ++i) {
      const int64_t partner = i - r.shift;
      const Real s = partner < 0 ? Real(-1) : partner >= r.m ? Real(1) : compare(q[i], p[partner]);
      signed_q[student.position_of(student.column[z_begin + i])] = q[i] * s;
      slope += double(q[i] * s);
    }
    for (int64_t i = 0; i < r.m; ++i) {
      const int64_t partner = i + r.shift;
      const Real s = partner < 0 ? Real(1) : partner >= r.n ? Real(-1) : compare(q[partner], p[i]);
      value -= double(p[i] * s);
    }
  }
  static Real compare(Real a, Real b) { return Real(int(a > b) - int(a < b)); }

  void write_gradient(int64_t r, double nan) {
    const Source<Real>& z = student.source;
    const Uniform<Real> weight(divergence_weight(problem, r) * z.gain), H(Real(slope + nan));
    char* const row = row_of(problem.gradient, r);
    for (int64_t start = 0; start < problem.vocab; start += kBlock) {
      const int64_t n = padded(z.columns(start));
      const auto combine = [&](auto* out) {
        block_combine(n, student.q + start, signed_q + start, H, weight, out);
      };
      if constexpr (sizeof(Real) == 4) {
        if (student.as_bf16(start)) {
          combine(reinterpret_cast<Bf16*>(row) + start);
          continue;
        }
      }
      if (z.dtype == DtypeOf<Real>::value && z.plain(start) && !label.on) {
        combine(reinterpret_cast<Real*>(row) + start);
        continue;
      }
      const Real* x = label.on || z.cap > 0 ? student.source.load(start) : nullptr;
      combine(w.gradient);
      finish_gradient(z, label, start, x, w.gradient, problem.gradient.dtype, row);
    }
  }
};

template <class Real>
void sorted_row(const Problem<Real>& problem, int64_t r, int64_t next, const Workspace<Real>& w) {
  SortedRow<Real> row(problem, r, next, w);
  const Normaliser<Real>&z = row.student.normaliser, &t = row.teacher.normaliser;
  if (problem.stats != nullptr) {
    Source<Real> student = row.student.source.with_buffer(w.gradient);
    Source<Real> teacher = row.teacher.source.with_buffer(w.gradient);
    const Real none = NAN;  // a column of one side has nothing to do with that of the other
    write_stats<Real>(problem, r,
                      {none, none, entropy_of(student, z, w.student_e),
                       entropy_of(teacher, t, w.teacher_e), Real(z.lse), Real(t.lse), none});
  }
  row.run();
  const double nan = (z.lse - z.lse) + (t.lse - t.lse);  // a NaN is in no bin, but in these
  write_value(problem, r, row.value + nan, row.label);
  if (problem.gradient.data != nullptr) row.write_gradient(r, nan);
}
