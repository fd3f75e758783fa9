// One side of one row: its tempered logits block by block, and their exponentials (pass 1).
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

// (x - shift) gain2, without an error that grows with x. The difference comes first, which is exact
// where it matters. Or, for floats with an fma, the product does, which is exact always; what is then
// lost in rounding `shift gain2` is the same for the whole block, and origin() knows it.
template <class Number>
struct Exponent {
#if defined(__FMA__) || defined(__aarch64__)
  static constexpr bool kFused = !std::is_same<Number, double>::value;
#else
  static constexpr bool kFused = false;
#endif
  Number gain2, offset;
  SH_INLINE Exponent(Number gain2, Number shift)
      : gain2(gain2), offset(kFused ? shift * gain2 : shift) {}
  SH_INLINE Number operator()(Number x) const {
    if constexpr (kFused) return mul_add(x, gain2, -offset);
    return (x - offset) * gain2;
  }
};

// A row that is known at some columns, those of block b from begin[b] on, and even elsewhere.
template <class Real>
struct Known {
  const int32_t *column, *begin;
  const Real* x;
  Real other;
};

// Tempered logit = gain * x, with x from load().
template <class Real>
struct Source {
  char* row = nullptr;
  Real* buffer = nullptr;  // [kBlock], for blocks that cannot be read where they lie
  int64_t in_buffer = -1;  // the start of the block that it holds
  Dtype dtype = Dtype::f32;
  int64_t vocab = 0;
  bool as_bf16 = false;  // whole lanes are read as they lie, in the order of load_step()
  Real gain = 1, scale = 1, cap = 0;
  Source* student = nullptr;  // TAID: x = (1 - weight) * student + weight * this, tempered
  Real weight = 1, own_gain = 1;
  int64_t without = -1;                // a column that is taken as -inf
  const Known<Real>* known = nullptr;  // instead of a row in memory

  Source() = default;
  Source(const Logits& logits, int64_t r, int64_t vocab, Real* buffer)
      : row(row_of(logits.rows, r)),
        buffer(buffer),
        dtype(logits.rows.dtype),
        vocab(vocab),
        gain(Real(logits.gain)),
        scale(Real(logits.scale)),
        cap(Real(logits.cap)) {}

  // A weight of 0 or 1 is one side alone: 0 * -inf must not make a NaN, and the target at t = 0 is
  // the student to the last bit.
  void mix_with(Source& other, Real t) {
    if (t == 0) *this = other.with_buffer(buffer);
    if (t == 0 || t == 1) return;
    student = &other;
    weight = t;
    own_gain = gain;
    gain = 1;
  }

  // Another row of the same logits.
  Source at(char* other_row, Real* other_buffer) const {
    Source other = with_buffer(other_buffer);
    other.row = other_row;
    return other;
  }

  Source with_buffer(Real* other) const {
    Source copy = *this;
    copy.buffer = other;
    copy.in_buffer = -1;
    return copy;
  }

  Real gain2() const { return Real(gain * kLog2e); }  // tempered logits in powers of two

  // All columns.
  Source whole(Real* other) const {
    Source copy = with_buffer(other);
    copy.without = -1;
    return copy;
  }

  // log of what an exponential of 1 relative to `shift` stands for.
  double origin(Real shift) const {
    double residue = 0;  // of the rounded offset; the product of two floats is exact in double
    if (Exponent<Real>::kFused)
      residue = double(shift) * double(gain2()) - double(Real(shift * gain2()));
    return double(gain) * double(shift) - residue / kLog2e;
  }

  int64_t columns(int64_t start) const { return vocab - start < kBlock ? vocab - start : kBlock; }

  // Whether all lanes of a block are the row's own elements.
  bool whole_lanes(int64_t start) const {
    return cap == 0 && known == nullptr && columns(start) % kLanes == 0 &&
           !(without >= start && without < start + kBlock);
  }
  // And its x are these elements as they are.
  bool plain(int64_t start) const { return student == nullptr && whole_lanes(start); }
  template <class In>
  const In* plain_block(int64_t start) const {
    return reinterpret_cast<const In*>(row) + start;
  }

