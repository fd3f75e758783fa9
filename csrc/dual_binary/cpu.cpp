// Dual-binary weights on the CPU. Compiled once per instruction set, in a namespace of its own: no torch
// header and no standard-library template here (csrc/rvq/cpu.cpp says why).
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <type_traits>

#include "kernel.h"

namespace stillhouse {
namespace STILLHOUSE_ISA {
namespace {

#include "lookup.h"

// Bytes ahead that words are asked for: a hardware prefetcher stops where a page of 4 KiB ends, and lookups
// leave it little room in front.
constexpr int64_t kAhead = 2048;

SH_INLINE void ask_for(const void* p) { __builtin_prefetch(p, 0, 3); }

SH_INLINE const char* scales_of(const FdbWeight& w, int64_t block, int64_t group) {
  return w.scales + w.scales_at(block, group) * element_size(w.scale_dtype);
}

template <class Unit>
int64_t table_entries(const FdbWeight& w) {
  return w.words() * Unit::kTable;
}

// Row `row` of x in columns of group `group` as numbers, with zeros up to whole words.
template <class Number>
SH_INLINE void stage(const FdbProduct& p, int64_t row, int64_t column, int64_t count,
                     Number (&to)[kWord]) {
  const int64_t at = row * p.weight.columns + column;
  for (int64_t i = count; i < kWord; ++i) to[i] = 0;
  if constexpr (sizeof(Number) == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = p.integers[at + i];
  } else {
    with_type(p.dtype, const_cast<char*>(p.x) + at * element_size(p.dtype), [&](auto* x) {
      for (int64_t i = 0; i < count; ++i) to[i] = Number(widen(x[i]));
    });
  }
}

template <class Unit>
void tables_of(const FdbProduct& p, int64_t lo, int64_t hi, int64_t first, char* memory) {
  const FdbWeight& w = p.weight;
  const int64_t columns = w.group_columns();
  auto* const entries = reinterpret_cast<typename Unit::Entry*>(memory);
  for (int64_t row = lo; row < hi; ++row) {
    auto* table = entries + (row - first) * table_entries<Unit>(w);
    for (int64_t group = 0; group < w.groups; ++group)
      for (int64_t i = 0; i < columns; i += kWord, table += Unit::kTable) {
        typename Unit::Number x[kWord];
        stage(p, row, group * columns + i, columns - i < kWord ? columns - i : kWord, x);
        Unit::build(x, table);
      }
  }
}

template <class V>
SH_INLINE void store_block(const FdbProduct& p, int64_t row, int64_t block, V total) {
  const int64_t column = block * kBlock, left = p.weight.rows - column;
  const int64_t count = left < kBlock ? left : kBlock;
  if (p.bias != nullptr)
    with_type(p.bias_dtype, const_cast<char*>(p.bias) + column * element_size(p.bias_dtype),
              [&](auto* bias) {
                using Real = decltype(total[0] + 0);
                for (int64_t i = 0; i < count; ++i) total[i] += Real(widen(bias[i]));
              });
  const int64_t at = row * p.weight.rows + column;
  with_type(p.dtype, p.y + at * element_size(p.dtype), [&](auto* y) {
    for (int64_t i = 0; i < count; ++i) narrow(total[i], y[i]);
  });
}

// Rows row ... row + kRows - 1 of x with blocks block ... block + kWide - 1 of W.
template <class Unit, int kRows, int kWide>
__attribute__((noinline)) void look_up(const FdbProduct& p, const char* tables, int64_t row,
                                       int64_t first, int64_t block) {
  using Total = typename Unit::Total;
  const FdbWeight& w = p.weight;
  const int64_t words = w.group_words(), size = table_entries<Unit>(w);
  const typename Unit::Entry* table[kRows];
  for (int t = 0; t < kRows; ++t)
    table[t] = reinterpret_cast<const typename Unit::Entry*>(tables) + (row - first + t) * size;
  const uint32_t* at[kWide];
  const char* scales[kWide];
  each<kWide>(SH_EACH(b) {
    at[b] = w.words_of(block + b, 0);
    scales[b] = scales_of(w, block + b, 0);
  });
  const int64_t of_group = 2 * kBlock * element_size(w.scale_dtype);
  // Past the end of its block, what lies ahead is the block that takes its place.
  const int64_t of_words = words * 2 * kBlock * 4, of_block = w.groups * of_words;
  const int64_t of_scales = w.groups * of_group;
  Total total[kRows][kWide] = {};
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t left = w.groups - group;
    const int64_t ahead = kAhead + (left * of_words <= kAhead ? (kWide - 1) * of_block : 0);
    const int64_t scales_ahead =
        kAhead / 2 + (left * of_group <= kAhead / 2 ? (kWide - 1) * of_scales : 0);
    typename Unit::Sum sum[kRows][kWide][2];
    const auto next_word = [&]() __attribute__((always_inline)) {
      each<kWide>(SH_EACH(b) {
        ask_for(reinterpret_cast<const char*>(at[b]) + ahead);
        ask_for(reinterpret_cast<const char*>(at[b]) + ahead + 64);
      });
      Unit::template word<kRows, kWide>(at, table, sum);
      each<kWide>(SH_EACH(b) { at[b] += 2 * kBlock; });
      each<kRows>(SH_EACH(t) { table[t] += Unit::kTable; });
    };
    if (kRows == 1 && words == 2) {  // groups of 64: their sums never leave registers
      next_word();
      next_word();
    } else {
      for (int64_t i = 0; i < words; ++i) next_word();
    }
    each<kWide>(SH_EACH(b) {
      Total scale[2];
      load_scales(w.scale_dtype, scales[b], scale);
      ask_for(scales[b] + scales_ahead);
      scales[b] += of_group;
      each<kRows>(SH_EACH(t) {
        if constexpr (sizeof(typename Unit::Number) == 1) {
          const float step = p.steps[(row + t) * w.groups + group];
          each<2>(SH_EACH(n) { add_scaled(scale[n] * step, sum[t][b][n].total(), total[t][b]); });
        } else {
          each<2>(SH_EACH(n) { add_scaled(scale[n], sum[t][b][n].total(), total[t][b]); });
        }
      });
    });
  }
  each<kRows>(
      SH_EACH(t) { each<kWide>(SH_EACH(b) { store_block(p, row + t, block + b, total[t][b]); }); });
}

// All rows of x but an odd one at the end.
template <class Unit, int kWide>
SH_INLINE void look_up_rows(const FdbProduct& p, const char* tables, int64_t first, int64_t count,
                            int64_t block) {
  constexpr int kRows = Unit::kTokens;
  int64_t row = first;
  for (; row + kRows <= first + count; row += kRows)
    look_up<Unit, kRows, kWide>(p, tables, row, first, block);
  if constexpr (kRows > 2)
    for (; row + 2 <= first + count; row += 2)
      look_up<Unit, 2, kWide>(p, tables, row, first, block);
}

// One row leaves registers for more blocks, which share what is read of its tables.
template <class Unit>
void product_of(const FdbProduct& p, const char* tables, int64_t first, int64_t count, int64_t lo,
                int64_t hi) {
  constexpr int kWide = Unit::kBlocksOfOne;
  const int64_t last = first + count - 1;
  int64_t block = lo;
  for (; block + kWide <= hi; block += kWide) {
    for (int64_t b = block; b < block + kWide; b += Unit::kBlocks)
      look_up_rows<Unit, Unit::kBlocks>(p, tables, first, count, b);
    if (count % 2 == 1) look_up<Unit, 1, kWide>(p, tables, last, first, block);
  }
  for (; block < hi; ++block) {
    look_up_rows<Unit, 1>(p, tables, first, count, block);
    if (count % 2 == 1) look_up<Unit, 1, 1>(p, tables, last, first, block);
  }
}

// Calls f with the unit that a product takes.
template <class F>
SH_INLINE auto with_unit(const FdbProduct& p, bool dot, F f) {
#if defined(__AVX512F__)
  if (p.x == nullptr && dot) return f(Int8Unit<true>());
#endif
  if (p.x == nullptr) return f(Int8Unit<false>());
  return p.dtype == Dtype::f64 ? f(DoubleUnit()) : f(FloatUnit());
}

int64_t table_bytes(const FdbProduct& p) {
  return with_unit(p, false, [&](auto unit) {
    using Unit = decltype(unit);
    return table_entries<Unit>(p.weight) * int64_t(sizeof(typename Unit::Entry));
  });
}
void tables(const FdbProduct& p, int64_t lo, int64_t hi, int64_t first, char* memory) {
  with_unit(p, false, [&](auto unit) { tables_of<decltype(unit)>(p, lo, hi, first, memory); });
}
void product(const FdbProduct& p, const char* tables, int64_t first, int64_t count, int64_t lo,
             int64_t hi, bool dot) {
  with_unit(p, dot,
            [&](auto unit) { product_of<decltype(unit)>(p, tables, first, count, lo, hi); });
}

// To nearest, ties to even: numbers are at most 127 in size, and adding 1.5 2^23 rounds.
SH_INLINE int8_t rounded(float x) {
  constexpr float kRound = 12582912.f;
  return int8_t(int32_t(as_bits(x + kRound) - as_bits(kRound)));
}

void quantize(const FdbQuantizing& q, int64_t lo, int64_t hi) {
  const int64_t columns = q.columns / q.groups;
  for (int64_t i = lo * q.groups; i < hi * q.groups; ++i) {
    const int64_t at = i * columns;
    with_type(q.dtype, const_cast<char*>(q.x) + at * element_size(q.dtype), [&](auto* x) {
      uint32_t bits = 0;  // of magnitudes, which order as integers, those that are not finite last
#pragma omp simd reduction(max : bits)
      for (int64_t k = 0; k < columns; ++k) {
        const uint32_t each = as_bits(float(widen(x[k]))) & 0x7fffffffu;
        bits = each > bits ? each : bits;
      }
      const float largest = as_float(bits), step = largest / 127.f;
      const bool finite = bits < 0x7f800000u;
      // A step that has become a denormal number or 0 has no reciprocal.
      const float scale = finite && step >= 1.1754944e-38f ? 127.f / largest : 0.f;
      q.steps[i] = !finite ? NAN : scale == 0.f ? 0.f : step;
#pragma omp simd
      for (int64_t k = 0; k < columns; ++k) {
        const float number = finite ? float(widen(x[k])) : 0.f;
        q.integers[at + k] = rounded(number * scale);
      }
    });
  }
}

// The bits of a word, as a vector is compared with.
struct BitsOfWord {
  uint32_t bit[kWord];
  constexpr BitsOfWord() : bit() {
    for (int i = 0; i < kWord; ++i) bit[i] = uint32_t(1) << i;
  }
};
constexpr BitsOfWord kBits;

#if defined(__AVX512F__)
SH_INLINE void write_word(uint32_t one, uint32_t two, const float (&level)[4], float* out) {
  const __m512 first = _mm512_set1_ps(level[1]), second = _mm512_set1_ps(level[2]);
  const __m512 both = _mm512_set1_ps(level[3]);
  for (int half = 0; half < 2; ++half) {
    const __mmask16 k = __mmask16(one >> 16 * half), l = __mmask16(two >> 16 * half);
    const __m512 with = _mm512_mask_blend_ps(k, second, both);
    _mm512_storeu_ps(out + 16 * half, _mm512_mask_blend_ps(l, _mm512_maskz_mov_ps(k, first), with));
  }
}
template <class T>
SH_INLINE void write_word_16(uint32_t one, uint32_t two, const T (&level)[4], T* out) {
  const __m512i first = _mm512_set1_epi16(short(level[1].bits));
  const __m512i second = _mm512_set1_epi16(short(level[2].bits));
  const __m512i both = _mm512_set1_epi16(short(level[3].bits));
  const __m512i with = _mm512_mask_blend_epi16(one, second, both);
  _mm512_storeu_si512(out, _mm512_mask_blend_epi16(two, _mm512_maskz_mov_epi16(one, first), with));
}
SH_INLINE void write_word(uint32_t one, uint32_t two, const Bf16 (&level)[4], Bf16* out) {
  write_word_16(one, two, level, out);
}
SH_INLINE void write_word(uint32_t one, uint32_t two, const Fp16 (&level)[4], Fp16* out) {
  write_word_16(one, two, level, out);
}
#endif
template <class T>
SH_INLINE void write_some(uint32_t one, uint32_t two, const T (&level)[4], int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T off = two & kBits.bit[i] ? level[2] : level[0];
    const T on = two & kBits.bit[i] ? level[3] : level[1];
    out[i] = one & kBits.bit[i] ? on : off;
  }
}
template <class T>
SH_INLINE void write_word(uint32_t one, uint32_t two, const T (&level)[4], T* out) {
  write_some(one, two, level, kWord, out);
}

// A block at a time, whose scales become levels together.
template <class V, class T>
void dequantize_blocks(const FdbPanel& panel, T* out, int64_t lo, int64_t hi) {
  const FdbWeight& w = panel.weight;
  const int64_t columns = w.group_columns(), words = w.group_words();
  const int64_t width = panel.count_groups * columns;
  for (int64_t b = lo; b < hi; ++b) {
    const int64_t block = panel.first_row / kBlock + b, left = panel.count_rows - b * kBlock;
    for (int64_t g = 0; g < panel.count_groups; ++g) {
      V scale[2];
      load_scales(w.scale_dtype, scales_of(w, block, panel.first_group + g), scale);
      const V both = scale[0] + scale[1];
      T level[kBlock][4];
      for (int64_t i = 0; i < kBlock; ++i) {
        narrow(decltype(both[0] + 0)(0), level[i][0]);
        narrow(scale[0][i], level[i][1]);
        narrow(scale[1][i], level[i][2]);
        narrow(both[i], level[i][3]);
      }
      const uint32_t* const of_group = w.words_of(block, panel.first_group + g);
      T* to = out + b * kBlock * width + g * columns;
      for (int64_t i = 0; i < kBlock && i < left; ++i, to += width) {
        const uint32_t* at = of_group + i;
        int64_t column = 0;
        for (int64_t word = 0; word < words; ++word, at += 2 * kBlock, column += kWord) {
          if (columns - column >= kWord) {
            write_word(at[0], at[kBlock], level[i], to + column);
          } else {
            write_some(at[0], at[kBlock], level[i], columns - column, to + column);
          }
        }
      }
    }
  }
}

void dequantize(const FdbPanel& panel, int64_t lo, int64_t hi) {
  with_type(panel.dtype, panel.out, [&](auto* out) {
    using V = std::conditional_t<sizeof(*out) == 8, D16, F16>;
    dequantize_blocks<V>(panel, out, lo, hi);
  });
}

// Sums over lanes of columns, then over lanes.
template <class Real, class T>
SH_INLINE void sum_group(const T* x, int64_t columns, const uint32_t* at, Real (&sum)[2]) {
  constexpr int64_t kLanesOfSum = 16;
  Real lanes[2][kLanesOfSum] = {};
  for (int64_t i = 0; i < columns; i += kLanesOfSum) {
    const uint32_t shift = uint32_t(i % kWord);
    const uint32_t* const word = at + i / kWord * 2 * kBlock;
    const uint32_t one = word[0] >> shift, two = word[kBlock] >> shift;
    if (columns - i >= kLanesOfSum) {
#pragma omp simd
      for (int64_t k = 0; k < kLanesOfSum; ++k) {
        const Real each = Real(widen(x[i + k]));
        lanes[0][k] += one & kBits.bit[k] ? each : Real(0);
        lanes[1][k] += two & kBits.bit[k] ? each : Real(0);
      }
    } else {
      for (int64_t k = 0; k < columns - i; ++k) {
        const Real each = Real(widen(x[i + k]));
        if (one & kBits.bit[k]) lanes[0][k] += each;
        if (two & kBits.bit[k]) lanes[1][k] += each;
      }
    }
  }
  for (int p = 0; p < 2; ++p) {
    for (int64_t width = kLanesOfSum / 2; width > 0; width /= 2)
      for (int64_t k = 0; k < width; ++k) lanes[p][k] += lanes[p][k + width];
    sum[p] = lanes[p][0];
  }
}

void scale_sums(const FdbScaleSums& s, int64_t lo, int64_t hi) {
  const FdbWeight& w = s.weight;
  const int64_t columns = w.group_columns();
  with_type(s.dtype, const_cast<char*>(s.of_weight), [&](auto* of_weight) {
    using Real = std::conditional_t<sizeof(*of_weight) == 8, double, float>;
    Real* const out = reinterpret_cast<Real*>(s.out);
    for (int64_t row = lo; row < hi; ++row) {
      const int64_t n = s.first_row + row, block = n / kBlock, lane = n % kBlock;
      for (int64_t g = 0; g < w.groups; ++g) {
        Real sum[2];
        sum_group(of_weight + row * w.columns + g * columns, columns, w.words_of(block, g) + lane,
                  sum);
        Real* const to = out + w.scales_at(block, g) + lane;
        to[0] = sum[0];
        to[kBlock] = sum[1];
      }
    }
  });
}

}  // namespace

extern const FdbKernels fdb_kernels;
const FdbKernels fdb_kernels = {table_bytes, tables, product, quantize, dequantize, scale_sums};

}  // namespace STILLHOUSE_ISA
}  // namespace stillhouse
