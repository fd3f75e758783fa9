// Prompt lookup: where did the context's last tokens occur before, and what came then? The longest n-gram
// that occurs decides, of equally long ones the most recent, the context before earlier texts.
//
// Earlier texts are a ring of `capacity` tokens with a hash chain for each length, as LZ77 has them: the
// newest place of a hash, and from each place the one before it. Places that the ring has left behind are
// recognised by their age, and a match is compared token by token, so a chain may hold anything.
#pragma once
#include <mutex>
#include <shared_mutex>

#include "file.h"
#include "index.h"
#include "tree.h"

namespace stillhouse::draft {

struct LookupOptions {
  int32_t length, branches, max_nodes;
};

class NGramTable {
 public:
  NGramTable(int32_t shortest, int32_t longest, uint32_t capacity)
      : shortest_(shortest), longest_(longest), capacity_(capacity), ring_(capacity, -1) {
    size_t cells = 16;
    while (cells < capacity) cells *= 2;
    for (int32_t n = shortest; n <= longest; ++n)
      chains_.push_back({std::vector<uint32_t>(cells, 0), std::vector<uint32_t>(capacity, 0)});
  }

  // An n-gram does not reach from one text into the next: -1 stands between them.
  void add(const int32_t* tokens, size_t size) {
    std::unique_lock lock(mutex_);
    if (size == 0) return;
    // Of a text longer than the ring only its end would stay.
    const size_t skipped = size > capacity_ ? size - capacity_ : 0;
    push(-1);
    for (size_t i = skipped; i < size; ++i) push(tokens[i]);
  }

  Tree draft(const int32_t* context, size_t size, const LookupOptions& options) const {
    Tree tree(context[size - 1]);
    const auto limit = std::min<size_t>(size_t(longest_), size - 1);
    // One pass finds all places of the context and how long each one's match is.
    std::vector<std::pair<size_t, size_t>> places;
    for (size_t i = size - 1; i-- > 0;) {
      if (context[i] != context[size - 1]) continue;
      size_t match = 1;
      while (match < limit && match <= i && context[i - match] == context[size - 1 - match])
        ++match;
      if (match >= size_t(shortest_)) places.push_back({match, i});
    }
    std::shared_lock lock(mutex_);
    int32_t branches = options.branches;
    for (size_t n = std::min<size_t>(size_t(longest_), size); n >= size_t(shortest_); --n) {
      for (const auto& [match, at] : places)
        if (match == n && branches > 0) {
          // Behind the context's end what was drafted goes on: a period repeats itself.
          const size_t period = size - 1 - at;
          const auto token = [&](size_t i) { return context[at + 1 + i % period]; };
          branches -= follow(tree, options, token, size_t(options.length), float(n));
        }
      branches -= earlier(tree, options, context + size - n, n, branches);
      if (branches <= 0) break;
    }
    return tree.by_level();
  }

  size_t size() const {
    std::shared_lock lock(mutex_);
    return live();
  }
  size_t bytes() const {
    size_t sum = sizeof *this + ring_.size() * sizeof(int32_t);
    for (const Chain& chain : chains_)
      sum += (chain.newest.size() + chain.before.size()) * sizeof(uint32_t);
    return sum;
  }
  int32_t shortest() const { return shortest_; }
  int32_t longest() const { return longest_; }
  uint32_t capacity() const { return capacity_; }

  void save(const std::string& path) const {
    Writer out;
    {
      std::shared_lock lock(mutex_);
      out.put(shortest_), out.put(longest_), out.put(capacity_), out.put(uint64_t(live()));
      for (uint64_t i = written_ - live(); i < written_; ++i) out.put(at(i));
    }
    out.save(path, kMagic, kVersion);
  }

