#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

namespace stillhouse {

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return kAvx2;
#endif
  return kBaseline;
}

namespace {
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa initial_isa() {
  const char* wanted = std::getenv("STILLHOUSE_CPU");
  if (wanted == nullptr || *wanted == 0) return best_isa();
  for (int level = kBaseline; level <= best_isa(); ++level)
    if (std::strcmp(wanted, kNames[level]) == 0) return Isa(level);
  std::fprintf(stderr, "stillhouse: STILLHOUSE_CPU=%s is not a level of this machine (best: %s)\n",
               wanted, kNames[best_isa()]);
  std::abort();
}

std::atomic<int>& current() {
  static std::atomic<int> level{initial_isa()};
  return level;
}
}  // namespace

Isa isa() { return Isa(current().load(std::memory_order_relaxed)); }

bool set_isa(int level) {
  if (level < kBaseline || level > best_isa()) return false;
  current() = level;
  return true;
}

// level -1 asks; any other switches, for tests that cover every level in one process.
int64_t cpu_level(int64_t level) {
  if (level >= 0)
    STD_TORCH_CHECK(set_isa(int(level)), "this machine has no instruction-set level ", level);
  return isa();
}

}  // namespace stillhouse

STABLE_TORCH_LIBRARY_IMPL(stillhouse, CompositeExplicitAutograd, m) {
  m.impl("_cpu_level", TORCH_BOX(&stillhouse::cpu_level));
}
