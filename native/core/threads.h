// A pool of threads that a run borrows. Every thread has a range of the tasks of a job, the same part of it in every job,
// so that what it wrote in one is in its own cache in the next; done with its own, it takes from the others', so that a
// late thread does no harm.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pw {

// A thread for a short piece of work, kept from the core that the caller is running on: where all cores are busy, it is
// not the caller who waits. Throws std::system_error where the system gives none.
std::thread aside(std::function<void()> work);

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
  // What two threads write lies on two cache lines (and their neighbours, which are fetched in pairs).
  static constexpr int kLine = 128;
  struct alignas(kLine) Taken {  // of a thread's range: epoch in the high half, number of tasks taken in the low half
    std::atomic<uint64_t> ticket{0};
  };
  struct alignas(kLine) Done {  // by a thread: epoch in the high half, number of tasks in the low half
    std::atomic<uint64_t> count{0};
  };
  struct Job {
    Function fn;
    void* context;
    int tasks;
  };

  void work(int thread);
  int take(const Job& job, uint32_t epoch, int thread);
  bool read(uint32_t epoch, Job& job) const;

  std::vector<std::thread> workers_;
  std::vector<Taken> taken_;
  std::vector<Done> done_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::atomic<bool> stop_{false};
  std::atomic<bool> running_{false};  // between acquire and release: workers spin
  std::mutex mutex_;
  std::condition_variable wake_;

  // The job, under its number. It is being written while `writing_` is ahead of `epoch_`.
  alignas(kLine) std::atomic<uint32_t> epoch_{0};
  std::atomic<uint32_t> writing_{0};
  std::atomic<Function> fn_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int> tasks_{0};
};

}  // namespace pw
