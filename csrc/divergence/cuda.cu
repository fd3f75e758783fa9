// The divergence kernels of CUDA: which is launched for which rows, and the ops' registration.
#include "../core/cuda.h"
#include "kernel.cuh"
#include "problem.h"
#include "sorted.cuh"
#include "sparse.cuh"
#include "state.cuh"

namespace stillhouse {
namespace {

// Above this many columns (a chunk less, for rows that do not start on 16 bytes) a row does not stay in
// the registers of a team.
template <class In, int kThreads>
constexpr int64_t kColumns = kThreads * kHeld - kChunk<In>;

template <class Kind, class Real, class In, int kThreads, Hold kHold, bool kPlain>
void launch_rows(const Problem<Real>& p, Launcher& launch, size_t shared = 0) {
  constexpr int kBlock = kBlockThreads<kThreads>;
  constexpr int64_t kTeams = kBlock / kThreads;
  launch("divergence", divergence_kernel<Kind, Real, In, kThreads, kHold, kPlain>,
         Grid{(p.rows + kTeams - 1) / kTeams, kBlock, shared}, p);
}

// Above this many columns a row that shares its multiprocessor with no other gets a team of 512.
constexpr int64_t kLarge = 8192;

template <class Kind, class Real, class In>
void choose_hold(const Problem<Real>& p, Launcher& launch) {
  const int64_t resident = p.resident_limit < 0 ? p.vocab : p.resident_limit;
  if (p.vocab <= resident) {
    if (p.vocab <= kColumns<In, 32>)
      return launch_rows<Kind, Real, In, 32, Hold::registers, true>(p, launch);
    if (p.vocab <= kColumns<In, 256>)
      return launch_rows<Kind, Real, In, 256, Hold::registers, true>(p, launch);
    // Both sides, each of at most a chunk more than its columns.
    const size_t shared = 2 * (size_t(p.vocab) / kChunk<In> + 2) * 16;
    if (shared <= launch.most_shared()) {
      if (p.vocab > kLarge)
        return launch_rows<Kind, Real, In, 512, Hold::shared, true>(p, launch, shared);
      return launch_rows<Kind, Real, In, 256, Hold::shared, true>(p, launch, shared);
    }
  }
  // Rows that are being worked on should stay in L2 until their last pass: one large team a
  // multiprocessor instead of three.
  launch_rows<Kind, Real, In, 512, Hold::nothing, true>(p, launch);
}

// With statistics, labels, a soft-cap or a mixture.
template <class Kind, class Real, class In>
void choose_full(const Problem<Real>& p, Launcher& launch) {
  if constexpr (!std::is_same<In, Mixed>::value && Kind::kRow == RowNumbers::none) {
    if (p.vocab <= kColumns<In, 32> && (p.resident_limit < 0 || p.vocab <= p.resident_limit))
      return launch_rows<Kind, Real, In, 32, Hold::registers, false>(p, launch);
  } else {
    // A head is found by a whole block.
    if constexpr (Kind::kRow != RowNumbers::head) {
      if (p.vocab <= 1024) return launch_rows<Kind, Real, In, 32, Hold::nothing, false>(p, launch);
    }
  }
  launch_rows<Kind, Real, In, 256, Hold::nothing, false>(p, launch);
}

template <class Kind, class Real, class In>
void choose_plain(const Problem<Real>& p, Launcher& launch) {
  if constexpr (kHasTeacher<Kind> && !std::is_same<Kind, TAID>::value &&
                Kind::kRow == RowNumbers::none)
    if (is_plain(p)) return choose_hold<Kind, Real, In>(p, launch);
  choose_full<Kind, Real, In>(p, launch);
}

template <class Kind, class Real>
void choose_type(const Problem<Real>& p, Launcher& launch) {
  const Dtype dtype = p.student.rows.dtype;
  const bool same = (p.teacher.rows.data == nullptr || p.teacher.rows.dtype == dtype) &&
                    (p.gradient.data == nullptr || p.gradient.dtype == dtype);
  if constexpr (sizeof(Real) == 4) {
    if (same && dtype == Dtype::f32) return choose_plain<Kind, Real, float>(p, launch);
    if (same && dtype == Dtype::bf16) return choose_plain<Kind, Real, Bf16>(p, launch);
    if (same && dtype == Dtype::fp16) return choose_plain<Kind, Real, Fp16>(p, launch);
  }
  choose_full<Kind, Real, Mixed>(p, launch);
}

// A row a multiprocessor at a time, and fewer where their scratch would be more than this.
constexpr int64_t kSortScratch = int64_t(256) << 20;

template <class Real, int kThreads, int kBins>
void launch_sorted(const Problem<Real>& p, const Tensor& student, Launcher& launch) {
  const int64_t columns = p.vocab > p.teacher_vocab ? p.vocab : p.teacher_vocab;
  const int64_t bytes = SortScratch<Real>::bytes(columns);
  int64_t blocks = p.rows < launch.multiprocessors() ? p.rows : launch.multiprocessors();
  if (blocks * bytes > kSortScratch) blocks = kSortScratch / bytes > 1 ? kSortScratch / bytes : 1;
  const Tensor scratch = new_output(student, {blocks * bytes / 4}, ScalarType::Float);
  launch("sorted", sorted_kernel<Real, kThreads, kBins>,
         Grid{blocks, kThreads, DeviceSortedRow<Real, kThreads, kBins>::kShared * sizeof(int32_t)},
         p, static_cast<char*>(scratch.data_ptr()), columns);
}

template <class Real, class In>
void launch_sparse_of(const Problem<Real>& p, Launcher& launch) {
  const size_t bits = size_t(p.vocab + 31) / 32 * sizeof(uint32_t);
  STD_TORCH_CHECK(bits <= launch.most_shared(), "a sparse teacher's vocabulary of ", p.vocab,
                  " columns needs more shared memory than this device has");
  launch("sparse", sparse_kernel<Real, In, 256>, Grid{p.rows, 256, bits}, p);
}
template <class Real>
void launch_sparse(const Problem<Real>& p, Launcher& launch) {
  const Dtype dtype = p.student.rows.dtype;
  const bool same = p.gradient.data == nullptr || p.gradient.dtype == dtype;
  if constexpr (sizeof(Real) == 4) {
    if (same && dtype == Dtype::f32) return launch_sparse_of<Real, float>(p, launch);
    if (same && dtype == Dtype::bf16) return launch_sparse_of<Real, Bf16>(p, launch);
    if (same && dtype == Dtype::fp16) return launch_sparse_of<Real, Fp16>(p, launch);
  }
  launch_sparse_of<Real, Mixed>(p, launch);
}

// out = sum of weight * value, by one block in an order that does not change.
template <class Real>
__global__ void total_kernel(const Real* weight, const Real* value, int64_t rows, Real* out) {
  double sum[1] = {0};
  for (int64_t r = threadIdx.x; r < rows; r += blockDim.x)
    sum[0] += double(weight[r]) * double(value[r]);
  Team<256>::reduce(sum, Add());
  if (threadIdx.x == 0) *out = Real(sum[0]);
}

struct Cuda {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return new_output(like, shape, dtype);
  }

