// Row-wise divergences on the CPU. Compiled once per instruction set, in a namespace of its own:
// no torch header and no standard-library template here, or the linker might keep the AVX-512 copy
// of a shared inline function and run it on a machine without AVX-512.
//
// A row is read once from memory and its gradient written once; in between it stays in L2:
//   1. exponentials: running maximum, 2^(x - max) into scratch, their sum   (student, then teacher)
//   2. terms:        q, p from scratch; value, slopes h and H = sum h; with a known H the gradient
//   3. combine:      (h - q H) * weight                                      (only where H is not known)
// A row longer than `resident_limit` has no scratch: passes 2 and 3 take the exponentials again.
// Passes work on blocks of 1,024 elements. Where student, teacher and gradient are all bfloat16 they
// are read and written as they are; any other mix of types is widened block by block in L1, so that
// the kernels are not a template of three input types.
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernel.h"

namespace stillhouse {
namespace STILLHOUSE_ISA {
namespace {

template <class Real>
struct Workspace {
  Real *q, *p;              // [vocab] exponentials, then q and h; null on the streaming path
  Real *q_shift, *p_shift;  // [blocks] powers of two that a block's are relative to
  Real *student, *teacher, *student_e, *teacher_e, *gradient;  // [kBlock] each
};

#include "source.h"

#include "label.h"

// One block as passes 2 and 3 see it: x of both sides, and probabilities up to a factor.
template <class In, class Real>
struct Block {
  int64_t n;  // multiple of kLanes
  const In *z, *t;
  Real z_gain, t_gain, ratio;  // ratio = z_gain / t_gain
  Real lse_difference, lse_difference_low, z_lse, t_lse;
  Real *q, *p;
  Real q_factor, p_factor;
};

struct Sums {
  double value = 0, slope = 0;
  double acceptance = 0, below = 0, student_entropy = 0, teacher_entropy = 0;
};

template <class In, class Real>
SH_INLINE Element<Real> element(const Block<In, Real>& b, int64_t j) {
  const Real z = Real(widen(b.z[j])), t = Real(widen(b.t[j]));
  Element<Real> e;
  e.lq = mul_add(b.z_gain, z, -b.z_lse);
  e.lp = mul_add(b.t_gain, t, -b.t_lse);
  e.q = b.q[j] * b.q_factor;
  e.p = b.p[j] * b.p_factor;
  // Not lp - lq: t - z is exact where the gains are equal, and the difference of the log-sum-exps was
  // taken in double; in two parts, since logits with an offset make it large and delta small.
  const Real gap = mul_add(-b.ratio, z, t);
  e.delta = mul_add(b.t_gain, gap, -b.lse_difference) - b.lse_difference_low;
  return e;
}

// Pass 2 without a gradient.
template <class Kind, class In, class Real>
void block_value(const Block<In, Real> b, const KindParams<Real> k, Sums& sums, Prefetch touch) {
  Real value[kLanes] = {};
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) value[i] += kind_term<Kind>(element(b, j + i), k);
  }
  sums.value += fold_sum(value);
}

// Pass 2 where H = -1 is known: value and gradient at once.
template <class Kind, class In, class Out, class Real>
void block_gradient(const Block<In, Real> b, const KindParams<Real> k, Real weight, Out* gradient,
                    Sums& sums, Prefetch touch) {
  Real value[kLanes] = {};
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const Element<Real> e = element(b, j + i);
      value[i] += kind_term<Kind>(e, k);
      narrow((Kind::slope(e, k) + e.q) * weight, gradient[j + i]);
    }
  }
  sums.value += fold_sum(value);
}

// Pass 2 where H is a sum: q stays in b.q and h in b.p.
template <class Kind, class In, class Real>
void block_slopes(const Block<In, Real> b, const KindParams<Real> k, Sums& sums, Prefetch touch) {
  Real value[kLanes] = {}, slope[kLanes] = {};
  for (int64_t j = 0; j < b.n; j += kLanes) {
    touch();
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const Element<Real> e = element(b, j + i);
      value[i] += kind_term<Kind>(e, k);
      const Real h = Kind::slope(e, k);
      slope[i] += h;
      b.q[j + i] = e.q;
      b.p[j + i] = h;
    }
  }
  sums.value += fold_sum(value);
  sums.slope += fold_sum(slope);
}

