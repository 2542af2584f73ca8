// Rounding in training: rows of values under one scale each, cut into stretches that threads share.
#include <algorithm>
#include <vector>

#include "core/cpu.h"
#include "core/kernels.h"
#include "core/threads.h"
#include "pennyweight.h"

namespace {

constexpr int64_t kStretch = 1 << 15;  // values a thread takes at a time: it stays in its cache

struct Job {
  pw::FakeArgs row;
  pw::FakeFn kernel;
  const float *scale, *zero;
  float lo, hi;
  int64_t rows, cols, stretches, rows_a_task;
  std::vector<double> sums;  // [rows, stretches, 3]
};

void stretch(const Job& job, int64_t row, int64_t part, double* sums) {
  pw::FakeArgs a = job.row;
  const int64_t size = a.bf16 ? 2 : 4, first = part * kStretch, at = (row * job.cols + first) * size;
  const float z = job.zero ? job.zero[row] : 0.0f;
  a.x = static_cast<const char*>(a.x) + at;
  a.g = a.g ? static_cast<const char*>(a.g) + at : nullptr;
  a.y = static_cast<char*>(a.y) + at;
  a.n = std::min(kStretch, job.cols - first);
  a.s = job.scale[row];
  a.r = 1.0f / a.s;
  a.lo = job.lo - z;
  a.hi = job.hi - z;
  a.sums = sums;
  job.kernel(a);
}

void task(void* context, int index, int) {
  Job& job = *static_cast<Job*>(context);
  const int64_t total = job.rows * job.stretches;
  const int64_t end = std::min(total, (int64_t(index) + 1) * job.rows_a_task);
  for (int64_t i = int64_t(index) * job.rows_a_task; i < end; ++i)
    stretch(job, i / job.stretches, i % job.stretches, job.sums.empty() ? nullptr : &job.sums[size_t(3 * i)]);
}

void run(Job& job, int threads) {
  job.stretches = std::max<int64_t>(1, (job.cols + kStretch - 1) / kStretch);
  job.rows_a_task = job.stretches > 1 ? 1 : std::max<int64_t>(1, kStretch / std::max<int64_t>(1, job.cols));
  const int64_t tasks = (job.rows * job.stretches + job.rows_a_task - 1) / job.rows_a_task;
  if (threads > 1 && tasks > 1) {
    pw::Pool& pool = pw::Pool::shared(threads);
    if (pool.acquire()) {
      pool.parallel(int(tasks), task, &job);
      pool.release();
      return;
    }
  }
  for (int64_t i = 0; i < tasks; ++i) task(&job, int(i), 0);
}

const pw::Kernels* chosen(int dtype) {
  const int isa = pw_isa_default();
  return isa < 0 || (dtype != PW_F32 && dtype != PW_BF16) ? nullptr : &pw::kernels_for(isa);
}

}  // namespace

extern "C" {

int pw_fake_quantize(int dtype, const void* x, void* y, int64_t rows, int64_t cols, const float* scale,
                     const float* zero, float lo, float hi, int threads) {
  const pw::Kernels* kernels = chosen(dtype);
  if (!kernels) return -1;
  Job job{{x, nullptr, y, 0, dtype == PW_BF16, 0, 0, 0, 0, 0, nullptr}, kernels->fake_quantize, scale, zero, lo, hi,
          rows, cols, 0, 0, {}};
  run(job, threads);
  return 0;
}

int pw_fake_gradient(int dtype, const void* x, const void* g, void* gx, int64_t rows, int64_t cols,
                     const float* scale, const float* zero, float lo, float hi, float delta, double* sums,
                     int threads) {
  const pw::Kernels* kernels = chosen(dtype);
  if (!kernels) return -1;
  const int64_t stretches = std::max<int64_t>(1, (cols + kStretch - 1) / kStretch);
  Job job{{x, g, gx, 0, dtype == PW_BF16, 0, 0, 0, 0, delta, nullptr}, kernels->fake_gradient, scale, zero, lo, hi,
          rows, cols, 0, 0, std::vector<double>(size_t(3 * rows * stretches), 0.0)};
  run(job, threads);
  for (int64_t row = 0; row < rows; ++row)
    for (int j = 0; j < 3; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < stretches; ++i) sum += job.sums[size_t(3 * (row * stretches + i) + j)];
      sums[3 * row + j] = sum;
    }
  return 0;
}

}  // extern "C"
