// A teacher that is known at k columns of a row: by what its tail says of the others, a divergence of
// k + 1 outcomes, the last being all columns that are not among the k, or of whole rows.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// The known columns of a row and the teacher's log-probabilities there, block by block.
template <class Real>
struct Support {
  int64_t count = 0;
  int32_t *column, *begin;  // of block b: begin[b] ... begin[b + 1] - 1
  Real* log_p;
  Real log_rest = NAN;  // of what the others have, if that was given
  bool broken = false;  // a column that does not exist, or one twice

  Support(const Problem<Real>& problem, int64_t r, const Workspace<Real>& w)
      : column(w.support_column), begin(w.support_begin), log_p(w.support[0]) {
    const int32_t* ids = problem.sparse.ids + r * problem.sparse.k;
    const int64_t blocks = (problem.vocab + kBlock - 1) / kBlock;
    for (int64_t b = 0; b <= blocks; ++b) begin[b] = 0;
    for (int64_t i = 0; i < problem.sparse.k; ++i) {
      broken = broken || ids[i] >= problem.vocab || ids[i] < kRestId;
      if (ids[i] < 0 || ids[i] >= problem.vocab) continue;
      ++begin[ids[i] / kBlock];
      ++count;
    }
    // Sums of the counts, which the columns then count down to where their block begins.
    for (int64_t b = 0; b < blocks; ++b) begin[b + 1] += begin[b];
    with_type(problem.teacher.rows.dtype, row_of(problem.teacher.rows, r), [&](auto* x) {
      for (int64_t i = problem.sparse.k - 1; i >= 0; --i) {
        if (ids[i] == kRestId) log_rest = Real(widen(x[i]));
        if (ids[i] < 0 || ids[i] >= problem.vocab) continue;
        const int32_t at = --begin[ids[i] / kBlock];
        column[at] = ids[i];
        log_p[at] = Real(widen(x[i]));
      }
    });
    Real* const seen = w.label_e;  // of a block's columns: how often
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = begin[b]; i < begin[b + 1]; ++i) seen[column[i] - b * kBlock] = 0;
      for (int64_t i = begin[b]; i < begin[b + 1]; ++i)
        broken = broken || seen[column[i] - b * kBlock]++ > 0;
    }
  }

  // log of what the columns have that are not known. Where it was not given, what the known ones leave
  // of 1, and not less than their rounding leaves open.
  double log_of_rest(int64_t vocab) {
    if (count == vocab) return -INFINITY;
    if (log_rest == log_rest) return log_rest;
    double known = 0;
    for (int64_t i = 0; i < count; ++i) known += std::exp(double(log_p[i]));
    broken = broken || known > kMostMass;
    const double left = 1 - known, least = sizeof(Real) == 4 ? 0x1p-24 : 0x1p-53;
    return std::log(left > least ? left : least);
  }
  // Each other column's, if they share that evenly.
  Real log_share(int64_t vocab) {
    return Real(log_of_rest(vocab) - std::log(double(vocab - count)));
  }
};

// Pass 2 over the columns that share one outcome.
template <class Real, class Out>
void block_scaled(int64_t n, const Real* e, Real factor, Out* out) {
  for (int64_t j = 0; j < n; j += kLanes) {
    Steps<Lane<Real>, Out> steps{out + j};
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      Lane<Real> ei;
      load_step(e + j, i, ei);
      steps.store(i, ei * Lane<Real>(factor));
    }
  }
}

template <class Kind, class Real>
struct SparseRow {
  const Problem<Real>& problem;
  const Workspace<Real>& w;
  const int64_t r;
  const bool support_alone;  // k outcomes, both sides with sum 1 there
  Source<Real> student;
  Support<Real> support;
  Normaliser<Real> whole;        // of the student's row
  Real shift = 0;                // that the exponentials of the rest are relative to
  double rest_sum = 0;           // of these
  bool kept = false;             // they are in w.q, each block's with its own shift
  Real *z, *t, *q, *p, *slopes;  // of the outcomes
  int64_t outcomes;
  double teacher_mass = 1;
  LabelTerm<Real> label;

