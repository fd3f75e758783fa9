// What a block of 16 rows makes of one word of columns, on each instruction set. Included by cpu.cpp inside
// its namespace.
//
// A row of x becomes a table for each word of 32 columns; a unit says what is in it and how a row's bits
// choose from it. Rows lie in lanes, so that a sum of a row never leaves its lane, and its order does not
// depend on what is worked on beside it.
#pragma once

using F16 = float __attribute__((vector_size(64)));
using I16 = int32_t __attribute__((vector_size(64)));
using U16 = uint32_t __attribute__((vector_size(64)));
using D16 = double __attribute__((vector_size(128)));
using L16 = int64_t __attribute__((vector_size(128)));

// f(0) ... f(kCount - 1) with constants, from which on the compiler keeps arrays of sums in registers: a loop
// that it unrolls itself is one too late.
template <int kValue>
struct Constant {
  SH_INLINE constexpr operator int() const { return kValue; }
};
template <int kCount, class F>
SH_INLINE void each(F f) {
  if constexpr (kCount > 0) {
    each<kCount - 1>(f);
    f(Constant<kCount - 1>());
  }
}
#define SH_EACH(i) [&](auto i) __attribute__((always_inline))

template <class V, class T>
SH_INLINE void load_lanes(const T* from, V& to) {
  static_assert(sizeof(V) == 16 * sizeof(T), "16 lanes");
  __builtin_memcpy(&to, from, sizeof to);
}
// float16 of any instruction set, exact.
SH_INLINE void widen_lanes(const Fp16* from, F16& to) {
#if defined(__AVX512F__)
  to = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) to[i] = widen(from[i]);
#endif
}
SH_INLINE void widen_lanes(const Bf16* from, F16& to) {
  U16 bits;
  for (int64_t i = 0; i < kBlock; ++i) bits[i] = uint32_t(from[i].bits) << 16;
  to = F16(bits);
}
SH_INLINE void widen_lanes(const float* from, F16& to) { load_lanes(from, to); }
SH_INLINE void widen_lanes(const double* from, F16& to) {
  D16 wide;
  load_lanes(from, wide);
  to = __builtin_convertvector(wide, F16);
}
template <class S>
SH_INLINE void widen_lanes(const S* from, D16& to) {
  for (int64_t i = 0; i < kBlock; ++i) to[i] = double(widen(from[i]));
}

// The two scales of a block's rows in a group, which lie at `from`.
template <class V>
SH_INLINE void load_scales(Dtype dtype, const char* from, V (&to)[2]) {
  with_type(dtype, const_cast<char*>(from), [&](auto* numbers) {
    widen_lanes(numbers, to[0]);
    widen_lanes(numbers + kBlock, to[1]);
  });
}

// total += scale x sum
SH_INLINE void add_scaled(F16 scale, F16 sum, F16& total) {
#if defined(__AVX512F__)
  total = _mm512_fmadd_ps(scale, sum, total);
#else
  total += scale * sum;
#endif
}
SH_INLINE void add_scaled(D16 scale, D16 sum, D16& total) { total += scale * sum; }

// Any instruction set: a bit lets a column's number through, or nothing.
template <class Real, class V, class Bits>
struct MaskUnit {
  using Number = Real;
  using Entry = Real;
  using Total = V;
  static constexpr int64_t kTable = kWord;
  static constexpr int kTokens = 2, kBlocks = 1, kBlocksOfOne = 1;

  struct Sum {
    V sum = {};
    SH_INLINE V total() const { return sum; }
  };

  static void build(const Real* x, Real* table) {
    for (int64_t i = 0; i < kWord; ++i) table[i] = x[i];
  }

