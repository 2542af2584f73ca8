#include "core/threads.h"

#include <chrono>
#include <map>

#if defined(__linux__)
#include <sched.h>
#endif
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

using Clock = std::chrono::steady_clock;
constexpr auto kIdle = std::chrono::microseconds(500);  // before an idle worker gives its core back: waking up costs 50
constexpr int kSpins = 64;                              // between two looks at the clock

}  // namespace

std::thread aside(std::function<void()> work) {
#if defined(__linux__)
  const int here = sched_getcpu();
  return std::thread([here, work = std::move(work)] {
    cpu_set_t cores;
    if (here >= 0 && here < CPU_SETSIZE && !sched_getaffinity(0, sizeof cores, &cores) && CPU_COUNT(&cores) > 1) {
      CPU_CLR(here, &cores);
      sched_setaffinity(0, sizeof cores, &cores);  // of this thread; if it cannot be, it is no harm
    }
    work();
  });
#else
  return std::thread(std::move(work));
#endif
}

Pool& Pool::shared(int threads) {
  static std::mutex mutex;
  static auto* pools = new std::map<int, Pool*>;  // never destroyed: threads may outlive static objects
  std::lock_guard<std::mutex> lock(mutex);
  Pool*& pool = (*pools)[threads];
  if (!pool) pool = new Pool(threads);
  return *pool;
}

Pool::Pool(int threads) : taken_(size_t(threads)), done_(size_t(threads)) {
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
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  // whoever sees one of the new values sees `writing_` ahead too
  writing_.store(epoch, std::memory_order_relaxed);
  fn_.store(fn, std::memory_order_release);
  context_.store(context, std::memory_order_release);
  tasks_.store(tasks, std::memory_order_release);
  epoch_.store(epoch, std::memory_order_release);
  const int mine = take({fn, context, tasks}, epoch, 0);
  for (int spins = 0;; pause()) {
    int done = mine;
    for (size_t t = 1; done < tasks && t < done_.size(); ++t) {
      const uint64_t said = done_[t].count.load(std::memory_order_acquire);
      if (uint32_t(said >> 32) == epoch) done += int(uint32_t(said));
    }
    if (done == tasks) return;
    if (++spins > 4000) {  // the other thread lost its core: let it have this one
      std::this_thread::yield();
      spins = 0;
    }
  }
}

bool Pool::read(uint32_t epoch, Job& job) const {
  job.fn = fn_.load(std::memory_order_acquire);
  job.context = context_.load(std::memory_order_acquire);
  job.tasks = tasks_.load(std::memory_order_acquire);
  return writing_.load(std::memory_order_relaxed) == epoch;
}

// A thread that is late for a job that was read whole finds all its tasks taken: the next job begins only then.
int Pool::take(const Job& job, uint32_t epoch, int thread) {
  const int threads = int(taken_.size());
  int done = 0;
  for (int i = 0, of = thread; i < threads; ++i, of = of + 1 < threads ? of + 1 : 0) {
    const int first = int(int64_t(job.tasks) * of / threads), end = int(int64_t(job.tasks) * (of + 1) / threads);
    if (first == end) continue;
    std::atomic<uint64_t>& ticket = taken_[size_t(of)].ticket;
    uint64_t seen = ticket.load(std::memory_order_acquire);
    for (;;) {
      const int32_t ahead = int32_t(uint32_t(seen >> 32) - epoch);
      if (ahead > 0) return done;
      const uint32_t taken = ahead == 0 ? uint32_t(seen) : 0;
      if (first + int(taken) >= end) break;
      const uint64_t mine = (uint64_t(epoch) << 32) + taken + 1;
      if (!ticket.compare_exchange_weak(seen, mine, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      job.fn(job.context, first + int(taken), thread);
      ++done;
      seen = ticket.load(std::memory_order_acquire);
    }
  }
  return done;
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  int spins = 0;
  Clock::time_point idle = Clock::now();
  while (!stop_.load(std::memory_order_relaxed)) {
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    Job job;
    if (epoch != seen && read(epoch, job)) {
      seen = epoch;
      const int done = take(job, epoch, thread);
      if (done > 0) done_[size_t(thread)].count.store((uint64_t(epoch) << 32) + uint32_t(done), std::memory_order_release);
      spins = 0;
      continue;
    }
    pause();
    if (spins++ == 0) idle = Clock::now();
    if (spins % kSpins || Clock::now() - idle < kIdle) continue;
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
