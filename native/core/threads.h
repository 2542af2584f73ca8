// A pool of threads that a run borrows: work is handed out task by task, so that a late thread does no harm.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace pw {

class Pool {
 public:
  // The pool of this many threads, shared by all plans; made on first use, kept for good.
  static Pool& shared(int threads);
  explicit Pool(int threads);
  ~Pool();
  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Whether the caller got the pool to itself; otherwise it works alone.
  bool acquire();
  void release();

  // Calls fn(context, task, thread) for every task in [0, tasks); returns when all are done. The pool must be acquired.
  using Function = void (*)(void* context, int task, int thread);
  void parallel(int tasks, Function fn, void* context);

 private:
  void work(int thread);
  void take(uint32_t epoch, int thread);

  std::vector<std::thread> workers_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::atomic<bool> stop_{false};
  std::atomic<bool> running_{false};  // between acquire and release: workers spin
  std::mutex mutex_;
  std::condition_variable wake_;

  // The job: a ticket is epoch in the high half and next task in the low half, so that a late thread cannot take
  // a task of a job that it has not seen.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int> left_{0};
  std::atomic<uint32_t> epoch_{0};
  std::atomic<Function> fn_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int> tasks_{0};
};

}  // namespace pw
