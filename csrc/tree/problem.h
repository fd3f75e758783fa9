// The ops of draft trees between torch's tensors and a device's kernels.
#pragma once
#include <tuple>

#include "../core/tensors.h"
#include "kernel.h"

namespace stillhouse {

constexpr int64_t kMostAccepted = 64, kMostChildren = 64;

// The links of trees [B, T], from parents.
struct TreeLinks {
  int64_t trees, nodes, words;
  const int32_t* parents;
  int32_t *first_child, *next_sibling, *depth, *bad;
  uint64_t* ancestors;

  // Nodes come after their parents, not too deep and not too many of one; the first that does not is named,
  // and neither it nor what comes behind it is linked.
  SH_INLINE void build(int64_t tree) const {
    const int64_t first = tree * nodes;
    for (int64_t i = 0; i < nodes; ++i) {
      first_child[first + i] = next_sibling[first + i] = depth[first + i] = -1;
      for (int64_t w = 0; w < words; ++w) ancestors[(first + i) * words + w] = 0;
    }
    const int64_t right = follow(first);
    bad[tree] = right < nodes ? int32_t(right) : -1;
    // From the last node back, each becomes its parent's first child.
    for (int64_t i = 0; i < right; ++i) next_sibling[first + i] = -1;
    for (int64_t i = right - 1; i > 0; --i) {
      const int32_t parent = parents[first + i];
      if (parent < 0) continue;
      next_sibling[first + i] = first_child[first + parent];
      first_child[first + parent] = int32_t(i);
    }
  }

