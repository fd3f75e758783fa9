// Draft trees on the CPU: threads, memory, and the ops' registration.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "../core/isa.h"
#include "../core/memory.h"
#include "../core/spin_team.h"
#include "problem.h"
#include "walk.h"

namespace stillhouse {
namespace baseline {
extern const TreeKernels tree_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const TreeKernels tree_kernels;
}
namespace avx512 {
extern const TreeKernels tree_kernels;
}
#endif

namespace {

const TreeKernels& kernels() {
#if defined(__x86_64__)
  static const TreeKernels* const tables[3] = {&baseline::tree_kernels, &avx2::tree_kernels,
                                               &avx512::tree_kernels};
#else
  static const TreeKernels* const tables[3] = {&baseline::tree_kernels, nullptr, nullptr};
#endif
  return by_isa(tables);
}

// Spans that are worth another thread.
constexpr int64_t kGrain = 32;
// Memory of a thread for the exponentials of a walk's frames.
constexpr int64_t kKeptBytes = 16 << 20;

// Reads rows for a walk; the team's threads work on one tree, span by span.
struct CpuRows {
  const TreeProblem& t;
  const WalkMemory& memory;
  const TreeKernels& kernels;
  SpinTeam& team;
  Kept* const kept;     // of frames
  char* const numbers;  // that are kept, [frames that keep, 2, row_bytes]
  const int64_t keeping, row_bytes;
  double* const extra;   // [spans]
  int64_t* const index;  // [spans]
  const int64_t spans;
  const TreeWalk<CpuRows>* walk = nullptr;

  template <class F>
  void write(F f) const {
    f();
  }
  // The target's row of a node, null if there is none.
  const char* row_of(int32_t node) const {
    return node < 0 ? nullptr : t.row(t.target, t.target_dtype, walk->tree, node).data;
  }

  Kept& kept_of(const Frame& f) const { return kept[&f - memory.frames]; }

  // The row's largest logit and scale; `of_spans` has extremes, and then what makes a kept number P.
  int32_t combine(TreeRow& row, double* of_spans, double* sums) const {
    double most = -INFINITY, least = INFINITY, total = 0;
    for (int64_t s = 0; s < spans; ++s) {
      most = of_spans[s] > most ? of_spans[s] : most;
      least = of_spans[s] < least ? of_spans[s] : least;
      if (std::isnan(sums[s])) return kNotFinite;
    }
    if (row.probabilities) {
      for (int64_t s = 0; s < spans; ++s) total += sums[s];
      if (!std::isfinite(total)) return kNotFinite;
      if (least < 0 || std::fabs(total - 1) > 1e-3) return kNotNormalised;
    } else {
      if (!std::isfinite(most)) return kNotFinite;
      for (int64_t s = 0; s < spans; ++s) {
        of_spans[s] = std::exp2((of_spans[s] - most) * row.factor);
        total += sums[s] *= of_spans[s];
      }
      row.max = most;
    }
    row.scale = 1 / total;
    for (int64_t s = 0; s < spans; ++s) sums[s] *= row.scale, of_spans[s] *= row.scale;
    return 0;
  }

  int32_t measure(Frame& f, bool with_q) const {
    Kept& keep = kept_of(f);
    // Without Q a rejection looks at single tokens: nothing to keep.
    const int64_t level = &f - memory.frames;
    const bool again = level < keeping && (with_q || t.mode == TreeMode::typical);
    keep.p.numbers = again ? numbers + 2 * level * row_bytes : nullptr;
    keep.q.numbers = again ? keep.p.numbers + row_bytes : nullptr;
    const char* const child = row_of(f.child);
    team.each(spans, [&](int64_t lo, int64_t hi) {
      kernels.measure(f.p, t.columns, lo, hi, keep.p.spans, f.masses, keep.p.numbers,
                      with_q ? f.q.data : child);
      if (with_q)
        kernels.measure(f.q, t.columns, lo, hi, keep.q.spans, extra, keep.q.numbers, child);
    });
    const int32_t of_q = with_q ? combine(f.q, keep.q.spans, extra) : 0;
    return combine(f.p, keep.p.spans, f.masses) | of_q;
  }

  double total(const double* sums) const {
    double total = 0;
    for (int64_t s = 0; s < spans; ++s) total += sums[s];
    return total;
  }

  double sums(Frame& f) const {
    const Residual residual = walk->residual(f);
    team.each(spans,
              [&](int64_t lo, int64_t hi) { kernels.sums(residual, kept_of(f), lo, hi, extra); });
    return total(extra);
  }

  double sums_at(Frame& f, int32_t x) const {
    const int64_t span = x / kSpan;
    for (int64_t s = 0; s < spans; ++s) extra[s] = f.masses[s];
    kernels.sums(walk->residual(f), kept_of(f), span, span + 1, extra);
    return total(extra);
  }

  void keep(Frame& f, double by) const {
    for (int64_t s = 0; s < spans; ++s) f.masses[s] = extra[s] * by;
  }

  double rest(const Frame& f, int32_t patched) const {
    const Residual q{f.q, {}, nullptr, memory.patches, 0, patched, t.columns};
    const Kept of_q{kept_of(f).q, {}};
    team.each(spans, [&](int64_t lo, int64_t hi) { kernels.sums(q, of_q, lo, hi, extra); });
    return total(extra);
  }

  double entropy(Frame& f) const {
    const Residual residual = walk->residual(f);
    team.each(spans, [&](int64_t lo, int64_t hi) {
      kernels.entropies(residual, kept_of(f), lo, hi, extra);
    });
    return total(extra);
  }

