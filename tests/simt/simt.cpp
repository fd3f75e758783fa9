// The scheduler of a block's fibers, and launches.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <sstream>
#include <thread>

#include "block.h"

namespace simt {

__attribute__((tls_model("initial-exec"))) thread_local Block* running = nullptr;

std::string place(Site site) {
  const char* slash = std::strrchr(site, '/');
  return slash != nullptr ? slash + 1 : site;
}

namespace {

std::atomic<uint64_t> seed{[] {
  const char* text = std::getenv("SIMT_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 0ull;
}()};

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

}  // namespace

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
