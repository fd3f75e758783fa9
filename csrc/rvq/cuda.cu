// Residual quantization on CUDA: which kernels are launched, and the ops' registration.
#include "../core/cuda.h"
#include "exact.cuh"
#include "filter.cuh"
#include "follow.cuh"
#include "problem.h"

namespace stillhouse {
namespace {

int64_t rounded_up(int64_t count, int64_t of) { return (count + of - 1) / of; }

template <class Kernel, class... Arguments>
void launch_items(Launcher& launch, const char* name, Kernel kernel, int64_t items,
                  Arguments... arguments) {
  launch(name, kernel, Grid{rounded_up(items, kFollowThreads), kFollowThreads}, arguments...);
}

// Tiles of the most rows that still keep every multiprocessor at work, or of the fewest, and fit in shared
// memory: the more rows, the less often tables are read.
template <class Real, int kOwnRows, int kRowThreads>
bool try_exact(const Quantizer<Real>& q, Launcher& launch, bool last) {
  constexpr int kRows = kOwnRows * kRowThreads;
  const int64_t tiles = q.groups * rounded_up(q.n, kRows);
  const size_t bytes = exact_bytes<Real>(q.width, kRows);
  if (bytes > launch.most_shared() || (tiles < launch.multiprocessors() && !last)) return false;
  launch("exact", exact_kernel<Real, kOwnRows, kRowThreads>,
         Grid{tiles, kCodeThreads * kRowThreads, bytes}, q);
  return true;
}

template <int kTiles, int kWarps>
bool try_filter(const Quantizer<float>& q, Launcher& launch) {
  constexpr int kRows = FilterSearch<kTiles, kWarps>::kRows;
  constexpr size_t kBeside = kRows * (12 * kSlots + 16);  // arrays of fixed size
  const int64_t tiles = q.groups * rounded_up(q.n, kRows);
  const size_t bytes = filter_bytes(q.width, kRows);
  if (bytes + kBeside > launch.most_shared() || tiles < launch.multiprocessors()) return false;
  launch("filter", filter_kernel<kTiles, kWarps>, Grid{tiles, kWarpSize * kWarps, bytes}, q);
  return true;
}

// Tensor cores pay where a code's exact score costs much, and rows fill their tiles. Margins are differences
// of exact scores.
bool filters(const Quantizer<float>& q, Launcher& launch) {
  if (q.margin != nullptr || q.width < 32 || q.codes < 256) return false;
  return try_filter<2, 4>(q, launch) || try_filter<1, 4>(q, launch) || try_filter<1, 2>(q, launch);
}
bool filters(const Quantizer<double>&, Launcher&) { return false; }

struct Cuda {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return new_output(like, shape, dtype);
  }
  static Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_zeros(like, shape, dtype);
  }

  template <class Real>
  static void pack(const Packing<Real>& p, const Tensor& like) {
    Launcher launch(like);
    launch("pack", pack_kernel<Real>, Grid{p.tables * code_blocks(p.codes), kFollowThreads}, p);
  }

  template <class Real>
  static void encode(const Quantizer<Real>& q, const Tensor& like) {
    Launcher launch(like);
    if (filters(q, launch) || try_exact<Real, 8, 16>(q, launch, false) ||
        try_exact<Real, 2, 16>(q, launch, false) || try_exact<Real, 1, 16>(q, launch, true) ||
        try_exact<Real, 1, 4>(q, launch, true))
      return;
    STD_TORCH_CHECK(false, "rows of ", q.width, " numbers do not fit into shared memory");
  }

  template <class Real>
  static void candidates(const Candidates<Real>& c, const Tensor& like) {
    Launcher launch(like);
    const size_t bytes = size_t(c.width) * sizeof(Real);
    STD_TORCH_CHECK(bytes <= launch.most_shared(), "rows of ", c.width,
                    " numbers do not fit into shared memory");
    const int64_t rows = c.groups * c.n, most = 8 * launch.multiprocessors();
    const int64_t blocks = rows < most ? rows : most;
    const Tensor values = new_output(like, {blocks, c.codes}, ScalarType::Double);
    launch("candidates", candidates_kernel<Real>, Grid{blocks, kFollowThreads, bytes}, c,
           static_cast<double*>(values.data_ptr()));
  }

  template <class Real>
  static void decode(const Quantizer<Real>& q, const Tensor& like) {
    Launcher launch(like);
    launch_items(launch, "decode", decode_kernel<Real>, q.groups * q.n * q.width, q);
  }

  template <class Real>
  static void follow(const Residuals<Real>& r, const Tensor& like) {
    Launcher launch(like);
    if (r.d_x != nullptr)
      launch_items(launch, "row gradient", row_gradient_kernel<Real>, r.groups * r.n * r.width, r);
    if (r.of_codes == nullptr) return;
    const int64_t warps =
        r.groups * r.tables * r.codes * rounded_up(r.width, int64_t(kWarpFeatures));
    launch_items(launch, "collect", collect_kernel<Real>, warps * kWarpSize, r);
  }
};

}  // namespace
}  // namespace stillhouse

STILLHOUSE_CUDA_LIBRARY(m) { stillhouse::RvqOps<stillhouse::Cuda>::register_ops(m); }