  template <int kRows, int kWide>
  SH_INLINE static void word(const uint32_t* const (&at)[kWide], const Real* const (&table)[kRows],
                             Sum (&sum)[kRows][kWide][2]) {
    using Word = decltype(Bits{}[0] + 0);
    for (int b = 0; b < kWide; ++b) {
      for (int p = 0; p < 2; ++p) {
        U16 words;
        load_lanes(at[b] + p * kBlock, words);
        Bits w = __builtin_convertvector(words, Bits);
        for (int64_t i = 0; i < kWord; ++i) {
          const Bits mask = -(w & Word(1));
          w >>= 1;
          for (int t = 0; t < kRows; ++t) {
            Word bits;
            __builtin_memcpy(&bits, table[t] + i, sizeof bits);
            sum[t][b][p].sum += V(mask & bits);
          }
        }
      }
    }
  }
};
using DoubleUnit = MaskUnit<double, D16, L16>;

#if defined(__AVX512F__)
// Four columns have 16 sums, one for each choice of them, which is one vector: a permutation answers 16 rows
// at once, exactly. It looks at the lowest four bits of a lane alone.
struct FloatUnit {
  using Number = float;
  using Entry = float;
  using Total = F16;
  static constexpr int64_t kTable = 8 * 16;
  static constexpr int kTokens = 4, kBlocks = 2, kBlocksOfOne = 4;

  struct Sum {
    __m512 sum = _mm512_setzero_ps();
    SH_INLINE F16 total() const { return sum; }
  };

  static void build(const float* x, float* table) {
    for (int64_t n = 0; n < 8; ++n, x += 4, table += 16) {
      __m512 sums = _mm512_setzero_ps();
      sums = _mm512_mask_add_ps(sums, 0xaaaa, sums, _mm512_set1_ps(x[0]));
      sums = _mm512_mask_add_ps(sums, 0xcccc, sums, _mm512_set1_ps(x[1]));
      sums = _mm512_mask_add_ps(sums, 0xf0f0, sums, _mm512_set1_ps(x[2]));
      sums = _mm512_mask_add_ps(sums, 0xff00, sums, _mm512_set1_ps(x[3]));
      _mm512_storeu_ps(table, sums);
    }
  }

  // The lowest four bits are those from bit n on. A product of 16 bits, of which the upper half is kept, is a
  // shift: where shifts and permutations share ports, as on AMD's machines, it takes another.
  template <int n>
  SH_INLINE static __m512i right_by(__m512i bits, bool by_product) {
    return by_product ? _mm512_mulhi_epu16(bits, _mm512_set1_epi32(1 << (16 - n)))
                      : _mm512_srli_epi32(bits, n);
  }

  // The upper half of plane 1's bits is loaded, not shifted down: loads have idle ports. Behind plane 2 the
  // weight may end.
  template <int kRows, int kWide>
  SH_INLINE static void word(const uint32_t* const (&at)[kWide], const float* const (&table)[kRows],
                             Sum (&sum)[kRows][kWide][2]) {
    each<2>(SH_EACH(half) {
      __m512i w[kWide][2], choice[kWide][2];
      each<kWide>(SH_EACH(b) {
        w[b][0] = _mm512_loadu_si512(reinterpret_cast<const char*>(at[b]) + 2 * half);
        w[b][1] = _mm512_loadu_si512(at[b] + kBlock);
        if (half == 1) w[b][1] = _mm512_srli_epi32(w[b][1], 16);
      });
      each<4>(SH_EACH(n) {
        each<2 * kWide>(SH_EACH(i) {
          const __m512i bits = w[i / 2][i % 2];
          choice[i / 2][i % 2] = n == 0 ? bits : right_by<4 * n>(bits, n == 2 || i % 2 == 1);
        });
        each<kRows>(SH_EACH(t) {
          const __m512 sums = _mm512_loadu_ps(table[t] + 64 * half + 16 * n);
          each<2 * kWide>(SH_EACH(i) {
            __m512& s = sum[t][i / 2][i % 2].sum;
            s = _mm512_add_ps(s, _mm512_permutexvar_ps(choice[i / 2][i % 2], sums));
            // Now: the compiler would put additions off until it has no registers left.
            asm volatile("" : "+v"(s));
          });
        });
      });
    });
  }
};
#elif defined(__AVX2__)
// Three columns have 8 sums; the last two of a word 4, which are there twice.
struct FloatUnit {
  using Number = float;
  using Entry = float;
  using Total = F16;
  static constexpr int64_t kChoices = 11, kTable = kChoices * 8;
  static constexpr int kTokens = 2, kBlocks = 1, kBlocksOfOne = 1;

