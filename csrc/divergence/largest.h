// The k largest columns of a row with their log-probabilities, and the mass of all others.
// Included by cpu.cpp inside the namespace of its instruction set.
//
// Two reads. The first leaves the maxima of interleaved parts of the row; the k-th largest of them is
// reached by k columns at least, and by few more. The second collects those, and sums the exponentials
// of all others on their own: what they have must not be 1 minus what the largest have. Draws from these
// look again at the blocks that they fall into.
#pragma once

// A column that may be one of the largest, and whether a comes before b: by value, NaN first, then by
// column.
template <class Real>
struct Candidate {
  Real x;
  int32_t column;
};
template <class Real>
SH_INLINE bool before(const Candidate<Real>& a, const Candidate<Real>& b) {
  const bool a_nan = a.x != a.x, b_nan = b.x != b.x;
  if (a_nan != b_nan) return a_nan;
  return a.x > b.x || ((a_nan || a.x == b.x) && a.column < b.column);
}

// Restores the order of a heap whose root, the last of its elements, was replaced.
template <class T, class Before>
void sift_down(T* heap, int64_t n, Before comes_before) {
  const T root = heap[0];
  int64_t at = 0;
  for (int64_t child = 1; child < n; child = 2 * at + 1) {
    if (child + 1 < n && comes_before(heap[child], heap[child + 1])) ++child;
    if (!comes_before(root, heap[child])) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = root;
}

// Moves the first k of n elements to the front, in order; `left` is called with each of the others, which
// stay behind them.
template <class T, class Before, class Left>
void select_first(T* x, int64_t n, int64_t k, Before comes_before, Left left) {
  for (int64_t end = 1; end <= k; ++end) {  // a heap of the first k
    int64_t at = end - 1;
    const T added = x[at];
    for (; at > 0 && comes_before(x[(at - 1) / 2], added); at = (at - 1) / 2)
      x[at] = x[(at - 1) / 2];
    x[at] = added;
  }
  for (int64_t i = k; i < n; ++i) {
    if (!comes_before(x[i], x[0])) {
      left(x[i]);
      continue;
    }
    const T out = x[0];
    left(out);
    x[0] = x[i];
    x[i] = out;
    sift_down(x, k, comes_before);
  }
  for (int64_t end = k - 1; end > 0; --end) {
    const T last = x[0];
    x[0] = x[end];
    sift_down(x, end, comes_before);
    x[end] = last;
  }
}

template <class Real>
struct LargestScratch {
  Real *buffer, *maxima, *block_sums;
  Candidate<Real>* candidates;

  LargestScratch(const LargestProblem& p, void* scratch) {
    const int64_t blocks = p.vocab / kBlock + 1;
    buffer = reinterpret_cast<Real*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
    maxima = buffer + kBlock;
    block_sums = maxima + blocks * kLanes;
    candidates = reinterpret_cast<Candidate<Real>*>(block_sums + padded(blocks));
  }
};

// Adds the columns of a block that are not below `bound` to the candidates; returns the sum of
// 2^((x - bound) gain2) of those that are.
template <class Real>
Real collect(int64_t n, const Real* x, Real bound, Real gain2, int64_t start, int64_t columns,
             Candidate<Real>*& end) {
  Lanes<Real> sum;
  const Lane<Real> limit(bound), gain(gain2), none(Real(0));
  constexpr uint32_t kAll = kWidth<Real> > 1 ? 0xffff : 1;
  for (int64_t j = 0; j < n; j += kLanes) {
    uint32_t below = kAll;
    SH_STEPS for (int64_t i = 0; i < kSteps<Real>; ++i) {
      Lane<Real> xi;
      load_step(x + j, i, xi);
      const auto less = xi < limit;
      sum[i] += select(less, fast_exp2((xi - limit) * gain), none);
      below &= bits_of(less);
    }
    if (below == kAll) continue;
    for (int64_t i = j; i < j + kLanes && i < columns; ++i)
      if (!(x[i] < bound)) *end++ = {x[i], int32_t(start + i)};
  }
  return fold_sum(sum);
}

// The columns that the draws of a row fall on, of those that are not among the first k candidates: the
// other candidates, then block by block, 32 columns by 32. Masses are relative to `shift`, the bound
// where there is one; block_sums: what is below it in each block.
template <class Real>
struct Draws {
  const LargestProblem& p;
  const LargestScratch<Real>& w;
  Source<Real>& source;
  const int64_t r;
  const Real shift, gain2;
  const int64_t found;
  double passed = 0;
  int64_t next = 0;
  double rest = 0;  // of all of them; a number below 1 times it is below it

  double mass_of(Real x) const {
    return x > -INFINITY ? double(fast_exp2((x - shift) * gain2)) : 0.;
  }
  bool falls_within(double mass) const {
    return next < p.draws && p.uniform[r * p.draws + next] * rest < passed + mass;
  }
  void take(int64_t column) { p.drawn[r * p.draws + next++] = int32_t(column); }

  // Adds up what it will pass, in the same order, so that no number is left over in the end.
  void all() {
    const int64_t blocks = (p.vocab + kBlock - 1) / kBlock;
    for (int64_t i = p.k; i < found; ++i) rest += mass_of(w.candidates[i].x);
    for (int64_t b = 0; b < blocks; ++b) rest += double(w.block_sums[b]);
    for (int64_t i = p.k; i < found; ++i) {
      const double mass = mass_of(w.candidates[i].x);
      while (falls_within(mass)) take(w.candidates[i].column);
      passed += mass;
    }
    for (int64_t b = 0; b < blocks; ++b) from_block(b * kBlock, double(w.block_sums[b]));
  }

 private:
  void from_block(int64_t start, double sum) {
    if (!falls_within(sum)) {
      passed += sum;
      return;
    }
    const double end = passed + sum;
    const Real* x = source.load(start);
    const int64_t columns = source.columns(start);
    int64_t group = -1;  // the last one with any mass
    for (int64_t j = 0; j < columns; j += kLanes) {
      Candidate<Real>* unused = w.candidates + p.vocab;
      const double of_lanes = double(collect(kLanes, x + j, shift, gain2, j, 0, unused));
      if (of_lanes > 0) group = j;
      if (!falls_within(of_lanes)) {
        passed += of_lanes;
        continue;
      }
      for (int64_t i = j; i < j + kLanes && i < columns; ++i) {
        if (!(x[i] < shift)) continue;
        const double mass = mass_of(x[i]);
        while (falls_within(mass)) take(start + i);
        passed += mass;
      }
    }
    passed = end;
    // Sums in another order differ in their last places: what they leave over.
    int64_t last = -1;
    for (int64_t i = group; group >= 0 && i < group + kLanes && i < columns; ++i)
      if (x[i] < shift && x[i] > -INFINITY) last = start + i;
    while (last >= 0 && falls_within(0)) take(last);
  }
};

template <class Real>
void largest_of_row(const LargestProblem& p, int64_t r, const LargestScratch<Real>& w) {
  Source<Real> source(p.logits, r, p.vocab, w.buffer);
  const Real gain2 = source.gain2();
  int64_t parts = 0;
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const Lanes<Real> top = lane_max<Real>(padded(source.columns(start)), source.load(start));
    for (int64_t i = 0; i < kSteps<Real>; ++i) store(top[i], w.maxima + parts + i * kWidth<Real>);
    parts += kLanes;
  }
  const auto higher = [](Real a, Real b) { return a > b; };
  Real bound = -INFINITY;
  if (p.k <= parts) {
    select_first(w.maxima, parts, p.k, higher, [](Real) {});
    bound = w.maxima[p.k - 1];
  }

  Candidate<Real>* end = w.candidates;
  double rest = 0;  // relative to `shift`
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const int64_t columns = source.columns(start);
    const Real sum =
        collect(padded(columns), source.load(start), bound, gain2, start, columns, end);
    w.block_sums[start / kBlock] = sum;
    rest += sum;
  }
  const int64_t found = end - w.candidates;
  Real shift = bound;
  if (!(bound > -INFINITY)) {
    // All columns are candidates. Relative to the largest, which is the first in the end.
    for (int64_t i = 0; i < found; ++i)
      if (w.candidates[i].x > shift) shift = w.candidates[i].x;
  }
  const auto mass = [&](Real x) { return ::exp((double(x) - double(shift)) * p.logits.gain); };
  select_first(w.candidates, found, p.k, before<Real>, [&](const Candidate<Real>& left) {
    if (left.x > -INFINITY) rest += mass(left.x);
  });
  for (int64_t i = 0; i < p.draws; ++i) p.drawn[r * p.draws + i] = -1;
  if (p.draws > 0 && rest > 1e-30) Draws<Real>{p, w, source, r, shift, gain2, found}.all();
  if (!(rest > 1e-30) && found < p.vocab && rest == rest) {
    // So far below the bound that nothing is left: once more, relative to their own maximum.
    Real top = -INFINITY;
    for (int64_t start = 0; start < p.vocab; start += kBlock) {
      const Real* x = source.load(start);
      for (int64_t j = 0; j < source.columns(start); ++j)
        if (x[j] < bound && x[j] > top) top = x[j];
    }
    shift = top > -INFINITY ? top : shift;
    rest = 0;
    for (int64_t start = 0; start < p.vocab && top > -INFINITY; start += kBlock) {
      const Real* x = source.load(start);
      for (int64_t j = 0; j < source.columns(start); ++j)
        if (x[j] < bound && x[j] > -INFINITY) rest += mass(x[j]);
    }
  }

  const double gain = p.logits.gain, top = double(w.candidates[0].x);
  double sum = 0;
  for (int64_t i = 0; i < p.k; ++i) sum += ::exp((double(w.candidates[i].x) - top) * gain);
  const double log_rest = rest > 0 ? ::log(rest) + (double(shift) - top) * gain : rest - INFINITY;
  const double log_sum = ::log(sum + ::exp(log_rest));
  for (int64_t i = 0; i < p.k; ++i) {
    p.ids[r * p.k + i] = w.candidates[i].column;
    static_cast<Real*>(p.log_probs)[r * p.k + i] =
        Real((double(w.candidates[i].x) - top) * gain - log_sum);
  }
  static_cast<Real*>(p.log_rest)[r] = Real(log_rest - log_sum);
}

template <class Real>
void largest(const LargestProblem& p, int64_t lo, int64_t hi, void* scratch) {
  const LargestScratch<Real> w(p, scratch);
  for (int64_t r = lo; r < hi; ++r) largest_of_row(p, r, w);
}