  // x of columns [start, start + columns), then -inf up to a multiple of kLanes. The row itself
  // where nothing has to be done to it.
  const Real* load(int64_t start) {
    if (dtype == DtypeOf<Real>::value && plain(start)) return plain_block<Real>(start);
    if (start == in_buffer) return buffer;
    in_buffer = start;
    const int64_t n = columns(start), end = padded(n);
    if (known != nullptr) {
      load_known(start, n, end);
    } else {
      with_type(dtype, row, [&](auto* in) { widen_first(n, in + start, buffer); });
    }
    if (cap > 0) {
      for (int64_t j = 0; j < n; ++j)
        if (buffer[j] > -INFINITY) buffer[j] = cap * std::tanh(scale * buffer[j] / cap);
    }
    if (student != nullptr) mix(start, end);
    if (without >= start && without < start + n) buffer[without - start] = -INFINITY;
    return buffer;
  }

  Real at_column(int64_t j) const {
    Real x = 0;
    with_type(dtype, row, [&](auto* in) { x = Real(widen(in[j])); });
    return cap > 0 && x > -INFINITY ? cap * std::tanh(scale * x / cap) : x;
  }

  Real top(int64_t start) {
    return with_block(start, [](int64_t n, auto* x) { return block_max<Real>(n, x); });
  }

  // f(padded columns, x), x as bfloat16 or as Real.
  template <class F>
  SH_INLINE Real with_block(int64_t start, F f) {
    const int64_t n = padded(columns(start));
    if constexpr (sizeof(Real) == 4) {
      if (as_bf16 && whole_lanes(start)) {
        const Bf16* x = plain_block<Bf16>(start);
        if (student == nullptr) return f(n, x);
        mix_bf16(n, x, student->template plain_block<Bf16>(start));
        return f(n, static_cast<const Real*>(buffer));
      }
    }
    return f(n, load(start));
  }

 private:
  void load_known(int64_t start, int64_t n, int64_t end) {
    for (int64_t j = 0; j < n; ++j) buffer[j] = known->other;
    for (int64_t j = n; j < end; ++j) buffer[j] = -INFINITY;
    const int64_t block = start / kBlock;
    for (int32_t i = known->begin[block]; i < known->begin[block + 1]; ++i)
      buffer[known->column[i] - start] = known->x[i];
  }
  // Into the buffer, in the order of load_step().
  void mix_bf16(int64_t n, const Bf16* own, const Bf16* z) {
    in_buffer = -1;
    const Lane<Real> a(weight * own_gain), b((1 - weight) * student->gain);
    for (int64_t j = 0; j < n; j += kLanes) {
      SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
        Lane<Real> own_i, z_i;
        load_step(own + j, i, own_i);
        load_step(z + j, i, z_i);
        store(mul_add(a, own_i, b * z_i), buffer + j + i * kWidth<Real>);
      }
    }
  }
  void mix(int64_t start, int64_t end) {
    const Real* z = student->load(start);
    const Real a = weight * own_gain, b = (1 - weight) * student->gain;
#pragma omp simd
    for (int64_t j = 0; j < end; ++j) buffer[j] = mul_add(a, buffer[j], b * z[j]);
  }
};

// What makes probabilities of a row: log q = gain x - lse, and q = factor 2^exponent(x) relative to
// `shift`.
template <class Real>
struct Normaliser {
  double lse = 0, sum = 0;
  Real shift = 0, factor = 1;

  // The factor of another shift; kept, since the blocks of a row have few.
  Real factor_at(Real other, const Source<Real>& source) {
    if (other == shift) return factor;
    if (other != last_shift) last_factor = Real(std::exp(source.origin(last_shift = other) - lse));
    return last_factor;
  }

 private:
  Real last_shift = NAN, last_factor = 0;
};

// Touches the row after this one while this one is computed, a line or two a step, so that memory
// and arithmetic overlap. A burst would fill the miss buffers and stall.
struct Prefetch {
  const char* at;
  int64_t step;  // bytes
  static Prefetch none(const void* at) { return {static_cast<const char*>(at), 0}; }
  SH_INLINE void operator()() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + step / 2, 0, 2);
    at += step;
  }
};

