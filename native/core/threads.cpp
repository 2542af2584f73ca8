#include "core/threads.h"

#include <chrono>
#include <map>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pw {
namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr int kSpins = 3000;  // some 100 us before an idle worker gives its core back

}  // namespace

Pool& Pool::shared(int threads) {
  static std::mutex mutex;
  static auto* pools = new std::map<int, Pool*>;  // never destroyed: threads may outlive static objects
  std::lock_guard<std::mutex> lock(mutex);
  Pool*& pool = (*pools)[threads];
  if (!pool) pool = new Pool(threads);
  return *pool;
}

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    running_ = true;
  }
  wake_.notify_all();
  for (auto& t : workers_) t.join();
}

bool Pool::acquire() {
  if (workers_.empty() || busy_.test_and_set(std::memory_order_acquire)) return false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    running_ = true;
  }
  wake_.notify_all();
  return true;
}

void Pool::release() {
  running_ = false;
  busy_.clear(std::memory_order_release);
}

void Pool::parallel(int tasks, Function fn, void* context) {
  fn_ = fn;
  context_ = context;
  tasks_ = tasks;
  left_.store(tasks, std::memory_order_relaxed);
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  ticket_.store(static_cast<uint64_t>(epoch) << 32, std::memory_order_release);
  epoch_.store(epoch, std::memory_order_release);
  take(epoch, 0);
  int spins = 0;
  while (left_.load(std::memory_order_acquire) > 0) {
    pause();
    if (++spins > 4000) {  // the other thread lost its core: let it have this one
      std::this_thread::yield();
      spins = 0;
    }
  }
}

void Pool::take(uint32_t epoch, int thread) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  for (;;) {
    if (static_cast<uint32_t>(ticket >> 32) != epoch) return;
    // fn_ and friends are read only under a ticket of their own epoch: the job cannot be replaced before all its
    // tasks are done, and this thread does one of them.
    const int task = static_cast<int>(ticket & 0xffffffffu);
    const int tasks = tasks_.load(std::memory_order_relaxed);
    if (task >= tasks) return;
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
    fn_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), task, thread);
    left_.fetch_sub(1, std::memory_order_acq_rel);
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  int spins = 0;
  while (!stop_) {
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (epoch != seen) {
      seen = epoch;
      take(epoch, thread);
      spins = 0;
      continue;
    }
    if (spins < kSpins) {
      ++spins;
      pause();
      continue;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    if (running_ && epoch_ == seen && !stop_) {
      // spun too long inside one run (a long serial step): sleep briefly, stay at hand
      wake_.wait_for(lock, std::chrono::microseconds(50));
    } else {
      wake_.wait(lock, [&] { return stop_ || running_; });
    }
    spins = 0;
  }
}

}  // namespace pw
