// Products with dual-binary weights as their kernels see them.
#pragma once
#include "../core/rows.h"

namespace stillhouse {

// Rows whose words lie side by side, and columns of a word.
constexpr int64_t kBlock = 16, kWord = 32;

SH_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// W [N, K] = scale_1 b_1 + scale_2 b_2 in g groups of G columns. Each block of 16 rows has its words one
// after the other: of group 0 word 0 plane 1 of the 16 rows, then plane 2; then the next word of the group.
// Bit i of word j of a group is its column 32 j + i; bits beyond G, and rows beyond N, are zeros.
struct FdbWeight {
  int64_t rows, columns, groups;
  const uint32_t* tiles;  // [N / 16, g, words, 2, 16]
  const char* scales;     // [N / 16, g, 2, 16]
  Dtype scale_dtype;

  SH_INLINE int64_t group_columns() const { return columns / groups; }
  SH_INLINE int64_t group_words() const { return ceil_div(group_columns(), kWord); }
  SH_INLINE int64_t words() const { return groups * group_words(); }
  SH_INLINE int64_t blocks() const { return ceil_div(rows, kBlock); }
  SH_INLINE const uint32_t* words_of(int64_t block, int64_t group) const {
    return tiles + (block * groups + group) * group_words() * 2 * kBlock;
  }
  SH_INLINE int64_t scales_at(int64_t block, int64_t group) const {
    return (block * groups + group) * 2 * kBlock;
  }
};

// y [M, N] = x W^T + bias. x is float, or int8 with a scale for each row and group.
struct FdbProduct {
  FdbWeight weight;
  int64_t m;
  const char* x;  // [M, K], of `dtype`; null: integers
  const int8_t* integers;
  const float* steps;  // [M, g]: what an integer of 1 is worth
  const char* bias;    // [N], or null
  char* y;
  Dtype dtype, bias_dtype;  // of x and y; of the bias
};

// Rows to int8: the largest number of a row's group becomes 127.
struct FdbQuantizing {
  int64_t m, columns, groups;
  const char* x;
  Dtype dtype;
  int8_t* integers;  // [M, K]
  float* steps;      // [M, g]
};

// A part of W as numbers: its rows from first_row (a multiple of 16) and groups from first_group on,
// [count_rows, count_groups G].
struct FdbPanel {
  FdbWeight weight;
  int64_t first_row, count_rows, first_group, count_groups;
  char* out;
  Dtype dtype;
};

// The sums of a gradient of W, [count_rows, K] from row first_row on (a multiple of 16), over the ones of
// each plane: the gradient of the scales.
struct FdbScaleSums {
  FdbWeight weight;
  int64_t first_row, count_rows;
  const char* of_weight;
  Dtype dtype;
  char* out;  // of all rows: [N / 16, g, 2, 16], float32, or float64 where of_weight is
};

// The steps of the CPU's kernels on one instruction set. Rows of x become tables, which blocks of rows of W
// look up; `dot`: whether the machine has products of bytes (VNNI).
struct FdbKernels {
  int64_t (*table_bytes)(const FdbProduct& p);  // of a row of x
  void (*tables)(const FdbProduct& p, int64_t lo, int64_t hi, int64_t first, char* memory);
  void (*product)(const FdbProduct& p, const char* tables, int64_t first, int64_t count, int64_t lo,
                  int64_t hi, bool dot);  // blocks lo ... hi of y's columns, rows first ... of x
  void (*quantize)(const FdbQuantizing& q, int64_t lo, int64_t hi);   // rows
  void (*dequantize)(const FdbPanel& panel, int64_t lo, int64_t hi);  // blocks of its rows
  void (*scale_sums)(const FdbScaleSums& s, int64_t lo, int64_t hi);  // rows
};

}  // namespace stillhouse
