#include "engine/steps/epilogue.h"

#include <algorithm>
#include <cmath>

#include "engine/layout.h"

namespace pw {

void Tail::finish() {
  base.bias = bias.data();
  base.multiplier = multiplier.empty() ? nullptr : multiplier.data();
  base.bias_f32 = bias_f32.empty() ? nullptr : bias_f32.data();
  base.colsum = colsum.empty() ? nullptr : colsum.data();
}

Epilogue Tail::at(const Run& r) const {
  Epilogue e = base;
  if (residual >= 0) {
    if (e.out == Out::kU8) e.residual = r.at<uint8_t>(residual);
    else e.addend = r.at<float>(residual);
  }
  if (row_scale >= 0) e.row_scale = r.at<float>(row_scale);
  if (row_zero >= 0) e.row_zero = r.at<int32_t>(row_zero);
  return e;
}

namespace {

void bounds(Epilogue& e, const OpNode& op) {
  e.zero = int32_t(op.integer("zero"));
  e.lo = int32_t(op.integer("lo"));
  e.hi = int32_t(op.integer("hi"));
}

// The op after `op`, if it alone reads the result and is of one of the kinds.
int next(Builder& b, int op, std::initializer_list<const char*> kinds) {
  const int follower = b.follower(op, kinds);
  return follower > op ? follower : -1;
}

// Whether a value exists when the step of `op` runs: made by an earlier op, or by a step that took its op in.
bool made_before(const Builder& b, int value, int op) {
  const int producer = b.plan.values[value].producer;
  return producer < std::max(op, b.now) || b.done.count(producer) > 0;
}

// The sum that alone reads what a rescaling makes, and what it adds: floats of the same sizes. -1: none.
std::pair<int, int> added(Builder& b, int rescale) {
  const Plan& plan = b.plan;
  const int add = next(b, rescale, {"binary"}), scaled = plan.ops[rescale].out[0];
  if (add < 0 || plan.ops[add].text("fn") != "add") return {-1, -1};
  const OpNode& sum = plan.ops[add];
  const int other = sum.in[0] == scaled ? sum.in[1] : sum.in[0];  // addition of two floats commutes, bit for bit
  const Value& v = plan.values[other];
  const bool same = v.dims == plan.values[sum.out[0]].dims && other != scaled;
  if (!same || v.dtype != PW_F32 || v.kind == PW_CONSTANT) return {-1, -1};
  return {add, other};
}

void take(Builder& b, Tail& t, int op) {
  b.done.insert(op);
  t.ops += "+" + b.plan.ops[op].kind;
  t.last_op = op;
  t.result = b.plan.ops[op].out[0];
}

}  // namespace

void tail_constants(const Plan& plan, Tail& t, const OpNode& op, int64_t columns) {
  if (op.kind == "requant_shift" || op.kind == "requant_add_shift") {  // powers of two: exponents, not products
    t.multiplier.assign(size_t((columns + 63) / 64 * 64), std::ldexp(1.0f, -int(op.integer("shift"))));
    t.base.out = Out::kU8;
    bounds(t.base, op);
    if (op.kind == "requant_shift") return;
    t.residual = op.in[1];
    t.base.r_zero = int32_t(op.integer("r_zero"));
    t.base.r_multiplier = std::ldexp(1.0f, -int(op.integer("r_shift")));
    return;
  }
  t.multiplier = columns_f32(plan, op.in[1], columns);
  if (op.kind == "rescale") {
    t.base.out = Out::kF32;
    if (op.input(2) >= 0) t.bias_f32 = columns_f32(plan, op.in[2], columns);
    if (op.input(3) >= 0) {
      t.row_scale = op.in[3];
      t.base.row_step = plan.values[op.in[3]].count() == 1 ? 0 : 1;
    }
    return;
  }
  t.base.out = Out::kU8;
  bounds(t.base, op);
  if (op.kind == "requant_add") {
    t.residual = op.in[2];
    t.base.r_zero = int32_t(op.integer("r_zero"));
    t.base.r_multiplier = op.real("r_multiplier");
  }
}

Tail make_tail(Builder& b, int op, int64_t columns) {
  Plan& plan = b.plan;
  Tail t;
  t.ops = plan.ops[op].kind;
  t.last_op = op;
  t.result = plan.ops[op].out[0];
  t.bias.assign((columns + 63) / 64 * 64, 0);
  const int after = next(b, op, {"requant", "requant_add", "requant_shift", "requant_add_shift", "rescale"});
  if (after < 0) return t;
  const OpNode& then = plan.ops[after];
  const bool by_shift = then.kind == "requant_shift" || then.kind == "requant_add_shift";
  if (by_shift && !shifts_in_float(plan, plan.ops[op], then)) return t;
  // the step runs where `op` stands: all that it reads must have been made by then
  for (int v : plan.ops[after].in)
    if (v >= 0 && v != plan.ops[op].out[0] && !made_before(b, v, op)) return t;
  tail_constants(plan, t, plan.ops[after], columns);
  take(b, t, after);
  if (t.base.out == Out::kU8) {
    const int table = next(b, after, {"table"});
    if (table >= 0 && plan.constant(plan.ops[table].in[1]).dtype == PW_U8) {
      t.base.lut = static_cast<const uint8_t*>(plan.constant(plan.ops[table].in[1]).data);
      t.base.permutes = plan.kernels->isa >= kAvx512Vbmi;
      take(b, t, table);
    }
  } else if (const auto [add, other] = added(b, after); add >= 0 && made_before(b, other, op)) {
    t.residual = other;
    take(b, t, add);
  }
  return t;
}

bool put_off(Builder& b, int op) {
  const int after = b.now == op ? next(b, op, {"rescale"}) : -1;
  if (after < 0) return false;
  const auto [add, other] = added(b, after);
  if (add < 0 || made_before(b, other, op)) return false;
  b.put_off[add] = op;
  b.done.insert({after, add});
  return true;
}

namespace {

struct EpilogueStep : Step {
  Tail tail;
  EpilogueFn fn;
  int acc;
  int64_t columns, rows, y_row, r_row;

