// One row at a time.
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

struct Sums {
  double value = 0, slope = 0;
  double acceptance = 0, below = 0, student_entropy = 0, teacher_entropy = 0;
};

// One row under one kind.
template <class Kind, class Real>
struct DivergenceRow {
  const Problem<Real>& problem;
  const Workspace<Real>& w;
  const int64_t r;
  KindParams<Real> params;
  Source<Real> student, teacher;
  Normaliser<Real> z_normaliser, t_normaliser;
  LabelTerm<Real> label;
  LabelColumn column;    // the label's own, for kinds whose rows are without it
  double means[2] = {};  // of the tempered logits, for kinds without them
  RowScalars<Real, Uniform<Real>> scalars;
  Real weight = 0;
  char* gradient = nullptr;
  Sums sums;
  Prefetch touch{};
  Known<Real> known{};

  // next: a later row whose memory is touched meanwhile; r itself if there is none.
  DivergenceRow(const Problem<Real>& problem, int64_t r, int64_t next, const Workspace<Real>& w)
      : problem(problem),
        w(w),
        r(r),
        params(problem.params),
        student(problem.student, r, problem.vocab, w.student),
        teacher(problem.teacher, r, problem.vocab, w.teacher) {
    if (problem.sparse.ids != nullptr) spread_teacher(r);
    if (problem.kind == kTAID) teacher.mix_with(student, problem.params.a);
    student.as_bf16 = teacher.as_bf16 = all_bf16(r);
    const Source<Real> unchanged = student;
    if constexpr (Kind::kRow == RowNumbers::label)
      student.without = teacher.without = problem.labels[r];
    numbers_of_logits<Kind>(problem, student, teacher, params, means);
    if (problem.lse != nullptr) {
      z_normaliser = known_normaliser(student, problem.lse[r]);
      t_normaliser = known_normaliser(teacher, problem.lse[problem.rows + r]);
    } else {
      normalise(next);
    }
    touch = {row_of(problem.teacher.rows, next), kLanes * element_size(teacher.dtype)};
    if (teacher.known != nullptr) touch.step = 0;
    numbers_of_probabilities<Kind>(student, z_normaliser, teacher, t_normaliser, w, params, means);
    set_scalars();
    if constexpr (Kind::kRow == RowNumbers::head) set_share_of_tail();
    if constexpr (Kind::kRow == RowNumbers::label) set_label_column();
    const bool same = unchanged.gain == student.gain && student.without < 0;
    label = LabelTerm<Real>(problem, r, unchanged, z_normaliser, w, same);
    weight = divergence_weight(problem, r) * student.gain;
    if (problem.gradient.data != nullptr) gradient = row_of(problem.gradient, r);
  }

  bool top_columns_agree() const {
    Source<Real> z = student.whole(w.gradient), t = teacher.whole(w.label_e);
    return first_argmax(z) == first_argmax(t);
  }

  // Passes 2 and 3.
  void run() {
    const bool known_slope = problem.slope != nullptr && !kOnePass<Kind>;
    for (int64_t start = 0; start < problem.vocab && !known_slope; start += kBlock) {
      pass2(start);
      touch.at += touch.step * (padded(student.columns(start)) / kLanes);
    }
    touch.step = 0;
    if (problem.lse != nullptr) {  // what belongs to whole rows is somebody else's
      if (known_slope) return combine_with(problem.slope[r]);
      if (problem.parts != nullptr)
        problem.parts[r] = sums.value, problem.parts[problem.rows + r] = sums.slope;
      return;
    }
    if constexpr (Kind::kFinish) {
      const Finished finished = Kind::finish(sums.value, sums.slope, params);
      sums.value = finished.value;
      weight *= Real(finished.factor);
    }
    if constexpr (Kind::kRow == RowNumbers::label) sums.value += double(params.a) * column.kl;
    if (!kOnePass<Kind> && gradient != nullptr) combine_with(sums.slope);
  }

