// Dual-binary weights on the CPU: threads, scratch, what goes through torch's own products, and the ops'
// registration.
#include <array>
#include <cstring>
#include "../core/isa.h"

#include <torch/csrc/stable/ops.h>

#include "../core/memory.h"
#include "problem.h"

namespace stillhouse {
namespace baseline {
extern const FdbKernels fdb_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const FdbKernels fdb_kernels;
}
namespace avx512 {
extern const FdbKernels fdb_kernels;
}
#endif

namespace {

const FdbKernels& kernels() {
#if defined(__x86_64__)
  static const FdbKernels* const tables[3] = {&baseline::fdb_kernels, &avx2::fdb_kernels,
                                              &avx512::fdb_kernels};
#else
  static const FdbKernels* const tables[3] = {&baseline::fdb_kernels, nullptr, nullptr};
#endif
  return by_isa(tables);
}

bool has_dot() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512vnni");
  return has && isa() == kAvx512;
#else
  return false;
#endif
}

// Bytes of tables that are looked up together, of numbers that torch multiplies, and of work that is worth a
// thread (of x or W).
constexpr int64_t kTableBytes = 1 << 20, kPanelBytes = 8 << 20, kWorth = 1 << 14;

template <class F>
void parallel(int64_t count, int64_t grain, F f) {
  torch::stable::parallel_for(0, count, grain < 1 ? 1 : grain, f);
}

// Rows of x from which a panel of W as numbers and torch's product of it are faster than looking up. Torch
// multiplies 16 bits on units of their own (AMX), of which a lookup knows nothing; elsewhere a lookup with
// 16 lanes keeps up with its products at any size.
bool multiplies(const FdbProduct& p) {
  if (p.x == nullptr || p.dtype == Dtype::f64) return false;
  if (p.bias != nullptr && p.bias_dtype != p.dtype) return false;
  if (isa() < kAvx512) return p.m >= 16;
  return p.dtype != Dtype::f32 && p.m >= 48;
}

void write_panel(const FdbPanel& panel) {
  const int64_t of_block = kBlock * panel.count_groups * panel.weight.group_columns();
  parallel(ceil_div(panel.count_rows, kBlock), kWorth / (of_block + 1),
           [&](int64_t lo, int64_t hi) { kernels().dequantize(panel, lo, hi); });
}

int64_t rows_of_panel(const FdbWeight& w, int64_t item) {
  const int64_t rows = kPanelBytes / (w.columns * item + 1) / kBlock * kBlock;
  return rows < kBlock ? kBlock : rows;
}

// [rows, columns] in memory that the thread keeps: pages of fresh memory would cost as much as a panel.
Tensor panel_memory(const Tensor& like, int64_t rows, int64_t columns) {
  char* const memory = align_up(thread_scratch(rows * columns * int64_t(like.element_size()) + 64));
  return torch::stable::from_blob(memory, {rows, columns}, {columns, 1}, like.device(),
                                  like.scalar_type());
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Cpu {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_empty(like, shape, dtype);
  }

  static void product(const FdbProduct& p, const Tensor& x, const Tensor& y) {
    return multiplies(p) ? multiply(p, x, y) : look_up(p, x);
  }

  static void look_up(const FdbProduct& p, const Tensor& like) {
    const FdbWeight& w = p.weight;
    const int64_t of_row = kernels().table_bytes(p), held = kTableBytes / (of_row + 1);
    const int64_t rows = held < 4 ? 4 : held / 4 * 4, most = rows < p.m ? rows : p.m;
    const Tensor memory = torch::stable::new_empty(like, {most * of_row + 64}, ScalarType::Byte);
    char* const tables = align_up(memory.data_ptr());
    const bool dot = has_dot();
    for (int64_t first = 0; first < p.m; first += most) {
      const int64_t left = p.m - first, count = left < most ? left : most;
      parallel(count, kWorth / (w.columns + 1), [&](int64_t lo, int64_t hi) {
        kernels().tables(p, first + lo, first + hi, first, tables);
      });
      parallel(
          w.blocks(), 2 + kWorth / (w.columns * kBlock * count + 1),
          [&](int64_t lo, int64_t hi) { kernels().product(p, tables, first, count, lo, hi, dot); });
    }
  }

  static void multiply(const FdbProduct& p, const Tensor& x, Tensor y) {
    const FdbWeight& w = p.weight;
    std::optional<Tensor> bias;
    if (p.bias != nullptr) {
      bias = torch::stable::new_empty(x, {w.rows}, x.scalar_type());
      std::memcpy(bias->data_ptr(), p.bias, w.rows * x.element_size());
    }
    const int64_t most = rows_of_panel(w, int64_t(x.element_size()));
    for (int64_t first = 0; first < w.rows; first += most) {
      const int64_t left = w.rows - first, count = left < most ? left : most;
      const Tensor numbers = panel_memory(x, count, w.columns);
      write_panel({w, first, count, 0, w.groups, static_cast<char*>(numbers.data_ptr()), p.dtype});
      std::optional<Tensor> part;
      if (bias) part = torch::stable::narrow(*bias, 0, first, count);
      Tensor to = torch::stable::narrow(y, 1, first, count);
      torch::stable::copy_(to, linear(x, numbers, part));
    }
  }

  static void quantize(const FdbQuantizing& q, const Tensor&) {
    parallel(q.m, kWorth / (q.columns + 1),
             [&](int64_t lo, int64_t hi) { kernels().quantize(q, lo, hi); });
  }
  static void dequantize(const FdbPanel& panel, const Tensor&) { write_panel(panel); }

  // In panels of columns: what they come to is rounded once.
  static void gradient_x(const FdbWeight& w, const Tensor& upstream, Tensor d_x) {
    const int64_t columns = w.group_columns(), item = int64_t(d_x.element_size());
    const int64_t held = kPanelBytes / (w.rows * columns * item + 1);
    const int64_t most = held < 1 ? 1 : held < w.groups ? held : w.groups;
    for (int64_t first = 0; first < w.groups; first += most) {
      const int64_t left = w.groups - first, count = left < most ? left : most;
      const Tensor numbers = panel_memory(d_x, w.rows, count * columns);
      write_panel(
          {w, 0, w.rows, first, count, static_cast<char*>(numbers.data_ptr()), dtype_of(numbers)});
      Tensor to = torch::stable::narrow(d_x, 1, first * columns, count * columns);
      torch::stable::copy_(to, torch::stable::matmul(upstream, numbers));
    }
  }

  static void gradient_scales(const FdbWeight& w, const Tensor& upstream, const Tensor& x,
                              const Tensor& d_scales) {
    const int64_t most = rows_of_panel(w, int64_t(x.element_size()));
    // Rows that W has not, in its last block.
    std::memset(d_scales.data_ptr(), 0, d_scales.numel() * d_scales.element_size());
    for (int64_t first = 0; first < w.rows; first += most) {
      const int64_t left = w.rows - first, count = left < most ? left : most;
      Tensor back = upstream;
      const Tensor of_weight = torch::stable::matmul(
          torch::stable::transpose(torch::stable::narrow(back, 1, first, count), 0, 1), x);
      std::vector<Tensor> hold;
      const FdbScaleSums sums{
          w,
          first,
          count,
          static_cast<const char*>(contiguous_of(of_weight, hold).const_data_ptr()),
          dtype_of(of_weight),
          static_cast<char*>(d_scales.data_ptr())};
      parallel(count, kWorth / (w.columns + 1),
               [&](int64_t lo, int64_t hi) { kernels().scale_sums(sums, lo, hi); });
    }
  }
};

}  // namespace

// A contiguous copy that begins with a huge page, where it is as large as one: a weight is read once from end
// to end, and would wait at every small page.
Tensor in_huge_pages(const Tensor& x) {
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t item = int64_t(x.element_size()), spare = kHugePage / item;
  Tensor copy;
  if (x.numel() < spare) {
    copy = torch::stable::new_empty(x, shape, x.scalar_type());
  } else {
    Tensor all = torch::stable::new_empty(x, {x.numel() + spare}, x.scalar_type());
    const uintptr_t begin = reinterpret_cast<uintptr_t>(all.data_ptr());
    const int64_t ahead = int64_t(-begin & (kHugePage - 1)) / item;
    copy = torch::stable::view(torch::stable::narrow(all, 0, ahead, x.numel()), shape);
    advise_huge_pages(copy, x.numel() * item);
  }
  return torch::stable::copy_(copy, x);
}

}  // namespace stillhouse

STABLE_TORCH_LIBRARY_IMPL(stillhouse, CPU, m) {
  stillhouse::FdbOps<stillhouse::Cpu>::register_ops(m);
  m.impl("in_huge_pages", TORCH_BOX(&stillhouse::in_huge_pages));
}
