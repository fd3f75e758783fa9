// Drafts from a tri-gram table: ADED's Monte-Carlo tree search, and a beam.
//
// With S and n the sum of values and the visits of a child, P its score in the table and N the visits of
// its parent,
//
//     PUCT = S / n + (c1 + log((N + c2 + 1) / c2)) P sqrt(N) / (1 + n),
//
// infinite for n = 0. The value of a sentence is 1 + the scores of its steps. Children are made in the
// table's order (score descending, then token), and of equal ones the first is followed: the search
// depends on the table, the context, the seed and the step alone.
#pragma once
#include <cmath>

#include "../core/philox.h"
#include "table.h"
#include "tree.h"

namespace stillhouse::draft {

constexpr int32_t kMostIterations = 1 << 20, kMostDepth = 64;

struct SearchOptions {
  int32_t iterations, depth, keep, max_nodes;
  double c1, c2;
};

inline double exploration(double visits, double c1, double c2) {
  return (c1 + std::log((visits + c2 + 1) / c2)) * std::sqrt(visits);
}

inline double puct(double sum, double visits, double score, double parent_visits, double c1,
                   double c2) {
  if (visits == 0) return std::numeric_limits<double>::infinity();
  return sum / visits + exploration(parent_visits, c1, c2) * score / (1 + visits);
}

constexpr uint32_t kDraftStream = 2;

class Search {
 public:
  Search(const TrigramTable& table, const SearchOptions& options)
      : table_(table), options_(options) {
    for (int32_t n = 0; n <= options.iterations; ++n)
      exploration_.push_back(exploration(n, options.c1, options.c2));
  }

  // `step` keys the rollouts beside the seed. Several threads may search at once.
  Tree draft(int32_t before_last, int32_t last, uint64_t seed, uint64_t step) const {
    // A search makes 150 x 12 nodes in 50 us: their memory is worth keeping, unless there are very many.
    constexpr size_t kKept = 1 << 16;
    thread_local Nodes nodes;
    const auto lock = table_.reading();
    nodes.size = 0;
    nodes.reserve(1);
    nodes.add(bigram(before_last, last), 0, -1);
    for (int32_t i = 0; i < options_.iterations; ++i) {
      iterate(nodes, seed, step, uint32_t(i));
      if (nodes.count[0] == 0) break;  // nothing is known of this bigram
    }
    const Tree tree = extract(nodes, last);
    if (nodes.key.size() > kKept) nodes = Nodes();
    return tree;
  }

  const TrigramTable& table() const { return table_; }

 private:
  // Children of a node lie side by side. `mean` is S / n and `weight` P / (1 + n), so that a choice among
  // children multiplies and adds only.
  struct Nodes {
    std::vector<double> sum, mean, weight, score;
    std::vector<uint64_t> key;
    std::vector<int32_t> visits, first, count, parent;
    int32_t size = 0;

    // Room for `more` nodes: one check for all children of a node.
    void reserve(int32_t more) {
      if (size_t(size + more) <= key.size()) return;
      const size_t room = std::max<size_t>(1024, 2 * size_t(size + more));
      for (auto* column : {&sum, &mean, &weight, &score}) column->resize(room);
      for (auto* column : {&visits, &first, &count, &parent}) column->resize(room);
      key.resize(room);
    }
    void add(uint64_t bigram, double its_score, int32_t its_parent) {
      sum[size] = 0, mean[size] = std::numeric_limits<double>::infinity();
      weight[size] = score[size] = its_score, key[size] = bigram, parent[size] = its_parent;
      visits[size] = 0, first[size] = -1, count[size] = 0;
      ++size;
    }
    int32_t token(int32_t node) const { return int32_t(uint32_t(key[node])); }
  };

  static uint64_t next(uint64_t key, int32_t token) { return key << 32 | uint32_t(token); }

  void iterate(Nodes& nodes, uint64_t seed, uint64_t step, uint32_t iteration) const {
    Successor found[kMostSuccessors];
    int32_t node = 0, depth = 0;
    double value = 1;
    while (nodes.count[node] > 0 && depth < options_.depth) {
      const int32_t first = nodes.first[node], end = first + nodes.count[node];
      const double explore = exploration_[nodes.visits[node]];
      double best = -1;
      for (int32_t child = first; child < end; ++child) {
        const double its = nodes.mean[child] + explore * nodes.weight[child];
        if (its > best) best = its, node = child;
      }
      value += nodes.score[node], ++depth;
    }
    if (depth < options_.depth && nodes.first[node] < 0) {
      const int32_t count = table_.find(nodes.key[node], found);
      nodes.first[node] = nodes.size, nodes.count[node] = count;
      nodes.reserve(count);
      for (int32_t i = 0; i < count; ++i)
        nodes.add(next(nodes.key[node], found[i].token), found[i].score, node);
      if (count > 0) node = nodes.first[node], value += nodes.score[node], ++depth;
    }
    uint64_t key = nodes.key[node];
    for (; depth < options_.depth; ++depth) {
      const int32_t count = table_.find(key, found);
      if (count == 0) break;
      double all = 0;
      for (int32_t i = 0; i < count; ++i) all += found[i].score;
      const uint32_t place = iteration * uint32_t(options_.depth) + uint32_t(depth);
      double left = uniform(philox(seed, step, place, kDraftStream)) * all;
      int32_t drawn = 0;
      for (; drawn < count - 1 && left >= found[drawn].score; ++drawn) left -= found[drawn].score;
      value += found[drawn].score;
      key = next(key, found[drawn].token);
    }
    for (; node >= 0; node = nodes.parent[node]) {
      nodes.sum[node] += value;
      const double visits = ++nodes.visits[node];
      nodes.mean[node] = nodes.sum[node] / visits;
      nodes.weight[node] = nodes.score[node] / (1 + visits);
    }
  }