 private:
  // The student's next row in two halves, one a side; the teacher's is touched in pass 2.
  void normalise(int64_t next) {
    const int64_t line = kLanes * element_size(student.dtype), half = problem.vocab / 2;
    const char* next_student = row_of(problem.student.rows, next);
    z_normaliser = exponentials(student, w.q, w.q_shift, w.student_e, {next_student, line / 2});
    t_normaliser = exponentials(teacher, w.p, w.p_shift, w.teacher_e,
                                {next_student + half * element_size(student.dtype), line / 2});
  }

  static Normaliser<Real> known_normaliser(const Source<Real>& source, double lse) {
    Normaliser<Real> known;
    known.lse = lse;
    known.shift = lse > -INFINITY ? Real(lse / double(source.gain)) : Real(0);
    known.factor = Real(std::exp(source.origin(known.shift) - lse));
    return known;
  }

  void set_scalars() {
    // Once a row: the passes must not differ in the last place of delta, or h is not what H is a sum of.
    scalars = {student.gain,
               teacher.gain,
               student.gain / teacher.gain,
               minus_two_part<Real>(t_normaliser.lse - z_normaliser.lse),
               minus_two_part<Real>(z_normaliser.lse),
               minus_two_part<Real>(t_normaliser.lse),
               z_normaliser.factor,
               t_normaliser.factor,
               minus_two_part<Real>(means[0]),
               minus_two_part<Real>(means[1])};
  }

  // Pass 3, with the sum of a row's slopes.
  void combine_with(double slope) {
    sums.slope = slope;
    for (int64_t start = 0; start < problem.vocab; start += kBlock) pass3(start);
  }

  // A teacher that is known at some columns of a row and even elsewhere.
  void spread_teacher(int64_t r) {
    Support<Real> support(problem, r, w);
    const Real share = support.log_share(problem.vocab);
    known = {support.column, support.begin, support.log_p, support.broken ? Real(NAN) : share};
    teacher.known = &known;
  }

  bool all_bf16(int64_t r) const {
    const bool gradient_too = problem.gradient.data == nullptr ||
                              (problem.gradient.dtype == Dtype::bf16 && !labelled(problem, r));
    // Pass 2 does not ask for the logits of a mixture if it has their exponentials; statistics do.
    const bool mixed = teacher.student != nullptr && (problem.stats != nullptr || w.q == nullptr);
    const bool as_they_are = student.cap == 0 && teacher.cap == 0 && !mixed;
    return student.dtype == Dtype::bf16 && teacher.dtype == Dtype::bf16 && gradient_too &&
           as_they_are && teacher.known == nullptr;
  }

  // Whether the block's student, teacher and gradient can be used where they lie, as T.
  template <class T>
  bool plain(int64_t start) const {
    if (std::is_same<T, Bf16>::value)
      return student.as_bf16 && student.whole_lanes(start) && teacher.whole_lanes(start);
    if (!student.plain(start) || !teacher.plain(start)) return false;
    constexpr Dtype dtype = DtypeOf<T>::value;
    return student.dtype == dtype && teacher.dtype == dtype &&
           (gradient == nullptr || (problem.gradient.dtype == dtype && !label.on));
  }

  template <class In>
  using RowBlock = Block<In, Real, Uniform<Real>>;

  template <class In>
  RowBlock<In> block(int64_t start, const In* z, const In* t) {
    RowBlock<In> b{padded(student.columns(start)), z, t, w.student_e, w.teacher_e, scalars};
    if (w.q != nullptr) {
      b.q = w.q + start;
      b.p = w.p + start;
      b.row.q_factor = z_normaliser.factor_at(w.q_shift[start / kBlock], student);
      b.row.p_factor = t_normaliser.factor_at(w.p_shift[start / kBlock], teacher);
    } else {
      const Uniform<Real> z_shift(z_normaliser.shift), t_shift(t_normaliser.shift);
      block_exp(b.n, z, student.gain2(), z_shift, b.q, Prefetch::none(z));
      block_exp(b.n, t, teacher.gain2(), t_shift, b.p, Prefetch::none(t));
    }
    return b;
  }

