// Peaks of this machine: the rate of small kernels that do nothing but multiply, or read.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>

#include "engine/plan.h"

namespace pw {
namespace {

constexpr int kParts = 10, kTasksPerThread = 8;
constexpr double kPart = 0.002;  // seconds at most: short enough that some are not disturbed by other work
constexpr int64_t kPiece = int64_t(1) << 20;  // bytes read at a time

using Work = std::function<double(int thread)>;  // returns what was done

struct Job {
  const Work* work;
  std::vector<double> done;  // per thread, a cache line apart
};

void call(void* context, int, int thread) {
  Job& job = *static_cast<Job*>(context);
  job.done[size_t(thread) * 8] += (*job.work)(thread);
}

// Units a second of one part: every thread does some eight tasks.
double rate(Pool& pool, bool mine, int threads, const Work& work) {
  Job job{&work, std::vector<double>(size_t(threads) * 8)};
  const auto start = std::chrono::steady_clock::now();
  if (mine) {
    pool.parallel(threads * kTasksPerThread, call, &job);
  } else {
    for (int i = 0; i < kTasksPerThread; ++i) call(&job, i, 0);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  double done = 0;
  for (double d : job.done) done += d;
  return done / seconds;
}

double best_rate(int threads, const Work& work, double seconds) {
  Pool& pool = Pool::shared(threads);
  const bool mine = pool.acquire();
  if (!mine && threads > 1) fail("the threads are busy with another run");
  double best = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kParts || std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++i)
    best = std::max(best, rate(pool, mine, threads, work));
  if (mine) pool.release();
  return best;
}

int64_t nanoseconds(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
}

// Repeats of `f(repeats)` that fill one task of a part.
int64_t repeats_for(double seconds, const std::function<void(int64_t)>& f) {
  int64_t n = 1;
  const double wanted = 1e9 * std::min(seconds / kParts, kPart) / kTasksPerThread;
  for (;;) {
    const double took = double(std::max<int64_t>(1, nanoseconds([&] { f(n); })));
    if (took > wanted / 4) return std::max<int64_t>(1, int64_t(double(n) * wanted / took));
    n *= 2;
  }
}

}  // namespace

double measure_macs(int isa, int kind, int threads, double seconds) {
  const Kernels& k = kernels_for(isa);
  const PeakFn kinds[] = {k.peak_i8, k.peak_f32, k.peak_bf16, k.peak_bits};
  require(kind >= 0 && kind < int(std::size(kinds)), "unknown kind of multiply-add");
  const PeakFn fn = kinds[kind];
  const int64_t repeats = repeats_for(seconds, [&](int64_t n) { fn(n); });
  return best_rate(threads, [&](int) { return double(fn(repeats)); }, seconds);
}

double measure_reads(int isa, int64_t bytes, int threads, double seconds) {
  const Kernels& k = kernels_for(isa);
  require(bytes >= 4096 && bytes <= int64_t(1) << 34, "a buffer of this size measures nothing");
  bytes = bytes / 512 * 512;
  std::vector<Buffer> buffers;
  for (int i = 0; i < threads; ++i) {
    buffers.emplace_back(bytes);
    std::memset(buffers.back().as<char>(), i + 1, size_t(bytes));
  }
  // each thread reads its buffer round and round, a piece at a time; places are a cache line apart
  std::vector<int64_t> places(size_t(threads) * 8);
  const int64_t piece = std::min(bytes, kPiece);
  const auto read_on = [&](int thread, int64_t pieces) {
    int64_t& at = places[size_t(thread) * 8];
    for (int64_t i = 0; i < pieces; ++i) {
      if (at + piece > bytes) at = 0;
      k.read(buffers[size_t(thread)].as<char>() + at, piece);
      at += piece;
    }
  };
  const int64_t repeats = repeats_for(seconds, [&](int64_t n) { read_on(0, n); });
  const auto work = [&](int thread) {
    read_on(thread, repeats);
    return double(repeats * piece);
  };
  return best_rate(threads, work, seconds);
}

}  // namespace pw
