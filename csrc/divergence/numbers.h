// The numbers of a row that some kinds need before their terms (RowNumbers in math.h).
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// Of one block about an origin near the mean, where the floats of a lane lose nothing to an offset.
template <class Real, class In>
void add_moments(int64_t n, const In* x, Real origin, Moments& m) {
  Lanes<Real> count, sum, squares;
  const Lane<Real> least(std::numeric_limits<Real>::lowest()), zero(0), one(1);
  for (int64_t j = 0; j < n; j += kLanes) {
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      Lane<Real> xi;
      load_step(x + j, i, xi);
      const auto hidden = xi < least;  // not a NaN, which has to show
      const Lane<Real> gap = select(hidden, zero, xi - Lane<Real>(origin));
      count[i] += select(hidden, zero, one);
      sum[i] += gap;
      squares[i] = mul_add(gap, gap, squares[i]);
    }
  }
  m.count += fold_sum(count);
  m.sum += fold_sum(sum);
  m.squares += fold_sum(squares);
}

// Of the blocks that start in [begin, end), about an origin.
template <class Real>
Moments moments_about(Source<Real>& source, int64_t begin, int64_t end, Real origin) {
  Moments m{};
  for (int64_t start = begin; start < end; start += kBlock)
    source.with_block(start, [&](int64_t n, auto* x) {
      add_moments(n, x, origin, m);
      return Real(0);
    });
  return m;
}

template <class Kind, class Real>
Moments moments(Source<Real>& source) {
  if constexpr (!kTakesMean<Kind>) return moments_about(source, 0, source.vocab, Real(0));
  Real origin = 0;
  Moments m{};
  for (int64_t start = 0; m.count == 0 && start < source.vocab; start += kBlock) {
    m = moments_about(source, start, start + 1, Real(0));
    origin = Real(m.sum / m.count);
  }
  double left = 0;  // of the squares, about the mean
  for (int tries = 0; tries < 3; ++tries) {
    m = moments_about(source, 0, source.vocab, origin);
    left = m.squares - m.sum / m.count * m.sum;
    if (!(left < 0.01 * m.squares)) break;
    origin += Real(m.sum / m.count);  // the first block was not like the others
  }
  return {m.count, m.sum + m.count * double(origin), left};
}

// Those of the logits, before pass 1.
template <class Kind, class Real>
void numbers_of_logits(const Problem<Real>& problem, Source<Real>& student, Source<Real>& teacher,
                       KindParams<Real>& k, double (&means)[2]) {
  if constexpr (!kTakesMean<Kind> && !kTakesSquares<Kind>) return;
  if (Kind::kRow == RowNumbers::means && k.a == 0) return;
  Real of_teacher = 0;
  means[0] =
      take_moments<Kind>(moments<Kind>(student), problem.student.temperature, student.gain, k.r[0]);
  means[1] = take_moments<Kind>(moments<Kind>(teacher), problem.teacher.temperature, teacher.gain,
                                of_teacher);
  k.r[1] = of_teacher;
}

// Those of the probabilities, after it: sum q^2 is the sum of exponentials of twice the logits.
template <class Kind, class Real>
void numbers_of_probabilities(const Source<Real>& student, const Normaliser<Real>& z,
                              const Source<Real>& teacher, const Normaliser<Real>& t,
                              const Workspace<Real>& w, KindParams<Real>& k, double (&means)[2]) {
  if constexpr (Kind::kRow == RowNumbers::means) {  // no sum would tell the row of a NaN
    means[0] += z.lse - z.lse;
    means[1] += t.lse - t.lse;
  }
  if constexpr (Kind::kRow == RowNumbers::standard)
    k.r[1] = Real((z.lse - means[0]) - (t.lse - means[1]));
  if constexpr (Kind::kRow == RowNumbers::probability_norms) {
    const auto inverse_norm = [&](const Source<Real>& side, double lse) {
      Source<Real> twice = side.with_buffer(w.gradient);
      twice.gain *= 2;
      const Normaliser<Real> squares =
          exponentials<Real>(twice, nullptr, nullptr, w.label_e, Prefetch::none(side.row));
      return Real(std::exp(lse - squares.lse / 2));
    };
    k.r[0] = inverse_norm(student, z.lse);
    k.r[1] = inverse_norm(teacher, t.lse);
  }
}
