// Scalar functions that vectorise: written without branches and without libm, so that a plain loop
// over them becomes SIMD code on every instruction set. They are forced inline: a file that is
// compiled once per instruction set must not emit a shared copy that the linker could pick.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SH_INLINE __host__ __device__ __forceinline__
#else
#define SH_INLINE __attribute__((always_inline)) inline
#endif

namespace stillhouse {

SH_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
SH_INLINE uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

// a b + c, rounded once where the instruction set has it. Compiled with -ffp-contract=off, so that no
// other product is fused: equal inputs must give equal results, and p - q an exact zero.
#if defined(__FMA__) || defined(__aarch64__) || defined(__CUDA_ARCH__) || defined(STILLHOUSE_SIMT)
SH_INLINE float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SH_INLINE double mul_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
SH_INLINE float mul_add(float a, float b, float c) { return a * b + c; }
SH_INLINE double mul_add(double a, double b, double c) { return a * b + c; }
#endif

// A step of a polynomial. On a CPU not mul_add where a select may discard the result: GCC sinks the
// builtin into the branch of the select, and the loop stays scalar.
template <class Real>
SH_INLINE Real horner(Real p, Real x, Real next) {
#if defined(__CUDA_ARCH__)
  return mul_add(p, x, next);
#else
  return p * x + next;
#endif
}

// condition ? yes : no, for vectors too (simd.h).
template <class Real>
SH_INLINE Real select(bool condition, Real yes, Real no) {
  return condition ? yes : no;
}
SH_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
SH_INLINE double magnitude(double x) { return __builtin_fabs(x); }
SH_INLINE float root(float x) { return ::sqrtf(x); }
SH_INLINE double root(double x) { return ::sqrt(x); }

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.693147180559945309417;

// 2^y, relative error 1.5e-7; 0 below -125 (also for -inf), 2^127 from there on (its bits must not
// wrap: a caller sees an overflow by the size), NaN for NaN. y = n + f with |f| <= 1/2: adding
// 1.5 * 2^23 rounds, and leaves n in the low bits. The additions run beside the multiplications on
// most cores, which is why f is not made by an fma. A GPU has a unit for it: relative error 2.4e-7,
// infinite from 2^128 on.
SH_INLINE float fast_exp2(float y) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
  return power;
#else
  constexpr float kRound = 12582912.f;
  y = y > 127.f ? 127.f : y;
  const float shifted = y + kRound;
  const float f = y - (shifted - kRound);
  float p = 0.00132647299f;
  p = mul_add(p, f, 0.00967151116f);
  p = mul_add(p, f, 0.05550733715f);
  p = mul_add(p, f, 0.24022242118f);
  p = mul_add(p, f, 0.69314697765f);
  p = mul_add(p, f, 1.f);
  const float power = as_float(as_bits(p) + (as_bits(shifted) << 23));
  return y < -125.f ? 0.f : power;
#endif
}
SH_INLINE double fast_exp2(double y) { return std::exp2(y); }

// a / b for |b| in [2^-126, 2^126]; on a GPU within two units in the last place.
template <class Real>
SH_INLINE Real quotient(Real a, Real b) {
  return a / b;
}
#if defined(__CUDA_ARCH__)
SH_INLINE float quotient(float a, float b) { return __fdividef(a, b); }
#endif

// log x for positive normal x, absolute error 6e-8 near 1 and relative error 1e-7 elsewhere.
// x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)]; log(1 + f) = f - f^2/2 + f^3 P(f).
template <class Real>
SH_INLINE Real log_of_parts(Real n, Real f) {
  Real p(-0.07865442973f);
  p = mul_add(p, f, Real(0.12879188073f));
  p = mul_add(p, f, Real(-0.13125292705f));
  p = mul_add(p, f, Real(0.14181421972f));
  p = mul_add(p, f, Real(-0.16624970293f));
  p = mul_add(p, f, Real(0.20002282445f));
  p = mul_add(p, f, Real(-0.25000796551f));
  p = mul_add(p, f, Real(0.33333316786f));
  return mul_add(n, Real(0.693147181f), f - f * f * mul_add(-f, p, Real(0.5f)));
}
SH_INLINE float fast_log(float x) {
  const uint32_t offset = as_bits(x) - 0x3f3504f3u;
  const int32_t n = static_cast<int32_t>(offset) >> 23;
  return log_of_parts(float(n), as_float((offset & 0x007fffffu) + 0x3f3504f3u) - 1.f);
}

// log x for positive normal x (NaN for NaN), relative error 4e-16. With x = 2^n m and m in
// [sqrt(1/2), sqrt(2)], log m = 2 atanh s for s = (m - 1) / (m + 1), |s| < 0.172: ten terms.
SH_INLINE double fast_log(double x) {
  const uint64_t offset = __builtin_bit_cast(uint64_t, x) - 0x3fe6a09e667f3bcdu;
  const int32_t n = static_cast<int32_t>(offset >> 32) >> 20;
  const double m = __builtin_bit_cast(double, (offset & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double p = 1.0 / 21;
  for (int k = 19; k > 1; k -= 2) p = mul_add(p, s2, 1.0 / k);
  const double twice = s + s;
  const double m_log = mul_add(twice * s2, p, twice);
  return mul_add(double(n), kLn2, m_log) + (x - x);
}

// x, which a compiler for a GPU does not make again wherever it is used.
template <class Real>
SH_INLINE Real kept(Real x) {
  return x;
}
#if defined(__CUDA_ARCH__)
SH_INLINE float kept(float x) {
  asm("" : "+f"(x));
  return x;
}
#endif

// 16-bit floats held as integers. Narrowing rounds to nearest even and keeps NaN.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

SH_INLINE float widen(float x) { return x; }
SH_INLINE double widen(double x) { return x; }
SH_INLINE float widen(Bf16 h) { return as_float(uint32_t(h.bits) << 16); }
SH_INLINE float widen(Fp16 h) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
  return x;
#else
  const uint32_t magnitude = (h.bits & 0x7fffu) << 13;
  const float finite = as_float(magnitude) * 0x1p112f;  // rebias; exact for denormals too
  const uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : as_bits(finite);
  return as_float(bits | uint32_t(h.bits & 0x8000u) << 16);
#endif
}

SH_INLINE void narrow(float x, float& out) { out = x; }
SH_INLINE void narrow(double x, double& out) { out = x; }
SH_INLINE void narrow(double x, float& out) { out = float(x); }
SH_INLINE void narrow(float x, double& out) { out = x; }
SH_INLINE void narrow(float x, Bf16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t b = as_bits(x);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  out.bits = uint16_t(x == x ? rounded : 0x7fc0u);
#endif
}
SH_INLINE void narrow(float x, Fp16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t b = as_bits(x), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t denormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // 2^-24 units
  const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = uint16_t(sign | (magnitude >= 0x477ff000u ? large : finite));
#endif
}
SH_INLINE void narrow(double x, Bf16& out) { narrow(float(x), out); }
SH_INLINE void narrow(double x, Fp16& out) { narrow(float(x), out); }

}  // namespace stillhouse
