// The walk through one tree, for any mode. What rows must be read for is asked of a device, which has
//   int32_t measure(Frame&, bool with_q): P of the frame's node (and Q), sums of its spans; status bits
//   double sums(Frame&): sums of the spans after the last rejection, put aside, and their total
//   double sums_at(Frame&, int32_t x): the same where only the span of a token has changed
//   void keep(Frame&, double): those times a number are the frame's
//   double rest(const Frame&, int32_t patched): the sum of Q with so many patches
//   int32_t pick(Frame&, double u): the first token with a cumulative sum above u of the total
//   int32_t largest(const TreeRow&, int32_t node): the first largest logit, -1: not finite
//   double entropy(Frame&): of P, in nats
//   void write(f): calls f, which changes what all threads of a walk share
// Where a walk has several threads, all of them walk, and come to the same.
#pragma once
#include "../core/philox.h"
#include "kernel.h"

#if defined(__CUDACC__) || defined(STILLHOUSE_SIMT)
#define SH_WALK __device__
#else
#define SH_WALK
#endif

namespace stillhouse {

// A node whose children are being verified.
struct Frame {
  int32_t node, child, begin, count;  // its rejections in the walk's memory
  bool open;
  double accept;  // the probability with which it is accepted itself
  TreeRow p, q;
  double* masses;  // of spans
};

// Memory of a walk: frames, a rejection with its child for each node of the tree, and sums of spans.
struct WalkMemory {
  Frame* frames;          // [depth + 1]
  Rejection* rejections;  // [T]
  int32_t* rejected;      // [T], the child
  Patch* patches;         // [T]
  double* masses;         // [frames in use, spans]
};

template <class Device>
struct TreeWalk {
  static constexpr double kLeast = 1e-7;  // mass of a residual that is more than rounding
  static constexpr double kConfident = 1. / 16;
  static constexpr double kSmallest = 1e-30;  // and its share is no infinity

  const TreeProblem& t;
  const int64_t tree;
  const WalkMemory memory;
  Device& device;
  int32_t status = 0, accepted = 0;
  double accept_prob = 1;

  SH_WALK int64_t at(int64_t node) const { return tree * t.nodes + node; }
  SH_WALK int32_t token(int64_t node) const { return t.tokens[at(node)]; }
  // Links lead down; what does not is not followed.
  SH_WALK int32_t link(const int32_t* links, int32_t node) const {
    const int32_t next = links[at(node)];
    return next > node && next < t.nodes ? next : -1;
  }
  SH_WALK int32_t first_child(int32_t node) const { return link(t.first_child, node); }
  SH_WALK int32_t next_sibling(int32_t node) const { return link(t.next_sibling, node); }
  SH_WALK TreeKind kind(int32_t node) const {
    if (t.draft == nullptr) return TreeKind::fixed;
    return t.kind == nullptr ? TreeKind::sampled : TreeKind(t.kind[at(node)]);
  }

  SH_WALK double coin(int32_t node, uint32_t stream) const {
    if (t.coins != nullptr) return t.coins[2 * at(node) + stream];
    return uniform(
        philox(uint64_t(t.seed[tree]), uint64_t(t.position[tree]), uint32_t(node), stream));
  }

  SH_WALK double element(const TreeRow& row, int32_t x) const {
    double number = 0;
    with_type(row.dtype, const_cast<char*>(row.data),
              [&](auto* numbers) { number = widen(numbers[x]); });
    return row.probabilities ? number * row.scale
                             : exp2((number - row.max) * row.factor) * row.scale;
  }

  SH_WALK bool is_token(int32_t x) {
    const bool is = x >= 0 && x < t.columns;
    if (!is) status |= kNoToken;
    return is;
  }

  // ---- frames ----

  SH_WALK Frame& enter(int32_t level, int32_t node, double accept) {
    Frame& f = memory.frames[level];
    device.write([&] {
      const int32_t begin = level == 0 ? 0 : end(memory.frames[level - 1]);
      double* const masses = memory.masses + level * spans_of(t.columns);
      const int32_t child = accepted + level < t.depth ? first_child(node) : -1;
      f = {node, child, begin, 0, false, accept, {}, {}, masses};
    });
    return f;
  }
  SH_WALK int32_t end(const Frame& f) const { return f.begin + f.count; }

  // Reads the node's rows; false: they cannot be used.
  SH_WALK bool open(Frame& f, bool with_q) {
    if (f.open) return true;
    bool drawn = false;
    for (int32_t c = f.child; with_q && c >= 0; c = next_sibling(c))
      drawn |= kind(c) != TreeKind::fixed;
    device.write([&] {
      f.p = t.row(t.target, t.target_dtype, tree, f.node);
      f.q = t.row(drawn ? t.draft : nullptr, t.draft_dtype, tree, f.node);
      f.open = true;
    });
    const int32_t found = device.measure(f, drawn);
    status |= found;
    return found == 0;
  }

