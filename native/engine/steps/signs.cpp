// Signs as a step of their own.
#include "engine/steps/signs.h"

#include <algorithm>

namespace pw {
namespace {

struct SignStep : Step {
  Signs signs;
  SignFn fn;
  int x, y;
  // lines of `length` rows (the axis before the last), outer axes in front
  std::vector<int64_t> dims, x_strides, y_strides;
  int64_t length = 1, x_row = 0, y_row = 0, lines = 1, size = 1;

  void run(const Run& r, int task, int) const override {
    const char* from = r.at<char>(x);
    uint8_t* to = r.at<uint8_t>(y);
    const int64_t rows = lines * length, first = rows * task / tasks, last = rows * (task + 1) / tasks;
    for (int64_t row = first; row < last;) {
      const int64_t line = row / length, in = row % length, count = std::min(length - in, last - row);
      int64_t xo = in * x_row, yo = in * y_row, rest = line;
      for (int a = int(dims.size()) - 1; a >= 0; --a) {
        xo += rest % dims[a] * x_strides[a];
        yo += rest % dims[a] * y_strides[a];
        rest /= dims[a];
      }
      signs.run(fn, size, from + xo * size, x_row, to + yo, y_row, count);
      row += count;
    }
  }
};

}  // namespace

void build_sign(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<SignStep>();
  const Value &x = plan.values[op.in[0]], &y = plan.values[op.out[0]];
  step->signs = Signs::of(plan, op);
  if (x.count() == 0) return;
  require(x.strides.back() == 1 && y.strides.back() == 1, "channels must lie side by side");
  step->fn = sign_kernel(plan, x.dtype, &step->kernel);
  step->x = op.in[0];
  step->y = op.out[0];
  step->size = dtype_size(x.dtype);
  const int outer = x.rank() - 1;
  step->x_row = step->signs.channels;
  step->y_row = y.dims.back();
  if (x.dense() && y.dense()) {
    step->length = x.count() / step->signs.channels;
  } else if (outer > 0) {
    step->length = x.dims[outer - 1];
    step->x_row = x.strides[outer - 1];
    step->y_row = y.strides[outer - 1];
    for (int a = 0; a + 1 < outer; ++a) {
      step->dims.push_back(x.dims[a]);
      step->x_strides.push_back(x.strides[a]);
      step->y_strides.push_back(y.strides[a]);
      step->lines *= x.dims[a];
    }
  }
  step->tasks = plan.threads > 1 && x.count() * step->size > 100000 ? plan.threads * 2 : 1;
  step->ops = op.kind;
  step->site = op.site;
  step->reads = {op.in[0]};
  step->writes = {op.out[0]};
  b.add(std::move(step));
}

}  // namespace pw
