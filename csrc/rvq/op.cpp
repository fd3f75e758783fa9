// Residual quantization on the CPU: threads, scratch, and the ops' registration.
#include "../core/isa.h"
#include "../core/memory.h"
#include "problem.h"

namespace stillhouse {
namespace baseline {
extern const RvqKernels rvq_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const RvqKernels rvq_kernels;
}
namespace avx512 {
extern const RvqKernels rvq_kernels;
}
#endif

namespace {

const RvqKernels& kernels() {
#if defined(__x86_64__)
  static const RvqKernels* const tables[3] = {&baseline::rvq_kernels, &avx2::rvq_kernels,
                                              &avx512::rvq_kernels};
#else
  static const RvqKernels* const tables[3] = {&baseline::rvq_kernels, nullptr, nullptr};
#endif
  return by_isa(tables);
}
const RvqSteps<float>& steps(const float*) { return kernels().f32; }
const RvqSteps<double>& steps(const double*) { return kernels().f64; }

template <class F>
void parallel(int64_t count, int64_t grain, F f) {
  torch::stable::parallel_for(0, count, grain, f);
}

// Rows that a thread takes through all stages at once: the more, the less often a table is read; as many as
// a second-level cache holds, and enough tiles for a dozen threads.
constexpr int64_t kTileBytes = 1 << 20, kMostRows = 480, kFewestRows = 48, kTiles = 12;

int64_t rows_of_tile(int64_t n, int64_t width, int64_t item) {
  int64_t rows = kTileBytes / (width * item);
  rows = rows < kMostRows ? rows : kMostRows;
  const int64_t even = (n + kTiles - 1) / kTiles;
  rows = even < rows ? even : rows;
  rows = rows > kFewestRows ? rows : kFewestRows;
  return (rows + 5) / 6 * 6;
}

template <class Real>
struct TileMemory {
  int64_t residual, scores, waiting;

  TileMemory(int64_t rows, int64_t parts, const Quantizer<Real>& q, int64_t lanes)
      : residual(aligned(rows * q.width * int64_t(sizeof(Real)))),
        scores(aligned(parts * rows * lanes * int64_t(sizeof(Real)))),
        waiting(parts * rows * kCodes * int64_t(sizeof(Real))) {}

  static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }
  int64_t bytes() const { return residual + 3 * scores + waiting + 64; }

  Tile<Real> at(void* memory, int64_t group, int64_t first, int64_t rows, int64_t parts,
                bool second) const {
    char* const base = align_up(memory);
    char* const numbers = base + residual;
    return {group,
            first,
            rows,
            parts,
            reinterpret_cast<Real*>(base),
            reinterpret_cast<Real*>(numbers),
            second ? reinterpret_cast<Real*>(numbers + scores) : nullptr,
            reinterpret_cast<Place<Real>*>(numbers + 2 * scores),
            reinterpret_cast<Real*>(numbers + 3 * scores)};
  }
};

template <class Real>
bool any_deep(const Quantizer<Real>& q, const Tile<Real>& tile, int64_t stage) {
  for (int64_t r = 0; r < tile.rows; ++r)
    if (stage < q.depth_of(tile.group, tile.first + r)) return true;
  return false;
}

// Few rows: threads share the codes of each stage.
template <class Real>
void encode_few(const Quantizer<Real>& q, int64_t group, const Tensor& like) {
  const RvqSteps<Real>& step = steps(q.table);
  const int64_t blocks = code_blocks(q.codes), parts = blocks < 8 ? blocks : 8;
  const TileMemory<Real> layout(q.n, parts, q, step.lanes);
  const Tensor memory = torch::stable::new_empty(like, {layout.bytes()}, ScalarType::Byte);
  const Tile<Real> tile = layout.at(memory.data_ptr(), group, 0, q.n, parts, q.margin != nullptr);
  const int64_t of_part = q.n * ((blocks + parts - 1) / parts) * kCodes * q.width;
  step.begin(q, tile, 0, q.n);
  for (int64_t stage = 0; stage < q.stages; ++stage) {
    if (q.coupling != nullptr) step.couple(q, tile, stage, 0, q.n);
    if (any_deep(q, tile, stage))
      parallel(parts, 1 + (int64_t(1) << 15) / (of_part + 1), [&](int64_t lo, int64_t hi) {
        for (int64_t part = lo; part < hi; ++part)
          step.search(q, tile, stage, part, part * blocks / parts, (part + 1) * blocks / parts);
      });
    step.settle(q, tile, stage, 0, q.n);
  }
}

template <class Real>
void encode_many(const Quantizer<Real>& q) {
  const RvqSteps<Real>& step = steps(q.table);
  const int64_t rows = rows_of_tile(q.n, q.width, sizeof(Real));
  const int64_t of_group = (q.n + rows - 1) / rows, blocks = code_blocks(q.codes);
  const TileMemory<Real> layout(rows, 1, q, step.lanes);
  parallel(q.groups * of_group, 1, [&](int64_t lo, int64_t hi) {
    void* const memory = thread_scratch(layout.bytes());
    for (int64_t t = lo; t < hi; ++t) {
      const int64_t first = t % of_group * rows, left = q.n - first;
      const Tile<Real> tile =
          layout.at(memory, t / of_group, first, left < rows ? left : rows, 1, q.margin != nullptr);
      step.begin(q, tile, 0, tile.rows);
      for (int64_t stage = 0; stage < q.stages; ++stage) {
        if (q.coupling != nullptr) step.couple(q, tile, stage, 0, tile.rows);
        if (any_deep(q, tile, stage)) step.search(q, tile, stage, 0, 0, blocks);
        step.settle(q, tile, stage, 0, tile.rows);
      }
    }
  });
}

// Features of all rows that go through all stages together: as many as a second-level cache holds, and some
// slices for threads; whole lines of the cache.
int64_t slice_width(int64_t n, int64_t width, int64_t item) {
  const int64_t held = kTileBytes / (n * item), shared = width / 4;
  const int64_t wide = held < shared ? held : shared;
  return wide < 16 ? 16 : wide / 16 * 16;
}

// Rows by their code of a stage, in order, those without one left out.
void sort_by_code(const int64_t* found, int64_t n, int64_t stages, int64_t codes, int64_t* starts,
                  int64_t* order) {
  for (int64_t k = 0; k <= codes; ++k) starts[k] = 0;
  for (int64_t row = 0; row < n; ++row) {
    const int64_t k = found[row * stages];
    if (k >= 0) ++starts[k + 1];
  }
  for (int64_t k = 0; k < codes; ++k) starts[k + 1] += starts[k];
  for (int64_t row = 0; row < n; ++row) {
    const int64_t k = found[row * stages];
    if (k >= 0) order[starts[k]++] = row;
  }
  // Each start has moved to its end, the next one's start.
  for (int64_t k = codes; k > 0; --k) starts[k] = starts[k - 1];
  starts[0] = 0;
}

void check_found(const int64_t* found, int64_t count, int64_t codes) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(-1 <= found[i] && found[i] < codes, "code ", found[i], " of a table of ",
                    codes);
}

