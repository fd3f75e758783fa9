// The teacher's head: its largest probabilities, in order, as long as their sum stays within a mass, and
// at least the first (RowNumbers::head of math.h).
// Included by cpu.cpp inside the namespace of its instruction set.
#pragma once

template <class Real>
struct Head {
  Real border = -INFINITY;        // logits above it are in the head,
  const int32_t* ties = nullptr;  // and these columns of those equal to it
  int64_t tied = 0;
};

// What could be in the head, in the order of columns.
template <class Real>
struct Candidates {
  Real *x, *p;
  int32_t* column;
  int64_t count = 0;

  void gather(Source<Real>& source, Real least) {
    for (int64_t start = 0; start < source.vocab; start += kBlock) {
      const Real* block = source.load(start);
      for (int64_t j = 0; j < source.columns(start); j += kLanes) {
        int any = 0;
#pragma omp simd reduction(| : any)
        for (int i = 0; i < kLanes; ++i) any |= block[j + i] >= least;
        if (!any) continue;
        for (int i = 0; i < kLanes; ++i) {  // what is behind the end is overwritten
          x[count] = block[j + i];
          column[count] = int32_t(start + j + i);
          count += block[j + i] >= least;
        }
      }
    }
  }

  void normalise(const Source<Real>& source, const Normaliser<Real>& normaliser) {
    const Exponent<Real> exponent(source.gain2(), normaliser.shift);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) p[i] = normaliser.factor * fast_exp2(exponent(x[i]));
  }

  template <class F>
  void keep(F wanted) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      x[kept] = x[i], p[kept] = p[i], column[kept] = column[i];
      kept += wanted(i);
    }
    count = kept;
  }

  // Larger ones first, equal ones by column.
  void sort() {
    for (int64_t i = 1; i < count; ++i) {
      const Real xi = x[i], pi = p[i];
      const int32_t ci = column[i];
      int64_t at = i;
      for (; at > 0 && x[at - 1] < xi; --at)
        x[at] = x[at - 1], p[at] = p[at - 1], column[at] = column[at - 1];
      x[at] = xi, p[at] = pi, column[at] = ci;
    }
  }
};

template <class Real>
Head<Real> find_head(Source<Real>& teacher, const Normaliser<Real>& normaliser, double most,
                     const Workspace<Real>& w) {
  constexpr int kBins = 1024, kFew = 16;
  const double least =
      (normaliser.lse + std::log(least_in_head(most, teacher.vocab))) / teacher.gain;
  Candidates<Real> c{w.order, w.order + w.order_part,
                     reinterpret_cast<int32_t*>(w.order + 2 * w.order_part)};
  // A column of -inf is in no head, whatever the mass: what a block is padded with is such a column.
  c.gather(teacher, larger(std::numeric_limits<Real>::lowest(),
                           Real(least) - Real(1e-3) * (1 + magnitude(Real(least)))));
  c.normalise(teacher, normaliser);
  double mass = 0;  // of those that were found to be in the head
  bool found = false;
  while (c.count > kFew) {
    uint64_t low = ~uint64_t(0), high = 0;
    for (int64_t i = 0; i < c.count; ++i) {
      const uint64_t key = order_of(c.x[i]);
      low = key < low ? key : low, high = key > high ? key : high;
    }
    if (low == high) break;
    const int shift = bin_shift(high - low, kBins);
    double bins[kBins] = {};
    for (int64_t i = 0; i < c.count; ++i) bins[(high - order_of(c.x[i])) >> shift] += c.p[i];
    uint64_t border = 0;
    while (border < kBins && mass + bins[border] <= most) mass += bins[border++];
    found = found || border > 0;
    c.keep([&](int64_t i) { return (high - order_of(c.x[i])) >> shift == border; });
  }
  c.sort();
  int64_t taken = 0;
  while (taken < c.count && mass + c.p[taken] <= most) mass += c.p[taken++];
  const bool first_alone = !found && taken == 0 && c.count > 0;
  if (first_alone) taken = 1;
  Head<Real> head;
  if (first_alone || taken < c.count) head.border = c.x[first_alone ? 0 : taken];
  int64_t first = taken;
  while (first > 0 && c.x[first - 1] == head.border) --first;
  head.ties = c.column + first;
  head.tied = taken - first;
  return head;
}
