// Tensors to pointers for the divergence kernels, threads, and the ops' registration.
#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../core/isa.h"
#include "kernel.h"
#include "series.h"

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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Above this the two scratch rows (2 x 4 bytes a column) leave L2 and the exponentials cost less.
constexpr int64_t kResidentLimit = 1 << 18;

// The order in which Python packs `numbers`.
enum Number {
  kTemperature,
  kTeacherTemperature,
  kScale,
  kTeacherScale,
  kCap,
  kTeacherCap,
  kLabelWeight,
  kLabelSmoothing,
  kParameter,
  kNumbers
};

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

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    case ScalarType::Double:
      return Dtype::f64;
    default:
      STD_TORCH_CHECK(false, "logits must be float32, bfloat16, float16 or float64");
  }
}

Rows rows_of(const Tensor& x) {
  const int64_t item = element_size(dtype_of(x));
  Rows rows{static_cast<char*>(x.data_ptr()), dtype_of(x), int32_t(x.dim()) - 1, {}, {}};
  STD_TORCH_CHECK(x.dim() >= 1 && rows.leading <= kMaxLeading,
                  "logits must have 1 to 9 dimensions");
  for (int i = 0; i < rows.leading; ++i) {
    rows.size[i] = x.size(i);
    rows.stride[i] = x.stride(i) * item;
  }
  return rows;
}

Tensor with_contiguous_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

int64_t count_rows(const Tensor& x) {
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) n *= x.size(i);
  return n;
}