 private:
  // Depths and ancestors of nodes up to the first that is wrong, which is returned. Children are counted
  // where their next siblings will be.
  SH_INLINE int64_t follow(int64_t first) const {
    bool padded = false;
    for (int64_t i = 0; i < nodes; ++i) {
      const int32_t parent = parents[first + i];
      if (parent == -2 && i > 0) {
        padded = true;
        continue;
      }
      bool is_right = i == 0 ? parent == -1 : parent >= 0 && parent < i && !padded;
      if (is_right && i > 0)
        is_right =
            depth[first + parent] < kMostAccepted && ++next_sibling[first + parent] < kMostChildren;
      if (!is_right) return i;
      uint64_t* const mine = ancestors + (first + i) * words;
      if (i > 0)
        for (int64_t w = 0; w < words; ++w) mine[w] = ancestors[(first + parent) * words + w];
      mine[i / 64] |= uint64_t(1) << i % 64;
      depth[first + i] = i == 0 ? 0 : depth[first + parent] + 1;
    }
    return nodes;
  }
};

// The ops, for a backend that has
//   Tensor output(like, shape, dtype)
//   void build(const TreeLinks&, like), void verify(const TreeProblem&, parents, like)
template <class Backend>
struct TreeOps {
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> build(const Tensor& parents) {
    STD_TORCH_CHECK(parents.dim() == 2 && parents.scalar_type() == ScalarType::Int,
                    "parents are int32 [B, T]");
    std::vector<Tensor> hold;
    const int64_t trees = parents.size(0), nodes = parents.size(1), words = (nodes + 63) / 64;
    const auto links = [&] { return Backend::output(parents, {trees, nodes}, ScalarType::Int); };
    const Tensor child = links(), sibling = links(), depth = links();
    const Tensor ancestors = Backend::output(parents, {trees, nodes, words}, ScalarType::Long);
    const Tensor bad = Backend::output(parents, {trees}, ScalarType::Int);
    const TreeLinks all{trees,
                        nodes,
                        words,
                        of<const int32_t>(contiguous_of(parents, hold)),
                        of<int32_t>(child),
                        of<int32_t>(sibling),
                        of<int32_t>(depth),
                        of<int32_t>(bad),
                        of<uint64_t>(ancestors)};
    if (trees * nodes > 0) Backend::build(all, parents);
    return {child, sibling, depth, ancestors, bad};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> verify(
      const Tensor& tokens, const Tensor& parents, const Tensor& first_child,
      const Tensor& next_sibling, const Tensor& target, const MaybeTensor& draft,
      const MaybeTensor& kind, const MaybeTensor& temperature, const Tensor& seed,
      const Tensor& position, const MaybeTensor& coins, int64_t mode, bool is_prob, double epsilon,
      double delta) {
    STD_TORCH_CHECK(target.dim() == 3, "target is [B, T, V]");
    std::vector<Tensor> hold;
    TreeProblem t{};
    t.trees = target.size(0), t.nodes = target.size(1), t.columns = target.size(2);
    t.depth = t.nodes - 1 < kMostAccepted ? t.nodes - 1 : kMostAccepted;
    STD_TORCH_CHECK(t.nodes > 0 && t.columns > 0 && t.columns < int64_t(1) << 31,
                    "a tree has a root, and a vocabulary tokens");
    const auto nodes = [&](const Tensor& x, ScalarType dtype, const char* name) {
      return part(x, dtype, {t.trees, t.nodes}, name, hold);
    };
    const auto trees = [&](const Tensor& x, ScalarType dtype, const char* name) {
      return part(x, dtype, {t.trees}, name, hold);
    };
    const auto* const above = of<const int32_t>(nodes(parents, ScalarType::Int, "parents"));
    t.tokens = of<const int32_t>(nodes(tokens, ScalarType::Int, "tokens"));
    t.first_child = of<const int32_t>(nodes(first_child, ScalarType::Int, "first_child"));
    t.next_sibling = of<const int32_t>(nodes(next_sibling, ScalarType::Int, "next_sibling"));
    t.target = of<const char>(contiguous_of(target, hold)), t.target_dtype = dtype_of(target);
    if (draft) {
      STD_TORCH_CHECK(draft->dim() == 3 && draft->numel() == target.numel() &&
                          draft->size(1) == t.nodes && draft->size(2) == t.columns,
                      "draft is [B, T, V] like target");
      t.draft = of<const char>(contiguous_of(*draft, hold)), t.draft_dtype = dtype_of(*draft);
    }
    if (kind) t.kind = of<const uint8_t>(nodes(*kind, ScalarType::Byte, "kind"));
    if (temperature)
      t.temperature = of<const double>(trees(*temperature, ScalarType::Double, "temperature"));
    t.seed = of<const int64_t>(trees(seed, ScalarType::Long, "seed"));
    t.position = of<const int64_t>(trees(position, ScalarType::Long, "position"));
    if (coins)
      t.coins =
          of<const double>(part(*coins, ScalarType::Double, {t.trees, t.nodes, 2}, "coins", hold));
    STD_TORCH_CHECK(mode >= 0 && mode <= int64_t(TreeMode::typical), "mode is 0 ... 4");
    t.mode = TreeMode(mode), t.probabilities = is_prob, t.epsilon = epsilon, t.delta = delta;
    const auto output = [&](std::vector<int64_t> shape, ScalarType dtype) {
      return Backend::output(target, shape, dtype);
    };
    const Tensor accepted = output({t.trees}, ScalarType::Int);
    const Tensor path = output({t.trees, t.depth + 1}, ScalarType::Int);
    const Tensor out_tokens = output({t.trees, t.depth + 1}, ScalarType::Int);
    const Tensor accept_prob = output({t.trees}, ScalarType::Float);
    const Tensor status = output({t.trees}, ScalarType::Int);
    t.n_accepted = of<int32_t>(accepted), t.path = of<int32_t>(path);
    t.out_tokens = of<int32_t>(out_tokens), t.status = of<int32_t>(status);
    t.accept_prob = of<float>(accept_prob);
    if (t.trees > 0) Backend::verify(t, above, target);
    return {accepted, path, out_tokens, accept_prob, status};
  }

  template <class Library>
  static void register_ops(Library& m) {
    m.impl("tree_build", TORCH_BOX(&build));
    m.impl("tree_verify", TORCH_BOX(&verify));
  }

 private:
  template <class T>
  static T* of(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
  }
  static Tensor part(const Tensor& x, ScalarType dtype, const std::vector<int64_t>& shape,
                     const char* name, std::vector<Tensor>& hold) {
    bool fits = x.dim() == int64_t(shape.size()) && x.scalar_type() == dtype;
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = x.size(i) == shape[i];
    STD_TORCH_CHECK(fits, name, " does not fit target, or has another dtype than it must");
    return contiguous_of(x, hold);
  }
};

}  // namespace stillhouse