  static std::unique_ptr<NGramTable> load(const std::string& path) {
    Reader in(path, kMagic, kVersion, "n-gram table");
    const auto shortest = in.get<int32_t>(), longest = in.get<int32_t>();
    const auto capacity = in.get<uint32_t>();
    const auto live = in.get<uint64_t>();
    in.check(shortest >= 1 && longest >= shortest && longest <= kLongest && capacity >= 2 &&
                 capacity <= kMostTokens && live <= capacity,
             "its settings are out of range");
    std::vector<int32_t> tokens(live);
    in.get(tokens.data(), live);
    in.end();
    auto table = std::make_unique<NGramTable>(shortest, longest, capacity);
    for (int32_t token : tokens) {
      in.check(token >= -1, "a token is negative");
      table->push(token);
    }
    return table;
  }

  static constexpr int32_t kLongest = 16;
  static constexpr uint32_t kMostTokens = 1u << 30;

 private:
  static constexpr const char (&kMagic)[9] = "SHNGRAMS";
  static constexpr uint32_t kVersion = 1;
  // Places of one hash that a lookup goes through at most.
  static constexpr int kMostPlaces = 64;

  struct Chain {
    std::vector<uint32_t> newest, before;  // places + 1 modulo 2^32, 0 for none
  };

  size_t live() const { return size_t(std::min<uint64_t>(written_, capacity_)); }
  int32_t at(uint64_t place) const { return ring_[place % capacity_]; }

  // Of the n tokens before `end`, which must lie in the ring.
  uint64_t hash(uint64_t end, size_t n) const {
    uint64_t state = n;
    for (uint64_t i = end - n; i < end; ++i) state = mixed(state * 31 + uint32_t(at(i)));
    return state;
  }

  void push(int32_t token) {
    ring_[written_++ % capacity_] = token;
    run_ = token < 0 ? 0 : run_ + 1;
    for (size_t c = 0; c < chains_.size(); ++c) {
      const size_t n = size_t(shortest_) + c;
      if (run_ < n || live() < n) break;
      uint32_t& newest = chains_[c].newest[hash(written_, n) & (chains_[c].newest.size() - 1)];
      chains_[c].before[(written_ - 1) % capacity_] = newest;
      newest = uint32_t(written_);
    }
  }

  // Continuations of an n-gram in earlier texts, newest first; returns how many were new.
  int32_t earlier(Tree& tree, const LookupOptions& options, const int32_t* tail, size_t n,
                  int32_t branches) const {
    const Chain& chain = chains_[n - size_t(shortest_)];
    uint64_t state = n;
    for (size_t i = 0; i < n; ++i) state = mixed(state * 31 + uint32_t(tail[i]));
    uint32_t found = chain.newest[state & (chain.newest.size() - 1)];
    uint32_t youngest = 0;
    int32_t taken = 0;
    for (int seen = 0; found != 0 && seen < kMostPlaces && taken < branches; ++seen) {
      const uint32_t age = uint32_t(written_) - found;
      if (age + n > live() || (seen > 0 && age <= youngest)) break;
      youngest = age;
      const uint64_t end = written_ - age;  // the place behind the n-gram
      bool equal = true;
      for (size_t i = 0; i < n && equal; ++i) equal = at(end - n + i) == tail[i];
      if (equal) {
        const auto token = [&](size_t i) { return end + i < written_ ? at(end + i) : -1; };
        taken += follow(tree, options, token, size_t(options.length), float(n));
      }
      found = chain.before[(end - 1) % capacity_];
    }
    return taken;
  }

  // A path of at most `length` tokens from the root; 1 if it is not there yet, else 0.
  template <class Token>
  static int32_t follow(Tree& tree, const LookupOptions& options, Token token, size_t length,
                        float score) {
    int32_t node = 0, added = 0;
    for (size_t i = 0; i < length && tree.size() < options.max_nodes; ++i) {
      const int32_t next = token(i);
      if (next < 0) break;
      const int32_t known = tree.child(node, next);
      if (known < 0) added = 1;
      node = known < 0 ? tree.append(node, next, score) : known;
    }
    return added;
  }

  const int32_t shortest_, longest_;
  const uint32_t capacity_;
  mutable std::shared_mutex mutex_;
  std::vector<int32_t> ring_;
  std::vector<Chain> chains_;
  uint64_t written_ = 0;
  size_t run_ = 0;  // tokens of the last text so far
};

}  // namespace stillhouse::draft