  // RowNumbers::head.
  void set_share_of_tail() {
    const Head<Real> head = find_head(teacher, t_normaliser, double(params.a), w);
    double gap = 0, in_head = 0;
    const auto add = [&](const auto& b) {
      const Gaps<Real> gaps = block_gaps(b, head.border);
      gap += fold_sum(gaps.all);
      in_head += fold_sum(gaps.above);
    };
    for (int64_t start = 0; start < problem.vocab; start += kBlock) {
      if constexpr (sizeof(Real) == 4) {
        if (plain<Bf16>(start)) {
          add(block(start, student.template plain_block<Bf16>(start),
                    teacher.template plain_block<Bf16>(start)));
          continue;
        }
      }
      add(block(start, student.load(start), teacher.load(start)));
    }
    const auto probability = [](const Source<Real>& side, const Normaliser<Real>& normaliser,
                                int64_t j) {
      const Exponent<Real> exponent(side.gain2(), normaliser.shift);
      return normaliser.factor * fast_exp2(exponent(side.at_column(j)));
    };
    for (int64_t i = 0; i < head.tied; ++i)
      in_head += magnitude(probability(teacher, t_normaliser, head.ties[i]) -
                           probability(student, z_normaliser, head.ties[i]));
    AdaptiveKL::set_share(params, gap - in_head, gap);
  }

  // RowNumbers::label.
  void set_label_column() {
    const int64_t y = student.without;
    column = LabelColumn(double(student.gain) * student.at_column(y), z_normaliser.lse,
                         double(teacher.gain) * teacher.at_column(y), t_normaliser.lse);
    params.r[0] = Real(double(params.b) - double(params.a) * (column.q - column.p));
  }

  // In a block of its gradient that is still in the buffer, and in that of the student.
  void add_label_column(int64_t start, Real* g) {
    const int64_t at = student.without - start;
    if (at < 0 || at >= student.columns(start)) return;
    g[at] = weight * Real(double(params.a) * (column.q - column.p));
    student.buffer[at] = student.at_column(student.without);
    student.in_buffer = -1;
  }

  // Pass 2 on a block. Out: where a gradient of known H goes.
  template <bool kValue, class In, class Out>
  void add_gradient(const RowBlock<In>& b, Out* out) {
    if constexpr (kOnePass<Kind>) {
      sums.value +=
          fold_sum(block_gradient<Kind, kValue>(b, params, Uniform<Real>(weight), out, touch));
    } else {
      const Slopes<Real> s = block_slopes<Kind, kValue>(b, params, touch);
      sums.value += fold_sum(s.value);
      sums.slope += fold_sum(s.slope);
    }
  }

  template <class In, class Out>
  void terms(const RowBlock<In>& b, Out* out) {
    if (problem.stats != nullptr) {
      RowBlock<In> whole = b;
      if constexpr (Kind::kRow == RowNumbers::label) whole.row = column.whole(b.row);
      const StatSums<Real> s = block_stats(whole);
      sums.acceptance += fold_sum(s.acceptance);
      sums.below += fold_sum(s.below);
      sums.student_entropy += fold_sum(s.student_entropy);
      sums.teacher_entropy += fold_sum(s.teacher_entropy);
    }
    // A part of a row gives its slopes, too.
    if (gradient == nullptr && !Kind::kFinish && (kOnePass<Kind> || problem.parts == nullptr)) {
      sums.value += fold_sum(block_value<Kind>(b, params, touch));
    } else if (Kind::kFinish || problem.value != nullptr || problem.parts != nullptr) {
      add_gradient<true>(b, out);
    } else {
      add_gradient<Kind::kFinish>(b, out);
    }
  }

  void pass2(int64_t start) {
    if constexpr (sizeof(Real) == 4) {
      if (plain<Bf16>(start))
        return terms(block(start, student.template plain_block<Bf16>(start),
                           teacher.template plain_block<Bf16>(start)),
                     reinterpret_cast<Bf16*>(gradient) + start);
    }
    const auto b = block(start, student.load(start), teacher.load(start));
    const bool direct = plain<Real>(start);
    Real* out = direct ? reinterpret_cast<Real*>(gradient) + start : w.gradient;
    terms(b, out);
    if (!kOnePass<Kind> || gradient == nullptr || direct) return;
    if constexpr (Kind::kRow == RowNumbers::label) add_label_column(start, out);
    finish_gradient(student, label, start, b.z, out, problem.gradient.dtype, gradient);
  }

