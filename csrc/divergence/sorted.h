// The divergence of sorted rows (ULD): sum_k |q_(k) - p_(k)|, both sides in descending order, the shorter
// one continued by zeros. With s the sign of q_(k) - p_(k) at the rank k of a column,
//     D = sum q s - sum p s,    dD/dz_j = q_j (s_j - sum q s).
// No sort: probabilities fall into bins, and where the ranks of the two sides in a bin do not meet, all of
// the bin has one sign. Only where they meet is a bin sorted.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// One side of a row.
template <class Real>
struct SortedSide {
  Source<Real> source;
  Normaliser<Real> normaliser;
  Real* q;              // [padded(vocab)], probabilities; of a plain bfloat16 block in the order of load_step()
  uint16_t* bin;        // [padded(vocab)], in the same order
  Real* key;            // [vocab], probabilities of the columns that are to be sorted, bin by bin
  int32_t* column;      // [vocab]
  int32_t count[kRankBins + 1], begin[kRankBins + 1];  // of bins, and where their keys start
  int32_t rank[kRankBins];                             // how many are in the bins before

  // scratch: [kParts, n]
  static constexpr int kParts = 3;
  SortedSide(const Source<Real>& source, Real* q, Real* scratch, int64_t n)
      : source(source),
        q(q),
        bin(reinterpret_cast<uint16_t*>(scratch)),
        key(scratch + n),
        column(reinterpret_cast<int32_t*>(scratch + 2 * n)) {
    for (int32_t& c : count) c = 0;
  }

  // What lies at a position of q, and the way back; the same but in a block in the order of load_step().
  bool reordered(int64_t at) const { return source.as_bf16 && source.plain(at / kBlock * kBlock); }
  int64_t column_at(int64_t at) const {
    const int64_t i = at % kLanes, half = kLanes / 2;
    return reordered(at) ? at - i + (i < half ? 2 * i : 2 * (i - half) + 1) : at;
  }
  int64_t position_of(int64_t j) const {
    const int64_t i = j % kLanes;
    return reordered(j) ? j - i + i / 2 + (i % 2) * (kLanes / 2) : j;
  }

  // Exponentials to probabilities; fills the bins.
  void count_bins(const Real* shifts) {
    for (int64_t start = 0; start < source.vocab; start += kBlock) {
      const Real factor = normaliser.factor_at(shifts[start / kBlock], source);
      const int64_t end = start + padded(source.columns(start));
      Real* const p = q;
      uint16_t* const b = bin;
#pragma omp simd
      for (int64_t j = start; j < end; ++j) {
        p[j] = p[j] * factor;
        b[j] = uint16_t(rank_bin(float(p[j])));
      }
      for (int64_t j = start; j < end; ++j) ++count[b[j]];
    }
  }

