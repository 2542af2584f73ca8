// Softmax, layer normalisation, reductions.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/functions.h"
#include "engine/build.h"
#include "engine/ranged.h"

namespace pw {
namespace {

struct SoftmaxStep : Step {
  SoftmaxFn fn;
  int x, y;
  int64_t rows, n;
  void run(const Run& r, int task, int) const override {
    const int64_t first = rows * task / tasks, end = rows * (task + 1) / tasks;
    fn({r.at<float>(x) + first * n, r.at<float>(y) + first * n, int(n), end - first, n});
  }
};

// Layer or RMS norm, and the rounding of its result where that follows: the row is still in the first cache.
struct LayerNormStep : Step {
  LayerNormFn fn;
  QuantizeFn quantize = nullptr;
  ConvertFn narrow = nullptr;
  int x, y, gain, shift, codes = -1, half = -1;  // y: -1 where only what it is rounded to is read
  RangedRows ranged;
  int64_t rows, n;
  float eps, r = 0;
  int32_t zero = 0, lo = 0, hi = 255;
  void run(const Run& run, int task, int thread) const override {
    const float* g = gain >= 0 ? run.at<float>(gain) : nullptr;
    const float* s = shift >= 0 ? run.at<float>(shift) : nullptr;
    for (int64_t m = rows * task / tasks; m < rows * (task + 1) / tasks; ++m) {
      float* out = y < 0 ? reinterpret_cast<float*>(run.scratch(thread)) : run.at<float>(y) + m * n;
      fn({run.at<float>(x) + m * n, out, int(n), g, s, eps});
      if (quantize) quantize({out, run.at<uint8_t>(codes) + m * n, n, r, zero, lo, hi});
      if (narrow) narrow({out, run.at<uint16_t>(half) + m * n, n});
      if (ranged) ranged.row(run, out, m);
    }
  }
};

struct ReduceStep : Step {
  int x, y, dtype;
  std::string fn;
  std::vector<int64_t> kept, kept_strides, gone, gone_strides;
  int64_t count = 1, taps = 1;

  template <class T>
  void loop(const Run& r) const {
    std::vector<int64_t> place(kept.size(), 0), inner(gone.size(), 0);
    for (int64_t i = 0; i < count; ++i) {
      int64_t at = 0;
      for (size_t a = 0; a < kept.size(); ++a) at += place[a] * kept_strides[a];
      std::fill(inner.begin(), inner.end(), 0);
      T total = fn == "prod" ? T(1) : T(0);
      bool first = true;
      for (int64_t j = 0; j < taps; ++j) {
        int64_t off = at;
        for (size_t a = 0; a < gone.size(); ++a) off += inner[a] * gone_strides[a];
        const T v = r.at<T>(x)[off];
        if (fn == "max") total = first || v > total || v != v ? v : total;
        else if (fn == "min") total = first || v < total || v != v ? v : total;
        else if (fn == "prod") total = total * v;
        else total = first ? v : total + v;
        first = false;
        for (int a = int(gone.size()) - 1; a >= 0; --a) {
          if (++inner[size_t(a)] < gone[size_t(a)]) break;
          inner[size_t(a)] = 0;
        }
      }
      if (fn == "mean") total = total / T(taps);
      r.at<T>(y)[i] = total;
      for (int a = int(kept.size()) - 1; a >= 0; --a) {
        if (++place[size_t(a)] < kept[size_t(a)]) break;
        place[size_t(a)] = 0;
      }
    }
  }
  void run(const Run& r, int, int) const override {
    if (dtype == PW_F32) loop<float>(r);
    else loop<int64_t>(r);
  }
};

// Sum or mean over one run of axes: x [outer, n, inner]. Row by row where there is an inner axis.
struct SumStep : Step {
  BinaryFn add;
  int x, y;
  int64_t outer, n, inner;
  bool mean;
  void run(const Run& r, int task, int) const override {
    for (int64_t o = outer * task / tasks; o < outer * (task + 1) / tasks; ++o) {
      const float* from = r.at<float>(x) + o * n * inner;
      float* to = r.at<float>(y) + o * inner;
      if (inner == 1) {
        float lanes[16] = {};
        for (int64_t i = 0; i < n; ++i) lanes[i % 16] += from[i];
        *to = fn::lanes_total(lanes);
      } else {
        std::memcpy(to, from, size_t(inner) * 4);
        for (int64_t i = 1; i < n; ++i) add({to, from + i * inner, to, inner, 1, 1});
      }
      if (mean)
        for (int64_t i = 0; i < inner; ++i) to[i] = to[i] / float(n);
    }
  }
};

struct ArgmaxStep : Step {
  int x, y;
  int64_t outer, n, inner;
  void run(const Run& r, int, int) const override {
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; ++i) {
        const float* row = r.at<float>(x) + o * n * inner + i;
        int64_t best = 0;
        for (int64_t k = 1; k < n; ++k) {
          const float v = row[k * inner], top = row[best * inner];
          if (v > top || (v != v && top == top)) best = k;  // the first greatest; NaN counts as greatest
        }
        r.at<int64_t>(y)[o * inner + i] = best;
      }
  }
};

int share(const Plan& plan, int64_t rows, int64_t n) {
  return plan.threads > 1 && rows * n > 8000 ? int(std::max<int64_t>(1, std::min<int64_t>(rows, plan.threads * 2))) : 1;
}

}  // namespace

