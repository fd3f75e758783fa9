// Residual quantization on the CPU. Compiled once per instruction set, in a namespace of its own: no
// torch header and no standard-library template here, or the linker might keep the AVX-512 copy of a
// shared inline function and run it on a machine without AVX-512.
//
// A row's score of a code, x c - |c|^2 / 2, is summed feature by feature in one order, whatever rows and
// codes are worked on beside it: codes do not depend on the batch or on the number of threads.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernel.h"

namespace stillhouse {
namespace STILLHOUSE_ISA {
namespace {

#include "search.h"

// |x - y|^2, of a feature in each lane and then over lanes.
template <class Sum, class Real>
Sum square_between(int64_t width, const Real* x, const Real* y) {
  constexpr int64_t lanes = kLane<Sum>;
  Sum sums[lanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes)
    for (int64_t l = 0; l < lanes; ++l) {
      const Sum gap = Sum(x[i + l]) - Sum(y[i + l]);
      sums[l] += gap * gap;
    }
  for (; i < width; ++i) sum += (Sum(x[i]) - Sum(y[i])) * (Sum(x[i]) - Sum(y[i]));
  for (int64_t l = 0; l < lanes; ++l) sum += sums[l];
  return sum;
}

// Features of a block that are transposed together: as many as the first-level cache has lines for.
constexpr int64_t kTransposed = 16;

template <class Real>
void pack(const Packing<Real>& p, int64_t lo, int64_t hi) {
  const int64_t blocks = code_blocks(p.codes);
  const Real none[kTransposed] = {};
  for (int64_t b = lo; b < hi; ++b) {
    const int64_t t = b / blocks, first = b % blocks * kCodes;
    const int64_t size = p.size_of(t);
    const Real* const codes = p.table + (t * p.codes + first) * p.width;
    Real* const block = p.packed + b * block_numbers(p.width);
    Real scale[kCodes];
    for (int64_t j = 0; j < kCodes; ++j) {
      scale[j] = 1;
      block[j] = -INFINITY;
      if (first + j >= size) continue;
      double square = 0;
      const Real* const code = codes + j * p.width;
      for (int64_t i = 0; i < p.width; i += kTransposed) {
        const int64_t left = p.width - i;
        square += square_between<double>(left < kTransposed ? left : kTransposed, code + i, none);
      }
      // A code of zeros has no direction: its cosine is 0.
      if (p.metric == kCosine) scale[j] = Real(1 / root(square > 0 ? square : 1.));
      block[j] = p.metric == kCosine ? Real(0) : Real(-square / 2);
    }
    for (int64_t i = 0; i < p.width; i += kTransposed) {
      const int64_t left = p.width - i, count = left < kTransposed ? left : kTransposed;
      for (int64_t j = 0; j < kCodes; ++j) {
        Real* const column = block + (1 + i) * kCodes + j;
        const bool counts = first + j < size;
        const Real* const code = counts ? codes + j * p.width + i : none;
        for (int64_t k = 0; k < count; ++k) column[k * kCodes] = code[k] * scale[j];
      }
    }
  }
}

// Numbers first ... first + count - 1 of x.
template <class Real>
void widen_some(const char* x, Dtype dtype, int64_t first, int64_t count, Real* to) {
  with_type(dtype, const_cast<char*>(x) + first * element_size(dtype), [&](auto* from) {
    for (int64_t i = 0; i < count; ++i) to[i] = Real(widen(from[i]));
  });
}

template <class Real>
void widen_row(const char* x, Dtype dtype, int64_t row, int64_t width, Real* to) {
  widen_some(x, dtype, row * width, width, to);
}

template <class Real>
void begin(const Quantizer<Real>& q, const Tile<Real>& tile, int64_t lo, int64_t hi) {
  for (int64_t r = lo; r < hi; ++r) {
    const int64_t row = tile.group * q.n + tile.first + r;
    if (q.coupling == nullptr) widen_row(q.x, q.x_dtype, row, q.width, tile.residual + r * q.width);
    if (q.out != nullptr)
      for (int64_t i = 0; i < q.out_width(); ++i) q.out[row * q.out_width() + i] = 0;
  }
}

template <class Real>
void couple(const Quantizer<Real>& q, const Tile<Real>& tile, int64_t stage, int64_t lo,
            int64_t hi) {
  const int64_t all = q.out_width(), first = stage * q.width;
  for (int64_t r = lo; r < hi; ++r) {
    const int64_t row = tile.group * q.n + tile.first + r;
    Real* const residual = tile.residual + r * q.width;
    widen_some(q.x, q.x_dtype, row * all + first, q.width, residual);
    const Real* const taken = q.out + row * all;
    const Real* weight = q.coupling + tile.group * all * all + first;
    for (int64_t j = 0; j < first; ++j, weight += all)
      for (int64_t i = 0; i < q.width; ++i) residual[i] -= taken[j] * weight[i];
  }
}

template <class Real>
void search(const Quantizer<Real>& q, const Tile<Real>& tile, int64_t stage, int64_t part,
            int64_t lo, int64_t hi) {
  const int64_t numbers = tile.rows * kLane<Real>, at = part * numbers;
  for (int64_t i = 0; i < numbers; ++i) {
    tile.score[at + i] = -INFINITY;
    tile.place[at + i] = 0;
    if (tile.second != nullptr) tile.second[at + i] = -INFINITY;
  }
  const Real* const blocks = q.blocks(tile.group, stage);
  for (int64_t b = lo; b < hi; ++b) {
    const Real* const block = blocks + b * block_numbers(q.width);
    if (tile.second != nullptr)
      score_block<Real, true>(tile, part, q.width, block, b, b + 1 < hi);
    else
      score_block<Real, false>(tile, part, q.width, block, b, b + 1 < hi);
  }
}

// Takes the nearest code of each row off its residual.
template <class Real>
void settle(const Quantizer<Real>& q, const Tile<Real>& tile, int64_t stage, int64_t lo,
            int64_t hi) {
  const auto place_of = [&](int64_t r) {
    return (tile.group * q.n + tile.first + r) * q.stages + stage;
  };
  const auto is_deep = [&](int64_t r) { return stage < q.depth_of(tile.group, tile.first + r); };
  for (int64_t r = lo; r < hi; ++r) {
    const Nearest<Real> found = is_deep(r) ? nearest(tile, r) : Nearest<Real>{0, 0, -1};
    q.found[place_of(r)] = found.code;
    if (q.margin != nullptr)
      q.margin[place_of(r)] = found.code >= 0 ? 2 * (found.score - found.second)
                              : is_deep(r)    ? Real(NAN)
                                              : Real(0);
  }
  for (int64_t r = lo; r < hi; ++r) {
    const int64_t k = q.found[place_of(r)], next = r + 1 < hi ? q.found[place_of(r + 1)] : -1;
    if (next >= 0)
      Ahead(q.code(tile.group, stage, next), q.width * int64_t(sizeof(Real)), 1).fetch();
    const int64_t of_row = tile.group * q.n + tile.first + r;
    Real* const residual = tile.residual + r * q.width;
    Real* const out = q.out == nullptr ? nullptr
                                       : q.out + of_row * q.out_width() +
                                             (q.coupling == nullptr ? 0 : stage * q.width);
    Real* const error = q.error == nullptr ? nullptr : q.error + place_of(r);
    if (k < 0) {
      if (error != nullptr) *error = is_deep(r) ? Real(NAN) : Real(0);
      for (int64_t i = 0; i < q.width && is_deep(r) && out != nullptr; ++i) out[i] = Real(NAN);
      continue;
    }
    const Real* const code = q.code(tile.group, stage, k);
    if (error != nullptr) *error = square_between<Real>(q.width, residual, code);
    for (int64_t i = 0; i < q.width; ++i) residual[i] -= code[i];
    if (out != nullptr)
      for (int64_t i = 0; i < q.width; ++i) out[i] += code[i];
  }
}

template <class Real>
void candidates(const Candidates<Real>& c, int64_t group, int64_t first, int64_t rows,
                void* memory) {
  Real* const x = static_cast<Real*>(memory);
  Real* const score = x + kCandidateRows * c.width;
  double* const value = reinterpret_cast<double*>(score + kCandidateRows * kCodes);
  int64_t* const code = reinterpret_cast<int64_t*>(value + kCandidateRows * c.k);
  for (int64_t r = 0; r < rows; ++r)
    widen_row(c.x, c.x_dtype, group * c.n + first + r, c.width, x + r * c.width);
  for (int64_t i = 0; i < rows * c.k; ++i) value[i] = -INFINITY, code[i] = -1;
  const int64_t blocks = code_blocks(c.codes);
  for (int64_t b = 0; b < blocks; ++b) {
    const Real* const block = c.packed + (group * blocks + b) * block_numbers(c.width);
    each_part(x, rows, c.width, block, b + 1 < blocks, score,
              [&](int64_t r, int64_t from, const auto& scores) {
                scores.store(score + r * kCodes + from, kCodes);
              });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = group * c.n + first + r;
      const int64_t position = c.position == nullptr ? row : c.position[row];
      keep(c, uint64_t(position), b * kCodes, score + r * kCodes,
           Kept{value + r * c.k, code + r * c.k, c.k});
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Real* const of_row = x + r * c.width;
    const bool finite = value[r * c.k] < INFINITY;
    for (int64_t j = 0; j < c.k; ++j) {
      const int64_t at = (group * c.n + first + r) * c.k + j, k = finite ? code[r * c.k + j] : -1;
      c.found[at] = k;
      c.error[at] =
          k < 0 ? Real(NAN)
                : square_between<Real>(c.width, of_row, c.table + (group * c.codes + k) * c.width);
    }
  }
}

// Sums of codes, in the order of the stages: what `settle` has put there, bit for bit.
template <class Real>
void decode(const Quantizer<Real>& q, int64_t lo, int64_t hi) {
  for (int64_t of_row = lo; of_row < hi; ++of_row) {
    Real* const out = q.out + of_row * q.width;
    for (int64_t i = 0; i < q.width; ++i) out[i] = 0;
    for (int64_t stage = 0; stage < q.stages; ++stage) {
      const int64_t k = q.found[of_row * q.stages + stage];
      if (k < 0) continue;
      const Real* const code = q.code(of_row / q.n, stage, k);
      for (int64_t i = 0; i < q.width; ++i) out[i] += code[i];
    }
  }
}

// Of each code the sum over its rows, in the rows' order: of residuals, or of what a squared distance's
// derivative to the code is made of.
template <class Real>
void collect(const Residuals<Real>& r, const Slice& s, int64_t stage, const Real* residual) {
  const int64_t of_stage = s.group * r.stages + stage, table = r.table_of(s.group, stage);
  const int64_t* const order = r.order + of_stage * r.n;
  const int64_t* const starts = r.starts + of_stage * (r.codes + 1);
  for (int64_t k = 0; k < r.codes; ++k) {
    if (r.counts != nullptr && s.first == 0)
      r.counts[table * r.codes + k] += Real(starts[k + 1] - starts[k]);
    Real* const sum = r.of_codes + (table * r.codes + k) * r.width + s.first;
    for (int64_t at = starts[k]; at < starts[k + 1]; ++at) {
      const int64_t row = order[at];
      const Real* const of_row = residual + row * s.count;
      const Real weight = r.upstream == nullptr
                              ? Real(1)
                              : -2 * r.upstream[(s.group * r.n + row) * r.stages + stage];
      for (int64_t i = 0; i < s.count; ++i) sum[i] += weight * of_row[i];
    }
  }
}

// Takes the codes of a stage off rows.
template <class Real>
void advance(const Residuals<Real>& r, const Slice& s, int64_t stage, Real* residual) {
  const Real* const table = r.table + r.table_of(s.group, stage) * r.codes * r.width + s.first;
  for (int64_t row = 0; row < s.rows; ++row) {
    const int64_t of_row = s.group * r.n + s.first_row + row, at = of_row * r.stages + stage;
    // Tables are larger than caches: codes of rows to come are asked for.
    if (row + 4 < s.rows && r.found[at + 4 * r.stages] >= 0)
      Ahead(table + r.found[at + 4 * r.stages] * r.width, s.count * int64_t(sizeof(Real)), 1)
          .fetch();
    if (r.found[at] < 0) continue;
    const Real* const code = table + r.found[at] * r.width;
    Real* const left = residual + row * s.count;
    for (int64_t i = 0; i < s.count; ++i) left[i] -= code[i];
    if (r.d_x == nullptr) continue;
    const Real weight = 2 * r.upstream[at];
    Real* const d_x = r.d_x + of_row * r.width + s.first;
    for (int64_t i = 0; i < s.count; ++i) d_x[i] += weight * left[i];
  }
}

template <class Real>
void follow(const Residuals<Real>& r, const Slice& s, Real* residual) {
  for (int64_t row = 0; row < s.rows; ++row) {
    const int64_t first = (s.group * r.n + s.first_row + row) * r.width + s.first;
    widen_some(r.x, r.x_dtype, first, s.count, residual + row * s.count);
  }
  const bool after = r.upstream != nullptr;
  for (int64_t stage = 0; stage < r.stages; ++stage) {
    if (after) advance(r, s, stage, residual);
    if (r.of_codes != nullptr) collect(r, s, stage, residual);
    if (!after) advance(r, s, stage, residual);
  }
}

}  // namespace

extern const RvqKernels rvq_kernels;
const RvqKernels rvq_kernels = {
    {kLane<float>, pack<float>, begin<float>, search<float>, couple<float>, settle<float>,
     candidates<float>, decode<float>, follow<float>},
    {kLane<double>, pack<double>, begin<double>, search<double>, couple<double>, settle<double>,
     candidates<double>, decode<double>, follow<double>}};

}  // namespace STILLHOUSE_ISA
}  // namespace stillhouse
