// Accumulators to codes by shifts: in a product's epilogue where float32 holds every sum, else a step in integers.
#include <cmath>

#include "engine/rows.h"
#include "engine/steps/epilogue.h"

namespace pw {
namespace {

constexpr double kExact = 1 << 24;  // whole numbers up to here are floats

// Largest |accumulator| of a product with stored weights; infinite where it is not known.
double largest_sum(const Plan& plan, const OpNode& op) {
  if ((op.kind != "conv" && op.kind != "linear") || op.input(3) >= 0) return INFINITY;
  if (plan.values[op.in[1]].kind != PW_CONSTANT || plan.constant(op.in[1]).dtype != PW_I8) return INFINITY;
  const Constant& w = plan.constant(op.in[1]);
  const int64_t rows = w.dims[0], n = rows ? w.count() / rows : 0;
  const int64_t zero = op.integer("zero"), far = std::max(zero, 255 - zero);
  const int32_t* bias = nullptr;
  if (op.input(2) >= 0) {
    if (plan.values[op.in[2]].kind != PW_CONSTANT) return INFINITY;
    bias = static_cast<const int32_t*>(plan.constant(op.in[2]).data);
  }
  double most = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int8_t* row = static_cast<const int8_t*>(w.data) + i * n;
    int64_t sum = 0;
    for (int64_t k = 0; k < n; ++k) sum += std::abs(int(row[k]));
    most = std::max(most, double(sum * far) + (bias ? std::fabs(double(bias[i])) : 0.0));
  }
  return most;
}

struct ShiftStep : Step {
  Rows rows;
  Share part;
  ShiftFn fn;
  ShiftArgs args;
  int acc, r, y;

  void run(const Run& run, int task, int) const override {
    for_rows(rows, part, task, [&](int64_t row, int64_t at, int64_t n) {
      ShiftArgs a = args;
      a.y = run.at<uint8_t>(y) + rows.at(0, row) + at;
      a.acc = run.at<int32_t>(acc) + rows.at(1, row) + at;
      if (r >= 0) a.r = run.at<uint8_t>(r) + rows.at(2, row) + at;
      a.n = n;
      fn(a);
    });
  }
};

}  // namespace

bool shifts_in_float(const Plan& plan, const OpNode& product, const OpNode& op) {
  double sum = largest_sum(plan, product);
  const int shift = int(op.integer("shift"));
  if (op.kind == "requant_shift") return sum < kExact;
  // both terms are multiples of the finer step: their sum must be less than 2^24 of those
  const int r_shift = int(op.integer("r_shift")), deepest = std::max(shift, r_shift);
  return std::ldexp(sum, deepest - shift) + std::ldexp(255.0, deepest - r_shift) < kExact && sum < kExact;
}

void build_shift(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<ShiftStep>();
  const bool sum = op.kind == "requant_add_shift";
  step->acc = op.in[0];
  step->r = sum ? op.in[1] : -1;
  step->y = op.out[0];
  const Value &out = plan.values[op.out[0]], &in = plan.values[op.in[0]];
  std::vector<std::vector<int64_t>> strides = {out.strides, in.strides};
  if (sum) strides.push_back(plan.values[op.in[1]].strides);
  step->rows = rows_of(out.dims, strides);
  step->part = share_rows(step->rows, plan.threads, 3);
  step->tasks = step->part.tasks;
  step->args = {nullptr, nullptr, nullptr, 0, int(op.integer("shift")), sum ? int(op.integer("r_shift")) : 0,
                sum ? int32_t(op.integer("r_zero")) : 0, int32_t(op.integer("zero")), int32_t(op.integer("lo")),
                int32_t(op.integer("hi"))};
  step->fn = plan.kernels->shift;
  step->kernel = plan.kernels->row[k_shift]->symbol;
  step->ops = op.kind;
  step->site = op.site;
  step->reads = {op.in[0]};
  if (sum) step->reads.push_back(op.in[1]);
  step->writes = {op.out[0]};
  b.add(std::move(step));
}

}  // namespace pw
