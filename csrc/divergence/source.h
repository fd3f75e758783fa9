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
      : row(row_of(logits.rows, r)), dtype(logits.rows.dtype), vocab(vocab),
        gain(Real((logits.cap > 0 ? 1.0 : logits.scale) / logits.temperature)),
        scale(Real(logits.scale)), cap(Real(logits.cap)) {}

  void mix_with(const Source& other, Real t) {
    student = &other;
    weight = t;
    own_gain = gain;
    gain = 1;
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
  // A weight of 0 or 1 takes one side alone: 0 * -inf must not make a NaN.
  void mix(int64_t start, int64_t end, Real* buffer) const {
    Real other[kBlock];
    const Real* z = student->load(start, other);
    const Real a = weight * own_gain, b = (1 - weight) * student->gain;
    if (weight == 0) {
#pragma omp simd
      for (int64_t j = 0; j < end; ++j) buffer[j] = b * z[j];
    } else if (weight == 1) {
#pragma omp simd
      for (int64_t j = 0; j < end; ++j) buffer[j] = a * buffer[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < end; ++j) buffer[j] = a * buffer[j] + b * z[j];
    }
  }
};

template <class Real>
Real block_max(int64_t n, const Real* x) {
  Real m = -INFINITY;
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < n; ++j) m = x[j] > m ? x[j] : m;
  return m;
}

template <class Real>
struct BlockExp {
  Real sum, max;
};

// e_j = 2^((x_j - shift) * gain2), with the block's largest x from the same pass.
template <class In, class Real>
BlockExp<Real> block_exp(int64_t n, const In* x, Real gain2, Real shift, Real* e) {
  n &= ~(kLanes - 1);
  Real sum = 0, max = -INFINITY;
#pragma omp simd reduction(+ : sum) reduction(max : max)
  for (int64_t j = 0; j < n; ++j) {
    const Real xj = widen(x[j]);
    max = xj > max ? xj : max;
    e[j] = fast_exp2((xj - shift) * gain2);
    sum += e[j];
  }
  return {sum, max};
}

template <class Real>
BlockExp<Real> source_exp(const Source<Real>& source, int64_t start, Real shift, Real* buffer, Real* e) {
  const int64_t n = padded(source.columns(start));
  const Real gain2 = Real(source.gain * kLog2e);
  if constexpr (sizeof(Real) == 4) {
    if (source.dtype == Dtype::bf16 && source.plain(start))
      return block_exp(n, source.template plain_block<Bf16>(start), gain2, shift, e);
  }
  return block_exp(n, source.load(start, buffer), gain2, shift, e);
}

// Pass 1: the log-sum-exp of a row. Exponentials go to e (row-long) with each block's reference, or
// to `block_e` if e is null. They are relative to the largest x seen so far, found in the same pass;
// only a block that exceeds it by far, usually the first alone, is taken again.
template <class Real>
Real exponentials(const Source<Real>& source, Real* buffer, Real* e, Real* reference, Real* block_e) {
  const Real headroom = 16 / source.gain;
  Real top = -INFINITY;
  double sum = 0;
  for (int64_t start = 0; start < source.vocab; start += kBlock) {
    Real* out = e != nullptr ? e + start : block_e;
    if (top == -INFINITY) top = block_max(padded(source.columns(start)), source.load(start, buffer));
    Real shift = top == -INFINITY ? Real(0) : top;  // a block of -inf: e^-inf, not e^nan
    BlockExp<Real> block = source_exp(source, start, shift, buffer, out);
    if (block.max > top + headroom) {
      sum *= fast_exp((top - block.max) * source.gain);
      shift = top = block.max;
      block = source_exp(source, start, shift, buffer, out);
    }
    sum += block.sum;
    if (reference != nullptr) reference[start / kBlock] = shift;
  }
  return top * source.gain + Real(std::log(sum));
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
