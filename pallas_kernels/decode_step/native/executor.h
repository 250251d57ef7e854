// Threads that claim the rows of a table in its order.
//
// The order is a linear extension of the dependencies, so whatever a claimed row waits for has been claimed before, by
// a thread that finishes it: threads that come late, or never, delay nothing for ever, and one thread is enough.
#pragma once

#include <atomic>
#if defined(__linux__)
#include <sched.h>
#endif
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

#include "simd.h"

struct Row {
  int32_t kind, layer, share, shares, wait, value, signal;

  // This row's part of a phase's units.
  int first(int units) const { return (int)((int64_t)units * share / shares); }
  int last(int units) const { return (int)((int64_t)units * (share + 1) / shares); }
};

struct alignas(64) Counter {
  std::atomic<int> value{0};
};

// Linux likes to wake a helper on the core of the thread that called it, and takes milliseconds to part them.
inline int this_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}
inline void leave_core(int core) {
#if defined(__linux__)
  if (sched_getcpu() != core) return;
  cpu_set_t allowed, others;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  others = allowed;
  CPU_CLR(core, &others);
  if (!CPU_COUNT(&others)) return;
  sched_setaffinity(0, sizeof others, &others);
  sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

// A round on its way. Helpers hold it by a shared pointer: one that starts after the end finds no row to claim.
template <class Work>
class Round {
 public:
  Round(const Row* rows, int count, Work work, int delays)
      : rows_(rows), count_(count), delays_(delays), work_(std::move(work)), counters_(new Counter[phases()]) {}

  void help() {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      if (follows(i)) continue;
      do {
        const Row& row = rows_[i];
        if (row.wait >= 0) await(counters_[row.wait].value, row.value);
        if (delays_) delay(i);
        work_(row);
        counters_[row.signal].value.fetch_add(1, std::memory_order_release);
      } while (++i < count_ && follows(i));
    }
  }

  void finish() { await(counters_[rows_[count_ - 1].signal].value, rows_[count_ - 1].shares); }

 private:
  // Whether a row is its phase's only one, as the one before it is, which it waits for: then one thread does both, and
  // what the first has written need not change cores.
  bool follows(int i) const {
    return i && rows_[i].shares == 1 && rows_[i - 1].shares == 1 && rows_[i].wait == rows_[i - 1].signal;
  }

  int phases() const { return rows_[count_ - 1].signal + 1; }

  static void await(const std::atomic<int>& counter, int value) {
    for (int spins = 0; counter.load(std::memory_order_acquire) < value; spins++) {
      if (spins < 20000) pause();
      else std::this_thread::yield();  // whoever is awaited may need this core
    }
  }

  // For tests: as if other work kept interfering.
  void delay(int i) const {
    const uint32_t mixed = (uint32_t)(i + 1) * 2654435761u ^ (uint32_t)delays_ * 40503u;
    if ((mixed >> 8) % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds((mixed >> 16) % 200));
  }

  const Row* rows_;
  const int count_, delays_;
  Work work_;
  std::atomic<int> next_{0};
  std::unique_ptr<Counter[]> counters_;
};