  SparseRow(const Problem<Real>& problem, int64_t r, int64_t next, const Workspace<Real>& w)
      : problem(problem),
        w(w),
        r(r),
        support_alone(problem.kind == kSupportKL),
        student(problem.student, r, problem.vocab, w.student),
        support(problem, r, w),
        z(w.support[1]),
        t(w.support[2]),
        q(w.support[3]),
        p(w.support[4]),
        slopes(w.support[5]),
        outcomes(support.count + (support_alone ? 0 : 1)) {
    const bool gradient_too = problem.gradient.data == nullptr ||
                              (problem.gradient.dtype == Dtype::bf16 && !labelled(problem, r));
    student.as_bf16 = student.dtype == Dtype::bf16 && student.cap == 0 && gradient_too;
    if (!support_alone) normalise(row_of(problem.student.rows, next));
    for (int64_t i = 0; i < support.count; ++i) z[i] = student.at_column(support.column[i]);
  }

  void run() {
    RowScalars<Real, Uniform<Real>> scalars{1, 1, 1};
    scalars.q_factor = scalars.p_factor = Uniform<Real>(1);
    const double z_lse = student_outcomes(), t_lse = teacher_outcomes();
    scalars.lse_difference = minus_two_part<Real>(t_lse - z_lse);
    scalars.z_lse = minus_two_part<Real>(z_lse);
    scalars.t_lse = minus_two_part<Real>(t_lse);
    label = LabelTerm<Real>(problem, r, student, whole, w, !support_alone);

    const Block<Real, Real, Uniform<Real>> b{padded(outcomes), z, t, q, p, scalars};
    RowStats<Real> stats{};
    if (problem.stats != nullptr) stats = statistics(b, t_lse);
    const Slopes<Real> sums = block_slopes<Kind, true>(b, problem.params, Prefetch::none(z));
    double value = fold_sum(sums.value);
    double slope = fold_sum(sums.slope);
    Real weight = divergence_weight(problem, r) * student.gain;
    // Of a known sum the exact number: equal sides have a gradient of exact zeros.
    if (Kind::kForm == Form::unit) slope = -teacher_mass;
    if (Kind::kSeries)
      value -= 1 - teacher_mass;  // of sum q - sum p, which every term has a part of
    if constexpr (Kind::kFinish) {
      const Finished finished = Kind::finish(value, slope, problem.params);
      value = finished.value;
      weight *= Real(finished.factor);
    }
    if (support.broken) value = NAN;
    write_value(problem, r, value, label);
    if (problem.stats != nullptr) write_stats<Real>(problem, r, stats);
    if (problem.gradient.data == nullptr) return;
    if (support.broken) weight = NAN;
    block_combine(padded(outcomes), q, p, Uniform<Real>(Real(slope)), Uniform<Real>(weight),
                  slopes);
    const Real nothing = support.broken ? Real(NAN) : Real(0);
    write_gradient(support_alone ? nothing : slopes[support.count]);
  }

 private:
  // The known columns leave the sum and the scratch, and have their exponentials kept in q.
  Real take_out(int64_t start, Real* e, Real all) {
    const int64_t block = start / kBlock;
    const int32_t first = support.begin[block], last = support.begin[block + 1];
    if (first == last) return all;
    const bool as_they_lie = student.as_bf16 && student.whole_lanes(start);
    const auto slot = [&](int64_t i) {
      const int64_t j = support.column[i] - start;
      return as_they_lie ? slot_of<Bf16, Lane<Real>>(j) : j;
    };
    for (int64_t i = first; i < last; ++i) {
      q[i] = e[slot(i)];
      e[slot(i)] = 0;
    }
    return block_sum<Real>(padded(student.columns(start)), e);
  }

  // Pass 1, the student's side.
  void normalise(const char* next) {
    const int64_t line = kLanes * element_size(student.dtype);
    const auto out = [this](int64_t start, Real* e, Real all) { return take_out(start, e, all); };
    const Normaliser<Real> rest =
        exponentials(student, w.q, w.q_shift, w.student_e, {next, line}, out);
    shift = rest.shift;
    rest_sum = rest.sum;
    kept = w.q != nullptr;
    double known = 0;
    for (int64_t i = 0; i < support.count; ++i) {
      const Real own = w.q_shift[support.column[i] / kBlock];
      if (own != shift) q[i] *= Real(std::exp(student.origin(own) - student.origin(shift)));
      known += double(q[i]);
    }
    whole.shift = shift;
    whole.factor = Real(1 / (known + rest_sum));
    whole.lse = student.origin(shift) + std::log(known + rest_sum);
    for (int64_t i = 0; i < support.count; ++i) q[i] *= whole.factor;
    if (rest_sum < 1e-30 && support.count < problem.vocab) rest_by_itself();
  }

