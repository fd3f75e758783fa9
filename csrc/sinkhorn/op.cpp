// Entropic transport on the CPU: threads, scratch, and the ops' registration.
#include "../core/isa.h"
#include "../core/memory.h"
#include "problem.h"

namespace stillhouse {
namespace baseline {
extern const SinkhornKernels sinkhorn_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const SinkhornKernels sinkhorn_kernels;
}
namespace avx512 {
extern const SinkhornKernels sinkhorn_kernels;
}
#endif

namespace {

const SinkhornKernels& kernels() {
#if defined(__x86_64__)
  static const SinkhornKernels* const tables[3] = {
      &baseline::sinkhorn_kernels, &avx2::sinkhorn_kernels, &avx512::sinkhorn_kernels};
#else
  static const SinkhornKernels* const tables[3] = {&baseline::sinkhorn_kernels, nullptr, nullptr};
#endif
  return by_isa(tables);
}
const SinkhornSteps<float>& steps(const Batch<float>&) { return kernels().f32; }
const SinkhornSteps<double>& steps(const Batch<double>&) { return kernels().f64; }

void check_lengths(const int64_t* lengths, int64_t groups, int64_t n, int64_t m) {
  for (int64_t g = 0; g < groups && lengths != nullptr; ++g)
    STD_TORCH_CHECK(1 <= lengths[2 * g] && lengths[2 * g] <= n && 1 <= lengths[2 * g + 1] &&
                        lengths[2 * g + 1] <= m,
                    "lengths of problem ", g, " are outside [1, ", n, "] and [1, ", m, "]");
}

// Many problems: each thread takes whole ones. Few and large: threads share the sweeps of one.
template <class Real>
void work(const Batch<Real>& batch, bool gradient, const Tensor& like) {
  check_lengths(batch.lengths, batch.groups, batch.n, batch.m);
  const SinkhornSteps<Real>& step = steps(batch);
  Task<Real> task{};
  const int64_t bytes = task.lay_out(batch, gradient, nullptr), of_row = row_scratch_bytes(batch);
  const int64_t at_once = batch.blocks() < 8 ? batch.blocks() : 8;
  if (batch.groups >= 2 * at_once || at_once == 1) {
    const int64_t work = batch.n * batch.m * batch.iterations;
    torch::stable::parallel_for(0, batch.groups, 1 + 65536 / work, [&](int64_t lo, int64_t hi) {
      char* const scratch = static_cast<char*>(thread_scratch(2 * bytes + of_row + 64));
      char* const aligned =
          reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
      void* const rows = aligned + 2 * bytes;
      Task<Real> own[2] = {};
      for (int i = 0; i < 2; ++i) own[i].lay_out(batch, gradient, aligned + i * bytes);
      for (int64_t group = lo; group < hi; group += 2) {
        const int64_t count = hi - group > 1 ? 2 : 1;
        step.begin({&own[0], &own[1]}, count, group, gradient, rows);
        for (int64_t i = 0; i < count; ++i)
          for (; own[i].step != Step::done; step.next(own[i], gradient))
            step.rows(own[i], 0, own[i].blocks, rows);
      }
    });
    return;
  }
  const Tensor memory = torch::stable::new_empty(like, {bytes + 64}, ScalarType::Byte);
  task.lay_out(batch, gradient,
               reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data_ptr()) + 63) &
                                       ~uintptr_t(63)));
  for (int64_t group = 0; group < batch.groups; ++group) {
    step.begin({&task, &task}, 1, group, gradient, thread_scratch(of_row));
    for (; task.step != Step::done; step.next(task, gradient)) {
      torch::stable::parallel_for(0, task.blocks, 1, [&](int64_t lo, int64_t hi) {
        step.rows(task, lo, hi, thread_scratch(of_row));
      });
    }
  }
}

void l1(const Pairs<float>& p, int64_t lo, int64_t hi) { kernels().l1_f32(p, lo, hi); }
void l1(const Pairs<double>& p, int64_t lo, int64_t hi) { kernels().l1_f64(p, lo, hi); }
void l1_gradient(const Pairs<float>& p, bool of_x, int64_t lo, int64_t hi) {
  kernels().l1_gradient_f32(p, of_x, lo, hi);
}
void l1_gradient(const Pairs<double>& p, bool of_x, int64_t lo, int64_t hi) {
  kernels().l1_gradient_f64(p, of_x, lo, hi);
}

struct Cpu {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    Tensor out = torch::stable::new_empty(like, shape, dtype);
    advise_huge_pages(out, out.numel() * int64_t(out.element_size()));
    return out;
  }

  template <class Real>
  static void solve(const Batch<Real>& batch, const Tensor& like) {
    work(batch, false, like);
  }
  template <class Real>
  static void differentiate(const Batch<Real>& batch, const Tensor& like) {
    for (int64_t g = 0; g < batch.groups; ++g)
      STD_TORCH_CHECK(1 <= batch.used[g] && batch.used[g] <= batch.iterations, "problem ", g,
                      " used another number of iterations than there are");
    work(batch, true, like);
  }

  template <class Real>
  static void distances(const Pairs<Real>& p, const Tensor&) {
    torch::stable::parallel_for(0, p.groups * p.n, 1 + 65536 / (p.m * p.d + 1),
                                [&](int64_t lo, int64_t hi) { l1(p, lo, hi); });
  }
  template <class Real>
  static void distance_gradient(const Pairs<Real>& p, const Tensor&) {
    for (const bool of_x : {true, false}) {
      if ((of_x ? p.d_x : p.d_y).data == nullptr) continue;
      const int64_t rows = p.groups * (of_x ? p.n : p.m), work_of_row = (of_x ? p.m : p.n) * p.d;
      torch::stable::parallel_for(0, rows, 1 + 65536 / (work_of_row + 1),
                                  [&](int64_t lo, int64_t hi) { l1_gradient(p, of_x, lo, hi); });
    }
  }
};

}  // namespace
}  // namespace stillhouse

STABLE_TORCH_LIBRARY_IMPL(stillhouse, CPU, m) {
  stillhouse::SinkhornOps<stillhouse::Cpu>::register_ops(m);
}