  void run(const Run& r, int task, int) const override {
    const Epilogue e = tail.at(r);
    const int32_t* x = r.at<int32_t>(acc);
    char* y = r.at<char>(tail.result);
    const int64_t size = dtype_size(e.out == Out::kU8 ? PW_U8 : PW_F32);
    const int64_t from = rows * task / tasks, to = rows * (task + 1) / tasks;
    for (int64_t m = from; m < to; ++m)
      fn({x + m * columns, y + m * y_row * size, int(columns), &e, e.residual ? e.residual + m * r_row : nullptr,
          e.addend ? e.addend + m * r_row : nullptr, int(m)});
  }
};

}  // namespace

// An epilogue whose accumulators have other readers too.
void build_epilogue(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<EpilogueStep>();
  const Value& acc = plan.values[op.in[0]];
  step->columns = acc.dims.empty() ? 1 : acc.dims.back();
  step->rows = step->columns ? acc.count() / step->columns : 0;
  step->acc = op.in[0];
  Tail& t = step->tail;
  t.bias.assign((step->columns + 63) / 64 * 64, 0);
  tail_constants(plan, t, op, step->columns);
  t.result = op.out[0];
  // rows must lie evenly: a result or residual with padding goes by way of a dense copy
  int result = op.out[0], copy_to = -1;
  if (!plan.values[result].dense()) {
    copy_to = result;
    t.result = result = padded_copy(plan, result, {}, {}, 0);
  }
  if (t.residual >= 0 && !plan.values[t.residual].dense()) {
    const int from = t.residual;
    t.residual = padded_copy(plan, from, {}, {}, 0);
    const Value &v = plan.values[from], &to = plan.values[t.residual];
    b.add(copy_step(plan, from, 0, v.strides, t.residual, 0, to.strides, v.dims));
  }
  t.finish();
  step->y_row = step->r_row = step->columns;
  step->fn = plan.kernels->epilogue;
  step->kernel = plan.kernels->row[k_epilogue]->symbol;
  step->ops = op.kind;
  step->site = op.site;
  step->bytes = acc.count() * 5;
  step->tasks = plan.threads > 1 && acc.count() > 40000 ? plan.threads * 2 : 1;
  step->reads = {op.in[0], t.residual, t.row_scale};
  step->writes = {result};
  b.add(std::move(step));
  if (copy_to >= 0) {
    const auto from = plan.values[result].strides, to = plan.values[copy_to].strides, dims = plan.values[copy_to].dims;
    b.add(copy_step(plan, result, 0, from, copy_to, 0, to, dims));
  }
}

}  // namespace pw