  // Where the rest is so much smaller than the known columns that it has vanished beside them.
  void rest_by_itself() {
    for (int pass = 0; pass < 2; ++pass) {
      Real top = -INFINITY;
      double sum = 0;
      for (int64_t start = 0; start < problem.vocab; start += kBlock) {
        const Real* x = without_known(start);
        for (int64_t j = 0; j < student.columns(start); ++j) {
          if (pass == 0) top = larger(x[j], top);
          if (pass == 1)
            sum += std::exp(double(student.gain) * double(x[j]) - student.origin(shift));
        }
      }
      if (pass == 0 && !(top > -INFINITY)) return;
      if (pass == 0) shift = top;
      if (pass == 1) rest_sum = sum;
    }
    kept = false;
  }
  const Real* without_known(int64_t start) {
    const Real* x = student.load(start);
    if (x != w.student) {
      for (int64_t j = 0; j < student.columns(start); ++j) w.student[j] = x[j];
    }
    student.in_buffer = -1;
    const int64_t block = start / kBlock;
    for (int64_t i = support.begin[block]; i < support.begin[block + 1]; ++i)
      w.student[support.column[i] - start] = -INFINITY;
    return w.student;
  }

  // Logits and probabilities of the student's outcomes. Returns their log-sum-exp. Logits are taken
  // relative to the shift, or an offset of the row would cost the rest its digits.
  double student_outcomes() {
    if (support_alone) {
      whole.shift = -INFINITY;
      for (int64_t i = 0; i < outcomes; ++i) whole.shift = larger(z[i], whole.shift);
      if (!(whole.shift > -INFINITY)) whole.shift = 0;
    }
    const double base = double(student.gain) * double(whole.shift);
    for (int64_t i = 0; i < support.count; ++i) z[i] = student.gain * (z[i] - whole.shift);
    fill(z, support.count, -INFINITY);
    fill(q, support.count, 0);
    if (support_alone) {
      double sum = 0;
      for (int64_t i = 0; i < outcomes; ++i) sum += double(q[i] = Real(std::exp(z[i])));
      for (int64_t i = 0; i < outcomes; ++i) q[i] /= Real(sum);
      whole.lse = base + std::log(sum);
      return std::log(sum);
    }
    const double rest = student.origin(shift) + std::log(rest_sum);
    z[support.count] = Real(rest - base);
    q[support.count] = Real(std::exp(rest - whole.lse));
    return whole.lse - base;
  }

  // The same of the teacher.
  double teacher_outcomes() {
    const Real gain = Real(1 / problem.teacher.temperature);
    const bool as_they_are = problem.sparse.tail == kDrop && !support_alone;
    const bool bucket = problem.sparse.tail == kBucket && !support_alone;
    Real top = -INFINITY;
    for (int64_t i = 0; i < support.count; ++i) {
      t[i] = gain * support.log_p[i];
      top = larger(t[i], top);
    }
    fill(t, support.count, -INFINITY);
    // Probabilities that are to be scaled may all be small.
    if (as_they_are || bucket || !(top > -INFINITY)) top = 0;
    double known = 0;
#pragma omp simd
    for (int64_t i = 0; i < padded(outcomes); ++i) p[i] = fast_exp2((t[i] - top) * Real(kLog2e));
    for (int64_t i = 0; i < support.count; ++i) known += double(p[i]);
    if (as_they_are) {
      support.broken = support.broken || known > kMostMass;
      teacher_mass = known;
      return 0;
    }
    double sum = known;
    if (bucket) {
      const double log_rest = support.log_of_rest(problem.vocab);
      t[support.count] = Real(log_rest);
      p[support.count] = Real(std::exp(log_rest));
      sum += std::exp(log_rest);
      support.broken = support.broken || sum > kMostMass;
    }
    for (int64_t i = 0; i < outcomes; ++i) p[i] = Real(double(p[i]) / sum);
    return double(top) + std::log(sum);
  }
  void fill(Real* x, int64_t from, Real value) const {
    for (int64_t i = from; i < padded(outcomes); ++i) x[i] = value;
  }