void build_softmax(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<SoftmaxStep>();
  const Value& in = plan.values[op.in[0]];
  require(in.dense() && plan.values[op.out[0]].dense(), "softmax reads and writes dense rows");
  step->n = in.dims.back();
  step->rows = step->n ? in.count() / step->n : 0;
  step->fn = plan.kernels->softmax;
  step->x = op.in[0];
  step->y = op.out[0];
  describe(*step, plan, op, plan.kernels->row[k_softmax]->symbol);
  step->tasks = share(plan, step->rows, step->n * 4);
  b.add(std::move(step));
}

void build_norm(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<LayerNormStep>();
  const Value& in = plan.values[op.in[0]];
  require(in.dense() && plan.values[op.out[0]].dense(), "norms read and write dense rows");
  step->n = in.dims.back();
  step->rows = step->n ? in.count() / step->n : 0;
  const bool rms = op.kind == "rms_norm";
  step->fn = rms ? plan.kernels->rms_norm : plan.kernels->layer_norm;
  step->x = op.in[0];
  step->y = op.out[0];
  step->gain = op.input(1);
  step->shift = op.input(2);
  step->eps = op.real("eps");
  describe(*step, plan, op, plan.kernels->row[rms ? k_rms_norm : k_layer_norm]->symbol);
  for (int reader : plan.values[op.out[0]].readers) {
    const OpNode& next = plan.ops[reader];
    if (converts_bf16(plan, next) && !b.done.count(reader) && plan.values[next.out[0]].dense() && !step->narrow) {
      step->narrow = plan.kernels->to_bf16;
      step->half = next.out[0];
      step->ops += "+cast";
      if (plan.sole_reader(op.out[0]) == reader) {
        step->y = -1;
        step->scratch = (step->n + 16) * 4;
        step->writes.clear();
      }
      step->writes.push_back(next.out[0]);
      b.done.insert(reader);
      continue;
    }
    if (step->ranged.take(b, reader, *step)) continue;
    if (next.kind != "quantize" || b.done.count(reader) || !plan.values[next.out[0]].dense() || step->quantize) continue;
    step->quantize = plan.kernels->quantize;
    step->codes = next.out[0];
    step->r = 1.0f / next.real("scale");
    step->zero = int32_t(next.integer("zero"));
    step->lo = int32_t(next.integer("lo"));
    step->hi = int32_t(next.integer("hi"));
    step->ops += "+quantize";
    step->writes.push_back(next.out[0]);
    b.done.insert(reader);
  }
  step->tasks = share(plan, step->rows, step->n * 2);
  b.add(std::move(step));
}

void build_reduce(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  const Value& in = plan.values[op.in[0]];
  std::vector<int64_t> axes = op.ints("axes");
  std::sort(axes.begin(), axes.end());
  const std::string& name = op.text("fn");
  require(in.dense(), "reductions read dense tensors");
  bool run_of_axes = !axes.empty() && in.dtype == PW_F32 && (name == "sum" || name == "mean");
  for (size_t i = 1; i < axes.size(); ++i) run_of_axes = run_of_axes && axes[i] == axes[i - 1] + 1;
  if (run_of_axes && in.count() > 0) {
    auto fast = std::make_unique<SumStep>();
    fast->outer = fast->n = fast->inner = 1;
    for (int i = 0; i < in.rank(); ++i)
      (i < axes.front() ? fast->outer : i > axes.back() ? fast->inner : fast->n) *= in.dims[size_t(i)];
    require(plan.values[op.out[0]].dense(), "reductions are written densely");
    fast->add = plan.kernels->add_f32;
    fast->x = op.in[0];
    fast->y = op.out[0];
    fast->mean = name == "mean";
    describe(*fast, plan, op, plan.kernels->row[k_add_f32]->symbol);
    fast->ops = "reduce:" + name;
    fast->tasks = share(plan, fast->outer, fast->n * fast->inner);
    b.add(std::move(fast));
    return;
  }
  auto step = std::make_unique<ReduceStep>();
  for (int i = 0; i < in.rank(); ++i) {
    const bool reduced = std::find(axes.begin(), axes.end(), i) != axes.end();
    (reduced ? step->gone : step->kept).push_back(in.dims[size_t(i)]);
    (reduced ? step->gone_strides : step->kept_strides).push_back(in.strides[size_t(i)]);
    (reduced ? step->taps : step->count) *= in.dims[size_t(i)];
  }
  require(plan.values[op.out[0]].dense(), "reductions are written densely");
  step->fn = name;
  step->dtype = in.dtype;
  step->x = op.in[0];
  step->y = op.out[0];
  describe(*step, plan, op, "scalar");
  step->ops = "reduce:" + step->fn;
  b.add(std::move(step));
}

void build_argmax(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<ArgmaxStep>();
  const Value& in = plan.values[op.in[0]];
  require(in.dense() && plan.values[op.out[0]].dense(), "argmax reads and writes dense tensors");
  const size_t axis = size_t(op.integer("axis"));
  step->outer = step->inner = 1;
  for (size_t i = 0; i < in.dims.size(); ++i) {
    if (i < axis) step->outer *= in.dims[i];
    if (i > axis) step->inner *= in.dims[i];
  }
  step->n = in.dims[axis];
  require(step->n > 0, "argmax of nothing");
  step->x = op.in[0];
  step->y = op.out[0];
  describe(*step, plan, op, "scalar");
  b.add(std::move(step));
}

}  // namespace pw
