// A dual-binary weight as the right factor of a product: W^T, or W itself for the gradient of rows.
#pragma once
#include "../core/block.cuh"
#include "../core/tile.cuh"
#include "kernel.h"

namespace stillhouse {

template <class T>
using SumOf = std::conditional_t<std::is_same<T, double>::value, double, float>;

template <class Real>
__device__ __forceinline__ Real number_at(const char* x, Dtype dtype, int64_t at) {
  Real number = 0;
  with_type(dtype, const_cast<char*>(x) + at * element_size(dtype),
            [&](auto* p) { number = Real(widen(*p)); });
  return number;
}

// In pieces of 32 numbers that are summed over, and tiles of 32 outputs. W^T: pieces are words, outputs two
// blocks of rows. W (kBack): pieces are two blocks of rows, outputs the columns of a word.
template <bool kBack>
struct Pieces {
  FdbWeight w;
  unsigned words;  // of a group
  int columns;     // of a group

  SH_INLINE explicit Pieces(const FdbWeight& w)
      : w(w), words(unsigned(w.group_words())), columns(int(w.group_columns())) {}

  SH_INLINE int count() const { return int(kBack ? ceil_div(w.blocks(), 2) : w.words()); }
  SH_INLINE int64_t tiles() const { return kBack ? w.words() : ceil_div(w.blocks(), 2); }
  SH_INLINE int64_t inner() const { return kBack ? w.rows : w.columns; }
  SH_INLINE int64_t outer() const { return kBack ? w.columns : w.rows; }

  // Where word `word` of all of a row begins among its columns, and how many of these it has.
  SH_INLINE int64_t first_of_word(unsigned word, int& count) const {
    const int at = int(word % words) * int(kWord), left = columns - at;
    count = left < int(kWord) ? left : int(kWord);
    return int64_t(word / words) * columns + at;
  }
  SH_INLINE int64_t first(int piece, int& count) const {
    if (!kBack) return first_of_word(unsigned(piece), count);
    const int64_t at = int64_t(piece) * kWord;
    count = int(w.rows - at < kWord ? w.rows - at : kWord);
    return at;
  }
  // Of column c of a tile; -1: it has none.
  SH_INLINE int64_t output(int64_t tile, int c) const {
    if (!kBack) return tile * kWord + c < w.rows ? tile * kWord + c : -1;
    if (tile >= w.words()) return -1;
    int count;
    const int64_t at = first_of_word(unsigned(tile), count);
    return c < count ? at + c : -1;
  }
  // Word `word` of row 0 of a block, plane 1; the other rows and plane 2 follow.
  SH_INLINE const uint32_t* words_at(int64_t block, int64_t word) const {
    return w.tiles + (block * w.words() + word) * 2 * kBlock;
  }
  template <class Real>
  __device__ __forceinline__ Real scale(int64_t block, unsigned word, int plane, int row) const {
    return number_at<Real>(w.scales, w.scale_dtype,
                           w.scales_at(block, word / words) + plane * kBlock + row);
  }
};

// What is added to a product before it is stored.
template <class Real, class T>
__device__ __forceinline__ void put_product(const FdbProduct& p, int64_t row, int64_t outer,
                                            int64_t column, Real sum) {
  if (p.bias != nullptr) sum += number_at<Real>(p.bias, p.bias_dtype, column);
  narrow(sum, reinterpret_cast<T*>(p.y)[row * outer + column]);
}

}  // namespace stillhouse
