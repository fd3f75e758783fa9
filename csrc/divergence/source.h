// One side of one row: its tempered logits block by block, and their exponentials (pass 1).
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Tempered logit = gain * x, with x from load().
template <class Real>
struct Source {
  char* row;
  Dtype dtype;
  int64_t vocab;
  Real gain, scale, cap;
  const Source* student = nullptr;  // TAID: x = (1 - weight) * student + weight * this, tempered
  Real weight = 1, own_gain = 1;

  Source(const Logits& logits, int64_t r, int64_t vocab)
      : row(row_of(logits.rows, r)),
        dtype(logits.rows.dtype),
        vocab(vocab),
        gain(Real((logits.cap > 0 ? 1.0 : logits.scale) / logits.temperature)),
        scale(Real(logits.scale)),
        cap(Real(logits.cap)) {}

  // A weight of 0 or 1 is one side alone: 0 * -inf must not make a NaN, and the target at t = 0 is
  // the student to the last bit.
  void mix_with(const Source& other, Real t) {
    if (t == 0) *this = other;
    if (t == 0 || t == 1) return;
    student = &other;
    weight = t;
    own_gain = gain;
    gain = 1;
  }

  Real gain2() const { return Real(gain * kLog2e); }  // tempered logits in powers of two

  // What turns exponentials relative to `shift` into probabilities.
  Real factor(Real shift, double lse) const {
    return Real(std::exp(double(gain) * double(shift) - lse));
  }

  int64_t columns(int64_t start) const { return vocab - start < kBlock ? vocab - start : kBlock; }

  // Whether a block's x are the row's own elements, all lanes of them.
  bool plain(int64_t start) const {
    return cap == 0 && student == nullptr && columns(start) % kLanes == 0;
  }
  template <class In>
  const In* plain_block(int64_t start) const {
    return reinterpret_cast<const In*>(row) + start;
  }

  // x of columns [start, start + columns), then -inf up to a multiple of kLanes. The row itself
  // where nothing has to be done to it.
  const Real* load(int64_t start, Real* buffer) const {
    if (dtype == DtypeOf<Real>::value && plain(start)) return plain_block<Real>(start);
    const int64_t n = columns(start), end = padded(n);
    with_type(dtype, row, [&](auto* in) {
      in += start;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) buffer[j] = Real(widen(in[j]));
    });
    for (int64_t j = n; j < end; ++j) buffer[j] = -INFINITY;
    if (cap > 0) {
      for (int64_t j = 0; j < n; ++j)
        if (buffer[j] > -INFINITY) buffer[j] = cap * std::tanh(scale * buffer[j] / cap);
    }
    if (student != nullptr) mix(start, end, buffer);
    return buffer;
  }

 private:
  void mix(int64_t start, int64_t end, Real* buffer) const {
    Real other[kBlock];
    const Real* z = student->load(start, other);
    const Real a = weight * own_gain, b = (1 - weight) * student->gain;
#pragma omp simd
    for (int64_t j = 0; j < end; ++j) buffer[j] = mul_add(a, buffer[j], b * z[j]);
  }
};

// Touches the row after this one while this one is computed, a line or two a step, so that memory
// and arithmetic overlap. A burst would fill the miss buffers and stall.
struct Prefetch {
  const char* at;
  int64_t step;  // bytes
  SH_INLINE void operator()() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + step / 2, 0, 2);
    at += step;
  }
};

// Sums and maxima are kept in kLanes lanes and folded once a block.
template <class Real>
SH_INLINE Real fold_sum(const Real* lanes) {
  Real half[kLanes / 2];
  for (int64_t i = 0; i < kLanes / 2; ++i) half[i] = lanes[i] + lanes[i + kLanes / 2];
  for (int64_t width = kLanes / 4; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) half[i] += half[i + width];
  return half[0];
}

template <class Real>
SH_INLINE Real fold_max(const Real* lanes) {
  Real max = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) max = lanes[i] > max ? lanes[i] : max;
  return max;
}

template <class Real>
Real block_max(int64_t n, const Real* x) {
  Real max[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) max[i] = -INFINITY;
  for (int64_t j = 0; j < n; j += kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) max[i] = x[j + i] > max[i] ? x[j + i] : max[i];
  }
  return fold_max(max);
}

