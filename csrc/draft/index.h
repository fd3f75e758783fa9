// An open-addressing hash map from bigrams to numbers: linear probing, at most half full, deletion by
// shifting back, so that no tombstone ever lengthens a search.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace stillhouse::draft {

constexpr uint32_t kNone = 0xffffffffu;

inline uint64_t bigram(int32_t a, int32_t b) { return uint64_t(uint32_t(a)) << 32 | uint32_t(b); }

// The finaliser of MurmurHash3: each bit of the result depends on all bits of x.
inline uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
  return x ^ x >> 33;
}

class Index {
 public:
  uint32_t find(uint64_t key) const {
    for (size_t at = home(key);; at = after(at))
      if (cells_[at].value == kNone || cells_[at].key == key) return cells_[at].value;
  }

  // The key must be new.
  void insert(uint64_t key, uint32_t value) {
    if (2 * (used_ + 1) > cells_.size()) grow();
    place(key, value);
    ++used_;
  }

  // The key must be there.
  void erase(uint64_t key) {
    size_t hole = home(key);
    while (cells_[hole].value == kNone || cells_[hole].key != key) hole = after(hole);
    for (size_t at = after(hole); cells_[at].value != kNone; at = after(at)) {
      // A cell may move back as far as its home, which is not between the hole and itself.
      const size_t from_home = (at - home(cells_[at].key)) & mask();
      if (from_home >= ((at - hole) & mask())) cells_[hole] = cells_[at], hole = at;
    }
    cells_[hole].value = kNone;
    --used_;
  }

  size_t bytes() const { return cells_.capacity() * sizeof(Cell); }

 private:
  struct Cell {
    uint64_t key = 0;
    uint32_t value = kNone;
  };

  size_t mask() const { return cells_.size() - 1; }
  size_t after(size_t at) const { return (at + 1) & mask(); }
  size_t home(uint64_t key) const { return mixed(key) & mask(); }
  void place(uint64_t key, uint32_t value) {
    size_t at = home(key);
    while (cells_[at].value != kNone) at = after(at);
    cells_[at] = {key, value};
  }
  void grow() {
    std::vector<Cell> old(2 * cells_.size());
    old.swap(cells_);
    for (const Cell& cell : old)
      if (cell.value != kNone) place(cell.key, cell.value);
  }

  std::vector<Cell> cells_ = std::vector<Cell>(16);
  size_t used_ = 0;
};

}  // namespace stillhouse::draft
