// Sixteen floats as one number, with the functions of scalar.h: what a template of one Real computes
// for an element it then computes for a vector. Only where the compiler's own vectorisation of the
// scalar code falls short: AVX-512 has 2^y, blends and packing in fewer instructions than it finds.
// A loop over elements is written once, in steps of kWidth<Lane>; elsewhere Lane is the scalar itself.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "scalar.h"

namespace stillhouse {

#if defined(__AVX512F__)
struct Float16x {
  __m512 v;
  SH_INLINE Float16x() : v(_mm512_setzero_ps()) {}
  SH_INLINE Float16x(__m512 v) : v(v) {}
  SH_INLINE explicit Float16x(float x) : v(_mm512_set1_ps(x)) {}
  SH_INLINE Float16x& operator+=(Float16x x) {
    v = v + x.v;
    return *this;
  }
};
struct Mask16x {
  __mmask16 k;
};

// The compiler's operators on __m512, which it may simplify (-p + q is q - p).
SH_INLINE Float16x operator+(Float16x a, Float16x b) { return a.v + b.v; }
SH_INLINE Float16x operator-(Float16x a, Float16x b) { return a.v - b.v; }
SH_INLINE Float16x operator*(Float16x a, Float16x b) { return a.v * b.v; }
SH_INLINE Float16x operator/(Float16x a, Float16x b) { return a.v / b.v; }
SH_INLINE Float16x operator-(Float16x a) { return -a.v; }
SH_INLINE Mask16x operator>(Float16x a, Float16x b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)};
}
SH_INLINE Mask16x operator<(Float16x a, Float16x b) { return b > a; }

SH_INLINE uint32_t bits_of(Mask16x mask) { return mask.k; }

SH_INLINE Float16x select(Mask16x condition, Float16x yes, Float16x no) {
  return _mm512_mask_mov_ps(no.v, condition.k, yes.v);
}
SH_INLINE Float16x magnitude(Float16x x) { return _mm512_abs_ps(x.v); }
SH_INLINE Float16x root(Float16x x) { return _mm512_sqrt_ps(x.v); }
SH_INLINE Float16x mul_add(Float16x a, Float16x b, Float16x c) {
  return _mm512_fmadd_ps(a.v, b.v, c.v);
}
SH_INLINE Float16x horner(Float16x p, Float16x x, Float16x next) { return mul_add(p, x, next); }

// y - floor(y) and p 2^floor(y) are one instruction each, and both are right at -inf and beyond the
// range: 7 instructions make an exponential instead of 12.
SH_INLINE Float16x fast_exp2(Float16x y) {
  constexpr int kMinusFloor = 0x09;  // without exceptions
  const Float16x f = _mm512_reduce_ps(y.v, kMinusFloor);
  Float16x p(0.0018670836729f);
  p = mul_add(p, f, Float16x(0.0090171473744f));
  p = mul_add(p, f, Float16x(0.0557998098027f));
  p = mul_add(p, f, Float16x(0.240164487032f));
  p = mul_add(p, f, Float16x(0.693151307491f));
  p = mul_add(p, f, Float16x(1.f));
  return _mm512_scalef_ps(p.v, y.v);
}

// As the scalar one, step by step.
SH_INLINE Float16x fast_log(Float16x x) {
  const __m512i base = _mm512_set1_epi32(0x3f3504f3);
  const __m512i offset = _mm512_sub_epi32(_mm512_castps_si512(x.v), base);
  const __m512i mantissa = _mm512_and_epi32(offset, _mm512_set1_epi32(0x007fffff));
  const Float16x n = _mm512_cvtepi32_ps(_mm512_srai_epi32(offset, 23));
  return log_of_parts(
      n, Float16x(_mm512_castsi512_ps(_mm512_add_epi32(mantissa, base))) - Float16x(1.f));
}

SH_INLINE Float16x larger(Float16x a, Float16x b) { return _mm512_max_ps(a.v, b.v); }
SH_INLINE float max_of(Float16x x) { return _mm512_reduce_max_ps(x.v); }
SH_INLINE float sum_of(Float16x x) { return _mm512_reduce_add_ps(x.v); }

SH_INLINE Float16x widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
SH_INLINE void load(const float* x, Float16x& out) { out = _mm512_loadu_ps(x); }
SH_INLINE void load(const Bf16* x, Float16x& out) {
  out = widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// The first n elements (all if there are more), then -inf. In one piece: a vector that is read back
// from narrower stores has to wait for them.
SH_INLINE __mmask16 first(int64_t n) { return n < 16 ? n > 0 ? (1u << n) - 1 : 0 : 0xffff; }
SH_INLINE void load_first(int64_t n, const float* x, Float16x& out) {
  out = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), first(n), x);
}
SH_INLINE void load_first(int64_t n, const Bf16* x, Float16x& out) {
  const __m256i none = _mm256_set1_epi16(short(0xff80));
  out = widen(_mm256_mask_loadu_epi16(none, first(n), x));
}