  // q times the sign of its bin to signed_q, if that is not null; returns their sum. Appends the columns
  // of bins without a sign to the list of their bin.
  double add_signs(const Real* sign, bool any_mixed, Real* signed_q, Real* buffer) {
    int32_t at[kRankBins + 1];
    for (int b = 0; b <= kRankBins; ++b) at[b] = begin[b];
    double sum = 0;
    for (int64_t start = 0; start < source.vocab; start += kBlock) {
      const int64_t n = padded(source.columns(start));
      const Real* const p = q + start;
      const uint16_t* const b = bin + start;
      Real* const out = signed_q != nullptr ? signed_q + start : buffer;
      Real part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < n; ++j) {
        const Real h = p[j] * sign[b[j]];
        out[j] = h;
        part += h;
      }
      sum += double(part);
      if (!any_mixed) continue;
      for (int64_t j = 0; j < n; j += kLanes) {
        int any = 0;
        for (int i = 0; i < kLanes; ++i) any |= sign[b[j + i]] == 0;
        if (!any) continue;
        for (int i = 0; i < kLanes; ++i) {
          const int bin_of = b[j + i];
          if (sign[bin_of] != 0 || bin_of == kRankBins) continue;
          key[at[bin_of]] = p[j + i];
          column[at[bin_of]++] = int32_t(column_at(start + j + i));
        }
      }
    }
    return sum;
  }

  // Where the list of each bin without a sign starts. Returns whether there is one.
  bool lay_out_lists(const Real* sign) {
    int32_t total = 0;
    for (int b = 0; b <= kRankBins; ++b) {
      begin[b] = total;
      if (sign[b] == 0 && b < kRankBins) total += count[b];
    }
    return total > 0;
  }

  bool before(Real a, int32_t a_column, Real b, int32_t b_column) const {
    return a > b || (a == b && a_column < b_column);
  }

  // A list in descending order, equal ones by column. Runs are merged by way of `spare`.
  void sort(int b, Real* spare_key, int32_t* spare_column) {
    constexpr int64_t kRun = 16;
    const int64_t n = count[b];
    Real *from = key + begin[b], *to = spare_key;
    int32_t *from_column = column + begin[b], *to_column = spare_column;
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
              i == middle ||
              (j < high && before(from[j], from_column[j], from[i], from_column[i]));
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
      key[begin[b] + i] = from[i], column[begin[b] + i] = from_column[i];
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
    static_assert(2 * SortedSide<Real>::kParts + 3 == kOrderParts, "what lay_out() makes room for");
    Source<Real>&z = student.source, &t = teacher.source;
    z.as_bf16 = z.dtype == Dtype::bf16 && !labelled(problem, r);
    t.as_bf16 = t.dtype == Dtype::bf16;
    const auto touch = [&](const Rows& rows) {
      return Prefetch{row_of(rows, next), kLanes * element_size(rows.dtype)};
    };
    student.normaliser =
        exponentials(z, w.q, w.q_shift, w.student_e, touch(problem.student.rows));
    teacher.normaliser =
        exponentials(t, w.p, w.p_shift, w.teacher_e, touch(problem.teacher.rows));
    label = LabelTerm<Real>(problem, r, z, student.normaliser, w);
  }

  void run() {
    student.count_bins(w.q_shift);
    teacher.count_bins(w.p_shift);
    Real sign[kRankBins + 1];  // 0: none of its own
    int32_t before_z = 0, before_t = 0;
    for (int b = 0; b < kRankBins; ++b) {
      student.rank[b] = before_z, teacher.rank[b] = before_t;
      const int32_t after_z = before_z + student.count[b], after_t = before_t + teacher.count[b];
      sign[b] = Real(int(before_z >= after_t) - int(after_z <= before_t && before_z < after_t));
      before_z = after_z, before_t = after_t;
    }
    sign[kRankBins] = 0;
    const bool z_mixed = student.lay_out_lists(sign), t_mixed = teacher.lay_out_lists(sign);
    if (problem.value != nullptr || t_mixed)
      value -= teacher.add_signs(sign, t_mixed, nullptr, w.gradient);
    slope += student.add_signs(sign, z_mixed, signed_q, w.gradient);
    for (int b = 0; b < kRankBins && (z_mixed || t_mixed); ++b)
      if (sign[b] == 0 && student.count[b] + teacher.count[b] > 0) match(b);
    value += slope;
  }

  // A bin in which the ranks of the sides meet.
  void match(int b) {
    Real* const spare_key = signed_q + w.order_part;
    int32_t* const spare_column = reinterpret_cast<int32_t*>(spare_key + w.order_part);
    student.sort(b, spare_key, spare_column);
    teacher.sort(b, spare_key, spare_column);
    const Real *q = student.key + student.begin[b], *p = teacher.key + teacher.begin[b];
    const int64_t n = student.count[b], m = teacher.count[b];
    const int64_t shift = int64_t(teacher.rank[b]) - student.rank[b];  // from q's index to its partner's
    for (int64_t i = 0; i < n; ++i) {
      const int64_t partner = i - shift;
      const Real s = partner < 0 ? Real(-1) : partner >= m ? Real(1) : compare(q[i], p[partner]);
      signed_q[student.position_of(student.column[student.begin[b] + i])] = q[i] * s;
      slope += double(q[i] * s);
    }
    for (int64_t i = 0; i < m; ++i) {
      const int64_t partner = i + shift;
      const Real s = partner < 0 ? Real(1) : partner >= n ? Real(-1) : compare(q[partner], p[i]);
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
        if (student.reordered(start)) {
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
