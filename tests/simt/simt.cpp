#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <thread>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

std::atomic<uint64_t> seed{[] {
  const char* text = std::getenv("SIMT_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 0ull;
}()};

// Mutations of the kernels that were compiled: SIMT_DELETE=file:line drops the barrier there,
// SIMT_NARROW=file:line takes the upper half out of the mask there. A file is its last path component.
bool is_mutated(const char* variable, Site site) {
  static const std::map<std::string, std::string> targets = [] {
    std::map<std::string, std::string> t;
    for (const char* name : {"SIMT_DELETE", "SIMT_NARROW"})
      if (const char* text = std::getenv(name)) t[name] = text;
    return t;
  }();
  const auto target = targets.find(variable);
  if (target == targets.end()) return false;
  const std::string whole(site);
  const std::string& end = target->second;
  return whole.size() > end.size() &&
         whole.compare(whole.size() - end.size(), end.size(), end) == 0 &&
         whole[whole.size() - end.size() - 1] == '/';
}

// ---- fibers ----

#if defined(__x86_64__)
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.local simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, . - simt_switch
)");

struct Context {
  void* sp = nullptr;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    auto* top =
        reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15));
    *--top = nullptr;  // entry() starts as if called: 8 below a multiple of 16
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    sp = top;
  }
  static void swap(Context& from, Context& to) { simt_switch(&from.sp, to.sp); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

enum class State { ready, at_barrier, at_warp_op, done };

}  // namespace

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

namespace {

std::string place(Site site) {
  const char* slash = std::strrchr(site, '/');
  return slash != nullptr ? slash + 1 : site;
}

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
  std::map<std::pair<Site, size_t>, std::unique_ptr<SharedArray>> shared;
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
__attribute__((tls_model("initial-exec"))) thread_local Block* running = nullptr;

Thread& me() { return *running->current; }

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &running->scheduler_stack,
                                  &running->scheduler_stack_size);
#endif
  try {
    (*running->body)();
    for (const auto& group : me().copies)
      if (!group.empty()) throw Error("asynchronous copies that nobody waited for");
  } catch (...) {
    if (!running->error) running->error = std::current_exception();
  }
  me().state = State::done;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, running->scheduler_stack, running->scheduler_stack_size);
#endif
  Context unused;
  Context::swap(unused, running->scheduler);
  std::abort();
}

void Block::resume(Thread& thread) {
  current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stacks + size_t(thread.linear) * kStack, kStack);