  template <class B>
  RowStats<Real> statistics(const B& b, double t_lse) {
    const StatSums<Real> s = block_stats(b);
    RowStats<Real> row{};
    row.acceptance = fold_sum(s.acceptance);
    row.below = fold_sum(s.below);
    row.student_entropy = fold_sum(s.student_entropy);
    row.teacher_entropy = fold_sum(s.teacher_entropy);
    row.student_lse = Real(whole.lse);
    row.teacher_lse = Real(t_lse);
    const auto largest = [this](const Real* x) {
      int64_t top = 0;
      for (int64_t i = 1; i < support.count; ++i)
        if (x[i] > x[top] || (x[i] == x[top] && support.column[i] < support.column[top])) top = i;
      return top;
    };
    if (support.count == 0) return row;
    if (support_alone) {
      row.agreement = largest(z) == largest(support.log_p);
    } else {
      Source<Real> source = student.with_buffer(w.gradient);
      row.student_entropy = entropy_of(source, whole, w.label_e);
      row.agreement = first_argmax(source) == support.column[largest(support.log_p)];
    }
    return row;
  }

  // rest: the gradient of the last outcome, which its columns share out by their probabilities.
  void write_gradient(Real rest) {
    char* row = row_of(problem.gradient, r);
    const bool nothing = (support_alone || rest_sum == 0) && rest == rest;
    if (nothing && !label.on && student.cap == 0) {
      const int64_t bytes = problem.vocab * element_size(problem.gradient.dtype);
      for (int64_t i = 0; i < bytes; ++i) row[i] = 0;
      with_type(problem.gradient.dtype, row, [&](auto* out) {
        for (int64_t i = 0; i < support.count; ++i) narrow(slopes[i], out[support.column[i]]);
      });
      return;
    }
    for (int64_t start = 0; start < problem.vocab; start += kBlock) {
      const int64_t n = padded(student.columns(start));
      Real* e = kept ? w.q + start : w.student_e;
      Real factor = nothing ? Real(0) : Real(double(rest) / rest_sum);
      if (nothing) {
        for (int64_t j = 0; j < n; ++j) e[j] = 0;
      } else if (kept) {
        const Real own = w.q_shift[start / kBlock];
        if (own != shift)
          factor = Real(double(factor) * std::exp(student.origin(own) - student.origin(shift)));
      } else {
        student.with_block(start, [&](int64_t n, auto* x) {
          return fold_sum(block_exp(n, x, student.gain2(), Uniform<Real>(shift), e,
                                    Prefetch::none(student.row)));
        });
      }
      write_block(start, n, e, factor, row);
    }
  }

  void write_block(int64_t start, int64_t n, const Real* e, Real factor, char* row) {
    if constexpr (sizeof(Real) == 4) {
      if (student.as_bf16 && student.whole_lanes(start) && problem.gradient.dtype == Dtype::bf16) {
        Bf16* out = reinterpret_cast<Bf16*>(row) + start;
        block_scaled(n, e, factor, out);
        return write_known(start, out);
      }
    }
    constexpr Dtype dtype = DtypeOf<Real>::value;
    if (student.dtype == dtype && student.plain(start) && problem.gradient.dtype == dtype &&
        !label.on) {
      Real* out = reinterpret_cast<Real*>(row) + start;
      block_scaled(n, e, factor, out);
      return write_known(start, out);
    }
    block_scaled(n, e, factor, w.gradient);
    write_known(start, w.gradient);
    const Real* x = label.on || student.cap > 0 ? student.load(start) : nullptr;
    finish_gradient(student, label, start, x, w.gradient, problem.gradient.dtype, row);
  }
  template <class Out>
  void write_known(int64_t start, Out* out) const {
    const int64_t block = start / kBlock;
    for (int64_t i = support.begin[block]; i < support.begin[block + 1]; ++i)
      narrow(slopes[i], out[support.column[i] - start]);
  }
};
