// The ops of the divergence family between torch's tensors and a device's kernels.
#pragma once
#include <tuple>

#include "../core/tensors.h"
#include "kernel.h"
#include "series.h"

namespace stillhouse {

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
  kSecondParameter,
  kFactor,
  kNumbers
};

constexpr int64_t kOneSide = -1;  // no kind: the state of a row without a teacher

struct Arguments {
  const Tensor& student;
  const MaybeTensor& teacher;
  const Tensor& numbers;
  const MaybeTensor& labels;
  int64_t kind, vocab, resident_limit;
  const MaybeTensor& ids;
  int64_t tail;
};

// Everything but the outputs. `hold` keeps tensors alive that were made here.
template <class Real>
Problem<Real> make_problem(const Arguments& a, std::vector<Tensor>& hold) {
  STD_TORCH_CHECK(a.numbers.numel() == kNumbers && a.numbers.is_cpu() &&
                      a.numbers.scalar_type() == ScalarType::Double,
                  "numbers must be float64 [", int(kNumbers), "] on the CPU");
  hold.push_back(torch::stable::contiguous(a.numbers));
  const double* numbers = static_cast<const double*>(hold.back().const_data_ptr());
  Problem<Real> p{};
  hold.push_back(with_contiguous_rows(a.student));
  p.student = {rows_of(hold.back()), numbers[kScale], numbers[kCap], numbers[kTemperature]};
  p.width = a.student.size(a.student.dim() - 1);
  p.vocab = a.vocab < 0 ? p.width : a.vocab;
  p.rows = count_rows(a.student);
  STD_TORCH_CHECK(p.vocab <= p.width, "vocab exceeds the student's columns");
  p.teacher_vocab = p.vocab;
  if (a.teacher) {
    hold.push_back(with_contiguous_rows(*a.teacher));
    p.teacher = {rows_of(hold.back()), numbers[kTeacherScale], numbers[kTeacherCap],
                 numbers[kTeacherTemperature]};
    const int64_t columns = a.ids ? p.vocab : a.teacher->size(a.teacher->dim() - 1);
    if (a.kind == kULD && a.vocab < 0) p.teacher_vocab = columns;
    STD_TORCH_CHECK(count_rows(*a.teacher) == p.rows && p.teacher_vocab <= columns,
                    "teacher has fewer rows or columns than the student");
  }
  if (a.ids) {
    hold.push_back(torch::stable::contiguous(*a.ids));
    p.sparse = {static_cast<const int32_t*>(hold.back().const_data_ptr()),
                a.ids->size(a.ids->dim() - 1), int32_t(a.tail)};
    STD_TORCH_CHECK(a.teacher && a.ids->scalar_type() == ScalarType::Int &&
                        a.ids->numel() == a.teacher->numel() && p.sparse.k > 0 &&
                        a.ids->numel() == p.rows * p.sparse.k,
                    "ids must be int32, one for each log-probability");
    STD_TORCH_CHECK(numbers[kTeacherTemperature] == 1 || a.tail == kRenormalize ||
                        a.tail == kUniform || a.kind == kSupportKL,
                    "this tail of a sparse teacher is known at its own temperature alone");
  }
  STD_TORCH_CHECK(a.ids || a.kind != kSupportKL, "SupportKL needs a sparse teacher");
  STD_TORCH_CHECK(p.student.temperature > 0 && (!a.teacher || p.teacher.temperature > 0),
                  "temperatures must be positive");
  for (Logits* side : {&p.student, &p.teacher})
    side->gain = (side->cap > 0 ? 1.0 : side->scale) / side->temperature;
  STD_TORCH_CHECK(a.labels || !needs_labels(a.kind), "cross-entropy and DKD need labels");
  STD_TORCH_CHECK(a.teacher || a.kind == kCrossEntropy || a.kind == kOneSide,
                  "a divergence needs a teacher");
  p.kind = int32_t(a.kind);
  set_params(p.kind, numbers[kParameter], numbers[kSecondParameter], p.params);
  p.factor = numbers[kFactor];
  p.label_weight = a.kind == kCrossEntropy ? 1 : numbers[kLabelWeight];
  p.label_smoothing = numbers[kLabelSmoothing];
  p.label_temperature = a.kind == kCrossEntropy ? p.student.temperature : 1;
  if (a.labels) {
    hold.push_back(torch::stable::contiguous(*a.labels));
    p.labels = static_cast<const int64_t*>(hold.back().const_data_ptr());
    STD_TORCH_CHECK(hold.back().scalar_type() == ScalarType::Long && hold.back().numel() == p.rows,
                    "labels must be one int64 a row");
  }
  p.resident_limit = a.resident_limit;
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

inline std::vector<int64_t> leading_shape(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  return shape;
}

constexpr ScalarType real_type(float) { return ScalarType::Float; }
constexpr ScalarType real_type(double) { return ScalarType::Double; }

inline bool in_double(const Arguments& a) {
  return a.student.scalar_type() == ScalarType::Double ||
         (a.teacher && a.teacher->scalar_type() == ScalarType::Double);
}

// Backend is a device:
//   launch(problem, student)     runs the kernels
//   output(like, shape, dtype)   a tensor that the kernels will write
//   gradient(student)            the same, as large as the logits
//   total(problem, out)          out = sum of weight * value, in an order that does not change
template <class Backend>
struct DivergenceOps {
  template <class Real>
  static Tensor new_stats(const Tensor& student, bool wanted) {
    std::vector<int64_t> shape{0};
    if (wanted) {
      shape = leading_shape(student);
      shape.insert(shape.begin(), kStats);
    }
    return Backend::output(student, shape, real_type(Real()));
  }

  template <class Real>
  static Problem<Real> make_masked(const Arguments& a, const MaybeTensor& mask,
                                   std::vector<Tensor>& hold) {
    Problem<Real> p = make_problem<Real>(a, hold);
    if (mask) {
      hold.push_back(torch::stable::contiguous(*mask));
      STD_TORCH_CHECK(
          hold.back().numel() == p.rows && hold.back().scalar_type() == ScalarType::Bool,
          "mask must be one bool a row");
      p.mask = static_cast<const bool*>(hold.back().const_data_ptr());
    }
    return p;
  }

  template <class Real>
  static Tensor states_of(const Arguments& a, const MaybeTensor& mask) {
    std::vector<Tensor> hold;
    const Problem<Real> p = make_masked<Real>(a, mask, hold);
    std::vector<int64_t> shape = leading_shape(a.student);
    shape.insert(shape.begin(), kStateNumbers);
    Tensor out = Backend::output(a.student, shape, ScalarType::Double);
    Backend::states(p, static_cast<double*>(out.data_ptr()), a.student);
    return out;
  }

  template <class Real>
  static std::tuple<Tensor, Tensor> forward(const Arguments& a, const MaybeTensor& mask,
                                            bool want_stats) {
    std::vector<Tensor> hold;
    Problem<Real> p = make_masked<Real>(a, mask, hold);
    Tensor value = Backend::output(a.student, leading_shape(a.student), real_type(Real()));
    Tensor stats = new_stats<Real>(a.student, want_stats);
    p.value = static_cast<Real*>(value.data_ptr());
    p.stats = want_stats ? static_cast<Real*>(stats.data_ptr()) : nullptr;
    Backend::launch(p, a.student);
    return {value, stats};
  }

  // A problem with a gradient, which may be the student itself.
  template <class Real>
  static Problem<Real> make_weighted(const Arguments& a, const Tensor& weight,
                                     const Tensor& gradient, std::vector<Tensor>& hold) {
    Problem<Real> p = make_problem<Real>(a, hold);
    p.weight = row_numbers<Real>(weight, p.rows, hold);
    p.gradient = rows_of(gradient);
    return p;
  }

  template <class Real>
  static void gradient_alone(const Arguments& a, const Tensor& weight, const Tensor& gradient) {
    std::vector<Tensor> hold;
    Backend::launch(make_weighted<Real>(a, weight, gradient, hold), a.student);
  }

  template <class Real>
  static std::tuple<Tensor, Tensor> with_gradient(const Arguments& a, const Tensor& weight,
                                                  const Tensor& gradient, bool want_stats) {
    std::vector<Tensor> hold;
    Problem<Real> p = make_weighted<Real>(a, weight, gradient, hold);
    const Tensor value = Backend::output(a.student, {p.rows}, real_type(Real()));
    Tensor stats = new_stats<Real>(a.student, want_stats);
    p.value = static_cast<Real*>(value.data_ptr());
    p.stats = want_stats ? static_cast<Real*>(stats.data_ptr()) : nullptr;
    Backend::launch(p, a.student);
    Tensor total = Backend::output(a.student, {}, real_type(Real()));
    Backend::total(p, static_cast<Real*>(total.data_ptr()), a.student);
    return {total, stats};
  }

  static std::tuple<Tensor, Tensor> dispatch_gradient(const Arguments& a, const Tensor& weight,
                                                      const Tensor& gradient, bool want_stats) {
    return in_double(a) ? with_gradient<double>(a, weight, gradient, want_stats)
                        : with_gradient<float>(a, weight, gradient, want_stats);
  }

  static std::tuple<Tensor, Tensor> divergence(const Tensor& student, const MaybeTensor& teacher,
                                               const Tensor& numbers, const MaybeTensor& mask,
                                               const MaybeTensor& labels, int64_t kind,
                                               int64_t vocab, bool want_stats,
                                               int64_t resident_limit, const MaybeTensor& ids,
                                               int64_t tail) {
    const Arguments a{student, teacher, numbers, labels, kind, vocab, resident_limit, ids, tail};
    return in_double(a) ? forward<double>(a, mask, want_stats)
                        : forward<float>(a, mask, want_stats);
  }

  static Tensor gradient(const Tensor& student, const MaybeTensor& teacher, const Tensor& numbers,
                         const Tensor& weight, const MaybeTensor& labels, int64_t kind,
                         int64_t vocab, int64_t resident_limit, const MaybeTensor& ids,
                         int64_t tail) {
    Tensor gradient = Backend::gradient(student);
    const Arguments a{student, teacher, numbers, labels, kind, vocab, resident_limit, ids, tail};
    in_double(a) ? gradient_alone<double>(a, weight, gradient)
                 : gradient_alone<float>(a, weight, gradient);
    return gradient;
  }

  static std::tuple<Tensor, Tensor, Tensor> loss(const Tensor& student, const MaybeTensor& teacher,
                                                 const Tensor& numbers, const Tensor& weight,
                                                 const MaybeTensor& labels, int64_t kind,
                                                 int64_t vocab, bool want_stats,
                                                 int64_t resident_limit, const MaybeTensor& ids,
                                                 int64_t tail) {
    Tensor gradient = Backend::gradient(student);
    const Arguments a{student, teacher, numbers, labels, kind, vocab, resident_limit, ids, tail};
    auto [total, stats] = dispatch_gradient(a, weight, gradient, want_stats);
    return {total, stats, gradient};
  }

  static std::tuple<Tensor, Tensor> loss_(Tensor student, const MaybeTensor& teacher,
                                          const Tensor& numbers, const Tensor& weight,
                                          const MaybeTensor& labels, int64_t kind, int64_t vocab,
                                          bool want_stats, int64_t resident_limit,
                                          const MaybeTensor& ids, int64_t tail) {
    const int64_t last = student.dim() - 1;
    STD_TORCH_CHECK(student.size(last) <= 1 || student.stride(last) == 1,
                    "an in-place gradient needs student logits whose last dimension is contiguous");
    const Arguments a{student, teacher, numbers, labels, kind, vocab, resident_limit, ids, tail};
    return dispatch_gradient(a, weight, student, want_stats);
  }

  static Tensor row_state(const Tensor& student, const MaybeTensor& teacher, const Tensor& numbers,
                          const MaybeTensor& mask) {
    const MaybeTensor none;
    // Forward KL, or of one side what has no teacher; the kind itself is not computed.
    const Arguments a{student, teacher, numbers, none, teacher ? 1 : kOneSide, -1, -1, none, 0};
    return in_double(a) ? states_of<double>(a, mask) : states_of<float>(a, mask);
  }

  // A problem whose columns are a part of the vocabulary.
  template <class Real>
  static Problem<Real> make_part(const Arguments& a, const Tensor& lse, std::vector<Tensor>& hold) {
    Problem<Real> p = make_problem<Real>(a, hold);
    STD_TORCH_CHECK(lse.numel() == 2 * p.rows && lse.scalar_type() == ScalarType::Double,
                    "lse must be float64 [2, rows]");
    hold.push_back(torch::stable::contiguous(lse));
    p.lse = static_cast<const double*>(hold.back().const_data_ptr());
    p.resident_limit = 0;  // passes have nothing to keep for each other
    return p;
  }

  template <class Real>
  static Tensor sums_of_part(const Arguments& a, const Tensor& lse) {
    std::vector<Tensor> hold;
    Problem<Real> p = make_part<Real>(a, lse, hold);
    std::vector<int64_t> shape = leading_shape(a.student);
    shape.insert(shape.begin(), 2);
    const Tensor parts = Backend::output(a.student, shape, ScalarType::Double);
    p.parts = static_cast<double*>(parts.data_ptr());
    Backend::launch(p, a.student);
    return parts;
  }

  template <class Real>
  static void gradient_of_part(const Arguments& a, const Tensor& lse, const Tensor& slope,
                               const Tensor& weight, const Tensor& gradient) {
    std::vector<Tensor> hold;
    Problem<Real> p = make_part<Real>(a, lse, hold);
    STD_TORCH_CHECK(slope.numel() == p.rows && slope.scalar_type() == ScalarType::Double,
                    "slope must be float64 [rows]");
    hold.push_back(torch::stable::contiguous(slope));
    p.slope = static_cast<const double*>(hold.back().const_data_ptr());
    p.weight = row_numbers<Real>(weight, p.rows, hold);
    p.gradient = rows_of(gradient);
    Backend::launch(p, a.student);
  }

  static Tensor part(const Tensor& student, const Tensor& teacher, const Tensor& numbers,
                     const Tensor& lse, int64_t kind) {
    const MaybeTensor none, given = teacher;
    const Arguments a{student, given, numbers, none, kind, -1, 0, none, 0};
    return in_double(a) ? sums_of_part<double>(a, lse) : sums_of_part<float>(a, lse);
  }

  static Tensor part_gradient(const Tensor& student, const Tensor& teacher, const Tensor& numbers,
                              const Tensor& lse, const Tensor& slope, const Tensor& weight,
                              int64_t kind) {
    const MaybeTensor none, given = teacher;
    const Arguments a{student, given, numbers, none, kind, -1, 0, none, 0};
    const Tensor gradient = Backend::gradient(student);
    in_double(a) ? gradient_of_part<double>(a, lse, slope, weight, gradient)
                 : gradient_of_part<float>(a, lse, slope, weight, gradient);
    return gradient;
  }

  template <class Library>
  static void register_ops(Library& m) {
    m.impl("divergence", TORCH_BOX(&DivergenceOps::divergence));
    m.impl("divergence_gradient", TORCH_BOX(&DivergenceOps::gradient));
    m.impl("divergence_loss", TORCH_BOX(&DivergenceOps::loss));
    m.impl("divergence_loss_", TORCH_BOX(&DivergenceOps::loss_));
    m.impl("row_state", TORCH_BOX(&DivergenceOps::row_state));
    m.impl("divergence_part", TORCH_BOX(&DivergenceOps::part));
    m.impl("divergence_part_gradient", TORCH_BOX(&DivergenceOps::part_gradient));
  }
};

}  // namespace stillhouse
