// What crosses from op.cpp (torch tensors) to cpu.cpp (one copy an instruction set): pointers and
// sizes, and functions that are forced inline: a shared copy could be that of another instruction set.
#pragma once
#include <cstdint>

#include "../core/rows.h"
#include "kinds.h"
#include "order.h"
#include "state.h"

namespace stillhouse {

constexpr int kStats = 7;
constexpr int64_t kBlock = 2048;  // elements widened and worked on at a time; two buffers fit in L1

struct Logits {
  Rows rows;
  double scale, cap, temperature;  // x = cap tanh(scale u / cap) / temperature; cap 0: none
  double gain = 1;                 // x over u, or over what the cap makes of it
};

// What a teacher that is known at k columns of a row says of the others: they are one outcome; they have
// nothing, the known ones all; each has the same; nothing is said, and the known ones are taken as they
// are. The numbers are those of stillhouse.ops.sparse_teacher.
enum Tail : int32_t { kBucket, kRenormalize, kUniform, kDrop };
constexpr int32_t kRestId = -2;     // an id: the entry is log of what all other columns have
constexpr double kMostMass = 1.01;  // above it, what is known are no probabilities of one row
struct Sparse {
  const int32_t* ids;  // [N, k], -1: none; null for a teacher that is known everywhere
  int64_t k;
  int32_t tail;
};

template <class Real>
struct Problem {
  Logits student, teacher;  // teacher.rows.data is null for cross-entropy
  Sparse sparse;  // if ids: the teacher's rows are log-probabilities [N, k] at these columns
  int64_t vocab;  // columns read; the gradient is zero beyond
  int64_t teacher_vocab;  // the same, but for a kind that sorts
  int64_t width;          // columns of the student
  int32_t kind;
  KindParams<Real> params;
  double factor;          // of the divergence, in value and gradient
  const Real* weight;     // [N] or null: the gradient is weight * dD/du; weight 0 = row not read
  const bool* mask;       // [N] or null: false = row not read
  const int64_t* labels;  // [N] or null; -100 = no label
  double label_weight;    // row loss = (1 - label_weight) D + label_weight CE
  double label_smoothing, label_temperature;
  Real* value;    // [N] or null
  Real* stats;    // [kStats, N] or null
  Rows gradient;  // data null: no gradient; may be the student's own rows
  // Where the columns are a part of the vocabulary, of whole rows [N] each: log-sum-exps of both sides
  // [2, N], and for a gradient the sum of slopes; or out go the sums of terms and slopes here, [2, N].
  const double *lse, *slope;
  double* parts;
  int64_t rows;
  int64_t resident_limit;  // rows of more columns take the streaming path
  int64_t short_limit;     // rows of at most so many columns are taken kLanes at a time
};

// What the problem says of a row, for every device.
template <class Real>
SH_INLINE bool has_labels(const Problem<Real>& p) {
  return p.labels != nullptr && p.label_weight > 0;
}
template <class Real>
SH_INLINE bool labelled(const Problem<Real>& p, int64_t r) {
  return has_labels(p) && p.labels[r] != -100;
}
template <class Real>
SH_INLINE bool counts(const Problem<Real>& p, int64_t r) {
  return (p.mask == nullptr || p.mask[r]) && (p.weight == nullptr || p.weight[r] != 0) &&
         (!needs_labels(p.kind) || p.labels[r] != -100);
}
template <class Real>
SH_INLINE Real row_weight(const Problem<Real>& p, int64_t r) {
  return p.weight != nullptr ? p.weight[r] : Real(1);
}

// Whether rows are taken kLanes at a time.
template <class Real>
SH_INLINE bool together(const Problem<Real>& p) {
  return p.vocab <= p.short_limit && p.kind != kCrossEntropy && p.kind != kULD &&
         p.sparse.ids == nullptr;
}

constexpr int kOrderParts = 8, kSupportParts = 6;

// A thread's scratch.
template <class Real>
struct Workspace {
  static constexpr int kBuffers = 6, kTiles = 6;