// Pass 3.
template <class Out, class Real>
void block_combine(int64_t n, const Real* q, const Real* h, Real H, Real weight, Out* gradient) {
  n &= ~(kLanes - 1);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(mul_add(-q[j], H, h[j]) * weight, gradient[j]);
}

template <class In, class Real>
void block_stats(const Block<In, Real> b, Sums& sums) {
  Real acceptance[kLanes] = {}, below[kLanes] = {}, student[kLanes] = {}, teacher[kLanes] = {};
  for (int64_t j = 0; j < b.n; j += kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const Element<Real> e = element(b, j + i);
      acceptance[i] += e.q < e.p ? e.q : e.p;
      below[i] += e.q < e.p ? e.q : Real(0);
      student[i] += times(e.q, -e.lq);
      teacher[i] += times(e.p, -e.lp);
    }
  }
  sums.acceptance += fold_sum(acceptance);
  sums.below += fold_sum(below);
  sums.student_entropy += fold_sum(student);
  sums.teacher_entropy += fold_sum(teacher);
}

// The last steps of a gradient block that was made in a buffer: label term, soft-cap, storage type.
template <class Real>
void finish_gradient(const Source<Real>& student, const LabelTerm<Real>& label, int64_t start,
                     const Real* x, Real* g, Dtype dtype, char* row) {
  const int64_t columns = student.columns(start), n = padded(columns);
  if (label.on) label.add_gradient(start, n, x, g);
  if (student.cap > 0) {
    const Real inverse = 1 / student.cap;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const Real ratio = x[j] * inverse;
      const Real chained = g[j] * student.scale * (1 - ratio * ratio);
      g[j] = x[j] > -INFINITY ? chained : Real(0);
    }
  }
  with_type(dtype, row, [&](auto* out) {
    out += start;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) narrow(g[j], out[j]);
  });
}

// One row under one kind.
template <class Kind, class Real>
struct DivergenceRow {
  const Problem<Real>& problem;
  Workspace<Real> w;
  Source<Real> student, teacher;
  LabelTerm<Real> label;
  double z_lse = 0, t_lse = 0;
  Real weight = 0;
  char* gradient = nullptr;
  Sums sums;
  Prefetch touch{};

  // next: a later row whose memory is touched meanwhile; r itself if there is none.
  DivergenceRow(const Problem<Real>& problem, int64_t r, int64_t next, Workspace<Real> w)
      : problem(problem),
        w(w),
        student(problem.student, r, problem.vocab),
        teacher(problem.teacher, r, problem.vocab) {
    if (problem.kind == kTAID) teacher.mix_with(student, problem.params.a);
    // The student's next row in two halves, one a side; the teacher's is touched in pass 2.
    const int64_t line = kLanes * element_size(student.dtype), half = problem.vocab / 2;
    const char* next_student = row_of(problem.student.rows, next);
    z_lse = exponentials(student, w.student, w.q, w.q_shift, w.student_e, {next_student, line / 2});
    t_lse = exponentials(teacher, w.teacher, w.p, w.p_shift, w.teacher_e,
                         {next_student + half * element_size(student.dtype), line / 2});
    touch = {row_of(problem.teacher.rows, next), kLanes * element_size(teacher.dtype)};
    if (problem.labels != nullptr && problem.label_weight > 0 && problem.labels[r] != -100)
      label = LabelTerm<Real>(problem, problem.labels[r], student, z_lse, w);
    const Real row_weight = problem.weight != nullptr ? problem.weight[r] : Real(1);
    weight = row_weight * Real(1 - problem.label_weight) * student.gain;
    label.weight = row_weight * Real(problem.label_weight) * label.gain;
    if (problem.gradient.data != nullptr) gradient = row_of(problem.gradient, r);
  }

  // Whether the block's student, teacher and gradient can be used where they lie, as T.
  template <class T>
  bool plain(int64_t start) const {
    constexpr Dtype dtype = DtypeOf<T>::value;
    return student.dtype == dtype && teacher.dtype == dtype && student.plain(start) &&
           teacher.plain(start) &&
           (gradient == nullptr || (problem.gradient.dtype == dtype && !label.on));
  }

