// The divergence kernels of the CPU: threads, scratch, and the ops' registration.
#include "../core/isa.h"
#include "../core/memory.h"
#include "problem.h"

namespace stillhouse {
namespace baseline {
extern const DivergenceKernels divergence_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const DivergenceKernels divergence_kernels;
}
namespace avx512 {
extern const DivergenceKernels divergence_kernels;
}
#endif

namespace {

// Above this the two scratch rows (2 x 4 bytes a column) leave L2 and the exponentials cost less.
constexpr int64_t kResidentLimit = 1 << 18;

const DivergenceKernels& kernels() {
#if defined(__x86_64__)
  static const DivergenceKernels* const tables[3] = {
      &baseline::divergence_kernels, &avx2::divergence_kernels, &avx512::divergence_kernels};
#else
  static const DivergenceKernels* const tables[3] = {&baseline::divergence_kernels, nullptr,
                                                     nullptr};
#endif
  return by_isa(tables);
}

void run(const Problem<float>& p, int64_t lo, int64_t hi, void* scratch) {
  kernels().f32(p, lo, hi, scratch);
}
void run(const Problem<double>& p, int64_t lo, int64_t hi, void* scratch) {
  kernels().f64(p, lo, hi, scratch);
}

void run_states(const Problem<float>& p, double* out, int64_t lo, int64_t hi, void* scratch) {
  kernels().states_f32(p, out, lo, hi, scratch);
}
void run_states(const Problem<double>& p, double* out, int64_t lo, int64_t hi, void* scratch) {
  kernels().states_f64(p, out, lo, hi, scratch);
}

struct Cpu {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_empty(like, shape, dtype);
  }

  static Tensor gradient(const Tensor& student) {
    Tensor gradient = torch::stable::new_empty(student, student.sizes());
    advise_huge_pages(gradient, gradient.numel() * element_size(dtype_of(student)));
    return gradient;
  }

  template <class Real>
  static void launch(Problem<Real> p, const Tensor& student) {
    for (int64_t r = 0; r < p.rows && p.labels != nullptr; ++r)
      STD_TORCH_CHECK(p.labels[r] == -100 || (p.labels[r] >= 0 && p.labels[r] < p.vocab), "label ",
                      p.labels[r], " of row ", r, " is outside [0, ", p.vocab, ") and not -100");
    p.short_limit = p.resident_limit < 0 ? kernels().short_limit : 0;
    if (p.resident_limit < 0) p.resident_limit = kResidentLimit;
    const int64_t bytes = scratch_bytes(p);
    torch::stable::parallel_for(0, p.rows, 1 + 16384 / p.vocab, [&](int64_t lo, int64_t hi) {
      run(p, lo, hi, thread_scratch(bytes));
    });
  }

  template <class Real>
  static void states(const Problem<Real>& p, double* out, const Tensor&) {
    const int64_t bytes = scratch_bytes(p);
    torch::stable::parallel_for(0, p.rows, 1 + 16384 / p.vocab, [&](int64_t lo, int64_t hi) {
      run_states(p, out, lo, hi, thread_scratch(bytes));
    });
  }

  template <class Real>
  static void total(const Problem<Real>& p, Real* out, const Tensor& student) {
    double sum = 0;  // in row order: the result does not depend on the number of threads
    for (int64_t r = 0; r < p.rows; ++r) sum += double(p.weight[r]) * double(p.value[r]);
    *out = Real(sum);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> largest(const Tensor& given, int64_t k,
                                                   double temperature, const MaybeTensor& uniform) {
  const Tensor logits = with_contiguous_rows(given);
  const bool in_double = logits.scalar_type() == ScalarType::Double;
  const ScalarType wide = in_double ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = count_rows(logits), vocab = logits.size(logits.dim() - 1);
  STD_TORCH_CHECK(1 <= k && k <= vocab, "k must lie in [1, ", vocab, "], got ", k);
  const Tensor ids = torch::stable::new_empty(logits, {rows, k}, ScalarType::Int);
  const Tensor log_probs = torch::stable::new_empty(logits, {rows, k}, wide);
  const Tensor log_rest = torch::stable::new_empty(logits, {rows}, wide);
  const int64_t draws = uniform ? uniform->size(uniform->dim() - 1) : 0;
  STD_TORCH_CHECK(!uniform || (uniform->numel() == rows * draws && uniform->is_contiguous() &&
                               uniform->scalar_type() == ScalarType::Double),
                  "uniform must be float64 [rows, draws]");
  const Tensor drawn = torch::stable::new_empty(logits, {rows, draws}, ScalarType::Int);
  const LargestProblem p{{rows_of(logits), 1, 0, temperature, 1 / temperature},
                         vocab,
                         k,
                         draws,
                         uniform ? static_cast<const double*>(uniform->const_data_ptr()) : nullptr,
                         static_cast<int32_t*>(ids.data_ptr()),
                         static_cast<int32_t*>(drawn.data_ptr()),
                         log_probs.data_ptr(),
                         log_rest.data_ptr()};
  // A block, the maxima of its lanes and its sum, and a number with its column each.
  const int64_t bytes = 64 + 8 * (kBlock + (vocab / kBlock + 2) * 2 * kLanes) + 16 * (vocab + 1);
  torch::stable::parallel_for(0, rows, 1 + 16384 / vocab, [&](int64_t lo, int64_t hi) {
    const auto kernel = in_double ? kernels().largest_f64 : kernels().largest_f32;
    kernel(p, lo, hi, thread_scratch(bytes));
  });
  return {ids, log_probs, log_rest, drawn};
}

void scale_(Tensor gradient, const Tensor& upstream) {
  const double factor = upstream.scalar_type() == ScalarType::Double
                            ? *static_cast<const double*>(upstream.const_data_ptr())
                            : double(*static_cast<const float*>(upstream.const_data_ptr()));
  if (factor == 1) return;
  const Rows rows = rows_of(gradient);
  const int64_t width = gradient.size(gradient.dim() - 1);
  torch::stable::parallel_for(
      0, count_rows(gradient), 1 + 16384 / (width + 1),
      [&](int64_t lo, int64_t hi) { kernels().scale(rows, width, factor, lo, hi); });
}

}  // namespace
}  // namespace stillhouse

STABLE_TORCH_LIBRARY_IMPL(stillhouse, CPU, m) {
  stillhouse::DivergenceOps<stillhouse::Cpu>::register_ops(m);
  m.impl("largest", TORCH_BOX(&stillhouse::largest));
  m.impl("scale_", TORCH_BOX(&stillhouse::scale_));
}
