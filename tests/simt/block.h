// The state of a block that an OS thread is running.
#pragma once
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#include <sys/mman.h>

#include "fiber.h"
#include "simt.h"

namespace simt {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

enum class State { ready, at_barrier, at_warp_op, done };

struct Thread {
  Context context;
  State state = State::ready;
  int linear = 0;
  uint3 index{};
  uint32_t warp_epoch = 0;
  // What it waits at.
  Site site = nullptr;
  BarrierOp barrier_op = BarrierOp::plain;
  bool predicate = false;
  WarpOp op = WarpOp::sync;
  uint32_t mask = 0;
  uint64_t value = 0, result = 0;
  int argument = 0, width = kWarp;
  void* operand = nullptr;
  std::vector<std::vector<std::function<void()>>> copies;  // groups; the last is open
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

// The block that an OS thread is running.
struct Block {
  const Launch* launch = nullptr;
  const std::function<void()>* body = nullptr;
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<int> order;
  Context scheduler;
  Thread* current = nullptr;
  uint32_t epoch = 0;
  int barrier_result = 0;
  std::exception_ptr error;
  std::map<std::tuple<Site, const void*, size_t>, std::unique_ptr<SharedArray>> shared;
  std::unique_ptr<SharedArray> dynamic;
  size_t static_bytes = 0;
  char* stacks = nullptr;
  size_t stack_count = 0;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;

  ~Block() { free_stacks(); }
  void free_stacks() {
    if (stacks == nullptr) return;
    unpoison_stacks();
    munmap(stacks, stack_count * kStack);
  }
  // Frames that never returned are still marked as somebody's variables.
  void unpoison_stacks() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks, stack_count * kStack);
#endif
  }

  void run(const Launch& l, uint3 block, const std::function<void()>& f, std::mt19937_64& random);
  void resume(Thread& thread);
  void yield();
  bool release_barrier();
  [[noreturn]] void deadlock();
  std::string describe(const Thread& t) const;
};
// Behind a plain pointer: a thread_local with a constructor is asked for through a call every time.
extern __attribute__((tls_model("initial-exec"))) thread_local Block* running;

inline Thread& me() { return *running->current; }
// "file:line" without folders.
std::string place(Site site);

}  // namespace simt