#endif
  Context::swap(scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Block::yield() {
  Thread& thread = *current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&thread.fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  Context::swap(thread.context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void Block::run(const Launch& l, uint3 where, const std::function<void()>& f,
                std::mt19937_64& random) {
  launch = &l;
  body = &f;
  index = where;
  epoch = 0;
  error = nullptr;
  shared.clear();
  dynamic.reset();
  static_bytes = 0;
  const size_t n = size_t(l.block.x) * l.block.y * l.block.z;
  if (stack_count < n) {
    free_stacks();
    void* memory = mmap(nullptr, n * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for the stacks of a block");
    stacks = static_cast<char*>(memory);
    stack_count = n;
  }
  unpoison_stacks();
  threads.assign(n, Thread());
  for (size_t i = 0; i < n; ++i) {
    threads[i].linear = int(i);
    threads[i].index = {unsigned(i) % l.block.x, unsigned(i) / l.block.x % l.block.y,
                        unsigned(i) / (l.block.x * l.block.y)};
    threads[i].context.prepare(stacks + i * kStack, kStack, enter);
  }
  order.resize(n);
  std::iota(order.begin(), order.end(), 0);
  for (bool alive = true; alive;) {
    std::shuffle(order.begin(), order.end(), random);
    alive = false;
    bool ran = false;
    for (int i : order) {
      if (threads[i].state == State::ready) {
        resume(threads[i]);
        ran = true;
        if (error) std::rethrow_exception(error);  // the other fibers are abandoned as they stand
      }
      alive = alive || threads[i].state != State::done;
    }
    if (alive && !ran && !release_barrier()) deadlock();
  }
}

bool Block::release_barrier() {
  Site site = nullptr;
  int count = 0, waiting = 0;
  for (const Thread& t : threads) {
    if (t.state != State::at_barrier) continue;
    if (site == nullptr) site = t.site;
    if (t.site != site) return false;
    ++waiting;
    count += t.predicate;
  }
  if (waiting != int(threads.size())) return false;
  switch (threads[0].barrier_op) {
    case BarrierOp::all:
      barrier_result = count == waiting;
      break;
    case BarrierOp::any:
      barrier_result = count > 0;
      break;
    default:
      barrier_result = count;
  }
  ++epoch;
  for (Thread& t : threads) t.state = State::ready;
  return true;
}

std::string Block::describe(const Thread& t) const {
  std::ostringstream text;
  switch (t.state) {
    case State::done:
      text << "has returned";
      break;
    case State::at_barrier:
      text << "waits at the barrier of " << place(t.site);
      break;
    case State::at_warp_op:
      text << "waits at the warp operation of " << place(t.site) << " with mask 0x" << std::hex
           << t.mask;
      break;
    case State::ready:
      text << "runs";
  }
  return text.str();
}

void Block::deadlock() {
  // Threads grouped by what they do: a line each.
  std::map<std::string, std::vector<int>> groups;
  for (const Thread& t : threads) groups[describe(t)].push_back(t.linear);
  bool warp_op = false;
  for (const Thread& t : threads) warp_op = warp_op || t.state == State::at_warp_op;
  std::ostringstream text;
  text << (warp_op ? "a warp operation waits for lanes of its mask that do not come"
                   : "divergent barrier");
  for (const auto& [what, who] : groups) {
    text << "; thread" << (who.size() > 1 ? "s " : " ") << who.front();
    if (who.size() > 1) text << " ... " << who.back() << " (" << who.size() << ")";
    text << ": " << what;
  }
  throw Error(text.str());
}

}  // namespace

const uint3& thread_index() { return me().index; }
const uint3& block_index() { return running->index; }
const dim3& block_size() { return running->launch->block; }
const dim3& grid_size() { return running->launch->grid; }

void fail(Site site, const std::string& what) {
  std::ostringstream text;
  text << place(site) << ": " << what << " (thread " << me().linear << " of block "
       << running->index.x;
  if (running->index.y + running->index.z > 0)
    text << ", " << running->index.y << ", " << running->index.z;
  text << ")";
  throw Error(text.str());
}

int barrier(Site site, BarrierOp op, bool predicate) {
  if (op == BarrierOp::plain && is_mutated("SIMT_DELETE", site)) return 0;
  Thread& t = me();
  t.site = site;
  t.barrier_op = op;
  t.predicate = predicate;
  t.state = State::at_barrier;
  running->yield();
  return running->barrier_result;
}

uint64_t warp_op(Site site, WarpOp op, uint32_t mask, uint64_t value, int argument, int width) {
  if (op == WarpOp::sync && is_mutated("SIMT_DELETE", site)) return 0;
  if (is_mutated("SIMT_NARROW", site)) mask &= 0xffff;
  Thread& t = me();
  const int lane = t.linear % kWarp, first = t.linear - lane;
  const int lanes = std::min(kWarp, int(running->threads.size()) - first);
  if ((mask >> lane & 1) == 0) fail(site, "a lane calls a warp operation whose mask leaves it out");
  if (lanes < kWarp && mask >> lanes != 0)
    fail(site, "the mask names lanes that the block has not");
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0)
    fail(site, "the width of a shuffle is a power of two up to 32");
  t.site = site;
  t.op = op;
  t.mask = mask;
  t.value = value;
  t.argument = argument;
  t.width = width;
  t.state = State::at_warp_op;
  Thread* const warp = &running->threads[first];
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const Thread& other = warp[i];
    if (other.state == State::at_warp_op && other.site == site && other.mask != mask)
      fail(site, "lanes of one warp operation name different masks");
    if (other.state != State::at_warp_op || other.site != site) {
      running->yield();
      return t.result;
    }
  }
  // This lane is the last: it does the work of all.
  if (op == WarpOp::collective) {
    void* operands[kWarp];
    for (int i = 0; i < kWarp; ++i) operands[i] = warp[i].operand;
    reinterpret_cast<Collective>(value)(operands);
  }
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    Thread& to = warp[i];
    const int segment = i & ~(to.width - 1);
    int from = i;
    switch (op) {
      case WarpOp::sync:
        ++to.warp_epoch;
        break;
      case WarpOp::collective:
        break;
      case WarpOp::ballot:
        to.result = 0;
        for (int j = 0; j < lanes; ++j)
          if ((mask >> j & 1) != 0 && warp[j].value != 0) to.result |= uint64_t(1) << j;
        break;
      case WarpOp::match_any:
        to.result = 0;
        for (int j = 0; j < lanes; ++j)
          if ((mask >> j & 1) != 0 && warp[j].value == to.value) to.result |= uint64_t(1) << j;
        break;
      case WarpOp::shuffle:
        from = segment + (to.argument & (to.width - 1));
        break;
      case WarpOp::shuffle_up:
        from = i - to.argument < segment ? i : i - to.argument;
        break;
      case WarpOp::shuffle_down:
        from = i + to.argument >= segment + to.width ? i : i + to.argument;
        break;
      case WarpOp::shuffle_xor:
        from = (i ^ to.argument) >= segment + to.width ? i : i ^ to.argument;
        break;
    }
    const bool moves = op == WarpOp::shuffle || op == WarpOp::shuffle_up ||
                       op == WarpOp::shuffle_down || op == WarpOp::shuffle_xor;
    if (moves && (from >= lanes || (mask >> from & 1) == 0))
      fail(site, "lane " + std::to_string(i) + " takes a value from lane " + std::to_string(from) +
                     ", which its mask leaves out");
    if (moves) to.result = warp[from].value;
  }
  for (int i = 0; i < lanes; ++i)
    if ((mask >> i & 1) != 0) warp[i].state = State::ready;
  return t.result;
}

