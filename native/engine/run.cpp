// Run the steps in order, each shared among the threads that the pool has.
#include <chrono>
#include <cstring>

#include "engine/plan.h"

namespace pw {
namespace {

constexpr int64_t kBeyond = 1 << 16;  // convolutions may read some rows beyond the last tensor

struct Job {
  const Step* step;
  const Run* run;
};

void call(void* context, int task, int thread) {
  const Job& job = *static_cast<Job*>(context);
  job.step->run(*job.run, task, thread);
}

class Arena {  // borrowed from the model for one run
 public:
  explicit Arena(const Plan& plan)
      : model_(*plan.model), buffer_(model_.borrow(plan.arena_bytes + plan.threads * plan.scratch_bytes + kBeyond)) {}
  ~Arena() { model_.give_back(std::move(buffer_)); }
  char* data() const { return buffer_.as<char>(); }

 private:
  Model& model_;
  Buffer buffer_;
};

class Lease {  // of the pool; a run that does not get it works alone
 public:
  explicit Lease(Pool& pool) : pool_(pool), mine_(pool.acquire()) {}
  ~Lease() {
    if (mine_) pool_.release();
  }
  void run(const Step& step, const Run& r) {
    step.begin(r);
    if (mine_ && step.tasks > 1) {
      Job job{&step, &r};
      pool_.parallel(step.tasks, call, &job);
    } else {
      for (int task = 0; task < step.tasks; ++task) step.run(r, task, 0);
    }
  }

 private:
  Pool& pool_;
  bool mine_;
};

}  // namespace

Buffer Model::borrow(int64_t bytes) {
  slab_.settle();
  Buffer found;
  {
    std::lock_guard<std::mutex> lock(idle_mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it)
      if (it->bytes() >= bytes && (best == idle_.end() || it->bytes() <= best->bytes())) best = it;
    if (best == idle_.end() && !idle_.empty()) best = idle_.end() - 1;  // too small: to be replaced
    if (best != idle_.end()) {
      std::swap(*best, idle_.back());
      found = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (!found.as<char>() || found.bytes() < bytes) {
    found = Buffer();  // before the new one is made
    found = Buffer(bytes);
  }
  return found;
}

void Model::give_back(Buffer buffer) {
  std::lock_guard<std::mutex> lock(idle_mutex_);
  idle_.push_back(std::move(buffer));
}

namespace {

int64_t since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
}

template <bool timed>
void run_steps(Plan& plan, const Run& r, int64_t* ns) {
  Lease lease(*plan.pool);
  for (size_t s = 0; s < plan.steps.size(); ++s) {
    std::chrono::steady_clock::time_point start;
    if (timed) start = std::chrono::steady_clock::now();
    lease.run(*plan.steps[s], r);
    if (timed) ns[s] = since(start);
    if (const char* what = r.error.load(std::memory_order_relaxed)) fail(plan.steps[s]->site + ": " + what);
  }
}

void run_in_arena(Plan& plan, const void* const* inputs, void* const* outputs, int64_t* ns) {
  Arena arena(plan);
  Run r;
  r.plan = &plan;
  r.arena = arena.data();
  r.inputs = inputs;
  r.outputs = outputs;
  ns ? run_steps<true>(plan, r, ns) : run_steps<false>(plan, r, nullptr);
}

}  // namespace

void run_plan(Plan& plan, const void* const* inputs, void* const* outputs, int64_t* ns) {
  if (!ns) return run_in_arena(plan, inputs, outputs, nullptr);
  const auto start = std::chrono::steady_clock::now();
  run_in_arena(plan, inputs, outputs, ns);
  int64_t around = since(start);
  for (size_t s = 0; s < plan.steps.size(); ++s) around -= ns[s];
  ns[plan.steps.size()] = around;
}

}  // namespace pw