  SH_WALK Residual residual(const Frame& f) const {
    int32_t patched = 0;
    for (int32_t c = f.count > 0 ? first_child(f.node) : -1; c >= 0; c = next_sibling(c))
      patched += token(c) >= 0 && token(c) < t.columns;
    if (patched > 0)
      device.write([&] {
        Patch* to = memory.patches;
        for (int32_t c = first_child(f.node); c >= 0; c = next_sibling(c))
          if (token(c) >= 0 && token(c) < t.columns) *to++ = {token(c), value(f, token(c))};
      });
    return {f.p, f.q, memory.rejections + f.begin, memory.patches, f.count, patched, t.columns};
  }

  SH_WALK bool is_fixed_sibling(const Frame& f, int32_t x) const {
    for (int32_t c = first_child(f.node); c >= 0; c = next_sibling(c))
      if (kind(c) == TreeKind::fixed && token(c) == x) return true;
    return false;
  }

  // What is left of P at a token.
  SH_WALK double value(const Frame& f, int32_t x) const {
    double v = element(f.p, x);
    if (f.count == 0) return v;
    const double q = f.q.data == nullptr ? 0 : element(f.q, x);
    const bool fixed = is_fixed_sibling(f, x);
    bool gone = false;  // from Q
    for (int32_t i = f.begin; i < end(f); ++i) {
      const Rejection& r = memory.rejections[i];
      const int32_t c = memory.rejected[i];
      const TreeKind how = kind(c);
      if (how == TreeKind::fixed) {
        v = token(c) == x ? 0 : v * r.scale;
        continue;
      }
      const double share =
          gone || (fixed && how == TreeKind::sampled_beside_fixed) ? 0 : r.share * q;
      v = r.a * v - share;
      v = (v > 0 ? v : 0) * r.scale;
      gone |= how != TreeKind::independent && token(c) == x;
    }
    return v;
  }

  // Q's mass on what a child could have been: what is left of it, summed anew where 1 less the rest would be
  // rounding. 0: it is too small for numbers of 32 bits.
  SH_WALK double drawn_mass(const Frame& f, TreeKind how) const {
    if (how == TreeKind::independent) return 1;
    double taken = 0;
    for (int32_t c = first_child(f.node); c >= 0; c = next_sibling(c))
      if (is_taken(f, how, c)) taken += element(f.q, token(c));
    if (1 - taken > kConfident) return 1 - taken;
    int32_t patched = 0;
    for (int32_t c = first_child(f.node); c >= 0; c = next_sibling(c))
      patched += is_taken(f, how, c);
    device.write([&] {
      Patch* to = memory.patches;
      for (int32_t c = first_child(f.node); c >= 0; c = next_sibling(c))
        if (is_taken(f, how, c)) *to++ = {token(c), 0};
    });
    const double left = device.rest(f, patched);
    return left > kSmallest ? left : 0;
  }
  // Whether the token of this child, and of none before it, was out of Q.
  SH_WALK bool is_taken(const Frame& f, TreeKind how, int32_t child) const {
    const int32_t x = token(child);
    if (x < 0 || x >= t.columns || !takes(f, how, x)) return false;
    for (int32_t b = first_child(f.node); b != child; b = next_sibling(b))
      if (token(b) == x) return false;
    return true;
  }
  SH_WALK bool takes(const Frame& f, TreeKind how, int32_t x) const {
    if (how == TreeKind::independent) return false;
    if (how == TreeKind::sampled_beside_fixed && is_fixed_sibling(f, x)) return true;
    for (int32_t i = f.begin; i < end(f); ++i) {
      const TreeKind rejected = kind(memory.rejected[i]);
      if (rejected != TreeKind::fixed && rejected != TreeKind::independent &&
          token(memory.rejected[i]) == x)
        return true;
    }
    return false;
  }

  struct Odds {
    double p, q, mass;
  };
  // How probable a child's token is by what is left of P, and by what it was drawn from.
  SH_WALK Odds odds(const Frame& f, int32_t child) const {
    const TreeKind how = kind(child);
    const double p = value(f, token(child));
    if (how == TreeKind::fixed) return {p, 1, 1};
    const double mass = drawn_mass(f, how);
    // A child of which is not known how it was drawn is passed over: rejected, and P stays what it is.
    if (mass == 0) return {0, 0, 0};
    const bool could = !takes(f, how, token(child));
    return {p, could ? element(f.q, token(child)) / mass : 0, mass};
  }

  // max(0, a P - Q), normalised. Gives its mass before that.
  SH_WALK double reject(Frame& f, int32_t child, const Odds& odds, double a) {
    const int32_t i = end(f);
    const bool fixed = kind(child) == TreeKind::fixed;
    const double share = fixed || odds.mass <= 0 ? 0 : 1 / odds.mass;
    device.write([&] {
      memory.rejected[i] = child;
      memory.rejections[i] = {fixed ? 1 : a, share, 1};
      ++f.count;
    });
    const double mass = fixed ? device.sums_at(f, token(child)) : device.sums(f);
    if (mass > kLeast) {
      device.write([&] { memory.rejections[i].scale = 1 / mass; });
      device.keep(f, 1 / mass);
    } else {
      // P as it was; a token that was drawn stays out of Q.
      status |= kNothingLeft;
      device.write([&] {
        memory.rejections[i] = {1, 0, 1};
        if (fixed) --f.count;
      });
    }
    return fixed ? a * mass : mass;
  }

