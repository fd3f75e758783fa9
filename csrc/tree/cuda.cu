// Draft trees on CUDA: launches, memory, and the ops' registration.
#include "../core/cuda.h"
#include "problem.h"
#include "rows.cuh"

namespace stillhouse {
namespace {

// Memory that lives as long as the launches need it: the stream orders its reuse.
struct Memory {
  const Tensor& like;
  std::vector<Tensor> hold;

  template <class T>
  T* take(int64_t count) {
    hold.push_back(new_output(like, {count * int64_t(sizeof(T))}, ScalarType::Byte));
    return static_cast<T*>(hold.back().data_ptr());
  }
};

struct Cuda {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return new_output(like, shape, dtype);
  }

  static void build(const TreeLinks& links, const Tensor& like) {
    Launcher launch(like);
    launch("links", links_kernel, Grid{(links.trees + kWarpSize - 1) / kWarpSize, kWarpSize},
           links);
  }

  static void verify(const TreeProblem& t, const int32_t* parents, const Tensor& like) {
    const bool wide =
        t.target_dtype == Dtype::f64 || (t.draft != nullptr && t.draft_dtype == Dtype::f64);
    wide ? verify<double>(t, parents, like) : verify<float>(t, parents, like);
  }

  // All rows that a walk may visit are measured at once, at the speed of memory; a walk then reads again
  // where it has to.
  template <class Real>
  static void verify(const TreeProblem& t, const int32_t* parents, const Tensor& like) {
    Launcher launch(like);
    Memory memory{like, {}};
    const int64_t spans = spans_of(t.columns), rows = t.trees * t.nodes;
    const bool greedy = t.mode == TreeMode::greedy;
    const int64_t items = rows * (t.draft == nullptr ? 1 : 2) * spans;
    const int64_t measured = measures(t) ? items : 1, looked_at = greedy ? items : 1;
    const SpanTable table{memory.take<double>(measured), memory.take<double>(measured),
                          memory.take<double>(looked_at), memory.take<int64_t>(looked_at)};
    constexpr int64_t kWarps = kWalkThreads / kWarpSize;
    launch("spans", span_kernel<Real>, Grid{(items + kWarps - 1) / kWarps, kWalkThreads}, t,
           parents, table);
    const int64_t levels = t.mode == TreeMode::traversal ? t.depth + 1 : 1;
    const WalkMemory walk{memory.take<Frame>(t.trees * levels), memory.take<Rejection>(rows),
                          memory.take<int32_t>(rows), memory.take<Patch>(rows),
                          memory.take<double>(t.trees * (levels + 1) * spans)};
    launch("walk", walk_kernel<Real>, Grid{t.trees, kWalkThreads}, t, table, walk, levels);
  }
};

}  // namespace
}  // namespace stillhouse

STILLHOUSE_CUDA_LIBRARY(m) { stillhouse::TreeOps<stillhouse::Cuda>::register_ops(m); }
