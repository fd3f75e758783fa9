// The residual quantizer as its kernels see it.
#pragma once
#include "../core/philox.h"
#include "../core/rows.h"

namespace stillhouse {

// Codes in a block of a packed table. A block is kCodes numbers that scores begin with (-|c|^2 / 2 or, for
// cosines, 0; -inf for what fills the last one), and then, feature by feature, those of kCodes codes.
constexpr int64_t kCodes = 64;
SH_INLINE int64_t code_blocks(int64_t codes) { return (codes + kCodes - 1) / kCodes; }
SH_INLINE int64_t block_numbers(int64_t width) { return (width + 1) * kCodes; }

enum Metric : int32_t { kEuclidean, kCosine };

// G groups of tables [T, K, D] and rows [N, D]; T is 1 where all stages share a table.
template <class Real>
struct Quantizer {
  int64_t groups, n, width, codes, tables, stages;
  const char* x;  // [G, N, D]; coupled [G, N, Q D]
  Dtype x_dtype;
  const Real* table;   // [G, T, K, D]
  const Real* packed;  // [G, T, blocks, block_numbers(D)]
  // Null, or [G, Q D, Q D], what each number of the codes taken takes off each number of later stages: then
  // a row is that of stage s in columns s D ... of x, less what the stages before take off it.
  const Real* coupling;
  const int64_t* depth;  // [G, N]: stages of each row; null: all
  int64_t* found;        // [G, N, Q], -1 beyond a row's depth and in rows that are not finite
  Real* out;             // [G, N, D], the sum of the codes, or null; coupled [G, N, Q D], the codes
  Real* error;   // [G, N, Q], squared distance after each stage, 0 beyond the depth, or null
  Real* margin;  // [G, N, Q], how much farther the second nearest code is, squared, or null

  SH_INLINE int64_t out_width() const { return coupling == nullptr ? width : stages * width; }
  SH_INLINE int64_t table_of(int64_t group, int64_t stage) const {
    return group * tables + (tables == 1 ? 0 : stage);
  }
  SH_INLINE const Real* code(int64_t group, int64_t stage, int64_t k) const {
    return table + (table_of(group, stage) * codes + k) * width;
  }
  SH_INLINE const Real* blocks(int64_t group, int64_t stage) const {
    return packed + table_of(group, stage) * code_blocks(codes) * block_numbers(width);
  }
  SH_INLINE int64_t depth_of(int64_t group, int64_t row) const {
    return depth == nullptr ? stages : depth[group * n + row];
  }
};

// The k codes of each row that are nearest, or that are drawn, from one table of each group.
template <class Real>
struct Candidates {
  int64_t groups, n, width, codes, k;
  const char* x;  // [G, N, D]
  Dtype x_dtype;
  const Real *table, *packed;  // of a table, [G, K, D]
  // 0, or what a score is multiplied with before it gets noise: 2 / temperature.
  double sharpness;
  uint64_t seed;
  int64_t node;             // where the words of the seed are taken, with
  const int64_t* position;  // [G, N]; null: the number of the row
  int64_t* found;           // [G, N, k], -1 in rows that are not finite
  Real* error;              // [G, N, k], squared distance
};

template <class Real>
struct Packing {
  int64_t tables, codes, width;
  const Real* table;
  const int64_t* sizes;  // codes that count of each table, or null
  int32_t metric;
  Real* packed;

  SH_INLINE int64_t size_of(int64_t table) const {
    return sizes == nullptr || sizes[table] > codes ? codes : sizes[table];
  }
};

// The number of a vector of scores, as wide as a score.
template <class Real>
struct PlaceOf;
template <>
struct PlaceOf<float> {
  using type = int32_t;
};
template <>
struct PlaceOf<double> {
  using type = int64_t;
};
template <class Real>
using Place = typename PlaceOf<Real>::type;

// Rows first ... first + rows - 1 of a group on their way through the stages. Scores are searched in up to
// `parts` parts of the codes at once, each with a best of its own.
template <class Real>
struct Tile {
  int64_t group, first, rows, parts;
  Real* residual;      // [rows, D]
  Real* score;         // [parts, rows, lanes]
  Real* second;        // the same; null: not asked for
  Place<Real>* place;  // the same
  Real* waiting;       // [parts, rows, kCodes]: scores that are not summed to their end yet
};

// A second way through the stages, along codes that are known: the residuals before or after a stage, summed
// over the rows that each code was given.
template <class Real>
struct Residuals {
  int64_t groups, n, width, codes, tables, stages;
  const char* x;  // [G, N, D]
  Dtype x_dtype;
  const Real* table;
  const int64_t* found;   // [G, N, Q]
  const Real* upstream;   // [G, N, Q], of squared distances, or null: rows count 1
  Real* d_x;              // [G, N, D], or null
  Real* of_codes;         // [G, T, K, D]: sums, or the derivative of the table; or null
  Real* counts;           // [G, T, K], or null
  const int64_t* order;   // [G, Q, N]: a stage's rows by code, in their order
  const int64_t* starts;  // [G, Q, K + 1]: where those of a code begin

  SH_INLINE int64_t table_of(int64_t group, int64_t stage) const {
    return group * tables + (tables == 1 ? 0 : stage);
  }
};

// Some rows of a group, and some of their features. Sums are of all rows.
struct Slice {
  int64_t group, first_row, rows, first, count;
};

template <class Real>
struct RvqSteps {
  int64_t lanes;                                                 // a row's numbers in Tile::score
  void (*pack)(const Packing<Real>& p, int64_t lo, int64_t hi);  // blocks of all tables
  void (*begin)(const Quantizer<Real>& q, const Tile<Real>& tile, int64_t lo, int64_t hi);
  void (*search)(const Quantizer<Real>& q, const Tile<Real>& tile, int64_t stage, int64_t part,
                 int64_t lo, int64_t hi);  // blocks of a table
  // Coupled: the rows of a stage, from the codes of the stages before.
  void (*couple)(const Quantizer<Real>& q, const Tile<Real>& tile, int64_t stage, int64_t lo,
                 int64_t hi);
  void (*settle)(const Quantizer<Real>& q, const Tile<Real>& tile, int64_t stage, int64_t lo,
                 int64_t hi);
  void (*candidates)(const Candidates<Real>& c, int64_t group, int64_t first, int64_t rows,
                     void* memory);                                  // of candidate_bytes
  void (*decode)(const Quantizer<Real>& q, int64_t lo, int64_t hi);  // rows of all groups
  void (*follow)(const Residuals<Real>& r, const Slice& slice, Real* residual);  // [rows, count]
};

// Rows of a tile of `candidates`, and what it needs.
constexpr int64_t kCandidateRows = 48;
template <class Real>
SH_INLINE int64_t candidate_bytes(int64_t width, int64_t k) {
  return kCandidateRows * ((width + kCodes) * int64_t(sizeof(Real)) + 16 * k) + 64;
}

struct RvqKernels {
  RvqSteps<float> f32;
  RvqSteps<double> f64;
};

}  // namespace stillhouse