  static Tensor gradient(const Tensor& student) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < student.dim(); ++i) shape.push_back(student.size(i));
    return new_output(student, shape, student.scalar_type());
  }

  template <class Real>
  static void launch(const Problem<Real>& p, const Tensor& student) {
    if (p.rows == 0) return;
    Launcher launch(student);
    if (p.sparse.ids != nullptr) return launch_sparse(p, launch);
    switch (p.kind) {
      case kCrossEntropy:
        return choose_type<LabelsOnly>(p, launch);
      case kULD:
        if (p.vocab <= kLarge && p.teacher_vocab <= kLarge)
          return launch_sorted<Real, 256, 512>(p, student, launch);
        // Twice as many threads would leave a double too few registers.
        return launch_sorted<Real, sizeof(Real) == 4 ? 512 : 256, kRankBins>(p, student, launch);
#define SH_CASE(number, Kind) \
  case number:                \
    return choose_type<Kind>(p, launch);
        SH_DIVERGENCE_KINDS(SH_CASE)
#undef SH_CASE
    }
  }

  template <class Real>
  static void states(const Problem<Real>& p, double* out, const Tensor& student) {
    if (p.rows == 0) return;
    Launcher launch(student);
    launch("states", state_kernel<Real, 256>, Grid{p.rows, 256}, p, out);
  }

  template <class Real>
  static void total(const Problem<Real>& p, Real* out, const Tensor& student) {
    Launcher launch(student);
    launch("total", total_kernel<Real>, Grid{1, 256}, p.weight, p.value, p.rows, out);
  }
};

// gradient *= upstream; returns at once when upstream is 1.
template <class Up>
__global__ void scale_kernel(const Rows gradient, int64_t width, const Up* upstream) {
  const Up factor = *upstream;
  if (factor == Up(1)) return;
  with_type(gradient.dtype, row_of(gradient, blockIdx.x), [&](auto* row) {
    for (int64_t j = threadIdx.x; j < width; j += blockDim.x)
      narrow(Up(widen(row[j])) * factor, row[j]);
  });
}

template <class Up>
void launch_scale(const Tensor& gradient, const Tensor& upstream) {
  if (gradient.numel() == 0) return;
  Launcher launch(gradient);
  launch("scale", scale_kernel<Up>, Grid{count_rows(gradient), 256}, rows_of(gradient),
         gradient.size(gradient.dim() - 1), static_cast<const Up*>(upstream.const_data_ptr()));
}

void scale_(Tensor gradient, const Tensor& upstream) {
  if (upstream.scalar_type() == ScalarType::Double) return launch_scale<double>(gradient, upstream);
  launch_scale<float>(gradient, upstream);
}

}  // namespace
}  // namespace stillhouse

STILLHOUSE_CUDA_LIBRARY(m) {
  stillhouse::DivergenceOps<stillhouse::Cuda>::register_ops(m);
  m.impl("scale_", TORCH_BOX(&stillhouse::scale_));
}
