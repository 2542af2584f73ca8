// Tasks of one step that run at the same time and wait for each other.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pw {

// One task's place in memory that all tasks see: how far it has come, and a few floats that it tells the others. The
// floats lie beside the mark so that both come over in one cache line.
struct alignas(64) Mark {
  static constexpr int kTold = 12;
  std::atomic<int32_t> reached{0};
  float told[kTold];
};

class Team {
 public:
  Team(Mark* marks, int size, int self) : marks_(marks), size_(size), self_(self) {}
  // Before any task starts, by one thread.
  static void reset(Mark* marks, int size) {
    for (int i = 0; i < size; ++i) new (marks + i) Mark;
  }
  int size() const { return size_; }
  int self() const { return self_; }
  Mark& of(int task) const { return marks_[task]; }

  // Returns when all tasks have called it as often as this one. What they wrote before can then be read.
  void meet() {
    ++at_;
    marks_[self_].reached.store(at_, std::memory_order_release);
    for (int i = 0; i < size_; ++i) {
      if (i == self_) continue;
      for (int spins = 0; marks_[i].reached.load(std::memory_order_acquire) < at_;) {
#if defined(__x86_64__)
        _mm_pause();
#endif
        if (++spins > kSpins) {  // the other waits for a core: it may have this one
          std::this_thread::yield();
          spins = 0;
        }
      }
    }
  }

 private:
  static constexpr int kSpins = 64;  // a few microseconds
  Mark* marks_;
  int size_, self_;
  int32_t at_ = 0;
};

}  // namespace pw