  // ---- results ----

  SH_WALK void accept(int32_t node, double probability) {
    const int64_t row = tree * (t.depth + 1);
    device.write([&] {
      t.path[row + accepted + 1] = node;
      t.out_tokens[row + accepted] = token(node);
    });
    ++accepted;
    accept_prob = probability;
  }
  SH_WALK void finish(int32_t last) {
    const int64_t row = tree * (t.depth + 1);
    const bool failed = (status & ~kNothingLeft) != 0;
    device.write([&] {
      t.out_tokens[row + accepted] = failed ? -1 : last;
      t.n_accepted[tree] = accepted;
      t.status[tree] = status;
      t.accept_prob[tree] = float(accept_prob);
    });
  }

  // ---- modes ----

  // A child that is accepted is where the walk goes on; -1: none was, and `last` comes after the path.
  template <class Step>
  SH_WALK void descend(Step step) {
    int32_t node = 0, last = -1;
    while (node >= 0) {
      Frame& f = enter(0, node, 1);
      node = step(f, last);
    }
    finish(last);
  }

  SH_WALK int32_t child_with(const Frame& f, int32_t x) {
    for (int32_t c = f.child; c >= 0; c = next_sibling(c)) {
      if (!is_token(token(c))) return -1;
      if (token(c) == x) return c;
    }
    return -1;
  }

  SH_WALK void greedy() {
    descend([&](Frame& f, int32_t& last) {
      if (t.probabilities && !open(f, false)) return -1;  // are they?
      last = device.largest(t.row(t.target, t.target_dtype, tree, f.node), f.node);
      if (last < 0) status |= kNotFinite;
      const int32_t child = last < 0 ? -1 : child_with(f, last);
      if (child >= 0) accept(child, 1);
      return child;
    });
  }

  SH_WALK void target() {
    descend([&](Frame& f, int32_t& last) {
      if (!open(f, false)) return -1;
      last = device.pick(f, coin(f.node, 1));
      const int32_t child = child_with(f, last);
      if (child >= 0) accept(child, element(f.p, last));
      return child;
    });
  }

  SH_WALK void multi_round() {
    descend([&](Frame& f, int32_t& last) {
      if (!open(f, true)) return -1;
      for (int32_t c = f.child; c >= 0; c = next_sibling(c)) {
        if (!is_token(token(c))) return -1;
        const Odds of = odds(f, c);
        if (coin(c, 0) * of.q < of.p) {
          accept(c, of.p < of.q ? of.p / of.q : 1);
          return c;
        }
        reject(f, c, of, 1);
      }
      last = device.pick(f, coin(f.node, 1));
      return -1;
    });
  }

  SH_WALK void typical() {
    descend([&](Frame& f, int32_t& last) {
      if (!open(f, false)) return -1;
      if (f.child >= 0) {
        const double surprise = t.delta * exp(-device.entropy(f));
        const double least = surprise < t.epsilon ? surprise : t.epsilon;
        for (int32_t c = f.child; c >= 0; c = next_sibling(c)) {
          if (!is_token(token(c))) return -1;
          if (element(f.p, token(c)) > least) {
            accept(c, 1);
            return c;
          }
        }
      }
      last = device.pick(f, coin(f.node, 1));
      return -1;
    });
  }

  // From the leaves up: a frame for each node of the path. Below a node that cannot be accepted none can.
  SH_WALK void traversal() {
    int32_t level = 0;
    enter(0, 0, 1);
    for (;;) {
      Frame& f = memory.frames[level];
      if (f.child >= 0 && f.accept > 0) {
        if (!is_token(token(f.child)) || !open(f, true)) break;
        const Odds of = odds(f, f.child);
        const double ratio = of.q > 0 ? f.accept * of.p / of.q : f.accept * of.p > 0 ? 1 : 0;
        enter(++level, f.child, ratio < 1 ? ratio : 1);
        continue;
      }
      if (level == 0 || coin(f.node, 0) < f.accept) {
        const double taken = f.accept;
        for (int32_t i = 1; i <= level; ++i) accept(memory.frames[i].node, taken);
        const bool can = open(f, false);
        return finish(can ? device.pick(f, coin(f.node, 1)) : -1);
      }
      Frame& parent = memory.frames[--level];
      const double a = parent.accept;
      const double mass = reject(parent, parent.child, odds(parent, parent.child), a);
      const double rest = mass + 1 - a;
      device.write([&] {
        parent.accept = rest > 0 ? mass / rest : 1;
        parent.child = next_sibling(parent.child);
      });
    }
    finish(-1);
  }
  SH_WALK void run() {
    switch (t.mode) {
      case TreeMode::greedy:
        return greedy();
      case TreeMode::target:
        return target();
      case TreeMode::multi_round:
        return multi_round();
      case TreeMode::traversal:
        return traversal();
      case TreeMode::typical:
        return typical();
    }
  }
};

}  // namespace stillhouse
