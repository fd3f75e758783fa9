// The divergence kernels of CUDA: which is launched for which rows, and the ops' registration.
#include "../core/cuda.h"
#include "kernel.cuh"
#include "problem.h"
#include "sorted.cuh"
#include "sparse.cuh"
#include "state.cuh"

namespace stillhouse {
namespace {

// Columns of a row that stay in the registers of a team; fewer by what rows that do not start on 16 bytes
// may need at their ends.
template <class In, int kThreads>
int64_t most_in_registers(const Problem<float>& p) {
  const auto aligned = [](const Rows& rows) {
    uintptr_t bits = reinterpret_cast<uintptr_t>(rows.data);
    for (int i = 0; i < rows.leading; ++i) bits |= uintptr_t(rows.stride[i]);
    return bits % 16 == 0;
  };
  return kThreads * kHeld - (aligned(p.student.rows) ? 0 : kChunk<In>);
}

template <class Kind, class Real, class In, int kThreads, Hold kHold, bool kPlain>
void launch_rows(const Problem<Real>& p, Launcher& launch) {
  constexpr int kBlock = kBlockThreads<kThreads>;
  constexpr int64_t kTeams = kBlock / kThreads;
  Grid grid{(p.rows + kTeams - 1) / kTeams, kBlock};
  if (kHold == Hold::shared) grid.shared = size_t(kTeams) * pair_bytes<In>(int(p.vocab));
  // A team that takes several rows asks for the next one while it works on the last.
  const int64_t at_once =
      launch.resident_blocks(grid, kBlocks<Kind, Real, kThreads, kHold, kPlain>);
  if (grid.blocks > at_once) grid.blocks = at_once;
  launch("divergence", divergence_kernel<Kind, Real, In, kThreads, kHold, kPlain>, grid, p);
}

// Bytes of a row pair up to which a warp takes it, and up to which two teams of 256 share a multiprocessor. A
// team of 512 has it alone, or one of 256 where that needs more registers.
constexpr size_t kOfWarp = 16 << 10, kOfTwo = 108 << 10;
// Columns above which a sorted row gets a block of 512 threads.
constexpr int64_t kLarge = 8192;

// Plain rows, and those with statistics, labels, a soft-cap or a mixture.
template <class Kind, class Real, class In, bool kPlain>
void choose_hold(const Problem<Real>& p, Launcher& launch) {
  const int64_t resident = p.resident_limit < 0 ? p.vocab : p.resident_limit;
  if (p.vocab <= resident) {
    if constexpr (Kind::kRow == RowNumbers::none) {
      if (p.vocab <= most_in_registers<In, 32>(p))
        return launch_rows<Kind, Real, In, 32, Hold::registers, kPlain>(p, launch);
    }
    const size_t shared = pair_bytes<In>(int(p.vocab));
    if (shared <= kOfWarp) return launch_rows<Kind, Real, In, 32, Hold::shared, kPlain>(p, launch);
    const bool fits = shared <= launch.most_shared();
    if constexpr (kPlain) {
      if (fits && shared > kOfTwo)
        return launch_rows<Kind, Real, In, 512, Hold::shared, kPlain>(p, launch);
    }
    if (fits) return launch_rows<Kind, Real, In, 256, Hold::shared, kPlain>(p, launch);
  }
  // Rows that are being worked on should stay in L2 until their last pass: one large team a
  // multiprocessor instead of three.
  launch_rows<Kind, Real, In, kPlain ? 512 : 256, Hold::nothing, kPlain>(p, launch);
}

template <class Kind, class Real, class In>
void choose_plain(const Problem<Real>& p, Launcher& launch) {
  // A head is found by a whole block, with arrays of its own in shared memory.
  if constexpr (Kind::kRow == RowNumbers::head) {
    return launch_rows<Kind, Real, In, 256, Hold::nothing, false>(p, launch);
  } else {
    if constexpr (kHasTeacher<Kind> && !std::is_same<Kind, TAID>::value &&
                  Kind::kRow == RowNumbers::none)
      if (is_plain(p)) return choose_hold<Kind, Real, In, true>(p, launch);
    choose_hold<Kind, Real, In, false>(p, launch);
  }
}

// Rows whose types differ, and those of float64.
template <class Kind, class Real>
void choose_mixed(const Problem<Real>& p, Launcher& launch) {
  if constexpr (Kind::kRow != RowNumbers::head) {
    if (p.vocab <= 1024) return launch_rows<Kind, Real, Mixed, 32, Hold::nothing, false>(p, launch);
  }
  launch_rows<Kind, Real, Mixed, 256, Hold::nothing, false>(p, launch);
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
  choose_mixed<Kind, Real>(p, launch);
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
__global__ void __launch_bounds__(1024)
    total_kernel(const Real* weight, const Real* value, int64_t rows, Real* out) {
  constexpr int kAtOnce = 8;  // loads under way
  double sum[1] = {0};
  for (int64_t r = threadIdx.x; r < rows; r += kAtOnce * 1024) {
    double product[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = r + i * 1024;
      product[i] = at < rows ? double(weight[at]) * double(value[at]) : 0.0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum[0] += product[i];
  }
  Team<1024>::reduce(sum, Add());
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
    STD_TORCH_CHECK(p.width < int64_t(1) << 30, "a row of ", p.width, " columns is too long");
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
    launch("total", total_kernel<Real>, Grid{1, 1024}, p.weight, p.value, p.rows, out);
  }
};

// gradient *= upstream, a warp a row in turn; returns at once when upstream is 1.
template <class Up>
__global__ void __launch_bounds__(256)
    scale_kernel(const Rows gradient, int64_t rows, int width, const Up* upstream) {
  const Up factor = *upstream;
  if (factor == Up(1)) return;
  const auto scale = [&](auto in, char* row) {
    using In = decltype(in);
    using Side = DeviceSide<In, Up, true>;
    Side side;
    side.row = row, side.vocab = width;
    const int head = side.head(), origin = head > 0 ? head - Side::kSize : 0;
    side.aligned = true;
    for (int start = origin + Team<32>::rank() * Side::kSize; start < width;
         start += 32 * Side::kSize) {
      Up x[Side::kSize];
      side.load(start, x);
#pragma unroll
      for (int i = 0; i < Side::kSize; ++i) x[i] *= factor;
      store_chunk<In>(row, gradient.dtype, true, start, width, x);
    }
  };
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
  for (int64_t r = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; r < rows; r += warps)
    with_type(gradient.dtype, row_of(gradient, r), [&](auto* row) {
      scale(std::remove_reference_t<decltype(*row)>(), reinterpret_cast<char*>(row));
    });
}

template <class Up>
void launch_scale(const Tensor& gradient, const Tensor& upstream) {
  if (gradient.numel() == 0) return;
  Launcher launch(gradient);
  const int64_t rows = count_rows(gradient), blocks = (rows + 7) / 8;
  const int64_t at_once = 8 * launch.multiprocessors();
  launch("scale", scale_kernel<Up>, Grid{blocks < at_once ? blocks : at_once, 256},
         rows_of(gradient), rows, int(gradient.size(gradient.dim() - 1)),
         static_cast<const Up*>(upstream.const_data_ptr()));
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