  struct Sum {
    __m256 half[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    SH_INLINE F16 total() const {
      F16 sum;
      __builtin_memcpy(&sum, half, sizeof sum);
      return sum;
    }
  };

  static void build(const float* x, float* table) {
    for (int64_t n = 0; n < kChoices; ++n, x += 3)
      for (int64_t c = 0; c < 8; ++c) {
        float sum = 0;
        for (int64_t i = 0; i < 3; ++i)
          if (c >> i & 1 && 3 * n + i < kWord) sum += x[i];
        table[8 * n + c] = sum;
      }
  }

  template <int kRows, int kWide>
  SH_INLINE static void word(const uint32_t* const (&at)[kWide], const float* const (&table)[kRows],
                             Sum (&sum)[kRows][kWide][2]) {
    for (int b = 0; b < kWide; ++b) {
      __m256i w[2][2];
      for (int p = 0; p < 2; ++p)
        for (int h = 0; h < 2; ++h)
          w[p][h] =
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at[b] + p * kBlock + 8 * h));
#pragma GCC unroll 11
      for (int64_t n = 0; n < kChoices; ++n) {
        for (int t = 0; t < kRows; ++t) {
          const __m256 sums = _mm256_loadu_ps(table[t] + 8 * n);
          for (int p = 0; p < 2; ++p)
            for (int h = 0; h < 2; ++h)
              sum[t][b][p].half[h] =
                  _mm256_add_ps(sum[t][b][p].half[h], _mm256_permutevar8x32_ps(sums, w[p][h]));
        }
        for (int p = 0; p < 2; ++p)
          for (int h = 0; h < 2; ++h) w[p][h] = _mm256_srli_epi32(w[p][h], 3);
      }
    }
  }
};
#else
using FloatUnit = MaskUnit<float, F16, I16>;
#endif

#if defined(__AVX2__)
// Bits j, 8 + j, 16 + j and 24 + j of a word are the lowest of its bytes after a shift by j: four columns at
// once, whose numbers lie side by side in the table.
#if defined(__AVX512F__)
template <bool kDot>
#else
template <bool kDot = false>
#endif
struct Int8Unit {
  using Number = int8_t;
  using Entry = int8_t;
  using Total = F16;
  static constexpr int64_t kTable = kWord;
#if defined(__AVX512F__)
  static constexpr int kTokens = 4, kBlocks = 2, kBlocksOfOne = 4;
#else
  static constexpr int kTokens = 2, kBlocks = 1, kBlocksOfOne = 1;
#endif

  static void build(const int8_t* x, int8_t* table) {
    for (int64_t j = 0; j < 8; ++j)
      for (int64_t i = 0; i < 4; ++i) table[4 * j + i] = x[8 * i + j];
  }

#if defined(__AVX512F__)
  struct Sum {
    __m512i sum = _mm512_setzero_si512();
    SH_INLINE F16 total() const { return _mm512_cvtepi32_ps(sum); }
  };

