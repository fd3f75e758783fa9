// Draft trees: node 0 is the root, each other node comes after its parent.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace stillhouse::draft {

constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Tree {
  std::vector<int32_t> tokens, parents;
  std::vector<float> scores;

  explicit Tree(int32_t root, float score = 0.f) : tokens{root}, parents{-1}, scores{score} {}
  int32_t size() const { return int32_t(tokens.size()); }

  int32_t child(int32_t parent, int32_t token) const {
    for (int32_t i = parent + 1; i < size(); ++i)
      if (parents[i] == parent && tokens[i] == token) return i;
    return -1;
  }
  int32_t append(int32_t parent, int32_t token, float score) {
    parents.push_back(parent), tokens.push_back(token), scores.push_back(score);
    return size() - 1;
  }

  // The same nodes level by level, within a level in their order.
  Tree by_level() const {
    std::vector<int32_t> depth(size(), 0), order(size()), place(size());
    for (int32_t i = 1; i < size(); ++i) depth[i] = depth[parents[i]] + 1;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t i, int32_t j) { return depth[i] < depth[j]; });
    Tree sorted(tokens[0], scores[0]);
    for (int32_t i = 1; i < size(); ++i) {
      const int32_t from = order[i];
      place[from] = sorted.append(place[parents[from]], tokens[from], scores[from]);
    }
    return sorted;
  }
};

// The k largest of a row, descending; of equal ones the lower index. NaN and -inf are never taken: where
// there are fewer than k others, the rest has index -1 and -inf.
inline void largest(const float* row, int64_t size, int32_t k, int32_t* index, float* value) {
  std::fill_n(index, k, -1);
  std::fill_n(value, k, kNever);
  for (int64_t i = 0; i < size; ++i) {
    if (!(row[i] > value[k - 1])) continue;
    int32_t at = k - 1;
    for (; at > 0 && row[i] > value[at - 1]; --at)
      value[at] = value[at - 1], index[at] = index[at - 1];
    value[at] = row[i], index[at] = int32_t(i);
  }
}

// One level of a tree that grows by cumulative log-probability: of each of F nodes the k best tokens, and
// which `width` of those F k children are best. log_probs [F, V], scores [F]; tokens, parents, sums [F k]
// and frontier [width]. A node with score -inf has no children; what is missing is -1, with score -inf.
inline void expand_level(const float* log_probs, const float* scores, int64_t nodes,
                         int64_t vocabulary, int32_t k, int32_t width, int32_t* tokens,
                         int32_t* parents, float* sums, int32_t* frontier) {
  for (int64_t f = 0; f < nodes; ++f) {
    largest(log_probs + f * vocabulary, vocabulary, k, tokens + f * k, sums + f * k);
    for (int64_t i = f * k; i < (f + 1) * k; ++i) {
      sums[i] += scores[f];
      const bool there = sums[i] > kNever;
      if (!there) tokens[i] = -1, sums[i] = kNever;
      parents[i] = there ? int32_t(f) : -1;
    }
  }
  std::vector<float> best(width);
  largest(sums, nodes * k, width, frontier, best.data());
}

// Of N candidates (node 0 the root, parents first) the `total` best, closed under parents. A candidate
// counts as its worst ancestor does: where scores are cumulative that changes nothing, and a parent always
// goes before its child. chosen: [total], ascending, -1 where there are fewer; those with parent -2 or
// score -inf are never chosen.
inline void rerank(const int32_t* parents, const float* scores, int64_t count, int32_t total,
                   int32_t* chosen) {
  std::vector<float> score(count);
  std::vector<int32_t> order;
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0)
      score[i] = std::numeric_limits<float>::infinity();
    else
      score[i] = parents[i] < 0 ? kNever : std::min(scores[i], score[parents[i]]);
    if (score[i] > kNever) order.push_back(int32_t(i));
  }
  const size_t kept = std::min<size_t>(order.size(), size_t(total));
  std::partial_sort(order.begin(), order.begin() + kept, order.end(), [&](int32_t i, int32_t j) {
    return score[i] != score[j] ? score[i] > score[j] : i < j;
  });
  std::sort(order.begin(), order.begin() + kept);
  std::fill_n(chosen, total, -1);
  std::copy_n(order.begin(), kept, chosen);
}

}  // namespace stillhouse::draft