  Real *student, *teacher, *student_e, *teacher_e, *label_e, *gradient;  // [kBlock] each
  Real *q, *p;              // [vocab] exponentials, then q and h; null on the streaming path
  Real *q_shift, *p_shift;  // [blocks] x that a block's exponentials are relative to
  Real* tiles[kTiles];      // [kLanes, padded(vocab)] each, for rows that are taken together
  Real* order;              // [kOrderParts, order_part], for kinds that depend on an order
  int64_t order_part;
  Real* support[kSupportParts];  // [padded(k + 1)] each, for a sparse teacher
  int32_t *support_column, *support_begin;

  // Lays the parts out from `at`, or from nothing to learn the size; returns the end.
  SH_INLINE Real* lay_out(const Problem<Real>& problem, Real* at) {
    const int64_t longer =
        problem.vocab > problem.teacher_vocab ? problem.vocab : problem.teacher_vocab;
    const int64_t blocks = longer / kBlock + 1;
    const auto take = [&at](Real*& part, int64_t n) {
      part = at;
      at += (n + 15) / 16 * 16;
    };
    Real** const buffers[kBuffers] = {&student,   &teacher, &student_e,
                                      &teacher_e, &label_e, &gradient};
    for (Real** buffer : buffers) take(*buffer, kBlock);
    take(q_shift, blocks);
    take(p_shift, blocks);
    q = p = nullptr;
    if (problem.vocab <= problem.resident_limit || problem.kind == kULD) {
      take(q, blocks * kBlock);
      take(p, blocks * kBlock);
    }
    for (Real*& tile : tiles) take(tile, together(problem) ? kLanes * padded(problem.vocab) : 0);
    order_part = padded(longer + 1);
    take(order, problem.kind == kAdaptiveKL || problem.kind == kULD ? kOrderParts * order_part : 0);
    const bool sparse = problem.sparse.ids != nullptr;
    for (Real*& part : support) take(part, sparse ? padded(problem.sparse.k + 1) : 0);
    Real *columns, *begins;
    take(columns, sparse ? problem.sparse.k : 0);
    take(begins, sparse ? blocks + 1 : 0);
    support_column = reinterpret_cast<int32_t*>(columns);
    support_begin = reinterpret_cast<int32_t*>(begins);
    return at;
  }
};

// Bytes of scratch a thread needs.
template <class Real>
SH_INLINE int64_t scratch_bytes(const Problem<Real>& problem) {
  Workspace<Real> w;
  return (w.lay_out(problem, nullptr) - static_cast<Real*>(nullptr)) * int64_t(sizeof(Real)) + 64;
}

// The k largest columns of each row of logits, in order, and draws from all others.
struct LargestProblem {
  Logits logits;
  int64_t vocab, k, draws;
  const double* uniform;       // [N, draws] in [0, 1), ascending
  int32_t *ids, *drawn;        // [N, k], [N, draws]
  void *log_probs, *log_rest;  // [N, k] and [N], float or double as the kernel is
};

struct DivergenceKernels {
  void (*f32)(const Problem<float>&, int64_t lo, int64_t hi, void* scratch);
  void (*f64)(const Problem<double>&, int64_t lo, int64_t hi, void* scratch);
  void (*states_f32)(const Problem<float>&, double* out, int64_t lo, int64_t hi, void* scratch);
  void (*states_f64)(const Problem<double>&, double* out, int64_t lo, int64_t hi, void* scratch);
  void (*largest_f32)(const LargestProblem&, int64_t lo, int64_t hi, void* scratch);
  void (*largest_f64)(const LargestProblem&, int64_t lo, int64_t hi, void* scratch);
  void (*scale)(const Rows&, int64_t width, double factor, int64_t lo, int64_t hi);
  int64_t short_limit;  // up to so many columns, kLanes rows at a time are faster than one
};

}  // namespace stillhouse