  template <int kRows, int kWide>
  SH_INLINE static void word(const uint32_t* const (&at)[kWide],
                             const int8_t* const (&table)[kRows], Sum (&sum)[kRows][kWide][2]) {
    const __m512i ones = _mm512_set1_epi32(0x01010101);
    __m512i w[kWide][2], pairs[kRows][kWide][2];
    each<2 * kWide>(
        SH_EACH(i) { w[i / 2][i % 2] = _mm512_loadu_si512(at[i / 2] + i % 2 * kBlock); });
    each<8>(SH_EACH(j) {
      __m512i bits[kWide][2];
      each<2 * kWide>(SH_EACH(i) {
        __m512i& words = w[i / 2][i % 2];
        bits[i / 2][i % 2] = _mm512_and_si512(words, ones);
        if (j < 7) words = _mm512_srli_epi32(words, 1);
      });
      each<kRows>(SH_EACH(t) {
        int32_t four;
        __builtin_memcpy(&four, table[t] + 4 * j, 4);
        const __m512i x = _mm512_set1_epi32(four);
        each<2 * kWide>(SH_EACH(i) {
          const __m512i bit = bits[i / 2][i % 2];
          if constexpr (kDot) {
            // Chosen at run time; this file is compiled for machines without it, too.
            asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum[t][i / 2][i % 2].sum) : "v"(bit), "v"(x));
          } else {
            // At most 8 times 2 x 128: no sum of 16 bits overflows.
            const __m512i two = _mm512_maddubs_epi16(bit, x);
            __m512i& pair = pairs[t][i / 2][i % 2];
            pair = j == 0 ? two : _mm512_add_epi16(pair, two);
          }
        });
      });
    });
    if constexpr (!kDot)
      each<kRows>(SH_EACH(t) {
        each<2 * kWide>(SH_EACH(i) {
          const __m512i two = _mm512_madd_epi16(pairs[t][i / 2][i % 2], _mm512_set1_epi16(1));
          __m512i& s = sum[t][i / 2][i % 2].sum;
          s = _mm512_add_epi32(s, two);
        });
      });
  }
#else
  struct Sum {
    __m256i half[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    SH_INLINE F16 total() const {
      F16 sum;
      for (int h = 0; h < 2; ++h) {
        const __m256 numbers = _mm256_cvtepi32_ps(half[h]);
        __builtin_memcpy(reinterpret_cast<char*>(&sum) + 32 * h, &numbers, 32);
      }
      return sum;
    }
  };

  template <int kRows, int kWide>
  SH_INLINE static void word(const uint32_t* const (&at)[kWide],
                             const int8_t* const (&table)[kRows], Sum (&sum)[kRows][kWide][2]) {
    const __m256i ones = _mm256_set1_epi8(1);
    for (int b = 0; b < kWide; ++b)
      for (int p = 0; p < 2; ++p)
        for (int h = 0; h < 2; ++h) {
          __m256i w =
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at[b] + p * kBlock + 8 * h));
          __m256i pairs[kRows];
          for (int t = 0; t < kRows; ++t) pairs[t] = _mm256_setzero_si256();
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) {
            const __m256i bits = _mm256_and_si256(w, ones);
            w = _mm256_srli_epi32(w, 1);
            for (int t = 0; t < kRows; ++t) {
              int32_t four;
              __builtin_memcpy(&four, table[t] + 4 * j, 4);
              // At most 8 times 2 x 128: no sum of 16 bits overflows.
              pairs[t] =
                  _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(bits, _mm256_set1_epi32(four)));
            }
          }
          for (int t = 0; t < kRows; ++t)
            sum[t][b][p].half[h] = _mm256_add_epi32(
                sum[t][b][p].half[h], _mm256_madd_epi16(pairs[t], _mm256_set1_epi16(1)));
        }
  }
#endif
};
#else
// Integers of 32 bits through masks.
template <bool kDot = false>
struct Int8Unit {
  using Number = int8_t;
  using Entry = int32_t;
  using Total = F16;
  static constexpr int64_t kTable = kWord;
  static constexpr int kTokens = 2, kBlocks = 1, kBlocksOfOne = 1;

  struct Sum {
    I16 sum = {};
    SH_INLINE F16 total() const { return __builtin_convertvector(sum, F16); }
  };

  static void build(const int8_t* x, int32_t* table) {
    for (int64_t i = 0; i < kWord; ++i) table[i] = x[i];
  }

  template <int kRows, int kWide>
  SH_INLINE static void word(const uint32_t* const (&at)[kWide],
                             const int32_t* const (&table)[kRows], Sum (&sum)[kRows][kWide][2]) {
    for (int b = 0; b < kWide; ++b)
      for (int p = 0; p < 2; ++p) {
        U16 words;
        load_lanes(at[b] + p * kBlock, words);
        I16 w = I16(words);
        for (int64_t i = 0; i < kWord; ++i) {
          const I16 mask = -(w & 1);
          w >>= 1;
          for (int t = 0; t < kRows; ++t) sum[t][b][p].sum += mask & table[t][i];
        }
      }
  }
};
#endif