// e_j = 2^exponent(x_j), and their sums. Shift: Uniform or Lanes.
template <class In, class Real, class Shift>
Lanes<Real> block_exp(int64_t n, const In* x, Real gain2, const Shift shift, Real* e,
                      Prefetch touch) {
  Lanes<Real> sum;
  for (int64_t j = 0; j < n; j += kLanes) {
    touch();
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      const Exponent<Lane<Real>> exponent(Lane<Real>(gain2), shift[i]);
      Lane<Real> xi;
      load_step(x + j, i, xi);
      const Lane<Real> ei = fast_exp2(exponent(xi));
      store(ei, e + j + i * kWidth<Real>);
      sum[i] += ei;
    }
  }
  return sum;
}

// Pass 1: the log-sum-exp of a row. Exponentials go to e (row-long) with each block's shift, or to
// `block_e` if e is null. The shift is the first block's maximum; a block whose sum shows that it lies
// far above is taken again with its own. In double: the difference of two such sums is small, and an
// error in it is an error of the divergence.
// keep(start, e, sum): what of a block's sum counts.
struct KeepAll {
  template <class Real>
  SH_INLINE Real operator()(int64_t, Real*, Real sum) const {
    return sum;
  }
};
template <class Real, class Keep = KeepAll>
Normaliser<Real> exponentials(Source<Real>& source, Real* e, Real* shifts, Real* block_e,
                              Prefetch touch, Keep keep = {}) {
  constexpr Real kOverflowing = Real(1e9);  // a block that exceeds the shift by far is taken again
  Real shift = 0;                           // a block of -inf alone: 2^-inf, not 2^nan
  bool shifted = false;
  double sum = 0;
  for (int64_t start = 0; start < source.vocab; start += kBlock) {
    Real* out = e != nullptr ? e + start : block_e;
    const auto take = [&] {
      return source.with_block(start, [&](int64_t n, auto* x) {
        return fold_sum(block_exp(n, x, source.gain2(), Uniform<Real>(shift), out, touch));
      });
    };
    if (!shifted) {
      const Real top = source.top(start);
      shifted = top > -INFINITY;
      if (shifted) shift = top;
      for (int64_t b = 0; shifts != nullptr && b < start / kBlock; ++b) shifts[b] = shift;
    }
    Real block_sum = take();
    if (!(block_sum < kOverflowing)) {
      const Real top = source.top(start);
      sum *= std::exp(source.origin(shift) - source.origin(top));
      shift = top;
      block_sum = take();
    }
    touch.at += touch.step * (padded(source.columns(start)) / kLanes);
    sum += keep(start, out, block_sum);
    if (shifts != nullptr) shifts[start / kBlock] = shift;
  }
  Normaliser<Real> normaliser;
  normaliser.sum = sum;
  normaliser.lse = source.origin(shift) + std::log(sum);
  normaliser.shift = shift;
  normaliser.factor = Real(1 / sum);
  return normaliser;
}

template <class Real>
Real block_sum(int64_t n, const Real* x) {
  Lanes<Real> sum;
  for (int64_t j = 0; j < n; j += kLanes) {
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      Lane<Real> xi;
      load_step(x + j, i, xi);
      sum[i] += xi;
    }
  }
  return fold_sum(sum);
}

// -sum q log q; e: [kBlock].
template <class Real>
Real entropy_of(Source<Real>& source, const Normaliser<Real>& normaliser, Real* e) {
  const auto lse = minus_two_part<Real>(normaliser.lse);
  const Real gain = source.gain, factor = normaliser.factor;
  double sum = 0;
  for (int64_t start = 0; start < source.vocab; start += kBlock) {
    const Real* x = source.load(start);
    const int64_t n = padded(source.columns(start));
    block_exp(n, x, source.gain2(), Uniform<Real>(normaliser.shift), e, Prefetch::none(source.row));
    Real part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t j = 0; j < n; ++j)
      part -= times(factor * e[j], mul_add(gain, x[j], lse.high.value) + lse.low.value);
    sum += part;
  }
  return Real(sum);
}

template <class Real>
int64_t first_argmax(Source<Real>& source) {
  Real top = -INFINITY;
  int64_t index = 0;
  for (int64_t start = 0; start < source.vocab; start += kBlock) {
    const Real m = source.top(start);
    if (!(m > top)) continue;
    top = m;
    const Real* x = source.load(start);
    for (int64_t j = source.columns(start) - 1; j >= 0; --j)
      if (x[j] == m) index = start + j;
  }
  return index;
}