  // The `keep` most visited nodes (the root among them), each with its best successor, of which those with
  // the fewest visits go until the tree has max_nodes. No node has more visits than its parent, and of
  // equal ones the parent comes first: what is cut off are leaves.
  Tree extract(const Nodes& nodes, int32_t last) const {
    struct Member {
      int32_t visits, parent, token, node;
    };
    // Most nodes were never visited: they are ranked only where the visited ones are too few.
    std::vector<int32_t> order, member_of(nodes.size, -1);
    for (int32_t i = 0; i < nodes.size; ++i)
      if (nodes.visits[i] > 0) order.push_back(i);
    for (int32_t i = 0; i < nodes.size && int32_t(order.size()) < options_.keep; ++i)
      if (nodes.visits[i] == 0) order.push_back(i);
    const int32_t keep = std::min<int32_t>(options_.keep, int32_t(order.size()));
    std::partial_sort(order.begin(), order.begin() + keep, order.end(), [&](int32_t i, int32_t j) {
      return nodes.visits[i] != nodes.visits[j] ? nodes.visits[i] > nodes.visits[j] : i < j;
    });
    std::vector<Member> members;
    for (int32_t i = 0; i < keep; ++i) {
      const int32_t node = order[i];
      const int32_t parent = nodes.parent[node] < 0 ? -1 : member_of[nodes.parent[node]];
      member_of[node] = i;
      members.push_back({nodes.visits[node], parent, nodes.token(node), node});
    }
    Successor found[kMostSuccessors];
    for (int32_t i = 0; i < keep; ++i) {
      const int32_t node = members[i].node;
      if (nodes.count[node] > 0) {
        const int32_t best = nodes.first[node];
        if (member_of[best] < 0)
          members.push_back({nodes.visits[best], i, nodes.token(best), best});
      } else if (nodes.first[node] < 0 && table_.find(nodes.key[node], found) > 0) {
        members.push_back({0, i, found[0].token, -1});
      }
    }
    std::vector<int32_t> rank(members.size()), place(members.size(), -1);
    std::iota(rank.begin(), rank.end(), 0);
    std::stable_sort(rank.begin(), rank.end(),
                     [&](int32_t i, int32_t j) { return members[i].visits > members[j].visits; });
    Tree tree(last, float(members[0].visits));
    place[0] = 0;
    for (int32_t i : rank) {
      if (tree.size() == options_.max_nodes) break;
      const Member& member = members[i];
      if (i > 0) place[i] = tree.append(place[member.parent], member.token, float(member.visits));
    }
    return tree.by_level();
  }

  const TrigramTable& table_;
  const SearchOptions options_;
  std::vector<double> exploration_;
};

// Level by level the `width` continuations with the highest product of normalised scores; of all of them
// the max_nodes best with their parents. Scores are cumulative logarithms.
inline Tree beam(const TrigramTable& table, int32_t before_last, int32_t last, int32_t depth,
                 int32_t width, int32_t max_nodes) {
  Tree all(last);
  std::vector<uint64_t> keys{bigram(before_last, last)};
  std::vector<int32_t> level{0};
  Successor found[kMostSuccessors];
  const auto lock = table.reading();
  for (int32_t d = 0; d < depth && !level.empty(); ++d) {
    std::vector<int32_t> made;
    for (int32_t node : level) {
      const int32_t count = table.find(keys[node], found);
      double sum = 0;
      for (int32_t i = 0; i < count; ++i) sum += found[i].score;
      for (int32_t i = 0; i < count && sum > 0; ++i) {
        const float its = all.scores[node] + float(std::log(found[i].score / sum));
        if (its > kNever)
          made.push_back(all.append(node, found[i].token, its));
        else
          continue;
        keys.push_back(keys[node] << 32 | uint32_t(found[i].token));
      }
    }
    const size_t kept = std::min<size_t>(made.size(), size_t(width));
    std::partial_sort(made.begin(), made.begin() + kept, made.end(), [&](int32_t i, int32_t j) {
      return all.scores[i] != all.scores[j] ? all.scores[i] > all.scores[j] : i < j;
    });
    made.resize(kept);
    level = made;
  }
  std::vector<int32_t> chosen(max_nodes), place(all.size(), -1);
  rerank(all.parents.data(), all.scores.data(), all.size(), max_nodes, chosen.data());
  Tree tree(last);
  place[0] = 0;
  for (int32_t i : chosen)
    if (i > 0) place[i] = tree.append(place[all.parents[i]], all.tokens[i], all.scores[i]);
  return tree.by_level();
}

}  // namespace stillhouse::draft
