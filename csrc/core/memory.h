// Memory of the CPU's kernels: large outputs, and scratch.
#pragma once
#include <sys/mman.h>

#include <memory>

#include "tensors.h"

namespace stillhouse {

constexpr uintptr_t kHugePage = 1 << 21;

// Page faults of a fresh gradient cost as much as the kernel; huge pages make them 512 times fewer.
inline void advise_huge_pages(const Tensor& x, int64_t bytes) {
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(x.data_ptr()) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// One buffer a thread, kept: pages that were faulted in once stay in L2.
inline void* thread_scratch(int64_t bytes) {
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

// The next address that a vector may be stored to.
inline char* align_up(void* memory) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t(63));
}

}  // namespace stillhouse