// Page faults of a fresh gradient cost as much as the kernel; huge pages make them 512 times fewer.
void advise_huge_pages(const Tensor& x, int64_t bytes) {
  constexpr uintptr_t kHugePage = 1 << 21;
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(x.data_ptr()) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

Tensor fresh_gradient(const Tensor& student) {
  Tensor gradient = torch::stable::new_empty(student, student.sizes());
  advise_huge_pages(gradient, gradient.numel() * element_size(dtype_of(student)));
  return gradient;
}

// One buffer a thread, kept: pages that were faulted in once stay in L2.
void* thread_scratch(int64_t bytes) {
  struct Buffer {
    std::unique_ptr<char[]> data;
    int64_t bytes = 0;
  };
  thread_local Buffer buffer;
  if (buffer.bytes < bytes) {
    buffer.data.reset(new char[bytes]);
    buffer.bytes = bytes;
  }
  return buffer.data.get();
}

void run(const Problem<float>& p, int64_t lo, int64_t hi, void* scratch) {
  kernels().f32(p, lo, hi, scratch);
}
void run(const Problem<double>& p, int64_t lo, int64_t hi, void* scratch) {
  kernels().f64(p, lo, hi, scratch);
}

struct Arguments {
  const Tensor& student;
  const MaybeTensor& teacher;
  const Tensor& numbers;
  const MaybeTensor& labels;
  int64_t kind, vocab, resident_limit;
};

// Everything but the outputs. `hold` keeps tensors alive that were made here.
template <class Real>
Problem<Real> make_problem(const Arguments& a, std::vector<Tensor>& hold) {
  STD_TORCH_CHECK(a.numbers.numel() == kNumbers && a.numbers.scalar_type() == ScalarType::Double,
                  "numbers must be float64 [", int(kNumbers), "]");
  hold.push_back(torch::stable::contiguous(a.numbers));
  const double* numbers = static_cast<const double*>(hold.back().const_data_ptr());
  Problem<Real> p{};
  hold.push_back(with_contiguous_rows(a.student));
  p.student = {rows_of(hold.back()), numbers[kScale], numbers[kCap], numbers[kTemperature]};
  p.width = a.student.size(a.student.dim() - 1);
  p.vocab = a.vocab < 0 ? p.width : a.vocab;
  p.rows = count_rows(a.student);
  STD_TORCH_CHECK(p.vocab <= p.width, "vocab exceeds the student's columns");
  if (a.teacher) {
    hold.push_back(with_contiguous_rows(*a.teacher));
    p.teacher = {rows_of(hold.back()), numbers[kTeacherScale], numbers[kTeacherCap],
                 numbers[kTeacherTemperature]};
    STD_TORCH_CHECK(
        count_rows(*a.teacher) == p.rows && p.vocab <= a.teacher->size(a.teacher->dim() - 1),
        "teacher has fewer rows or columns than the student");
  }
  STD_TORCH_CHECK(p.student.temperature > 0 && (!a.teacher || p.teacher.temperature > 0),
                  "temperatures must be positive");
  STD_TORCH_CHECK(a.kind == kCrossEntropy ? a.labels.has_value() : a.teacher.has_value(),
                  "a divergence needs a teacher, cross-entropy needs labels");
  p.kind = int32_t(a.kind);
  set_series(p.kind, numbers[kParameter], p.params);
  p.label_weight = a.kind == kCrossEntropy ? 1 : numbers[kLabelWeight];
  p.label_smoothing = numbers[kLabelSmoothing];
  p.label_temperature = a.kind == kCrossEntropy ? p.student.temperature : 1;
  if (a.labels) {
    hold.push_back(torch::stable::contiguous(*a.labels));
    p.labels = static_cast<const int64_t*>(hold.back().const_data_ptr());
    STD_TORCH_CHECK(hold.back().scalar_type() == ScalarType::Long && hold.back().numel() == p.rows,
                    "labels must be one int64 a row");
    for (int64_t r = 0; r < p.rows; ++r)
      STD_TORCH_CHECK(p.labels[r] == -100 || (p.labels[r] >= 0 && p.labels[r] < p.vocab), "label ",
                      p.labels[r], " of row ", r, " is outside [0, ", p.vocab, ") and not -100");
  }
  p.resident_limit = a.resident_limit < 0 ? kResidentLimit : a.resident_limit;
  p.short_limit = a.resident_limit < 0 ? kernels().short_limit : 0;
  return p;
}

template <class Real>
const Real* row_numbers(const Tensor& x, int64_t rows, std::vector<Tensor>& hold) {
  hold.push_back(torch::stable::contiguous(x));
  STD_TORCH_CHECK(
      hold.back().numel() == rows &&
          hold.back().scalar_type() == (sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float),
      "weight must have one number a row, of the result's dtype");
  return static_cast<const Real*>(hold.back().const_data_ptr());
}

template <class Real>
void launch(const Problem<Real>& p) {
  const int64_t bytes = scratch_bytes(p);
  torch::stable::parallel_for(0, p.rows, 1 + 16384 / p.vocab, [&](int64_t lo, int64_t hi) {
    run(p, lo, hi, thread_scratch(bytes));
  });
}

std::vector<int64_t> leading_shape(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  return shape;
}

constexpr ScalarType real_type(float) { return ScalarType::Float; }
constexpr ScalarType real_type(double) { return ScalarType::Double; }

template <class Real>
Tensor new_stats(const Tensor& student, bool wanted) {
  std::vector<int64_t> shape{0};
  if (wanted) {
    shape = leading_shape(student);
    shape.insert(shape.begin(), kStats);
  }
  return torch::stable::new_empty(student, shape, real_type(Real()));
}

template <class Real>
std::tuple<Tensor, Tensor> forward(const Arguments& a, const MaybeTensor& mask, bool want_stats) {
  std::vector<Tensor> hold;
  Problem<Real> p = make_problem<Real>(a, hold);
  if (mask) {
    hold.push_back(torch::stable::contiguous(*mask));
    STD_TORCH_CHECK(hold.back().numel() == p.rows && hold.back().scalar_type() == ScalarType::Bool,
                    "mask must be one bool a row");
    p.mask = static_cast<const bool*>(hold.back().const_data_ptr());
  }
  Tensor value = torch::stable::new_empty(a.student, leading_shape(a.student), real_type(Real()));
  Tensor stats = new_stats<Real>(a.student, want_stats);
  p.value = static_cast<Real*>(value.data_ptr());
  p.stats = want_stats ? static_cast<Real*>(stats.data_ptr()) : nullptr;
  launch(p);
  return {value, stats};
}

// value and stats are written only where wanted; gradient may be the student itself.
template <class Real>
std::tuple<Tensor, Tensor> with_gradient(const Arguments& a, const Tensor& weight,
                                         const Tensor& gradient, bool want_stats) {
  std::vector<Tensor> hold;
  Problem<Real> p = make_problem<Real>(a, hold);
  p.weight = row_numbers<Real>(weight, p.rows, hold);
  p.gradient = rows_of(gradient);
  std::vector<Real> value(p.rows);
  Tensor stats = new_stats<Real>(a.student, want_stats);
  p.value = value.data();
  p.stats = want_stats ? static_cast<Real*>(stats.data_ptr()) : nullptr;
  launch(p);
  double loss = 0;  // summed in row order: the result does not depend on the number of threads
  for (int64_t r = 0; r < p.rows; ++r) loss += double(p.weight[r]) * double(value[r]);
  Tensor total = torch::stable::new_empty(a.student, {}, real_type(Real()));
  *static_cast<Real*>(total.data_ptr()) = Real(loss);
  return {total, stats};
}

bool in_double(const Arguments& a) {
  return a.student.scalar_type() == ScalarType::Double ||
         (a.teacher && a.teacher->scalar_type() == ScalarType::Double);
}

std::tuple<Tensor, Tensor> dispatch_gradient(const Arguments& a, const Tensor& weight,
                                             const Tensor& gradient, bool want_stats) {
  return in_double(a) ? with_gradient<double>(a, weight, gradient, want_stats)
                      : with_gradient<float>(a, weight, gradient, want_stats);
}

std::tuple<Tensor, Tensor> divergence(const Tensor& student, const MaybeTensor& teacher,
                                      const Tensor& numbers, const MaybeTensor& mask,
                                      const MaybeTensor& labels, int64_t kind, int64_t vocab,
                                      bool want_stats, int64_t resident_limit) {
  const Arguments a{student, teacher, numbers, labels, kind, vocab, resident_limit};
  return in_double(a) ? forward<double>(a, mask, want_stats) : forward<float>(a, mask, want_stats);
}

Tensor divergence_gradient(const Tensor& student, const MaybeTensor& teacher, const Tensor& numbers,
                           const Tensor& weight, const MaybeTensor& labels, int64_t kind,
                           int64_t vocab, int64_t resident_limit) {
  Tensor gradient = fresh_gradient(student);
  dispatch_gradient({student, teacher, numbers, labels, kind, vocab, resident_limit}, weight,
                    gradient, false);
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> divergence_loss(const Tensor& student,
                                                   const MaybeTensor& teacher,
                                                   const Tensor& numbers, const Tensor& weight,
                                                   const MaybeTensor& labels, int64_t kind,
                                                   int64_t vocab, bool want_stats,
                                                   int64_t resident_limit) {
  Tensor gradient = fresh_gradient(student);
  auto [loss, stats] =
      dispatch_gradient({student, teacher, numbers, labels, kind, vocab, resident_limit}, weight,
                        gradient, want_stats);
  return {loss, stats, gradient};
}

std::tuple<Tensor, Tensor> divergence_loss_(Tensor student, const MaybeTensor& teacher,
                                            const Tensor& numbers, const Tensor& weight,
                                            const MaybeTensor& labels, int64_t kind, int64_t vocab,
                                            bool want_stats, int64_t resident_limit) {
  STD_TORCH_CHECK(student.size(student.dim() - 1) <= 1 || student.stride(student.dim() - 1) == 1,
                  "an in-place gradient needs student logits whose last dimension is contiguous");
  return dispatch_gradient({student, teacher, numbers, labels, kind, vocab, resident_limit}, weight,
                           student, want_stats);
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
  m.impl("divergence", TORCH_BOX(&stillhouse::divergence));
  m.impl("divergence_gradient", TORCH_BOX(&stillhouse::divergence_gradient));
  m.impl("divergence_loss", TORCH_BOX(&stillhouse::divergence_loss));
  m.impl("divergence_loss_", TORCH_BOX(&stillhouse::divergence_loss_));
  m.impl("scale_", TORCH_BOX(&stillhouse::scale_));
}