  template <class In>
  Block<In, Real> block(int64_t start, const In* z, const In* t) const {
    const Real difference = Real(t_lse - z_lse);
    Block<In, Real> b{padded(student.columns(start)),
                      z,
                      t,
                      student.gain,
                      teacher.gain,
                      student.gain / teacher.gain,
                      difference,
                      Real((t_lse - z_lse) - double(difference)),
                      Real(z_lse),
                      Real(t_lse),
                      w.student_e,
                      w.teacher_e,
                      1,
                      1};
    const double z_lse2 = student.in_powers_of_two(z_lse), t_lse2 = teacher.in_powers_of_two(t_lse);
    Real z_shift = Real(z_lse2), t_shift = Real(t_lse2);
    if (w.q != nullptr) {
      b.q = w.q + start;
      b.p = w.p + start;
      z_shift = w.q_shift[start / kBlock];
      t_shift = w.p_shift[start / kBlock];
    } else {
      block_exp(b.n, z, student.gain2(), z_shift, b.q, {reinterpret_cast<const char*>(z), 0});
      block_exp(b.n, t, teacher.gain2(), t_shift, b.p, {reinterpret_cast<const char*>(t), 0});
    }
    b.q_factor = Real(std::exp2(z_shift - z_lse2));
    b.p_factor = Real(std::exp2(t_shift - t_lse2));
    return b;
  }

  // Pass 2 on a block. Out: where a gradient of known H goes.
  template <class In, class Out>
  void terms(const Block<In, Real>& b, Out* out) {
    if (problem.stats != nullptr) block_stats(b, sums);
    if (gradient == nullptr) {
      block_value<Kind>(b, problem.params, sums, touch);
    } else if constexpr (Kind::kUnitSlope) {
      block_gradient<Kind>(b, problem.params, weight, out, sums, touch);
    } else {
      block_slopes<Kind>(b, problem.params, sums, touch);
    }
  }

  void pass2(int64_t start) {
    if constexpr (sizeof(Real) == 4) {
      if (plain<Bf16>(start))
        return terms(block(start, student.template plain_block<Bf16>(start),
                           teacher.template plain_block<Bf16>(start)),
                     reinterpret_cast<Bf16*>(gradient) + start);
    }
    const auto b = block(start, student.load(start, w.student), teacher.load(start, w.teacher));
    const bool direct = plain<Real>(start);
    Real* out = direct ? reinterpret_cast<Real*>(gradient) + start : w.gradient;
    terms(b, out);
    if (Kind::kUnitSlope && gradient != nullptr && !direct)
      finish_gradient(student, label, start, b.z, out, problem.gradient.dtype, gradient);
  }

  void pass3(int64_t start, Real H) {
    const int64_t n = padded(student.columns(start));
    const Real *q = w.q + start, *h = w.p + start, *x = nullptr;
    if (w.q == nullptr) {
      const auto b = block(start, student.load(start, w.student), teacher.load(start, w.teacher));
      Sums taken_before;
      block_slopes<Kind>(b, problem.params, taken_before, touch);
      q = b.q, h = b.p, x = b.z;
    }
    if constexpr (sizeof(Real) == 4) {
      if (plain<Bf16>(start))
        return block_combine(n, q, h, H, weight, reinterpret_cast<Bf16*>(gradient) + start);
    }
    if (plain<Real>(start))
      return block_combine(n, q, h, H, weight, reinterpret_cast<Real*>(gradient) + start);
    block_combine(n, q, h, H, weight, w.gradient);
    if (x == nullptr && (label.on || student.cap > 0)) x = student.load(start, w.student);
    finish_gradient(student, label, start, x, w.gradient, problem.gradient.dtype, gradient);
  }
};

template <class Kind, class Real>
void divergence_row(const Problem<Real>& problem, int64_t r, int64_t next, Workspace<Real> w) {
  DivergenceRow<Kind, Real> row(problem, r, next, w);
  // Before pass 2, which may write the gradient over the student.
  const Real agreement = problem.stats != nullptr && first_argmax(row.student, w.student) ==
                                                         first_argmax(row.teacher, w.teacher);
  for (int64_t start = 0; start < problem.vocab; start += kBlock) {
    row.pass2(start);
    row.touch.at += row.touch.step * (padded(row.student.columns(start)) / kLanes);
  }
  row.touch.step = 0;
  if (!Kind::kUnitSlope && row.gradient != nullptr)
    for (int64_t start = 0; start < problem.vocab; start += kBlock)
      row.pass3(start, Real(row.sums.slope));

  const Sums& sums = row.sums;
  if (problem.value != nullptr) {
    problem.value[r] = Real(sums.value);
    if (problem.label_weight > 0)
      problem.value[r] = Real(1 - problem.label_weight) * problem.value[r] +
                         Real(problem.label_weight) * row.label.value;
  }
  if (problem.stats != nullptr) {
    const Real values[kStats] = {Real(sums.acceptance),
                                 agreement,
                                 Real(sums.student_entropy),
                                 Real(sums.teacher_entropy),
                                 Real(row.z_lse),
                                 Real(row.t_lse),
                                 Real(sums.below)};
    for (int i = 0; i < kStats; ++i) problem.stats[i * problem.rows + r] = values[i];
  }
}