  int32_t pick(Frame& f, double u) const {
    const double wanted = u * total(f.masses);
    double before = 0, sum = 0;
    int64_t span = -1;  // the first that passes what is wanted, else the last that has anything
    for (int64_t s = 0; s < spans && sum <= wanted; ++s) {
      if (f.masses[s] > 0) span = s, before = sum;
      sum += f.masses[s];
    }
    if (span < 0) return -1;
    double values[kSpan];
    kernels.values(walk->residual(f), kept_of(f), span, values);
    const int64_t left = t.columns - span * kSpan, n = left < kSpan ? left : kSpan;
    int64_t found = -1;
    sum = before;
    for (int64_t j = 0; j < n && sum <= wanted; ++j) {
      if (values[j] > 0) found = j;
      sum += values[j];
    }
    return found < 0 ? -1 : int32_t(span * kSpan + found);
  }

  int32_t largest(const TreeRow& row, int32_t node) const {
    const char* const child = row_of(walk->first_child(node));
    team.each(spans, [&](int64_t lo, int64_t hi) {
      kernels.largest(row, t.columns, lo, hi, extra, index, child);
    });
    int64_t best = 0;
    for (int64_t s = 0; s < spans; ++s) {
      if (index[s] < 0) return -1;
      if (extra[s] > extra[best]) best = s;
    }
    return extra[best] == -INFINITY ? -1 : int32_t(index[best]);
  }
};

// Frames whose exponentials are kept: those of modes that come back to a row, as far as memory goes.
int64_t keeping_of(const TreeProblem& t, int64_t levels, int64_t bytes) {
  const bool again = t.mode == TreeMode::multi_round || t.mode == TreeMode::traversal ||
                     t.mode == TreeMode::typical;
  const bool of_draft = t.draft != nullptr && t.mode != TreeMode::typical;
  const bool one_type =
      !of_draft || (t.target_dtype == Dtype::f64) == (t.draft_dtype == Dtype::f64);
  if (!again || !one_type || t.probabilities) return 0;
  return std::min(levels, std::max(int64_t(1), kKeptBytes / bytes));
}

void verify_one(const TreeProblem& t, int64_t tree, SpinTeam& team) {
  const int64_t spans = spans_of(t.columns), width = t.depth + 1, row = tree * width;
  const int64_t levels = t.mode == TreeMode::traversal ? width : 1;
  for (int64_t i = 0; i < width; ++i) t.path[row + i] = t.out_tokens[row + i] = -1;
  t.path[row] = 0;
  const bool wide =
      t.target_dtype == Dtype::f64 || (t.draft != nullptr && t.draft_dtype == Dtype::f64);
  const int64_t row_bytes = spans * kSpan * (wide ? 8 : 4);
  const int64_t keep = keeping_of(t, levels, 2 * row_bytes);
  const int64_t bytes =
      (3 * levels + 2) * spans * 8 + levels * int64_t(sizeof(Frame) + sizeof(Kept)) +
      t.nodes * int64_t(sizeof(Rejection) + sizeof(Patch) + 8) + 2 * keep * row_bytes + 256;
  char* at = align_up(thread_scratch(bytes));
  const auto take = [&](auto* type, int64_t count) {
    auto* const taken = reinterpret_cast<decltype(type)>(at);
    at += (count * int64_t(sizeof(*type)) + 7) / 8 * 8;
    return taken;
  };
  char* const numbers =
      take((char*)nullptr, 2 * keep * row_bytes);  // first: vectors are stored to it
  WalkMemory memory{};
  memory.masses = take((double*)nullptr, levels * spans);
  double* const extra = take((double*)nullptr, spans);
  int64_t* const index = take((int64_t*)nullptr, spans);
  Kept* const kept = take((Kept*)nullptr, levels);
  for (int64_t i = 0; i < levels; ++i) {
    kept[i].p = {nullptr, take((double*)nullptr, spans)};
    kept[i].q = {nullptr, take((double*)nullptr, spans)};
  }
  memory.frames = take((Frame*)nullptr, levels);
  memory.rejections = take((Rejection*)nullptr, t.nodes);
  memory.patches = take((Patch*)nullptr, t.nodes);
  memory.rejected = take((int32_t*)nullptr, t.nodes);
  CpuRows rows{t, memory, kernels(), team, kept, numbers, keep, row_bytes, extra, index, spans};
  TreeWalk<CpuRows> walk{t, tree, memory, rows};
  rows.walk = &walk;
  walk.run();
}

struct Cpu {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_empty(like, shape, dtype);
  }
  static void build(const TreeLinks& links, const Tensor&) {
    for (int64_t tree = 0; tree < links.trees; ++tree) links.build(tree);
  }
  // Trees side by side, where there are as many as threads: walks differ in length, so a thread that is done
  // takes the next.
  static void verify(const TreeProblem& t, const int32_t*, const Tensor&) {
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    if (t.trees < threads) {
      const int64_t worth = std::max(int64_t(1), spans_of(t.columns) / kGrain);
      return SpinTeam::run(std::min(threads, worth), [&](SpinTeam& team) {
        for (int64_t tree = 0; tree < t.trees; ++tree) verify_one(t, tree, team);
      });
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      SpinTeam::run(1, [&](SpinTeam& alone) {
        for (int64_t tree; (tree = next.fetch_add(1)) < t.trees;) verify_one(t, tree, alone);
      });
    });
  }
};

}  // namespace
}  // namespace stillhouse

STABLE_TORCH_LIBRARY_IMPL(stillhouse, CPU, m) {
  stillhouse::TreeOps<stillhouse::Cpu>::register_ops(m);
}
