// Work in phases: threads share the parts of a phase and meet at its end.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pw {

// One part's place in memory that all threads see: the last phase in which it was taken up, and done, and a few floats
// that whoever did it tells the others. One cache line, so that they come over together.
struct alignas(64) Part {
  static constexpr int kTold = 12;
  std::atomic<int32_t> taken{0}, done{0};
  float told[kTold];
};

// A thread's view of the parts. Every thread goes through the same phases. It takes up the part that is its own, and
// those of others that have not begun: a thread that lost its core, or never came, holds nobody up, and finds its work
// done when it comes.
class Team {
 public:
  Team(Part* parts, int size, int self) : parts_(parts), size_(size), self_(self) {}
  // Before any thread starts, by one of them.
  static void reset(Part* parts, int size) {
    for (int i = 0; i < size; ++i) new (parts + i) Part;
  }

  // Calls work(part) for the parts that fall to this thread; returns when all are done, and what was written in doing
  // them can be read. Within `work` everything before this phase is done and nothing after it has begun.
  template <class F>
  void phase(F work) {
    ++at_;
    for (int i = 0, part = self_; i < size_; ++i, part = part + 1 < size_ ? part + 1 : 0) {
      int32_t before = at_ - 1;
      if (parts_[part].taken.load(std::memory_order_relaxed) != before ||
          !parts_[part].taken.compare_exchange_strong(before, at_, std::memory_order_relaxed))
        continue;
      work(part);
      parts_[part].done.store(at_, std::memory_order_release);
    }
    for (int i = 0; i < size_; ++i)
      for (int spins = 0; parts_[i].done.load(std::memory_order_acquire) < at_;) {
#if defined(__x86_64__)
        _mm_pause();
#endif
        if (++spins > kSpins) {  // the other waits for a core: it may have this one
          std::this_thread::yield();
          spins = 0;
        }
      }
  }

 private:
  static constexpr int kSpins = 64;  // a few microseconds
  Part* parts_;
  int size_, self_;
  int32_t at_ = 0;
};

}  // namespace pw
