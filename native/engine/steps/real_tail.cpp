#include "engine/steps/real_tail.h"

namespace pw {

RealTail FloatTail::at(const Run& r, int64_t column) const {
  RealTail t;
  t.bias = bias.empty() ? nullptr : bias.data() + column;
  if (addend >= 0) t.addend = r.at<char>(addend) + column * (addend_bf16 ? 2 : 4);
  t.addend_bf16 = addend_bf16;
  t.out_bf16 = out_bf16;
  t.clip = clip;
  t.lo = lo;
  t.hi = hi;
  return t;
}

UnaryFn unary_kernel(const Kernels& k, const std::string& name, const KernelRow** row) {
  const struct {
    const char* name;
    UnaryFn fn;
    int slot;
  } fast[] = {{"exp", k.exp, k_exp},       {"sigmoid", k.sigmoid, k_sigmoid},       {"tanh", k.tanh, k_tanh},
              {"erf", k.erf, k_erf},       {"gelu", k.gelu, k_gelu},                {"gelu_tanh", k.gelu_tanh, k_gelu_tanh},
              {"silu", k.silu, k_silu},    {"hardswish", k.hardswish, k_hardswish}, {"clip", k.clip, k_clip},
              {"mul", k.scale, k_scale}};
  for (const auto& f : fast)
    if (name == f.name) {
      *row = k.row[f.slot];
      return f.fn;
    }
  return nullptr;
}

namespace {

int next(Builder& b, int op, const char* kind, bool dense) {
  const int follower = b.follower(op, {kind});
  const bool fits = follower > op && (!dense || b.plan.values[b.plan.ops[follower].out[0]].dense());
  return fits ? follower : -1;
}

bool made_before(const Builder& b, int value, int op) {
  const int producer = b.plan.values[value].producer;
  return producer < op || b.done.count(producer) > 0;
}

void take(Builder& b, FloatTail& t, int op, const std::string& name) {
  b.done.insert(op);
  t.ops += "+" + name;
  t.result = b.plan.ops[op].out[0];
}

// Adds the other operand of a sum, if it has the same sizes and exists by now.
int take_sum(Builder& b, FloatTail& t, int op, int number, bool dense) {
  Plan& plan = b.plan;
  const int add = next(b, op, "binary", dense);
  if (add < 0 || plan.ops[add].text("fn") != "add") return op;
  const OpNode& sum = plan.ops[add];
  const int mine = plan.ops[op].out[0], other = sum.in[0] == mine ? sum.in[1] : sum.in[0];
  const Value& v = plan.values[other];
  const auto half = b.widened.find(other);
  if (other == mine || v.dtype != PW_F32 || v.dims != plan.values[sum.out[0]].dims || !made_before(b, other, number))
    return op;
  t.addend = half == b.widened.end() ? other : half->second;
  t.addend_bf16 = half != b.widened.end();
  take(b, t, add, "add");
  return add;
}

}  // namespace

FloatTail make_float_tail(Builder& b, int number, bool matrices) {
  Plan& plan = b.plan;
  FloatTail t;
  t.ops = plan.ops[number].kind;
  t.result = plan.ops[number].out[0];
  int op = take_sum(b, t, number, number, matrices);
  if (const int unary = next(b, op, "unary", matrices); unary >= 0) {
    const OpNode& f = plan.ops[unary];
    const std::string& name = f.text("fn");
    const KernelRow* row = nullptr;
    if (name == "clip") {
      t.clip = true;
      t.lo = f.real("p");
      t.hi = f.real("q");
      take(b, t, unary, name);
    } else if (const UnaryFn fn = unary_kernel(*plan.kernels, name, &row)) {
      t.after = fn;
      t.p = f.real("p");
      t.q = f.real("q");
      take(b, t, unary, name);
    }
    if (t.clip || t.after) op = unary;
  }
  if (const int cast = next(b, op, "cast", matrices); cast >= 0 && converts_bf16(plan, plan.ops[cast]) && !(matrices && t.after)) {
    t.out_bf16 = true;
    take(b, t, cast, "cast");
  }
  return t;
}

}  // namespace pw
