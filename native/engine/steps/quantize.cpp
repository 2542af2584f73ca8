// Between floats and codes, and elementwise ops on codes.
#include <cmath>
#include <cstring>

#include "engine/build.h"
#include "engine/ranged.h"
#include "engine/rows.h"

namespace pw {
namespace {

// A step over rows of equal sizes: result first, then the operands.
struct RowStep : Step {
  Rows rows;
  Share part;
  int y, x[2] = {-1, -1};

  void set(Builder& b, const OpNode& op, KernelRow const* row, std::initializer_list<int> operands, int64_t cost) {
    Plan& plan = b.plan;
    y = op.out[0];
    const Value& out = plan.values[y];
    std::vector<std::vector<int64_t>> strides = {out.strides};
    int i = 0;
    bytes = out.count() * dtype_size(out.dtype);
    reads.clear();
    for (int v : operands) {
      x[i++] = v;
      strides.push_back(broadcast_strides(plan.values[v], out.dims));
      reads.push_back(v);
      bytes += plan.values[v].count() * dtype_size(plan.values[v].dtype);
    }
    rows = rows_of(out.dims, strides);
    part = share_rows(rows, plan.threads, cost);
    tasks = part.tasks;
    ops = op.kind;
    site = op.site;
    kernel = row->symbol;
    writes = {y};
  }
};

struct Clamp {
  int32_t zero, lo, hi;
  explicit Clamp(const OpNode& op)
      : zero(int32_t(op.integer("zero"))), lo(int32_t(op.integer("lo"))), hi(int32_t(op.integer("hi"))) {}
};

struct QuantizeStep : RowStep {
  QuantizeFn fn;
  float r;
  Clamp clamp;
  explicit QuantizeStep(const OpNode& op) : clamp(op) {}
  void run(const Run& run, int task, int) const override {
    const float* from = run.at<float>(x[0]);
    uint8_t* to = run.at<uint8_t>(y);
    for_rows(rows, part, task, [&](int64_t row, int64_t at, int64_t n) {
      fn({from + rows.at(1, row) + at, to + rows.at(0, row) + at, n, r, clamp.zero, clamp.lo, clamp.hi});
    });
  }
};

// Planes of an image in float to codes side by side: quantize and transpose [N, C, *space] -> [N, *space, C], C <= 4.
struct PlanesStep : Step {
  QuantizeFn quantize;
  InterleaveFn interleave;
  float r;
  Clamp clamp;
  int x, y;
  int64_t images, planes, lines, width, y_image, y_line;
  explicit PlanesStep(const OpNode& op) : clamp(op) {}
  void run(const Run& run, int task, int thread) const override {
    uint8_t* rows[4];
    for (int p = 0; p < 4; ++p) rows[p] = reinterpret_cast<uint8_t*>(run.scratch(thread)) + p * ((width + 127) / 64 * 64);
    const int64_t all = images * lines, from = all * task / tasks, to = all * (task + 1) / tasks;
    for (int64_t line = from; line < to; ++line) {
      const int64_t image = line / lines, row = line % lines;
      for (int64_t p = 0; p < planes; ++p)
        quantize({run.at<float>(x) + ((image * planes + p) * lines + row) * width, rows[p], width, r, clamp.zero,
                  clamp.lo, clamp.hi});
      interleave({{rows[0], rows[1], rows[2], rows[3]}, int(planes), width,
                  run.at<uint8_t>(y) + image * y_image + row * y_line});
    }
  }
};

bool to_channels_last(const OpNode& op) {
  const auto& perm = op.ints("perm");
  if (perm.size() != 4) return false;
  return perm[0] == 0 && perm[1] == 2 && perm[2] == 3 && perm[3] == 1;
}

struct DequantizeStep : RowStep {
  DequantizeFn fn;
  float scale;
  int32_t zero;
  void run(const Run& run, int task, int) const override {
    for_rows(rows, part, task, [&](int64_t row, int64_t at, int64_t n) {
      fn({run.at<uint8_t>(x[0]) + rows.at(1, row) + at, run.at<float>(y) + rows.at(0, row) + at, n, scale, zero});
    });
  }
};

struct TableStep : RowStep {
  TableFn fn = nullptr;
  TableF32Fn fn_f32 = nullptr;
  const void* lut;
  void run(const Run& run, int task, int) const override {
    for_rows(rows, part, task, [&](int64_t row, int64_t at, int64_t n) {
      const uint8_t* from = run.at<uint8_t>(x[0]) + rows.at(1, row) + at;
      const int64_t to = rows.at(0, row) + at;
      if (fn) fn({from, run.at<uint8_t>(y) + to, n, static_cast<const uint8_t*>(lut)});
      else fn_f32({from, run.at<float>(y) + to, n, static_cast<const float*>(lut)});
    });
  }
};

struct AddStep : RowStep {
  AddFn fn;
  AddArgs args;
  bool b_moves, swapped = false;
  void run(const Run& run, int task, int) const override {
    for_rows(rows, part, task, [&](int64_t row, int64_t at, int64_t n) {
      AddArgs a = args;
      a.a = run.at<uint8_t>(x[0]) + rows.at(1, row) + at;
      a.b = run.at<uint8_t>(x[1]) + rows.at(2, row) + (b_moves ? at : 0);
      a.y = run.at<uint8_t>(y) + rows.at(0, row) + at;
      a.n = n;
      fn(a);
    });
  }
};

struct MulStep : RowStep {
  MulFn fn;
  MulArgs args;
  bool b_moves;
  void run(const Run& run, int task, int) const override {
    for_rows(rows, part, task, [&](int64_t row, int64_t at, int64_t n) {
      MulArgs a = args;
      a.a = run.at<uint8_t>(x[0]) + rows.at(1, row) + at;
      a.b = run.at<uint8_t>(x[1]) + rows.at(2, row) + (b_moves ? at : 0);
      a.y = run.at<uint8_t>(y) + rows.at(0, row) + at;
      a.n = n;
      fn(a);
    });
  }
};

struct AffineStep : Step {
  AffineFn fn;
  Rows rows;
  Share part;
  int x, y;
  int64_t channels;
  std::vector<float> m, b;
  int32_t in_zero;
  Clamp clamp;
  explicit AffineStep(const OpNode& op) : clamp(op) {}
  void run(const Run& run, int task, int) const override {
    for_rows(rows, part, task, [&](int64_t row, int64_t at, int64_t n) {
      for (int64_t c = 0; c < n; c += channels)  // a run may hold several rows of channels
        fn({run.at<uint8_t>(x) + rows.at(1, row) + at + c, run.at<uint8_t>(y) + rows.at(0, row) + at + c, int(channels),
            m.data(), b.data(), in_zero, clamp.zero, clamp.lo, clamp.hi});
    });
  }
};

struct DynamicStep : Step {
  RangedRows ranged;
  int x;
  int64_t rows;
  void run(const Run& run, int task, int) const override {
    const int64_t from = rows * task / tasks, to = rows * (task + 1) / tasks;
    for (int64_t m = from; m < to; ++m) ranged.row(run, run.at<float>(x) + m * ranged.n, m);
  }
};

}  // namespace

void build_quantize(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  const float r = 1.0f / op.real("scale");
  const int next = b.follower(number, {"transpose"});
  const Value& in = plan.values[op.in[0]];
  if (next >= 0 && to_channels_last(plan.ops[next]) && in.dense() && in.dims[1] <= 4 && in.dims[1] > 0) {
    const Value& out = plan.values[plan.ops[next].out[0]];
    if (out.strides[3] == 1 && out.strides[2] == out.dims[3]) {
      auto step = std::make_unique<PlanesStep>(op);
      step->quantize = plan.kernels->quantize;
      step->interleave = plan.kernels->interleave;
      step->r = r;
      step->x = op.in[0];
      step->y = plan.ops[next].out[0];
      step->images = in.dims[0];
      step->planes = in.dims[1];
      step->lines = in.dims[2];
      step->width = in.dims[3];
      step->y_image = out.strides[0];
      step->y_line = out.strides[1];
      step->scratch = 4 * ((in.dims[3] + 127) / 64 * 64) + 64;
      step->ops = op.kind + "+transpose";
      step->site = op.site;
      step->kernel = plan.kernels->row[k_quantize]->symbol;
      step->bytes = in.count() * 5;
      step->tasks = plan.threads > 1 && in.count() > 20000 ? int(std::min<int64_t>(plan.threads * 4, in.dims[2])) : 1;
      step->reads = {op.in[0]};
      step->writes = {step->y};
      b.done.insert(next);
      b.add(std::move(step));
      return;
    }
  }
  auto step = std::make_unique<QuantizeStep>(op);
  step->set(b, op, plan.kernels->row[k_quantize], {op.in[0]}, 2);
  step->fn = plan.kernels->quantize;
  step->r = r;
  b.add(std::move(step));
}

void build_dequantize(Builder& b, int number) {
  const OpNode& op = b.plan.ops[number];
  auto step = std::make_unique<DequantizeStep>();
  step->set(b, op, b.plan.kernels->row[k_dequantize], {op.in[0]}, 2);
  step->fn = b.plan.kernels->dequantize;
  step->scale = op.real("scale");
  step->zero = int32_t(op.integer("zero"));
  b.add(std::move(step));
}

void build_table(Builder& b, int number) {
  const OpNode& op = b.plan.ops[number];
  auto step = std::make_unique<TableStep>();
  const Constant& lut = b.plan.constant(op.in[1]);
  require(lut.count() == 256, "a table has 256 entries");
  const bool codes = lut.dtype == PW_U8;
  step->set(b, op, b.plan.kernels->row[codes ? k_table : k_table_f32], {op.in[0]}, 1);
  if (codes) step->fn = b.plan.kernels->table;
  else step->fn_f32 = b.plan.kernels->table_f32;
  step->lut = lut.data;
  b.add(std::move(step));
}

namespace {

// Operands in the order that a kernel takes: the second may stand still along the last axis, the first may not.
bool operands_swapped(const Plan& plan, const OpNode& op) {
  const Value &out = plan.values[op.out[0]], &a = plan.values[op.in[0]];
  return out.rank() > 0 && out.dims.back() > 1 && broadcast_strides(a, out.dims).back() == 0;
}

bool last_axis_moves(const Plan& plan, const OpNode& op, int operand) {
  const Value& out = plan.values[op.out[0]];
  return out.rank() == 0 || out.dims.back() == 1 || broadcast_strides(plan.values[operand], out.dims).back() != 0;
}

}  // namespace

void build_add_q(Builder& b, int number) {
  const OpNode& op = b.plan.ops[number];
  auto step = std::make_unique<AddStep>();
  const bool swap = operands_swapped(b.plan, op);  // t + u is u + t, bit for bit
  const int first = op.in[swap ? 1 : 0], second = op.in[swap ? 0 : 1];
  step->set(b, op, b.plan.kernels->row[k_add], {first, second}, 3);
  step->fn = b.plan.kernels->add;
  const Clamp clamp(op);
  const int32_t a_zero = int32_t(op.integer(swap ? "b_zero" : "a_zero"));
  const int32_t b_zero = int32_t(op.integer(swap ? "a_zero" : "b_zero"));
  const float a_m = op.real(swap ? "b_multiplier" : "a_multiplier"), b_m = op.real(swap ? "a_multiplier" : "b_multiplier");
  step->b_moves = last_axis_moves(b.plan, op, second);
  step->args = {nullptr, nullptr, nullptr, 0, a_zero, b_zero, clamp.zero, clamp.lo, clamp.hi, a_m, b_m, step->b_moves};
  b.add(std::move(step));
}

void build_mul_q(Builder& b, int number) {
  const OpNode& op = b.plan.ops[number];
  auto step = std::make_unique<MulStep>();
  const bool swap = operands_swapped(b.plan, op);
  const int first = op.in[swap ? 1 : 0], second = op.in[swap ? 0 : 1];
  step->set(b, op, b.plan.kernels->row[k_mul], {first, second}, 3);
  step->fn = b.plan.kernels->mul;
  const Clamp clamp(op);
  const int32_t a_zero = int32_t(op.integer(swap ? "b_zero" : "a_zero"));
  const int32_t b_zero = int32_t(op.integer(swap ? "a_zero" : "b_zero"));
  step->b_moves = last_axis_moves(b.plan, op, second);
  step->args = {nullptr, nullptr, nullptr, 0, a_zero, b_zero, clamp.zero, clamp.lo, clamp.hi, op.real("multiplier"),
                step->b_moves};
  b.add(std::move(step));
}

void build_affine_q(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<AffineStep>(op);
  const Value &in = plan.values[op.in[0]], &out = plan.values[op.out[0]];
  step->channels = out.dims.back();
  step->rows = rows_of(out.dims, {out.strides, in.strides});
  step->part = share_rows(step->rows, plan.threads, 3);
  if (!step->part.by_row) step->part.tasks = 1;  // pieces must be whole rows of channels
  step->tasks = step->part.tasks;
  step->fn = plan.kernels->affine;
  step->kernel = plan.kernels->row[k_affine]->symbol;
  step->x = op.in[0];
  step->y = op.out[0];
  step->m = columns_f32(plan, op.in[1], step->channels);
  step->b = columns_f32(plan, op.in[2], step->channels);
  step->in_zero = int32_t(op.integer("in_zero"));
  step->ops = op.kind;
  step->site = op.site;
  step->bytes = out.count() * 2;
  step->reads = {op.in[0]};
  step->writes = {op.out[0]};
  b.add(std::move(step));
}

void build_dynamic_quantize(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<DynamicStep>();
  const Value& in = plan.values[op.in[0]];
  const bool whole = !op.flag("per_token");
  RangedRows& r = step->ranged;
  r.n = whole ? in.count() : in.dims.back();
  step->rows = whole ? 1 : (r.n ? in.count() / r.n : 0);
  r.minmax = plan.kernels->minmax;
  r.quantize = plan.kernels->quantize;
  r.codes = op.out[0];
  r.scale = op.out[1];
  r.zero = op.out[2];
  step->kernel = plan.kernels->row[k_quantize]->symbol;
  step->x = op.in[0];
  step->ops = op.kind;
  step->site = op.site;
  step->bytes = in.count() * 5;
  step->tasks = plan.threads > 1 && in.count() > 20000 && step->rows > 1 ? plan.threads * 2 : 1;
  step->reads = {op.in[0]};
  step->writes = {op.out[0], op.out[1], op.out[2]};
  b.add(std::move(step));
}

}  // namespace pw
