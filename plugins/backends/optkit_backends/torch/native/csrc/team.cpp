#include "team.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
static void rest() { _mm_pause(); }
#else
static void rest() { std::this_thread::yield(); }
#endif

namespace {
using Clock = std::chrono::steady_clock;
constexpr auto INSIDE = std::chrono::microseconds(20);  // longer than the others usually take
// Longer than a caller usually takes to plan a text's next step: to wake up would take a hundredth of one.
constexpr auto BETWEEN = std::chrono::microseconds(500);
constexpr int PATIENCE = 250;  // looks, before whoever else wants the processor gets it

void wait_while(const std::atomic<uint32_t>& counter, uint32_t old, Clock::duration awake) {
  auto changed = [&] { return counter.load(std::memory_order_acquire) != old; };
  for (Clock::time_point now, until; until == Clock::time_point() || now < until; std::this_thread::yield()) {
    for (int i = 0; i < PATIENCE; i++) {
      if (changed()) return;
      rest();
    }
    now = Clock::now();  // not before, as most waits are shorter than it takes to read
    if (until == Clock::time_point()) until = now + awake;
  }
  while (!changed()) counter.wait(old, std::memory_order_acquire);
}

void advance(std::atomic<uint32_t>& counter) {
  counter.fetch_add(1, std::memory_order_release);
  counter.notify_all();
}
}  // namespace

struct Team {
  explicit Team(int count) : size(count) {
    for (int i = 1; i < count; i++) threads.emplace_back([this, i] { serve(i); });
  }

  ~Team() {
    closing = true;
    advance(calls);
    for (auto& thread : threads) thread.join();
  }

  void serve(int thread) {
    for (uint32_t seen = 0;; seen++) {
      wait_while(calls, seen, BETWEEN);
      if (closing) return;
      work(given, thread);
      meet();
    }
  }

  void meet() {
    uint32_t meeting = meetings.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived.store(0, std::memory_order_relaxed);
      taken.store(0, std::memory_order_relaxed);
      advance(meetings);
    } else {
      wait_while(meetings, meeting, INSIDE);
    }
  }

  const int size;
  Work work = nullptr;
  void* given = nullptr;
  bool closing = false;
  std::vector<std::thread> threads;
  alignas(64) std::atomic<uint32_t> calls{0};
  alignas(64) std::atomic<uint32_t> meetings{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int64_t> taken{0};
};

Team* team_open(int threads) { return new Team(threads); }
void team_close(Team* team) { delete team; }
int team_size(const Team* team) { return team->size; }
int64_t team_take(Team* team) { return team->taken.fetch_add(1, std::memory_order_relaxed); }
void team_meet(Team* team) { team->meet(); }

void team_run(Team* team, Work work, void* given) {
  team->work = work;
  team->given = given;
  advance(team->calls);
  work(given, 0);
  team->meet();
}
