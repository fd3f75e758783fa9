// The tri-gram table of ADED (arXiv 2407.12021): which tokens follow a bigram, and how much each is
// preferred. With c(a, b, x) counted in texts and h occurrences in windows of the text being written,
//
//     score(x | a, b) = min(c(a, b, x) / sum_y c(a, b, y) + step h(a, b, x), cap).
//
// The state is integers alone, so nothing drifts. Memory is bounded twice: a bigram keeps its
// `successors` best (and one outsider, so that a new token can rise), and of more than `capacity`
// bigrams the one that has not occurred for longest goes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "file.h"
#include "index.h"

namespace stillhouse::draft {

constexpr int32_t kMostSuccessors = 64;

struct Successor {
  int32_t token;
  double score;
};

class TrigramTable {
 public:
  // vocabulary: tokens are below it; 0 where that is not known.
  TrigramTable(int32_t successors, double step, double cap, uint32_t capacity, int32_t vocabulary)
      : successors_(successors),
        step_(step),
        cap_(cap),
        capacity_(capacity),
        vocabulary_(vocabulary) {
    for (uint32_t size = 1; size < most(); size *= 2) pools_.push_back(Pool(size));
    pools_.push_back(Pool(most()));
  }

  // Counts the tri-grams of texts. What a bigram drops is chosen after all of them.
  void add(const std::vector<std::pair<const int32_t*, size_t>>& texts) {
    std::vector<Trigram> all;
    size_t count = 0;
    for (const auto& text : texts) count += text.second < 2 ? 0 : text.second - 2;
    all.reserve(count);
    uint32_t place = 0;
    for (const auto& [tokens, size] : texts)
      for (size_t i = 2; i < size; ++i)
        all.push_back({bigram(tokens[i - 2], tokens[i - 1]), tokens[i], place++});
    std::sort(all.begin(), all.end());
    // Bigrams enter in the order of their last occurrence, which is the order in which they will go.
    std::vector<std::pair<uint32_t, std::pair<size_t, size_t>>> groups;
    for (size_t from = 0, to; from < all.size(); from = to) {
      uint32_t last = 0;
      for (to = from; to < all.size() && all[to].key == all[from].key; ++to)
        last = std::max(last, all[to].place);
      groups.push_back({last, {from, to}});
    }
    std::sort(groups.begin(), groups.end());
    if (groups.size() > capacity_) groups.erase(groups.begin(), groups.end() - capacity_);
    std::unique_lock lock(mutex_);
    // Those that are known come out of the way first, or new ones would push them out.
    for (const auto& group : groups)
      if (index_.find(all[group.second.first].key) != kNone) touch(all[group.second.first].key);
    for (const auto& group : groups) count_group(all, group.second.first, group.second.second);
  }

  // The tri-grams of one window of the text being written, `step` for each occurrence.
  void update(const int32_t* tokens, size_t size) {
    std::unique_lock lock(mutex_);
    for (size_t i = 2; i < size; ++i) {
      Entry& entry = touch(bigram(tokens[i - 2], tokens[i - 1]));
      const uint32_t at = slot_of(entry, tokens[i]);
      Slot& slot = slots(entry)[at];
      // At the cap a hit is not kept: a later text may lower the count's share, not the memory of it.
      if (share(entry, slot) + step_ * slot.hits < cap_) ++slot.hits;
      sort(entry);
    }
  }

  // Successors of a bigram, best first; of equal ones the lower token. The caller holds `reading()`.
  int32_t find(uint64_t key, Successor* found) const {
    const uint32_t id = index_.find(key);
    if (id == kNone) return 0;
    const Entry& entry = entries_[id];
    const int32_t count = std::min<int32_t>(entry.used, successors_);
    const Slot* slot = slots(entry);
    const double scale = entry.total > 0 ? 1.0 / double(entry.total) : 0.0;
    for (int32_t i = 0; i < count; ++i) found[i] = {slot[i].token, score(slot[i], scale)};
    return count;
  }
  std::shared_lock<std::shared_mutex> reading() const { return std::shared_lock(mutex_); }

  size_t size() const {
    const auto lock = reading();
    return live_;
  }
  size_t bytes() const {
    const auto lock = reading();
    size_t sum = index_.bytes() + entries_.capacity() * sizeof(Entry) + sizeof *this;
    for (const Pool& pool : pools_) sum += pool.bytes();
    return sum;
  }
  int32_t successors() const { return successors_; }
  double step() const { return step_; }
  double cap() const { return cap_; }
  uint32_t capacity() const { return capacity_; }
  int32_t vocabulary() const { return vocabulary_; }
  bool holds(int32_t token) const {
    return token >= 0 && (vocabulary_ == 0 || token < vocabulary_);
  }

