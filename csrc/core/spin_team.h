// Threads for passes of few microseconds, as many as it takes to enter and leave a parallel region: one
// region stays open, and its threads wait for the next pass awake.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "tensors.h"

namespace stillhouse {

class SpinTeam {
 public:
  // Calls work(team), with up to `threads` threads in team.each.
  template <class Work>
  static void run(int64_t threads, const Work& work) {
    SpinTeam team(threads);
    if (threads < 2) return work(team);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
      if (first > 0) return team.help(first);
      const Stop stop{team};  // also where the work throws
      work(team);
    });
  }

  // f(lo, hi) for parts of 0 ... count. A thread has the same part each time, whose numbers lie in its cache;
  // but a part that its thread has not begun is not waited for: inside of another region, or on a busy
  // machine, that thread may never come.
  template <class F>
  void each(int64_t count, const F& f) {
    if (threads_ < 2) return f(int64_t(0), count);
    call_ = [](const void* work, int64_t lo, int64_t hi) {
      (*static_cast<const F*>(work))(lo, hi);
    };
    work_ = &f, count_ = count;
    const uint64_t pass = pass_.load(std::memory_order_relaxed) + 1;
    pass_.store(pass, std::memory_order_release);
    do_part(0);
    for (int64_t i = 1; i < threads_; ++i) {
      if (parts_[i].claim(pass))
        do_part(i);
      else
        wait([&] { return parts_[i].done.load(std::memory_order_acquire) == pass; });
    }
  }

 private:
  struct alignas(64) Part {
    std::atomic<uint64_t> claimed{0}, done{0};  // the last pass
    bool claim(uint64_t pass) {
      uint64_t before = pass - 1;
      return claimed.compare_exchange_strong(before, pass, std::memory_order_acq_rel);
    }
  };

  struct Stop {
    SpinTeam& team;
    ~Stop() { team.stopped_.store(true, std::memory_order_release); }
  };

  explicit SpinTeam(int64_t threads)
      : threads_(threads), parts_(threads < 2 ? nullptr : new Part[threads]) {}

  void do_part(int64_t i) const {
    call_(work_, count_ * i / threads_, count_ * (i + 1) / threads_);
  }

  // Each part of a pass is claimed once, and the next pass comes when all are done: a thread that was late
  // finds its claim refused, and does not look at what may be the next pass's work.
  void help(int64_t i) {
    for (uint64_t seen = 0;;) {
      wait([&] {
        return pass_.load(std::memory_order_acquire) != seen ||
               stopped_.load(std::memory_order_acquire);
      });
      const uint64_t pass = pass_.load(std::memory_order_acquire);
      if (pass == seen) return;
      seen = pass;
      if (!parts_[i].claim(pass)) continue;
      do_part(i);
      parts_[i].done.store(pass, std::memory_order_release);
    }
  }

  // Awake for some 10 microseconds, then the processor is offered to others in between.
  template <class Condition>
  static void wait(Condition is_met) {
    for (int64_t turn = 0; !is_met(); ++turn) {
      if (turn >= kTurnsAwake) std::this_thread::yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
  static constexpr int64_t kTurnsAwake = 500;

  const int64_t threads_;
  const std::unique_ptr<Part[]> parts_;
  // A pass, on one line.
  alignas(64) std::atomic<uint64_t> pass_{0};
  void (*call_)(const void*, int64_t, int64_t) = nullptr;
  const void* work_ = nullptr;
  int64_t count_ = 0;
  std::atomic<bool> stopped_{false};
};

}  // namespace stillhouse
