// The ops of the transport family between torch's tensors and a device's kernels.
#pragma once
#include <cmath>
#include <tuple>

#include "../core/tensors.h"
#include "kernel.h"

namespace stillhouse {

// The order in which Python packs `numbers`; infinite rho: balanced, no annealing: 0, no tolerance:
// -1.
enum TransportNumber { kEpsilon, kRhoA, kRhoB, kAnnealing, kTolerance, kTransportNumbers };

struct TransportArguments {
  const Tensor& cost;
  const MaybeTensor &other, &a, &b, &lengths;
  const Tensor& numbers;
  int64_t iterations, ground, domain, objective;
};

inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor contiguous_of(const Tensor& x, std::vector<Tensor>& hold) {
  hold.push_back(torch::stable::contiguous(x));
  return hold.back();
}

// A contiguous tensor [..., width].
inline Matrix matrix_of(const Tensor& x) {
  return {static_cast<char*>(x.data_ptr()), dtype_of(x), x.size(x.dim() - 1)};
}

// Everything but the outputs. `hold` keeps tensors alive that were made here.
template <class Real>
Batch<Real> make_batch(const TransportArguments& given, std::vector<Tensor>& hold) {
  STD_TORCH_CHECK(given.numbers.numel() == kTransportNumbers && given.numbers.is_cpu() &&
                      given.numbers.scalar_type() == ScalarType::Double,
                  "numbers must be float64 [", int(kTransportNumbers), "] on the CPU");
  const double* numbers =
      static_cast<const double*>(contiguous_of(given.numbers, hold).const_data_ptr());
  Batch<Real> batch{};
  batch.epsilon = numbers[kEpsilon];
  batch.rho_a = numbers[kRhoA], batch.rho_b = numbers[kRhoB];
  batch.annealing = numbers[kAnnealing], batch.tolerance = numbers[kTolerance];
  batch.iterations = given.iterations;
  batch.ground = int32_t(given.ground), batch.domain = int32_t(given.domain);
  batch.objective = int32_t(given.objective);
  STD_TORCH_CHECK(batch.epsilon > 0 && batch.iterations >= 1 && batch.rho_a > 0 && batch.rho_b > 0,
                  "epsilon, rho and iterations must be positive");
  const Tensor cost = contiguous_of(given.cost, hold);
  STD_TORCH_CHECK(cost.dim() == 3 && (given.ground == kMatrix) == !given.other,
                  "costs are [G, n, m], points [G, n, d] and [G, m, d]");
  batch.groups = cost.size(0), batch.n = cost.size(1);
  batch.cost = matrix_of(cost);
  batch.m = cost.size(2);
  if (given.other) {
    const Tensor other = contiguous_of(*given.other, hold);
    STD_TORCH_CHECK(other.dim() == 3 && other.size(0) == batch.groups &&
                        other.size(2) == cost.size(2) && other.scalar_type() == cost.scalar_type(),
                    "points of both sides have the same groups, dimension and type");
    batch.m = other.size(1);
    batch.other = matrix_of(other);
  }
  const auto side = [&](const MaybeTensor& x, int64_t count) -> const Real* {
    if (!x) return nullptr;
    STD_TORCH_CHECK(x->numel() == batch.groups * count && x->scalar_type() == wide_type(cost),
                    "marginals are [G, n] and [G, m], of the result's type");
    return static_cast<const Real*>(contiguous_of(*x, hold).const_data_ptr());
  };
  batch.a = side(given.a, batch.n), batch.b = side(given.b, batch.m);
  if (given.lengths) {
    STD_TORCH_CHECK(given.lengths->numel() == 2 * batch.groups &&
                        given.lengths->scalar_type() == ScalarType::Long,
                    "lengths are int64 [G, 2]");
    batch.lengths =
        static_cast<const int64_t*>(contiguous_of(*given.lengths, hold).const_data_ptr());
  }
  return batch;
}

}  // namespace stillhouse