  void save(const std::string& path) const {
    Writer out;
    {
      const auto lock = reading();
      out.put(successors_), out.put(capacity_), out.put(step_), out.put(cap_);
      out.put(vocabulary_), out.put(live_);
      for (uint32_t id = oldest_; id != kNone; id = entries_[id].newer) {
        const Entry& entry = entries_[id];
        out.put(entry.key), out.put(entry.total), out.put(uint32_t(entry.used));
        out.put(slots(entry), entry.used);
      }
    }
    out.save(path, kMagic, kVersion);
  }

  static std::unique_ptr<TrigramTable> load(const std::string& path) {
    Reader in(path, kMagic, kVersion, "tri-gram table");
    const auto successors = in.get<int32_t>();
    const auto capacity = in.get<uint32_t>();
    const auto step = in.get<double>(), cap = in.get<double>();
    const auto vocabulary = in.get<int32_t>();
    const auto live = in.get<uint32_t>();
    in.check(successors >= 1 && successors <= kMostSuccessors && capacity >= 1 &&
                 capacity < kNone && step > 0 && cap > 0 && vocabulary >= 0 && live <= capacity,
             "its settings are out of range");
    auto table = std::make_unique<TrigramTable>(successors, step, cap, capacity, vocabulary);
    for (uint32_t i = 0; i < live; ++i) {
      const auto key = in.get<uint64_t>(), total = in.get<uint64_t>();
      const auto used = in.get<uint32_t>();
      in.check(used >= 1 && used <= table->most(), "a bigram has too many successors");
      in.check(table->holds(int32_t(key >> 32)) && table->holds(int32_t(key)), kOutside);
      in.check(table->index_.find(key) == kNone, "a bigram comes twice");
      Entry& entry = table->touch(key);
      entry.total = total;
      table->reserve(entry, used);
      in.get(table->slots(entry), used);
      entry.used = uint8_t(used);
      uint64_t counted = 0;
      for (uint32_t s = 0; s < used; ++s) {
        in.check(table->holds(table->slots(entry)[s].token), kOutside);
        counted += table->slots(entry)[s].count;
      }
      in.check(counted <= total, "the counts of a bigram exceed their sum");
      table->sort(entry);
    }
    in.end();
    return table;
  }

 private:
  static constexpr const char (&kMagic)[9] = "SHTRIGRM";
  static constexpr uint32_t kVersion = 1;
  static constexpr const char* kOutside = "a token is outside the vocabulary";

  struct Trigram {
    uint64_t key;
    int32_t next;
    uint32_t place;
    bool operator<(const Trigram& other) const {
      return key != other.key ? key < other.key : next < other.next;
    }
  };
  struct Slot {
    int32_t token;
    uint32_t count, hits;
  };
  struct Entry {
    uint64_t key, total;
    uint32_t block, older, newer;
    uint8_t used, pool;
  };

  // Blocks of `size` slots; freed ones are used again.
  struct Pool {
    explicit Pool(uint32_t size) : size(size) {}
    uint32_t take() {
      if (!free.empty()) {
        const uint32_t block = free.back();
        free.pop_back();
        return block;
      }
      slots.resize(slots.size() + size);
      return uint32_t(slots.size() / size - 1);
    }
    size_t bytes() const {
      return slots.capacity() * sizeof(Slot) + free.capacity() * sizeof(uint32_t);
    }
    uint32_t size;
    std::vector<Slot> slots;
    std::vector<uint32_t> free;
  };

  uint32_t most() const { return uint32_t(successors_) + 1; }
  Slot* slots(const Entry& entry) {
    Pool& pool = pools_[entry.pool];
    return pool.slots.data() + size_t(entry.block) * pool.size;
  }
  const Slot* slots(const Entry& entry) const {
    return const_cast<TrigramTable*>(this)->slots(entry);
  }
  double share(const Entry& entry, const Slot& slot) const {
    return entry.total > 0 ? double(slot.count) / double(entry.total) : 0.0;
  }
  double score(const Slot& slot, double scale) const {
    return std::min(slot.count * scale + step_ * slot.hits, cap_);
  }

