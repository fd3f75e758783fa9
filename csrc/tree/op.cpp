// Draft trees on the CPU: threads, memory, and the ops' registration.
#include <atomic>
#include <cmath>

#include "../core/isa.h"
#include "../core/memory.h"
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

// Reads rows for a walk; `shared`: its threads work on one tree, span by span.
struct CpuRows {
  const TreeProblem& t;
  const WalkMemory& memory;
  const TreeKernels& kernels;
  const bool shared;
  double* const extremes;  // [2, spans]
  double* const extra;     // [spans]
  int64_t* const index;    // [spans]
  const int64_t spans;
  const TreeWalk<CpuRows>* walk = nullptr;

  template <class F>
  void write(F f) const {
    f();
  }
  template <class F>
  void each(int64_t count, F f) const {
    if (shared && count > kGrain) {
      torch::stable::parallel_for(0, count, kGrain, f);
    } else {
      f(0, count);
    }
  }

  int32_t combine(TreeRow& row, const double* extreme, double* sums) const {
    double most = -INFINITY, least = INFINITY, total = 0;
    for (int64_t s = 0; s < spans; ++s) {
      most = extreme[s] > most ? extreme[s] : most;
      least = extreme[s] < least ? extreme[s] : least;
      if (std::isnan(sums[s])) return kNotFinite;
    }
    if (row.probabilities) {
      for (int64_t s = 0; s < spans; ++s) total += sums[s];
      if (!std::isfinite(total)) return kNotFinite;
      if (least < 0 || std::fabs(total - 1) > 1e-3) return kNotNormalised;
    } else {
      if (!std::isfinite(most)) return kNotFinite;
      for (int64_t s = 0; s < spans; ++s)
        total += sums[s] *= std::exp2((extreme[s] - most) * row.factor);
      row.max = most;
    }
    row.scale = 1 / total;
    for (int64_t s = 0; s < spans; ++s) sums[s] *= row.scale;
    return 0;
  }

  int32_t measure(Frame& f, bool with_q) const {
    each(with_q ? 2 * spans : spans, [&](int64_t lo, int64_t hi) {
      if (lo < spans)
        kernels.measure(f.p, t.columns, lo, hi < spans ? hi : spans, extremes, f.masses);
      if (hi > spans)
        kernels.measure(f.q, t.columns, lo > spans ? lo - spans : 0, hi - spans, extremes + spans,
                        extra);
    });
    const int32_t of_q = with_q ? combine(f.q, extremes + spans, extra) : 0;
    return combine(f.p, extremes, f.masses) | of_q;
  }

  double total(const Frame& f) const {
    double total = 0;
    for (int64_t s = 0; s < spans; ++s) total += f.masses[s];
    return total;
  }

  double sums(Frame& f) const {
    const Residual residual = walk->residual(f);
    each(spans, [&](int64_t lo, int64_t hi) { kernels.sums(residual, lo, hi, f.masses); });
    return total(f);
  }

  double sums_at(Frame& f, int32_t x) const {
    const int64_t span = x / kSpan;
    kernels.sums(walk->residual(f), span, span + 1, f.masses);
    return total(f);
  }

  void scale(Frame& f, double by) const {
    for (int64_t s = 0; s < spans; ++s) f.masses[s] *= by;
  }

  double entropy(Frame& f) const {
    const Residual residual = walk->residual(f);
    each(spans, [&](int64_t lo, int64_t hi) { kernels.entropies(residual, lo, hi, extra); });
    double total = 0;
    for (int64_t s = 0; s < spans; ++s) total += extra[s];
    return total;
  }

  int32_t pick(Frame& f, double u) const {
    const double wanted = u * total(f);
    double before = 0, sum = 0;
    int64_t span = -1;  // the first that passes what is wanted, else the last that has anything
    for (int64_t s = 0; s < spans && sum <= wanted; ++s) {
      if (f.masses[s] > 0) span = s, before = sum;
      sum += f.masses[s];
    }
    if (span < 0) return -1;
    double values[kSpan];
    kernels.values(walk->residual(f), span, values);
    const int64_t left = t.columns - span * kSpan, n = left < kSpan ? left : kSpan;
    int64_t found = -1;
    sum = before;
    for (int64_t j = 0; j < n && sum <= wanted; ++j) {
      if (values[j] > 0) found = j;
      sum += values[j];
    }
    return found < 0 ? -1 : int32_t(span * kSpan + found);
  }

  int32_t largest(const TreeRow& row, int32_t) const {
    each(spans,
         [&](int64_t lo, int64_t hi) { kernels.largest(row, t.columns, lo, hi, extremes, index); });
    int64_t best = 0;
    for (int64_t s = 0; s < spans; ++s) {
      if (index[s] < 0) return -1;
      if (extremes[s] > extremes[best]) best = s;
    }
    return extremes[best] == -INFINITY ? -1 : int32_t(index[best]);
  }
};

void verify_one(const TreeProblem& t, int64_t tree, bool shared) {
  const int64_t spans = spans_of(t.columns), width = t.depth + 1, row = tree * width;
  const int64_t levels = t.mode == TreeMode::traversal ? width : 1;
  for (int64_t i = 0; i < width; ++i) t.path[row + i] = t.out_tokens[row + i] = -1;
  t.path[row] = 0;
  const int64_t doubles = (levels + 4) * spans;
  const int64_t bytes = doubles * 8 + levels * int64_t(sizeof(Frame)) +
                        t.nodes * int64_t(sizeof(Rejection) + sizeof(Patch) + 8) + 256;
  char* at = align_up(thread_scratch(bytes));
  const auto take = [&](auto* type, int64_t count) {
    auto* const taken = reinterpret_cast<decltype(type)>(at);
    at += (count * int64_t(sizeof(*type)) + 7) / 8 * 8;
    return taken;
  };
  WalkMemory memory{};
  memory.masses = take((double*)nullptr, levels * spans);
  double* const extremes = take((double*)nullptr, 2 * spans);
  double* const extra = take((double*)nullptr, spans);
  int64_t* const index = take((int64_t*)nullptr, spans);
  memory.frames = take((Frame*)nullptr, levels);
  memory.rejections = take((Rejection*)nullptr, t.nodes);
  memory.patches = take((Patch*)nullptr, t.nodes);
  memory.rejected = take((int32_t*)nullptr, t.nodes);
  CpuRows rows{t, memory, kernels(), shared, extremes, extra, index, spans};
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
      for (int64_t tree = 0; tree < t.trees; ++tree) verify_one(t, tree, true);
      return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t tree; (tree = next.fetch_add(1)) < t.trees;) verify_one(t, tree, false);
    });
  }
};

}  // namespace
}  // namespace stillhouse

STABLE_TORCH_LIBRARY_IMPL(stillhouse, CPU, m) {
  stillhouse::TreeOps<stillhouse::Cpu>::register_ops(m);
}
