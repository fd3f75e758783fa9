// What crosses from op.cpp (torch tensors) to cpu.cpp (one copy an instruction set): pointers and
// sizes, nothing that the two could instantiate differently.
#pragma once
#include <cstdint>

#include "../core/rows.h"
#include "math.h"

namespace stillhouse {

constexpr int kStats = 7;
constexpr int64_t kBlock = 2048;  // elements widened and worked on at a time; two buffers fit in L1
constexpr int64_t kLanes = 32;    // blocks are padded with -inf to a multiple of this

struct Logits {
  Rows rows;
  double scale, cap, temperature;  // x = cap tanh(scale u / cap) / temperature; cap 0: none
};

template <class Real>
struct Problem {
  Logits student, teacher;  // teacher.rows.data is null for cross-entropy
  int64_t vocab;            // columns read; the gradient is zero beyond
  int64_t width;            // columns of the student
  int32_t kind;
  KindParams<Real> params;
  const Real* weight;     // [N] or null: the gradient is weight * dD/du; weight 0 = row not read
  const bool* mask;       // [N] or null: false = row not read
  const int64_t* labels;  // [N] or null; -100 = no label
  double label_weight;    // row loss = (1 - label_weight) D + label_weight CE
  double label_smoothing, label_temperature;
  Real* value;    // [N] or null
  Real* stats;    // [kStats, N] or null
  Rows gradient;  // data null: no gradient; may be the student's own rows
  int64_t rows;
  int64_t resident_limit;  // rows of more columns take the streaming path
};

// Bytes of scratch a thread needs.
template <class Real>
inline int64_t scratch_bytes(const Problem<Real>& p) {
  const int64_t padded = (p.vocab + kBlock - 1) / kBlock * kBlock;
  const int64_t resident = p.vocab <= p.resident_limit ? 2 * padded : 0;
  return (resident + 2 * (p.vocab / kBlock + 1) + 8 * kBlock) * int64_t(sizeof(Real)) + 64;
}

struct DivergenceKernels {
  void (*f32)(const Problem<float>&, int64_t lo, int64_t hi, void* scratch);
  void (*f64)(const Problem<double>&, int64_t lo, int64_t hi, void* scratch);
  void (*scale)(const Rows&, int64_t width, double factor, int64_t lo, int64_t hi);
};

}  // namespace stillhouse