  // Insertion sort: after a hit one slot is out of place at most.
  void sort(Entry& entry) {
    Slot* slot = slots(entry);
    const double scale = entry.total > 0 ? 1.0 / double(entry.total) : 0.0;
    for (uint32_t i = 1; i < entry.used; ++i) {
      const Slot moved = slot[i];
      const double its = score(moved, scale);
      uint32_t to = i;
      for (; to > 0; --to) {
        const double before = score(slot[to - 1], scale);
        if (before > its || (before == its && slot[to - 1].token < moved.token)) break;
        slot[to] = slot[to - 1];
      }
      slot[to] = moved;
    }
  }

  // A block of at least `count` slots, with what the entry has.
  void reserve(Entry& entry, uint32_t count) {
    uint8_t pool = entry.pool;
    while (pools_[pool].size < count) ++pool;
    if (pool == entry.pool) return;
    const uint32_t block = pools_[pool].take();
    std::copy_n(slots(entry), entry.used,
                pools_[pool].slots.data() + size_t(block) * pools_[pool].size);
    pools_[entry.pool].free.push_back(entry.block);
    entry.pool = pool, entry.block = block;
  }

  // Where a token is among a bigram's slots; a new one takes the last place of a full bigram.
  uint32_t slot_of(Entry& entry, int32_t token) {
    for (uint32_t i = 0; i < entry.used; ++i)
      if (slots(entry)[i].token == token) return i;
    if (entry.used < most()) {
      reserve(entry, entry.used + 1u);
      ++entry.used;
    }
    slots(entry)[entry.used - 1] = {token, 0, 0};
    return entry.used - 1u;
  }

  // The entry of a bigram, now the one that occurred last.
  Entry& touch(uint64_t key) {
    uint32_t id = index_.find(key);
    if (id == kNone) {
      if (live_ == capacity_) {
        id = oldest_;
        index_.erase(entries_[id].key);
        unlink(id);
        pools_[entries_[id].pool].free.push_back(entries_[id].block);
      } else {
        id = live_++;
        entries_.emplace_back();
      }
      entries_[id] = {key, 0, pools_[0].take(), kNone, kNone, 0, 0};
      index_.insert(key, id);
    } else {
      unlink(id);
    }
    Entry& entry = entries_[id];
    entry.older = newest_, entry.newer = kNone;
    (newest_ == kNone ? oldest_ : entries_[newest_].newer) = id;
    newest_ = id;
    return entry;
  }
  void unlink(uint32_t id) {
    const Entry& entry = entries_[id];
    (entry.older == kNone ? oldest_ : entries_[entry.older].newer) = entry.newer;
    (entry.newer == kNone ? newest_ : entries_[entry.newer].older) = entry.older;
  }

  // What follows one bigram in new texts: sorted, so equal tokens are neighbours.
  void count_group(const std::vector<Trigram>& all, size_t from, size_t to) {
    Entry& entry = touch(all[from].key);
    std::vector<Slot> merged(slots(entry), slots(entry) + entry.used);
    const size_t known = merged.size();
    for (size_t i = from; i < to;) {
      const size_t begin = i;
      while (i < to && all[i].next == all[begin].next) ++i;
      const uint32_t count = uint32_t(i - begin);
      size_t at = 0;
      while (at < known && merged[at].token != all[begin].next) ++at;
      if (at == known)
        merged.push_back({all[begin].next, count, 0});
      else
        merged[at].count = uint32_t(std::min<uint64_t>(uint64_t(merged[at].count) + count, kNone));
    }
    entry.total += to - from;
    const double scale = 1.0 / double(entry.total);
    const uint32_t kept = uint32_t(std::min<size_t>(merged.size(), most()));
    std::partial_sort(merged.begin(), merged.begin() + kept, merged.end(),
                      [&](const Slot& x, const Slot& y) {
                        const double of_x = score(x, scale), of_y = score(y, scale);
                        return of_x != of_y ? of_x > of_y : x.token < y.token;
                      });
    reserve(entry, kept);
    std::copy_n(merged.begin(), kept, slots(entry));
    entry.used = uint8_t(kept);
  }

  const int32_t successors_;
  const double step_, cap_;
  const uint32_t capacity_;
  const int32_t vocabulary_;
  mutable std::shared_mutex mutex_;
  Index index_;
  std::vector<Entry> entries_;
  std::vector<Pool> pools_;
  uint32_t live_ = 0, oldest_ = kNone, newest_ = kNone;
};

}  // namespace stillhouse::draft
