// Steps that turn rows of floats: rotary embeddings, Hadamard transforms.
#include <algorithm>
#include <cmath>

#include "engine/build.h"
#include "engine/rows.h"

namespace pw {

// ---- rotary --------------------------------------------------------------------------------------------------------

namespace {

struct RotaryStep : Step {
  RotaryFn fn;
  Rows rows;  // each of one or more vectors
  int x, cos, sin, y, n;
  void run(const Run& r, int task, int) const override {
    const int64_t each = rows.length / n, vectors = rows.count * each;
    for (int64_t i = vectors * task / tasks; i < vectors * (task + 1) / tasks; ++i) {
      const int64_t row = i / each, at = i % each * n;
      const auto place = [&](int tensor) { return rows.at(tensor, row) + at; };
      fn({r.at<float>(x) + place(1), r.at<float>(cos) + place(2), r.at<float>(sin) + place(3), r.at<float>(y) + place(0), n});
    }
  }
};

}  // namespace

void build_rotary(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<RotaryStep>();
  const Value& out = plan.values[op.out[0]];
  const auto strides = [&](int operand) { return broadcast_strides(plan.values[op.in[operand]], out.dims); };
  step->fn = plan.kernels->rotary;
  step->x = op.in[0];
  step->cos = op.in[1];
  step->sin = op.in[2];
  step->y = op.out[0];
  step->n = int(std::max<int64_t>(out.dims.back(), 1));
  step->rows = rows_of(out.dims, {out.strides, strides(0), strides(1), strides(2)});
  describe(*step, plan, op, plan.kernels->row[k_rotary]->symbol);
  if (plan.threads > 1 && out.count() > 10000) step->tasks = plan.threads * 2;
  b.add(std::move(step));
}

// ---- hadamard ------------------------------------------------------------------------------------------------------

namespace {

struct HadamardStep : Step {
  HadamardFn fn;
  Rows rows;  // each of one or more blocks
  int x, y;
  int64_t size;
  float scale;
  void run(const Run& r, int task, int) const override {
    const int64_t each = rows.length / size, blocks = rows.count * each;
    for (int64_t i = blocks * task / tasks, end = blocks * (task + 1) / tasks, n; i < end; i += n) {
      const int64_t row = i / each, at = i % each;
      n = std::min(end - i, each - at);
      fn({r.at<float>(x) + rows.at(1, row) + at * size, r.at<float>(y) + rows.at(0, row) + at * size, n * size, size, scale});
    }
  }
};

}  // namespace

void build_hadamard(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<HadamardStep>();
  const Value& out = plan.values[op.out[0]];
  step->fn = plan.kernels->hadamard;
  step->x = op.in[0];
  step->y = op.out[0];
  step->size = op.integer("size");
  step->scale = float(1.0 / std::sqrt(double(step->size)));
  step->rows = rows_of(out.dims, {out.strides, broadcast_strides(plan.values[op.in[0]], out.dims)});
  describe(*step, plan, op, plan.kernels->row[k_hadamard]->symbol);
  if (plan.threads > 1 && out.count() > 10000) step->tasks = plan.threads * 2;
  b.add(std::move(step));
}

}  // namespace pw
