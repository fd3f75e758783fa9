// The divergence of sorted rows (ULD): sum_k |q_(k) - p_(k)|, both sides in descending order, the shorter
// one continued by zeros. With s the sign of q_(k) - p_(k) at the rank of a column,
//     D = sum q s - sum p s,    dD/dz_j = q_j (s_j - sum q s).
// No sort: log-probabilities fall into bins, and a bin whose ranks on one side do not overlap those on the
// other has one sign for all of it. Only the other bins are sorted, each for itself.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

constexpr int kBins = 2048;
constexpr double kBinned = 64;  // nats below the largest probability; what is less falls into one bin

// One side of a row on its way into bins; columns of -inf fall into bin kBins, which nobody asks for.
template <class Real>
struct BinnedSide {
  Source<Real>& source;
  const MinusTwoPart<Uniform<Real>> lse;
  uint16_t* bin;    // [padded(vocab)]
  Real* key;        // [vocab], log-probabilities of the columns that are to be sorted, bin by bin
  int32_t* column;  // [vocab]
  int32_t count[kBins + 1] = {}, begin[kBins + 1] = {};  // of bins, and where their keys start

  // scratch: [kParts, n]
  static constexpr int kParts = 3;
  BinnedSide(Source<Real>& source, const Normaliser<Real>& normaliser, Real* scratch, int64_t n)
      : source(source),
        lse(stillhouse::minus_two_part<Real>(normaliser.lse)),
        bin(reinterpret_cast<uint16_t*>(scratch)),
        key(scratch + n),
        column(reinterpret_cast<int32_t*>(scratch + 2 * n)) {}

  SH_INLINE Real log_probability(Real x) const {
    return mul_add(source.gain, x, lse.high.value) + lse.low.value;
  }

  // The smallest that is not -inf, and the largest.
  void widen_range(Real& low, Real& high) {
    for (int64_t start = 0; start < source.vocab; start += kBlock) {
      const Real* x = source.load(start);
      Real least = INFINITY, most = -INFINITY;
#pragma omp simd reduction(min : least) reduction(max : most)
      for (int64_t j = 0; j < padded(source.columns(start)); ++j) {
        const Real shown = x[j] > -INFINITY ? x[j] : INFINITY;
        least = shown < least ? shown : least;
        most = x[j] > most ? x[j] : most;
      }
      const Real l = log_probability(least), h = log_probability(most);
      low = l < low ? l : low, high = h > high ? h : high;
    }
  }

  void fill(Real high, Real scale) {
    for (int64_t start = 0; start < source.vocab; start += kBlock) {
      const Real* x = source.load(start);
      const int64_t n = padded(source.columns(start));
      uint16_t* out = bin + start;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const Real below = (high - log_probability(x[j])) * scale;
        const Real inside = below < Real(kBins - 1) ? below : Real(kBins - 1);
        out[j] = uint16_t(x[j] > -INFINITY ? int32_t(inside) : int32_t(kBins));
      }
    }
    for (int64_t j = 0; j < source.vocab; ++j) ++count[bin[j]];
  }

  // The columns of bins that are to be sorted, those of a bin together, in their order.
  void gather(const bool* mixed) {
    int32_t at[kBins + 1];
    int32_t total = 0;
    for (int b = 0; b <= kBins; ++b) {
      begin[b] = at[b] = total;
      if (mixed[b]) total += count[b];
    }
    if (total == 0) return;
    for (int64_t j = 0; j < source.vocab; ++j) {
      const int b = bin[j];
      if (!mixed[b]) continue;
      column[at[b]] = int32_t(j);
      key[at[b]++] = log_probability(source.at_column(j));
    }
  }

  // Keys [first, first + n) in descending order, equal ones by column. Merges runs, by way of `spare`.
  void sort(int64_t first, int64_t n, Real* spare_key, int32_t* spare_column) {
    constexpr int64_t kRun = 16;
    Real *from = key + first, *to = spare_key;
    int32_t *from_column = column + first, *to_column = spare_column;
    for (int64_t low = 0; low < n; low += kRun) {
      for (int64_t i = low + 1; i < n && i < low + kRun; ++i) {
        const Real k = from[i];
        const int32_t c = from_column[i];
        int64_t at = i;
        for (; at > low && from[at - 1] < k; --at)
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
          const bool left = j == high || (i < middle && !(from[i] < from[j]));
          const int64_t taken = left ? i++ : j++;
          to[at] = from[taken], to_column[at] = from_column[taken];
        }
      }
      Real* const other = from;
      int32_t* const other_column = from_column;
      from = to, from_column = to_column;
      to = other, to_column = other_column;
    }
    for (int64_t i = 0; i < n && from != key + first; ++i)
      key[first + i] = from[i], column[first + i] = from_column[i];
  }
};

template <class Real>
struct SortedRow {
  const Problem<Real>& problem;
  const Workspace<Real>& w;
  Source<Real> student, teacher;
  Normaliser<Real> z_normaliser, t_normaliser;
  LabelTerm<Real> label;
  double value = 0, slope = 0;  // slope: sum q s
  Real* signed_q = nullptr;     // [padded(vocab)], q s

  SortedRow(const Problem<Real>& problem, int64_t r, const Workspace<Real>& w)
      : problem(problem),
        w(w),
        student(problem.student, r, problem.vocab, w.student),
        teacher(problem.teacher, r, problem.teacher_vocab, w.teacher) {
    z_normaliser = exponentials(student, w.q, w.q_shift, w.student_e, Prefetch::none(student.row));
    t_normaliser = exponentials(teacher, w.p, w.p_shift, w.teacher_e, Prefetch::none(teacher.row));
    label = LabelTerm<Real>(problem, r, student, z_normaliser, w);
  }