// To nearest even, in the upper half of each 32 bits. The NaN of an operation, and any that came from
// 16 bits, has no low bits to carry out of and stays one.
SH_INLINE __m512i rounded_to_bf16(Float16x x) {
  const __m512i b = _mm512_castps_si512(x.v), half = _mm512_set1_epi32(0x7fff);
  const __mmask16 odd = _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000));
  const __m512i r = _mm512_add_epi32(b, half);
  return _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
}
SH_INLINE __m256i to_bf16(Float16x x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_bf16(x), 16));
}
SH_INLINE void store(Float16x x, float* out) { _mm512_storeu_ps(out, x.v); }

// Step i of two over 32 elements. Of bfloat16, the even ones and then the odd ones: a shift and a mask
// are cheaper than two conversions, and an order that all of a block share is as good as another.
SH_INLINE void load_step(const Bf16* x, int64_t i, Float16x& out) {
  const __m512i both = _mm512_loadu_si512(x);
  out = _mm512_castsi512_ps(i == 0 ? _mm512_slli_epi32(both, 16)
                                   : _mm512_and_epi32(both, _mm512_set1_epi32(int(0xffff0000))));
}

// Row i, column j of sixteen vectors becomes row j, column i.
SH_INLINE void transpose(Float16x (&x)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = x[i].v;
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // columns i ... i + 3 of each 128 bits, rows in fours
    for (int k = 0; k < 2; ++k) {
      const __m512d x = _mm512_castps_pd(b[i + k]), y = _mm512_castps_pd(b[i + k + 2]);
      a[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 2; ++k) {  // rows 8 k ... 8 k + 7
      b[8 * k + i] = _mm512_shuffle_f32x4(a[8 * k + i], a[8 * k + 4 + i], 0x88);
      b[8 * k + 4 + i] = _mm512_shuffle_f32x4(a[8 * k + i], a[8 * k + 4 + i], 0xdd);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 2; ++k) {
      x[4 * k + i] = _mm512_shuffle_f32x4(b[4 * k + i], b[8 + 4 * k + i], 0x88);
      x[8 + 4 * k + i] = _mm512_shuffle_f32x4(b[4 * k + i], b[8 + 4 * k + i], 0xdd);
    }
  }
}

SH_INLINE void store_first(int64_t n, Float16x x, float* out) {
  _mm512_mask_storeu_ps(out, first(n), x.v);
}
SH_INLINE void store_first(int64_t n, Float16x x, Bf16* out) {
  _mm256_mask_storeu_epi16(out, first(n), to_bf16(x));
}
#endif

template <class In, class Real>
SH_INLINE void load(const In* x, Real& out) {
  out = Real(widen(*x));
}
template <class Real, class Out>
SH_INLINE void store(Real x, Out* out) {
  narrow(x, *out);
}

// Step i of a short loop over lanes: a load, and a place to store to.
template <class L>
constexpr int64_t kElements = sizeof(L) > sizeof(double) ? 16 : 1;
template <class In, class L>
SH_INLINE void load_step(const In* x, int64_t i, L& out) {
  load(x + i * kElements<L>, out);
}
// Where load_step() puts element j of a multiple of 32.
template <class In, class L>
SH_INLINE int64_t slot_of(int64_t j) {
#if defined(__AVX512F__)
  if constexpr (sizeof(L) > sizeof(double) && sizeof(In) == sizeof(Bf16))
    return (j & ~int64_t(31)) + (j & 1) * 16 + (j & 31) / 2;
#endif
  return j;
}
template <class L, class Out>
struct Steps {
  Out* out;
  SH_INLINE void store(int64_t i, L x) { stillhouse::store(x, out + i * kElements<L>); }
};
#if defined(__AVX512F__)
template <>
struct Steps<Float16x, Bf16> {
  Bf16* out;
  __m512i even = {};
  SH_INLINE void store(int64_t i, Float16x x) {
    const __m512i rounded = rounded_to_bf16(x);
    if (i == 0) even = _mm512_srli_epi32(rounded, 16);
    if (i == 1) _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded));
  }
};
#endif

template <class Real>
SH_INLINE Real larger(Real a, Real b) {
  return a > b ? a : b;
}
SH_INLINE float max_of(float x) { return x; }
SH_INLINE double max_of(double x) { return x; }
SH_INLINE float sum_of(float x) { return x; }
SH_INLINE double sum_of(double x) { return x; }

SH_INLINE uint32_t bits_of(bool mask) { return mask; }

// What a loop over elements of type Real takes at a time.
template <class Real>
struct LaneOf {
  using type = Real;
};
#if defined(__AVX512F__)
template <>
struct LaneOf<float> {
  using type = Float16x;
};
#endif
template <class Real>
using Lane = typename LaneOf<Real>::type;
template <class Real>
constexpr int64_t kWidth = sizeof(Lane<Real>) / sizeof(Real);

// Elements that a loop over a row takes at a time; rows in scratch are padded to a multiple of it.
constexpr int64_t kLanes = 32;
SH_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// In front of a short loop over lanes: to be unrolled where they are vectors, else to become one.
#if defined(__AVX512F__)
#define SH_STEPS _Pragma("GCC unroll 2")
#else
#define SH_STEPS _Pragma("omp simd")
#endif

}  // namespace stillhouse
