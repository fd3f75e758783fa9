// CUDA's vocabulary on a CPU: one fiber per thread, stricter than a GPU (README.md beside this file).
// csrc/core/launch.h includes this instead of cuda_runtime.h when STILLHOUSE_SIMT is defined.
#pragma once
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a kernel calls the executor: "file:line", one literal a call site.
using Site = const char*;

// A GPU's limits, those of the oldest architecture the project builds for (sm_80) unless named.
constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStaticShared = 48
                                 << 10;  // also what a launch may ask for without saying so before
constexpr size_t kDynamicShared = 99 << 10;  // opt-in of sm_86, sm_89 and sm_120, the smallest
constexpr size_t kArguments = 4 << 10;

enum class WarpOp {
  sync,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  match_any,
  collective
};

struct Thread;

// What a thread does to a shared element, and when: accesses of two threads are ordered only by a
// barrier of the block or, within a warp, by __syncwarp.
struct Access {
  int thread = -1;
  uint32_t block_epoch = 0, warp_epoch = 0;
};

// An array in shared memory. Every access is checked for bounds, for a value that nobody wrote, and
// for a race with another thread.
class SharedArray {
 public:
  SharedArray(Site site, size_t bytes, size_t element, std::string name);
  void read(size_t index, void* out);
  void write(size_t index, const void* value);
  // As one step that does not race with other atomic steps.
  void update(size_t index, const std::function<void(void*)>& step);
  size_t size() const { return elements_.size(); }
  const std::string& name() const { return name_; }

 private:
  struct Element {
    bool written = false;
    Access writer, atomic;
    // The last reader, the last other one of its warp, the last of another warp: whoever writes next
    // races with one of these if it races with any reader.
    Access reader, reader_of_warp, reader_of_other_warp;
  };
  Element& at(size_t index, const char* what);
  void check(const Element& element, size_t index, const Access& me, bool writes,
             bool atomic) const;
  Site site_;
  std::string name_;
  size_t bytes_;
  std::vector<unsigned char> data_;
  std::vector<Element> elements_;
};

// A pointer into shared memory.
template <class T>
class Shared {
 public:
  struct Ref {
    SharedArray* array;
    size_t index;
    Ref(const Ref&) = default;
    operator T() const {
      T value;
      array->read(index, &value);
      return value;
    }
    const Ref& operator=(T value) const {
      array->write(index, &value);
      return *this;
    }
    const Ref& operator=(const Ref& other) const { return *this = T(other); }
    const Ref& operator+=(T value) const { return *this = T(*this) + value; }
  };
  Shared() = default;
  Shared(SharedArray* array, size_t first) : array_(array), first_(first) {}
  Ref operator[](int64_t i) const { return {array_, size_t(int64_t(first_) + i)}; }
  Shared operator+(int64_t i) const { return {array_, size_t(int64_t(first_) + i)}; }
  SharedArray* array() const { return array_; }
  size_t first() const { return first_; }

 private:
  SharedArray* array_ = nullptr;
  size_t first_ = 0;
};

// type: an address that stands for the elements' type. A call site in a template is an array for each.
SharedArray* static_shared(Site site, const char* name, const void* type, size_t bytes,
                           size_t element);
template <class T>
inline char type_tag;
SharedArray* dynamic_shared(Site site, size_t element);

template <class T>
Shared<T> shared_array(Site site, const char* name, size_t n) {
  return {static_shared(site, name, &type_tag<T>, n * sizeof(T), sizeof(T)), 0};
}
template <class T>
Shared<T> shared_dynamic(Site site) {
  return {dynamic_shared(site, sizeof(T)), 0};
}

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();

enum class BarrierOp { plain, count, all, any };
int barrier(Site site, BarrierOp op = BarrierOp::plain, bool predicate = false);
uint64_t warp_op(Site site, WarpOp op, uint32_t mask, uint64_t value, int argument, int width);
[[noreturn]] void fail(Site site, const std::string& what);

template <class T>
T shuffle(Site site, WarpOp op, uint32_t mask, T value, int argument, int width = kWarp) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value,
                "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_op(site, op, mask, bits, argument, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline uint32_t ballot(Site site, uint32_t mask, bool predicate) {
  return uint32_t(warp_op(site, WarpOp::ballot, mask, predicate, 0, kWarp));
}

// All lanes of a warp bring an operand each; the last one to come does the work of all.
using Collective = void (*)(void* const (&lanes)[kWarp]);
void collective(Site site, void* operand, Collective work);

// Copies that happen only when they are waited for: what reads too early finds nothing written.
void copy_async(std::function<void()> copy);
void copy_async_commit();
void copy_async_wait(int pending);
template <class T>
void copy_async(Site site, Shared<T> to, const T* from, int count) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || to.first() * sizeof(T) % 16 != 0)
    fail(site, "misaligned asynchronous copy of 16 bytes");
  copy_async([=] {
    for (int i = 0; i < count; ++i) to.array()->write(to.first() + i, from + i);
  });
}