// Cross-entropy to labels: the label term alone, one side.
template <class Real>
void label_row(const Problem<Real>& problem, int64_t r, Workspace<Real> w) {
  const Source<Real> student(problem.student, r, problem.vocab);
  const double lse =
      exponentials<Real>(student, w.student, nullptr, nullptr, w.student_e, {student.row, 0});
  LabelTerm<Real> label(problem, problem.labels[r], student, lse, w);
  if (problem.value != nullptr) problem.value[r] = label.value;
  if (problem.gradient.data == nullptr) return;
  label.weight = (problem.weight != nullptr ? problem.weight[r] : Real(1)) * label.gain;
  for (int64_t start = 0; start < problem.vocab; start += kBlock) {
    const Real* x = student.load(start, w.student);
    for (int64_t j = 0; j < padded(student.columns(start)); ++j) w.gradient[j] = 0;
    finish_gradient(student, label, start, x, w.gradient, problem.gradient.dtype,
                    row_of(problem.gradient, r));
  }
}

void zero(char* row, int64_t from, int64_t to, int64_t size) {
  for (int64_t i = from * size; i < to * size; ++i) row[i] = 0;
}

template <class Real>
void rows(const Problem<Real>& problem, int64_t lo, int64_t hi, void* scratch) {
  Real* next =
      reinterpret_cast<Real*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
  const auto take = [&next](int64_t n) {
    Real* taken = next;
    next += n;
    return taken;
  };
  const bool resident = problem.vocab <= problem.resident_limit;
  const int64_t blocks = problem.vocab / kBlock + 1;
  const int64_t row = (problem.vocab + kBlock - 1) / kBlock * kBlock;
  Workspace<Real> w;
  w.student = take(kBlock);
  w.teacher = take(kBlock);
  w.student_e = take(kBlock);
  w.teacher_e = take(kBlock);
  w.gradient = take(kBlock);
  w.q = resident ? take(row) : nullptr;
  w.p = resident ? take(row) : nullptr;
  w.q_shift = take(blocks);
  w.p_shift = take(blocks);

  const int64_t gradient_size = element_size(problem.gradient.dtype);
  for (int64_t r = lo; r < hi; ++r) {
    const bool labelled = problem.kind != kCrossEntropy || problem.labels[r] != -100;
    const bool counts = (problem.mask == nullptr || problem.mask[r]) &&
                        (problem.weight == nullptr || problem.weight[r] != 0) && labelled;
    char* gradient = problem.gradient.data != nullptr ? row_of(problem.gradient, r) : nullptr;
    if (!counts) {
      if (problem.value != nullptr) problem.value[r] = 0;
      if (problem.stats != nullptr)
        for (int i = 0; i < kStats; ++i) problem.stats[i * problem.rows + r] = 0;
      if (gradient != nullptr) zero(gradient, 0, problem.width, gradient_size);
      continue;
    }
    const int64_t next = r + 1 < hi ? r + 1 : r;
    switch (problem.kind) {
      case kCrossEntropy:
        label_row(problem, r, w);
        break;
#define SH_CASE(number, Kind)                        \
  case number:                                       \
    divergence_row<Kind, Real>(problem, r, next, w); \
    break;
        SH_DIVERGENCE_KINDS(SH_CASE)
#undef SH_CASE
    }
    if (gradient != nullptr) zero(gradient, problem.vocab, problem.width, gradient_size);
  }
}

void scale(const Rows& rows, int64_t width, double factor, int64_t lo, int64_t hi) {
  for (int64_t r = lo; r < hi; ++r) {
    with_type(rows.dtype, row_of(rows, r), [&](auto* x) {
      using Real = decltype(widen(*x));
      const Real f = Real(factor);
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) narrow(Real(widen(x[j]) * f), x[j]);
    });
  }
}

}  // namespace

extern const DivergenceKernels divergence_kernels;
const DivergenceKernels divergence_kernels = {rows<float>, rows<double>, scale};

}  // namespace STILLHOUSE_ISA
}  // namespace stillhouse
