// Row-wise divergences on the CPU. Compiled once per instruction set, in a namespace of its own:
// no torch header and no standard-library template here, or the linker might keep the AVX-512 copy
// of a shared inline function and run it on a machine without AVX-512.
//
// A row is read once from memory and its gradient written once; in between it stays in L2:
//   1. exponentials: 2^(x - shift) into scratch, their sum                   (student, then teacher)
//   2. terms:        q, p from scratch; value, slopes h and H = sum h; with a known H the gradient
//   3. combine:      (h - q H) * weight                                      (only where H is not known)
// Short rows are taken kLanes at a time (short.h).
// A row longer than `resident_limit` has no scratch: passes 2 and 3 take the exponentials again.
// Passes work on blocks of kBlock elements. Where student, teacher and gradient are all bfloat16 they
// are read and written as they are; any other mix of types is widened block by block in L1, so that
// the kernels are not a template of three input types.
#include <limits>
#include <type_traits>

#include "kernel.h"

namespace stillhouse {
namespace STILLHOUSE_ISA {
namespace {

#include "../core/lanes.h"

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

template <class Real>
void write_value(const Problem<Real>& problem, int64_t r, double divergence,
                 const LabelTerm<Real>& label) {
  if (problem.value == nullptr) return;
  problem.value[r] = Real(problem.factor * divergence);
  if (problem.label_weight > 0)
    problem.value[r] = Real(1 - problem.label_weight) * problem.value[r] +
                       Real(problem.label_weight) * label.value;
}

template <class Real>
Real divergence_weight(const Problem<Real>& problem, int64_t r) {
  return row_weight(problem, r) * Real((1 - problem.label_weight) * problem.factor);
}

#include "numbers.h"

#include "head.h"

#include "sparse.h"

#include "row.h"

#include "short.h"

#include "sorted.h"

#include "states.h"

#include "largest.h"

void zero(char* row, int64_t from, int64_t to, int64_t size) {
  for (int64_t i = from * size; i < to * size; ++i) row[i] = 0;
}

template <class Kind, class Real>
void sparse_rows(const Problem<Real>& problem, int64_t lo, int64_t hi, const Workspace<Real>& w) {
  for (int64_t r = lo; r < hi; ++r)
    if (counts(problem, r)) SparseRow<Kind, Real>(problem, r, r + 1 < hi ? r + 1 : r, w).run();
}

template <class Kind, class Real>
void rows_of_kind(const Problem<Real>& problem, int64_t lo, int64_t hi, const Workspace<Real>& w) {
  if constexpr (kTakesSparse<Kind>) {
    if (problem.sparse.ids != nullptr && problem.sparse.tail != kUniform)
      return sparse_rows<Kind>(problem, lo, hi, w);
  }
  if (Kind::kRow != RowNumbers::none || !together(problem)) {
    for (int64_t r = lo; r < hi; ++r)
      if (counts(problem, r)) divergence_row<Kind>(problem, r, r + 1 < hi ? r + 1 : r, w);
    return;
  }
  int64_t chosen[kLanes];
  int count = 0;
  for (int64_t r = lo; r < hi; ++r) {
    if (counts(problem, r)) chosen[count++] = r;
    if (count == 0 || (count < kLanes && r + 1 < hi)) continue;
    for (int i = count; i < kLanes; ++i) chosen[i] = chosen[0];
    short_rows<Kind>(problem, chosen, count, r + 1 < hi ? r + 1 : r, w);
    count = 0;
  }
}

template <class Real>
void rows(const Problem<Real>& problem, int64_t lo, int64_t hi, void* scratch) {
  Workspace<Real> w;
  w.lay_out(problem,
            reinterpret_cast<Real*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63)));
  // What the kinds leave out: rows that do not count, columns beyond the vocabulary.
  const int64_t gradient_size = element_size(problem.gradient.dtype);
  for (int64_t r = lo; r < hi; ++r) {
    const bool counted = counts(problem, r);
    if (!counted && problem.value != nullptr) problem.value[r] = 0;
    if (!counted && problem.stats != nullptr) write_stats<Real>(problem, r, {});
    if (problem.gradient.data != nullptr)
      zero(row_of(problem.gradient, r), counted ? problem.vocab : 0, problem.width, gradient_size);
  }
  switch (problem.kind) {
    case kCrossEntropy:
      for (int64_t r = lo; r < hi; ++r)
        if (counts(problem, r)) label_row(problem, r, w);
      break;
    case kULD:
      for (int64_t r = lo; r < hi; ++r)
        if (counts(problem, r)) sorted_row<Real>(problem, r, r + 1 < hi ? r + 1 : r, w);
      break;
    case kSupportKL:
      sparse_rows<ForwardKL>(problem, lo, hi, w);
      break;
#define SH_CASE(number, Kind)                     \
  case number:                                    \
    rows_of_kind<Kind, Real>(problem, lo, hi, w); \
    break;
      SH_DIVERGENCE_KINDS(SH_CASE)
#undef SH_CASE
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
const DivergenceKernels divergence_kernels = {rows<float>,    rows<double>,   states<float>,
                                              states<double>, largest<float>, largest<double>,
                                              scale,          kShortLimit};

}  // namespace STILLHOUSE_ISA
}  // namespace stillhouse