// A vector access must be aligned to its size.
template <class T>
const T& aligned(Site site, const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0)
    fail(site, "misaligned access of " + std::to_string(sizeof(T)) + " bytes");
  return *p;
}

template <class T, class F>
T atomic_update(T* address, F next) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  auto* bits = reinterpret_cast<Bits*>(address);
  Bits before = __atomic_load_n(bits, __ATOMIC_RELAXED);
  for (;;) {
    T old;
    std::memcpy(&old, &before, sizeof(T));
    const T updated = next(old);
    Bits after;
    std::memcpy(&after, &updated, sizeof(T));
    if (__atomic_compare_exchange_n(bits, &before, after, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED))
      return old;
  }
}
template <class T, class F>
T atomic_update(typename Shared<T>::Ref at, F next) {
  T old{};
  at.array->update(at.index, [&](void* p) {
    std::memcpy(&old, p, sizeof(T));
    const T updated = next(old);
    std::memcpy(p, &updated, sizeof(T));
  });
  return old;
}

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared = 0, allowed_shared = kStaticShared;
};
// Runs body once per thread of the grid. Throws Error with the first thing that went wrong.
void run(const Launch& launch, const char* kernel, const std::function<void()>& body);

// The order of threads, of blocks, and the bytes of fresh memory depend on it. SIMT_SEED sets it first.
void set_seed(uint64_t seed);
// Fills memory that a kernel must write before anybody reads it: NaN for every float type.
void poison(void* data, size_t bytes);

}  // namespace simt

#define SIMT_TEXT_(x) #x
#define SIMT_TEXT(x) SIMT_TEXT_(x)
#define SIMT_SITE (__FILE__ ":" SIMT_TEXT(__LINE__))

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __constant__ static const
#define __launch_bounds__(...)

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

#define __syncthreads() ((void)::simt::barrier(SIMT_SITE))
#define __syncthreads_count(p) ::simt::barrier(SIMT_SITE, ::simt::BarrierOp::count, bool(p))
#define __syncthreads_and(p) ::simt::barrier(SIMT_SITE, ::simt::BarrierOp::all, bool(p))
#define __syncthreads_or(p) ::simt::barrier(SIMT_SITE, ::simt::BarrierOp::any, bool(p))
#define SIMT_WARP_SYNC(mask) \
  ((void)::simt::warp_op(SIMT_SITE, ::simt::WarpOp::sync, mask, 0, 0, ::simt::kWarp))
#define __syncwarp(mask) SIMT_WARP_SYNC(mask)
#define __shfl_sync(...) SIMT_SHUFFLE(shuffle, __VA_ARGS__)
#define __shfl_up_sync(...) SIMT_SHUFFLE(shuffle_up, __VA_ARGS__)
#define __shfl_down_sync(...) SIMT_SHUFFLE(shuffle_down, __VA_ARGS__)
#define __shfl_xor_sync(...) SIMT_SHUFFLE(shuffle_xor, __VA_ARGS__)
#define SIMT_SHUFFLE(op, mask, ...) \
  ::simt::shuffle(SIMT_SITE, ::simt::WarpOp::op, mask, __VA_ARGS__)
#define __ballot_sync(mask, p) ::simt::ballot(SIMT_SITE, mask, bool(p))
#define __any_sync(mask, p) (::simt::ballot(SIMT_SITE, mask, bool(p)) != 0)
#define __all_sync(mask, p) (::simt::ballot(SIMT_SITE, mask, !(p)) == 0)
#define __match_any_sync(mask, value)                                                      \
  uint32_t(::simt::warp_op(SIMT_SITE, ::simt::WarpOp::match_any, mask, uint64_t(value), 0, \
                           ::simt::kWarp))

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class P, class T>
inline T atomicAdd(P at, T value) {
  return ::simt::atomic_update<T>(at, [&](T old) { return T(old + value); });
}
template <class P, class T>
inline T atomicMax(P at, T value) {
  return ::simt::atomic_update<T>(at, [&](T old) { return old < value ? value : old; });
}
template <class P, class T>
inline T atomicMin(P at, T value) {
  return ::simt::atomic_update<T>(at, [&](T old) { return value < old ? value : old; });
}
template <class P, class T>
inline T atomicExch(P at, T value) {
  return ::simt::atomic_update<T>(at, [&](T) { return value; });
}
template <class P, class T>
inline T atomicCAS(P at, T expected, T value) {
  return ::simt::atomic_update<T>(at, [&](T old) { return old == expected ? value : old; });
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(uint32_t(x)); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