// e_j = 2^((x_j - shift) gain2), and their sum. The difference comes first: it is exact where it matters.
template <class In, class Real>
Real block_exp(int64_t n, const In* x, Real gain2, Real shift, Real* e, Prefetch touch) {
  Real sum[kLanes] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    touch();
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const Real ei = fast_exp2((Real(widen(x[j + i])) - shift) * gain2);
      e[j + i] = ei;
      sum[i] += ei;
    }
  }
  return fold_sum(sum);
}

#if defined(__AVX512F__)
// By hand where the instructions are there: y - floor(y) and p 2^floor(y) are one each, and both are
// right at -inf, so that 8 instructions make an exponential instead of 13.
inline __m512 widen_16(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 widen_16(const Bf16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512 exp2_16(__m512 y) {
  constexpr int kMinusFloor = 0x09;  // y - floor(y), without exceptions
  const __m512 f = _mm512_reduce_ps(y, kMinusFloor);
  __m512 p = _mm512_set1_ps(0.0018670836729f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0090171473744f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0557998098027f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240164487032f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693151307491f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, y);
}

template <class In>
float block_exp(int64_t n, const In* x, float gain2, float shift, float* e, Prefetch touch) {
  const __m512 g = _mm512_set1_ps(gain2), s = _mm512_set1_ps(shift);
  __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 32) {
    touch();
    const __m512 e0 = exp2_16(_mm512_mul_ps(_mm512_sub_ps(widen_16(x + j), s), g));
    const __m512 e1 = exp2_16(_mm512_mul_ps(_mm512_sub_ps(widen_16(x + j + 16), s), g));
    _mm512_storeu_ps(e + j, e0);
    _mm512_storeu_ps(e + j + 16, e1);
    sum0 = _mm512_add_ps(sum0, e0);
    sum1 = _mm512_add_ps(sum1, e1);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
}
#endif

template <class Real>
Real source_exp(const Source<Real>& source, int64_t start, Real shift, Real* buffer, Real* e,
                Prefetch touch) {
  const int64_t n = padded(source.columns(start));
  const Real gain2 = source.gain2();
  if constexpr (sizeof(Real) == 4) {
    if (source.dtype == Dtype::bf16 && source.plain(start))
      return block_exp(n, source.template plain_block<Bf16>(start), gain2, shift, e, touch);
  }
  return block_exp(n, source.load(start, buffer), gain2, shift, e, touch);
}

// Pass 1: the log-sum-exp of a row. Exponentials go to e (row-long) with each block's shift, or to
// `block_e` if e is null. The shift is the first block's maximum; a block whose sum
// shows that it lies far above is taken again with its own. In double: the difference of two such
// sums is small, and an error in it is an error of the divergence.
template <class Real>
double exponentials(const Source<Real>& source, Real* buffer, Real* e, Real* shifts, Real* block_e,
                    Prefetch touch) {
  constexpr Real kOverflowing = Real(1e9);  // a block that exceeds the shift by far is taken again
  Real shift = 0;                           // a block of -inf alone: 2^-inf, not 2^nan
  bool shifted = false;
  double sum = 0;
  for (int64_t start = 0; start < source.vocab; start += kBlock) {
    const int64_t n = padded(source.columns(start));
    Real* out = e != nullptr ? e + start : block_e;
    if (!shifted) {
      const Real top = block_max(n, source.load(start, buffer));
      shifted = top > -INFINITY;
      if (shifted) shift = top;
    }
    Real block_sum = source_exp(source, start, shift, buffer, out, touch);
    if (!(block_sum < kOverflowing)) {
      const Real top = block_max(n, source.load(start, buffer));
      sum *= std::exp(double(source.gain) * (double(shift) - double(top)));
      shift = top;
      block_sum = source_exp(source, start, shift, buffer, out, touch);
    }
    touch.at += touch.step * (n / kLanes);
    sum += block_sum;
    if (shifts != nullptr) shifts[start / kBlock] = shift;
  }
  return double(source.gain) * double(shift) + std::log(sum);
}

template <class Real>
int64_t first_argmax(const Source<Real>& source, Real* buffer) {
  Real top = -INFINITY;
  int64_t index = 0;
  for (int64_t start = 0; start < source.vocab; start += kBlock) {
    const Real* x = source.load(start, buffer);
    const int64_t n = source.columns(start);
    const Real m = block_max(padded(n), x);
    if (!(m > top)) continue;
    top = m;
    for (int64_t j = n - 1; j >= 0; --j)
      if (x[j] == m) index = start + j;
  }
  return index;
}
