// Verification of draft trees as its kernels see it.
#pragma once
#include "../core/rows.h"

namespace stillhouse {

// Columns whose probabilities are summed together. Sums of spans are added in their order: a result
// depends neither on threads nor on what is verified beside it.
constexpr int64_t kSpan = 512;

enum class TreeMode : int32_t { greedy, target, multi_round, traversal, typical };
// How a child was proposed: drawn from q without replacement, independently, or not drawn at all (one-hot);
// the last is drawn without replacement from q without the tokens of its one-hot siblings.
enum class TreeKind : uint8_t { sampled, independent, fixed, sampled_beside_fixed };

enum TreeStatus : int32_t {
  kNotFinite = 1,      // NaN, +inf, or nothing above -inf in a row that was visited
  kNotNormalised = 2,  // probabilities of such a row do not sum to 1
  kNoToken = 4,        // a token outside the vocabulary
  kNothingLeft = 8,    // a residual without mass: p stayed what it was
};

// A row of logits or probabilities. P(x) = 2^((x - max) factor) scale, or x scale.
struct TreeRow {
  const char* data;
  Dtype dtype;
  bool probabilities;
  double factor;  // log2(e) / temperature
  double max, scale;
};

// A rejected child turns P into max(0, a P - share Q) scale. At tokens of children more than that happens.
struct Rejection {
  double a, share, scale;
};
struct Patch {
  int32_t token;
  double value;
};

// What the rejections so far have made of a node's P.
struct Residual {
  TreeRow p, q;  // q.data null: no rejection has a share
  const Rejection* rejections;
  const Patch* patches;
  int32_t count, patched;
  int64_t columns;
};

// Trees [B, T] with rows [B, T, V]; D: the most tokens that can be accepted.
struct TreeProblem {
  int64_t trees, nodes, columns, depth;
  const int32_t *tokens, *first_child, *next_sibling;
  const uint8_t* kind;  // null: all sampled, or fixed where there is no draft
  const char *target, *draft;
  Dtype target_dtype, draft_dtype;
  bool probabilities;
  TreeMode mode;
  double epsilon, delta;      // of `typical`
  const double* temperature;  // [B], or null: 1
  const int64_t *seed, *position;
  const double* coins;  // [B, T, 2], or null: those of Philox
  int32_t *n_accepted, *path, *out_tokens, *status;
  float* accept_prob;

  SH_INLINE TreeRow row(const char* rows, Dtype dtype, int64_t tree, int64_t node) const {
    const double at = temperature == nullptr ? 1.0 : temperature[tree];
    const int64_t first = (tree * nodes + node) * columns * element_size(dtype);
    return {rows == nullptr ? nullptr : rows + first, dtype, probabilities, kLog2e / at, 0, 1};
  }
};

SH_INLINE int64_t spans_of(int64_t columns) { return (columns + kSpan - 1) / kSpan; }

// Exponentials of a node's rows as they were measured, so that rejections need not take them again: P is a
// number times its span's. Null: they were not kept.
struct KeptRow {
  char* numbers;  // [spans, kSpan] of the type that residuals are computed in
  double* spans;
};
struct Kept {
  KeptRow p, q;
};

// Steps of the CPU's kernels on one instruction set, over spans lo ... hi of a row.
struct TreeKernels {
  // The largest logit and the sum of 2^((x - largest) factor), each of which is kept, too, unless `kept` is
  // null; of probabilities the least and the sum. `next`: a row of the same type that is likely to be read
  // after this one, or null.
  void (*measure)(const TreeRow& row, int64_t columns, int64_t lo, int64_t hi, double* extremes,
                  double* sums, char* kept, const char* next);
  void (*sums)(const Residual& residual, const Kept& kept, int64_t lo, int64_t hi, double* sums);
  void (*values)(const Residual& residual, const Kept& kept, int64_t span, double* values);
  void (*entropies)(const Residual& residual, const Kept& kept, int64_t lo, int64_t hi,
                    double* sums);  // nats
  // The largest of each span and, where it is above those before it, its first place; -1: NaN or +inf.
  void (*largest)(const TreeRow& row, int64_t columns, int64_t lo, int64_t hi, double* best,
                  int64_t* index, const char* next);
};

}  // namespace stillhouse