  // Leaves probabilities in w.q.
  void run() {
    constexpr int kParts = BinnedSide<Real>::kParts;
    const int64_t part = w.order_part;
    BinnedSide<Real> z(student, z_normaliser, w.order, part);
    BinnedSide<Real> t(teacher, t_normaliser, w.order + kParts * part, part);
    Real* const spare_key = w.order + 2 * kParts * part;
    int32_t* const spare_column = reinterpret_cast<int32_t*>(spare_key + part);
    signed_q = spare_key + 2 * part;
    static_assert(2 * kParts + 3 == kOrderParts, "what lay_out() makes room for");
    Real low = INFINITY, high = -INFINITY;
    z.widen_range(low, high);
    t.widen_range(low, high);
    Real range = high - low;
    range = range < Real(kBinned) ? range : Real(kBinned);
    const Real scale = range > 0 ? Real(kBins) / range : Real(1);
    z.fill(high, scale);
    t.fill(high, scale);

    Real sign[kBins + 1];
    bool mixed[kBins + 1];
    int32_t z_rank[kBins], t_rank[kBins];
    int32_t z_count = 0, t_count = 0;  // of larger ones
    for (int b = 0; b < kBins; ++b) {
      z_rank[b] = z_count, t_rank[b] = t_count;
      const bool student_larger = z_count >= t_count + t.count[b];
      const bool teacher_larger = z_count + z.count[b] <= t_count;
      mixed[b] = !student_larger && !teacher_larger;
      sign[b] = Real(student_larger) - Real(teacher_larger && !student_larger);
      z_count += z.count[b], t_count += t.count[b];
    }
    sign[kBins] = 0, mixed[kBins] = false;
    value -= add_signs(teacher, t_normaliser, w.p_shift, w.p, t.bin, sign, signed_q);
    slope += add_signs(student, z_normaliser, w.q_shift, w.q, z.bin, sign, signed_q);
    z.gather(mixed);
    t.gather(mixed);
    for (int b = 0; b < kBins; ++b) {
      if (!mixed[b]) continue;
      const int64_t n = z.count[b], m = t.count[b];
      z.sort(z.begin[b], n, spare_key, spare_column);
      t.sort(t.begin[b], m, spare_key, spare_column);
      const Real *q = z.key + z.begin[b], *p = t.key + t.begin[b];
      const int64_t shift = int64_t(t_rank[b]) - z_rank[b];  // from an index of q to that of its partner
      for (int64_t i = 0; i < n; ++i) {
        const int64_t partner = i - shift;
        const Real s = partner < 0 ? Real(-1) : partner >= m ? Real(1) : compare(q[i], p[partner]);
        const int64_t j = z.column[z.begin[b] + i];
        signed_q[j] = w.q[j] * s;
        slope += double(signed_q[j]);
      }
      for (int64_t i = 0; i < m; ++i) {
        const int64_t partner = i + shift;
        const Real s = partner < 0 ? Real(1) : partner >= n ? Real(-1) : compare(q[partner], p[i]);
        value -= double(s * w.p[t.column[t.begin[b] + i]]);
      }
    }
    value += slope;
  }

  static Real compare(Real a, Real b) { return Real(a > b) - Real(a < b); }

  // Exponentials e to probabilities, and those times the sign of their bin to `signed_e`; their sum.
  double add_signs(const Source<Real>& source, Normaliser<Real>& normaliser, const Real* shifts,
                   Real* e, const uint16_t* bin, const Real* sign, Real* signed_e) {
    double sum = 0;
    for (int64_t start = 0; start < source.vocab; start += kBlock) {
      const Real factor = normaliser.factor_at(shifts[start / kBlock], source);
      Real part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = start; j < start + padded(source.columns(start)); ++j) {
        const Real q = e[j] * factor, h = q * sign[bin[j]];
        e[j] = q;
        signed_e[j] = h;
        part += h;
      }
      sum += double(part);
    }
    return sum;
  }
};

template <class Real>
void sorted_row(const Problem<Real>& problem, int64_t r, const Workspace<Real>& w) {
  SortedRow<Real> row(problem, r, w);
  Real entropy[2] = {};
  if (problem.stats != nullptr) {
    entropy[0] = entropy_of(row.student, row.z_normaliser, w.student_e);
    entropy[1] = entropy_of(row.teacher, row.t_normaliser, w.teacher_e);
  }
  row.run();
  // A NaN is in no bin; it is in the log-sum-exps.
  const double nan = (row.z_normaliser.lse - row.z_normaliser.lse) +
                     (row.t_normaliser.lse - row.t_normaliser.lse);
  write_value(problem, r, row.value + nan, row.label);
  if (problem.stats != nullptr) {
    const Real none = NAN;  // a column of one side has nothing to do with that of the other
    write_stats<Real>(problem, r,
                      {none, none, entropy[0], entropy[1], Real(row.z_normaliser.lse),
                       Real(row.t_normaliser.lse), none});
  }
  if (problem.gradient.data == nullptr) return;
  const Real weight = divergence_weight(problem, r) * row.student.gain;
  for (int64_t start = 0; start < problem.vocab; start += kBlock) {
    const Real* x = row.label.on || row.student.cap > 0 ? row.student.load(start) : nullptr;
    block_combine(padded(row.student.columns(start)), w.q + start,
                  row.signed_q + start, Uniform<Real>(Real(row.slope + nan)), Uniform<Real>(weight), w.gradient);
    finish_gradient(row.student, row.label, start, x, w.gradient, problem.gradient.dtype,
                    row_of(problem.gradient, r));
  }
}