void collective(Site site, void* operand, Collective work) {
  me().operand = operand;
  warp_op(site, WarpOp::collective, 0xffffffffu, reinterpret_cast<uint64_t>(work), 0, kWarp);
}

void copy_async(std::function<void()> copy) {
  if (me().copies.empty()) me().copies.emplace_back();
  me().copies.back().push_back(std::move(copy));
}
void copy_async_commit() { me().copies.emplace_back(); }
void copy_async_wait(int pending) {
  auto& groups = me().copies;
  while (int(groups.size()) > pending + 1) {  // the open group is not waited for
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

// ---- shared memory ----

SharedArray::SharedArray(Site site, size_t bytes, size_t element, std::string name)
    : site_(site),
      name_(std::move(name)),
      bytes_(element),
      data_(bytes),
      elements_(bytes / element) {
  poison(data_.data(), data_.size());
}

SharedArray::Element& SharedArray::at(size_t index, const char* what) {
  if (index >= elements_.size())
    fail(site_, std::string(what) + " beyond shared array " + name_ + ": index " +
                    std::to_string(int64_t(index)) + " of " + std::to_string(elements_.size()));
  return elements_[index];
}

namespace {
bool unordered(const Access& before, const Access& now) {
  if (before.thread < 0 || before.thread == now.thread || before.block_epoch != now.block_epoch)
    return false;
  return before.thread / kWarp != now.thread / kWarp || before.warp_epoch == now.warp_epoch;
}
Access my_access() { return {me().linear, running->epoch, me().warp_epoch}; }
}  // namespace

void SharedArray::check(const Element& element, size_t index, const Access& now, bool writes,
                        bool atomic) const {
  const auto race = [&](const Access& before, const char* did) {
    if (!unordered(before, now)) return;
    fail(site_, "race on shared array " + name_ + "[" + std::to_string(index) + "]: thread " +
                    std::to_string(before.thread) + " " + did + " it, this thread " +
                    (writes ? "writes" : "reads") + " it, and no barrier orders the two");
  };
  race(element.writer, "wrote");
  if (!atomic) race(element.atomic, "updated");
  if (!writes) return;
  race(element.reader, "read");
  race(element.reader_of_warp, "read");
  race(element.reader_of_other_warp, "read");
}

void SharedArray::read(size_t index, void* out) {
  Element& element = at(index, "read");
  const Access now = my_access();
  if (!element.written)
    fail(site_,
         "read of shared array " + name_ + "[" + std::to_string(index) + "] before any write");
  check(element, index, now, false, false);
  if (element.reader.thread / kWarp != now.thread / kWarp) {
    element.reader_of_other_warp = element.reader;
    element.reader_of_warp = Access();
  } else if (element.reader.thread != now.thread) {
    element.reader_of_warp = element.reader;
  }
  element.reader = now;
  std::memcpy(out, data_.data() + index * bytes_, bytes_);
}

void SharedArray::write(size_t index, const void* value) {
  Element& element = at(index, "write");
  const Access now = my_access();
  check(element, index, now, true, false);
  element.writer = now;
  element.written = true;
  element.reader = element.reader_of_warp = element.reader_of_other_warp = Access();
  std::memcpy(data_.data() + index * bytes_, value, bytes_);
}

void SharedArray::update(size_t index, const std::function<void(void*)>& step) {
  Element& element = at(index, "atomic update");
  const Access now = my_access();
  if (!element.written)
    fail(site_,
         "update of shared array " + name_ + "[" + std::to_string(index) + "] before any write");
  check(element, index, now, true, true);
  element.atomic = now;
  element.reader = element.reader_of_warp = element.reader_of_other_warp = Access();
  step(data_.data() + index * bytes_);
}

SharedArray* static_shared(Site site, const char* name, size_t bytes, size_t element) {
  std::unique_ptr<SharedArray>& array = running->shared[{site, bytes}];
  if (array == nullptr) {
    running->static_bytes += bytes;
    if (running->static_bytes > kStaticShared)
      fail(site, "static shared memory of " + std::to_string(running->static_bytes) +
                     " bytes, the limit is " + std::to_string(kStaticShared));
    array = std::make_unique<SharedArray>(site, bytes, element, name);
  }
  return array.get();
}

SharedArray* dynamic_shared(Site site, size_t element) {
  if (running->dynamic == nullptr)
    running->dynamic =
        std::make_unique<SharedArray>(site, running->launch->dynamic_shared, element, "(dynamic)");
  return running->dynamic.get();
}

// ---- launches ----

void set_seed(uint64_t value) { seed = value; }

void poison(void* data, size_t bytes) {
  if (bytes > 0) std::memset(data, 0xff, bytes);
}

namespace {
void check_limits(const Launch& l) {
  const auto limit = [](const char* what, uint64_t value, uint64_t most) {
    if (value > most)
      throw Error(std::string(what) + " of " + std::to_string(value) + ", the limit is " +
                  std::to_string(most));
  };
  const uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z;
  limit("a block", threads, kMaxThreads);
  limit("blockDim.z", l.block.z, 64);
  limit("gridDim.x", l.grid.x, 0x7fffffff);
  limit("gridDim.y", l.grid.y, 65535);
  limit("gridDim.z", l.grid.z, 65535);
  limit("dynamic shared memory", l.dynamic_shared, l.allowed_shared);
  limit("allowed dynamic shared memory", l.allowed_shared, kDynamicShared);
  if (threads == 0 || l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0)
    throw Error("a launch of no thread or no block");
}
}  // namespace

void run(const Launch& launch, const char* kernel, const std::function<void()>& body) {
  const auto named = [&](const std::exception& error) {
    return Error(std::string("simt: ") + kernel + ": " + error.what());
  };
  try {
    check_limits(launch);
  } catch (const Error& error) {
    throw named(error);
  }
  const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  std::mt19937_64 random(seed.load());
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  const uint64_t salt = random();

  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    thread_local Block of_this_thread;
    running = &of_this_thread;
    for (uint64_t i; (i = next++) < blocks;) {
      const uint32_t b = order[i];
      std::mt19937_64 of_block(salt + b);
      try {
        running->run(launch,
                     {b % launch.grid.x, b / launch.grid.x % launch.grid.y,
                      b / (launch.grid.x * launch.grid.y)},
                     body, of_block);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
        next = blocks;
      }
    }
  };
  const unsigned workers =
      unsigned(std::min<uint64_t>(blocks, std::thread::hardware_concurrency()));
  std::vector<std::thread> others;
  for (unsigned i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (!error) return;
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& e) {
    throw named(e);
  }
}

}  // namespace simt
