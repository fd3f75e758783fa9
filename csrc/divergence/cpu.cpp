// Row-wise divergences on the CPU. Compiled once per instruction set, in a namespace of its own:
// no torch header and no standard-library template here, or the linker might keep the AVX-512 copy
// of a shared inline function and run it on a machine without AVX-512.
//
// A row is read once from memory and its gradient written once; in between it stays in L2:
//   1. exponentials: 2^(x - shift) into scratch, their sum                   (student, then teacher)
//   2. terms:        q, p from scratch; value, slopes h and H = sum h; with a known H the gradient
//   3. combine:      (h - q H) * weight                                      (only where H is not known)
// A row longer than `resident_limit` has no scratch: passes 2 and 3 take the exponentials again.
// Passes work on blocks of kBlock elements. Where student, teacher and gradient are all bfloat16 they
// are read and written as they are; any other mix of types is widened block by block in L1, so that
// the kernels are not a template of three input types.
#include <type_traits>

#include "kernel.h"

namespace stillhouse {
namespace STILLHOUSE_ISA {
namespace {

template <class Real>
struct Workspace {
  Real *q, *p;              // [vocab] exponentials, then q and h; null on the streaming path
  Real *q_shift, *p_shift;  // [blocks] x that a block's exponentials are relative to
  Real *student, *teacher, *student_e, *teacher_e, *gradient;  // [kBlock] each
};

#include "source.h"

#include "label.h"

#include "blocks.h"

// In the order of ops.Stats.
template <class Real>
struct RowStats {
  Real acceptance, agreement, student_entropy, teacher_entropy, student_lse, teacher_lse, below;
};

template <class Real>
void write_stats(const Problem<Real>& problem, int64_t r, RowStats<Real> row) {
  const Real values[kStats] = {
      row.acceptance,  row.agreement, row.student_entropy, row.teacher_entropy, row.student_lse,
      row.teacher_lse, row.below};
  for (int i = 0; i < kStats; ++i) problem.stats[i * problem.rows + r] = values[i];
}

// Source::factor of the shift it was last asked for: most rows have one.
template <class Real>
struct Factor {
  Real shift = NAN, value = 0;
  Real at(const Source<Real>& source, Real shift_now, double lse) {
    if (shift_now != shift) value = source.factor(shift = shift_now, lse);
    return value;
  }
};

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
  Factor<Real> q_factor, p_factor;
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
  Block<In, Real> block(int64_t start, const In* z, const In* t) {
    Block<In, Real> b{padded(student.columns(start)),
                      z,
                      t,
                      student.gain,
                      teacher.gain,
                      student.gain / teacher.gain,
                      TwoPart<Real>(t_lse - z_lse),
                      TwoPart<Real>(z_lse),
                      TwoPart<Real>(t_lse),
                      w.student_e,
                      w.teacher_e,
                      1,
                      1};
    Real z_shift = Real(z_lse / student.gain), t_shift = Real(t_lse / teacher.gain);
    if (w.q != nullptr) {
      b.q = w.q + start;
      b.p = w.p + start;
      z_shift = w.q_shift[start / kBlock];
      t_shift = w.p_shift[start / kBlock];
    } else {
      block_exp(b.n, z, student.gain2(), z_shift, b.q, {reinterpret_cast<const char*>(z), 0});
      block_exp(b.n, t, teacher.gain2(), t_shift, b.p, {reinterpret_cast<const char*>(t), 0});
    }
    b.q_factor = q_factor.at(student, z_shift, z_lse);
    b.p_factor = p_factor.at(teacher, t_shift, t_lse);
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
  if (problem.stats != nullptr)
    write_stats<Real>(
        problem, r,
        {Real(sums.acceptance), agreement, Real(sums.student_entropy), Real(sums.teacher_entropy),
         Real(row.z_lse), Real(row.t_lse), Real(sums.below)});
}

// Cross-entropy to labels: the label term alone, one side.
template <class Real>
void label_row(const Problem<Real>& problem, int64_t r, Workspace<Real> w) {
  const Source<Real> student(problem.student, r, problem.vocab);
  const double lse =
      exponentials<Real>(student, w.student, nullptr, nullptr, w.student_e, {student.row, 0});
  LabelTerm<Real> label(problem, problem.labels[r], student, lse, w);
  if (problem.value != nullptr) problem.value[r] = label.value;
  if (problem.stats != nullptr) {
    const Real none = NAN;  // there is no teacher to compare with
    const Real entropy = label.entropy(student, Real(lse), w.student, w.student_e);
    write_stats<Real>(problem, r, {none, none, entropy, none, Real(lse), none, none});
  }
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
      if (problem.stats != nullptr) write_stats<Real>(problem, r, {});
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