struct Cpu {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    Tensor out = torch::stable::new_empty(like, shape, dtype);
    advise_huge_pages(out, out.numel() * int64_t(out.element_size()));
    return out;
  }
  static Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_zeros(like, shape, dtype);
  }

  template <class Real>
  static void pack(const Packing<Real>& p, const Tensor&) {
    const int64_t grain = 1 + (int64_t(1) << 15) / block_numbers(p.width);
    parallel(p.tables * code_blocks(p.codes), grain,
             [&](int64_t lo, int64_t hi) { steps(p.table).pack(p, lo, hi); });
  }

  template <class Real>
  static void encode(const Quantizer<Real>& q, const Tensor& like) {
    if (q.n >= kTiles * kFewestRows) return encode_many(q);
    for (int64_t group = 0; group < q.groups; ++group) encode_few(q, group, like);
  }

  template <class Real>
  static void candidates(const Candidates<Real>& c, const Tensor&) {
    const int64_t of_group = (c.n + kCandidateRows - 1) / kCandidateRows;
    parallel(c.groups * of_group, 1, [&](int64_t lo, int64_t hi) {
      void* const memory = align_up(thread_scratch(candidate_bytes<Real>(c.width, c.k)));
      for (int64_t t = lo; t < hi; ++t) {
        const int64_t first = t % of_group * kCandidateRows, left = c.n - first;
        steps(c.table).candidates(c, t / of_group, first,
                                  left < kCandidateRows ? left : kCandidateRows, memory);
      }
    });
  }

  template <class Real>
  static void decode(const Quantizer<Real>& q, const Tensor&) {
    check_found(q.found, q.groups * q.n * q.stages, q.codes);
    const int64_t grain = 1 + (int64_t(1) << 15) / (q.stages * q.width + 1);
    parallel(q.groups * q.n, grain,
             [&](int64_t lo, int64_t hi) { steps(q.table).decode(q, lo, hi); });
  }

  template <class Real>
  static void follow(Residuals<Real> r, const Tensor& like) {
    check_found(r.found, r.groups * r.n * r.stages, r.codes);
    const auto run = [&](const Slice& slice) {
      const int64_t bytes = slice.rows * slice.count * int64_t(sizeof(Real));
      steps(r.table).follow(r, slice,
                            reinterpret_cast<Real*>(align_up(thread_scratch(bytes + 64))));
    };
    if (r.of_codes == nullptr) {
      const int64_t rows = 16, of_group = (r.n + rows - 1) / rows;
      const int64_t grain = 1 + (int64_t(1) << 15) / (rows * r.width * r.stages + 1);
      return parallel(r.groups * of_group, grain, [&](int64_t lo, int64_t hi) {
        for (int64_t t = lo; t < hi; ++t) {
          const int64_t first = t % of_group * rows, left = r.n - first;
          run({t / of_group, first, left < rows ? left : rows, 0, r.width});
        }
      });
    }
    const int64_t of_group = r.stages * (r.n + r.codes + 1);
    const Tensor memory = torch::stable::new_empty(like, {r.groups * of_group}, ScalarType::Long);
    int64_t* const order = static_cast<int64_t*>(memory.data_ptr());
    int64_t* const starts = order + r.groups * r.stages * r.n;
    r.order = order, r.starts = starts;
    parallel(r.groups * r.stages, 1 + (int64_t(1) << 13) / r.n, [&](int64_t lo, int64_t hi) {
      for (int64_t i = lo; i < hi; ++i)
        sort_by_code(r.found + i / r.stages * r.n * r.stages + i % r.stages, r.n, r.stages, r.codes,
                     starts + i * (r.codes + 1), order + i * r.n);
    });
    const int64_t wide = slice_width(r.n, r.width, sizeof(Real));
    const int64_t slices = (r.width + wide - 1) / wide;
    const int64_t grain = 1 + (int64_t(1) << 15) / (r.n * wide * r.stages + 1);
    parallel(r.groups * slices, grain, [&](int64_t lo, int64_t hi) {
      for (int64_t t = lo; t < hi; ++t) {
        const int64_t first = t % slices * wide, left = r.width - first;
        run({t / slices, 0, r.n, first, left < wide ? left : wide});
      }
    });
  }
};

}  // namespace
}  // namespace stillhouse

STABLE_TORCH_LIBRARY_IMPL(stillhouse, CPU, m) {
  stillhouse::RvqOps<stillhouse::Cpu>::register_ops(m);
}