  // Pass 3 on a block, from scratch or, without it, once more from the logits.
  template <class In, class Out>
  void combine(int64_t start, const In* z, const In* t, Out* out) {
    const Real *q = w.q + start, *h = w.p + start;
    if (w.q == nullptr) {
      const auto b = block(start, z, t);
      block_slopes<Kind, false>(b, params, touch);
      q = b.q, h = b.p;
    }
    block_combine(padded(student.columns(start)), q, h, Uniform<Real>(Real(sums.slope)),
                  Uniform<Real>(weight), out);
  }

  void pass3(int64_t start) {
    if constexpr (sizeof(Real) == 4) {
      if (plain<Bf16>(start))
        return combine(start, student.template plain_block<Bf16>(start),
                       teacher.template plain_block<Bf16>(start),
                       reinterpret_cast<Bf16*>(gradient) + start);
    }
    const bool direct = plain<Real>(start);
    const bool reads = w.q == nullptr || label.on || student.cap > 0;
    const Real* z = reads ? student.load(start) : nullptr;
    const Real* t = w.q == nullptr ? teacher.load(start) : nullptr;
    combine(start, z, t, direct ? reinterpret_cast<Real*>(gradient) + start : w.gradient);
    if (!direct)
      finish_gradient(student, label, start, z, w.gradient, problem.gradient.dtype, gradient);
  }
};

template <class Kind, class Real>
void divergence_row(const Problem<Real>& problem, int64_t r, int64_t next,
                    const Workspace<Real>& w) {
  DivergenceRow<Kind, Real> row(problem, r, next, w);
  // Before pass 2, which may write the gradient over the student.
  const Real agreement = problem.stats != nullptr && row.top_columns_agree();
  row.run();
  Sums& sums = row.sums;
  double lse[2] = {row.z_normaliser.lse, row.t_normaliser.lse};
  if (Kind::kRow == RowNumbers::standard) lse[0] -= row.means[0], lse[1] -= row.means[1];
  if constexpr (Kind::kRow == RowNumbers::label) {
    sums.acceptance += row.column.acceptance();
    sums.below += row.column.below();
    sums.student_entropy += row.column.student_entropy();
    sums.teacher_entropy += row.column.teacher_entropy();
    lse[0] = row.column.z_lse, lse[1] = row.column.t_lse;
  }
  write_value(problem, r, sums.value, row.label);
  if (problem.stats != nullptr)
    write_stats<Real>(problem, r,
                      {Real(sums.acceptance), agreement, Real(sums.student_entropy),
                       Real(sums.teacher_entropy), Real(lse[0]), Real(lse[1]), Real(sums.below)});
}

// Cross-entropy to labels: the label term alone, one side.
template <class Real>
void label_row(const Problem<Real>& problem, int64_t r, const Workspace<Real>& w) {
  Source<Real> student(problem.student, r, problem.vocab, w.student);
  student.as_bf16 = student.dtype == Dtype::bf16;
  const Normaliser<Real> normaliser =
      exponentials<Real>(student, nullptr, nullptr, w.student_e, Prefetch::none(student.row));
  const LabelTerm<Real> label(problem, r, student, normaliser, w);
  if (problem.value != nullptr) problem.value[r] = label.value;
  if (problem.stats != nullptr) {
    const Real none = NAN;  // there is no teacher to compare with
    const Real entropy = entropy_of(student, normaliser, w.student_e);
    write_stats<Real>(problem, r, {none, none, entropy, none, Real(normaliser.lse), none, none});
  }
  if (problem.gradient.data == nullptr) return;
  for (int64_t start = 0; start < problem.vocab; start += kBlock) {
    const Real* x = student.load(start);
    for (int64_t j = 0; j < padded(student.columns(start)); ++j) w.gradient[j] = 0;
    finish_gradient(student, label, start, x, w.gradient, problem.gradient.dtype,
                    row_of(problem.gradient, r));
  }
}
