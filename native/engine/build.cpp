#include "engine/build.h"

#include <algorithm>
#include <cstring>

#include "engine/layout.h"

namespace pw {
namespace {

struct Entry {
  const char* kind;
  BuildFn build;
};
const Entry kBuilders[] = {
    {"conv", build_conv},
    {"linear", build_linear},
    {"linear_grouped", build_linear_grouped},
    {"unpack", build_unpack},
    {"matmul", build_matmul},
    {"attention", build_attention},
    {"past_attention", build_past_attention},
    {"past_attention_q", build_past_attention},
    {"conv_f32", build_conv_f32},
    {"linear_f32", build_linear_f32},
    {"matmul_f32", build_matmul_f32},
    {"linear_w", build_linear_f32},
    {"decode", build_decode},
    {"decode_levels", build_decode_levels},
    {"embedding", build_embedding},
    {"requant", build_epilogue},
    {"requant_shift", build_shift},
    {"requant_add_shift", build_shift},
    {"requant_add", build_epilogue},
    {"rescale", build_epilogue},
    {"quantize", build_quantize},
    {"dequantize", build_dequantize},
    {"dynamic_quantize", build_dynamic_quantize},
    {"add_q", build_add_q},
    {"mul_q", build_mul_q},
    {"affine_q", build_affine_q},
    {"table", build_table},
    {"unary", build_unary},
    {"binary", build_binary},
    {"where", build_where},
    {"cast", build_cast},
    {"iota", build_iota},
    {"full", build_full},
    {"reduce", build_reduce},
    {"argmax", build_argmax},
    {"softmax", build_softmax},
    {"layer_norm", build_norm},
    {"rms_norm", build_norm},
    {"rotary", build_rotary},
    {"hadamard", build_hadamard},
    {"max_pool", build_max_pool},
    {"sum_pool", build_sum_pool},
    {"sum_q", build_sum_q},
    {"avg_pool", build_avg_pool},
    {"reshape", build_reshape},
    {"transpose", build_movement},
    {"slice", build_movement},
    {"expand", build_movement},
    {"upsample", build_movement},
    {"concat", build_concat},
    {"pad", build_pad},
    {"stuff", build_stuff},
    {"gather", build_gather},
    {"gather_nd", build_gather_nd},
    {"sign", build_sign},
    {"conv_binary", build_conv_binary},
    {"linear_binary", build_linear_binary},
    {"lstm", build_lstm},
    {"gru", build_gru},
};

}  // namespace

namespace {

// Bytes of the tensors that a step reads and writes, each once.
int64_t traffic(const Plan& plan, const Step& step) {
  int64_t total = 0;
  for (const auto* list : {&step.reads, &step.writes})
    for (int v : std::set<int>(list->begin(), list->end()))
      if (v >= 0) total += plan.values[v].count() * dtype_size(plan.values[v].dtype);
  return total;
}

}  // namespace

void describe(Step& s, const Plan& plan, const OpNode& op, const char* kernel) {
  s.ops = op.kind;
  s.site = op.site;
  s.kernel = kernel;
  for (int v : op.in) {
    if (v < 0) continue;
    s.reads.push_back(v);
    s.bytes += plan.values[v].count() * dtype_size(plan.values[v].dtype);
  }
  for (int v : op.out) {
    s.writes.push_back(v);
    s.bytes += plan.values[v].count() * dtype_size(plan.values[v].dtype);
  }
}

void Builder::add(std::unique_ptr<Step> step) {
  for (int v : step->reads) {
    const auto found = v < 0 ? widened.end() : widened.find(plan.values[v].root);
    if (found == widened.end()) continue;
    const auto [value, source] = *found;
    widened.erase(found);
    add(convert_step(plan, source, value, plan.ops[plan.values[value].producer].site));
  }
  if (!step->bytes) step->bytes = traffic(plan, *step);
  for (int v : step->writes) {
    const int root = plan.values[v].root;
    if (!plan.values[root].halo_begin.empty() && filled_.insert(root).second)
      plan.steps.push_back(halo_step(plan, root));
  }
  plan.steps.push_back(std::move(step));
}

int Builder::follower(int op, std::initializer_list<const char*> kinds) const {
  const int reader = plan.sole_reader(plan.ops[op].out[0]);
  if (reader < 0) return -1;
  for (const char* kind : kinds)
    if (plan.ops[reader].kind == kind) return reader;
  return -1;
}

int Builder::readable(int value, const std::vector<int64_t>& begin, const std::vector<int64_t>& end, int64_t fill) {
  const Value& v = plan.values[value];
  const Value& root = plan.values[v.root];
  const bool in_arena = root.kind == PW_TEMPORARY;
  const bool padding = std::any_of(begin.begin(), begin.end(), [](int64_t p) { return p > 0; }) ||
                       std::any_of(end.begin(), end.end(), [](int64_t p) { return p > 0; });
  if (in_arena && !padding) return value;
  if (in_arena && v.root == value && !v.halo_begin.empty() && v.fill == fill) {
    bool enough = true;
    for (size_t i = 0; i < begin.size(); ++i)
      enough = enough && v.halo_begin[i] >= begin[i] && v.halo_end[i] >= end[i];
    if (enough) return value;
  }
  const int copy = padded_copy(plan, value, begin, end, fill);
  const Value &from = plan.values[value], &to = plan.values[copy];
  add(copy_step(plan, value, 0, from.strides, copy, 0, to.strides, from.dims));
  return copy;
}

void build_steps(Plan& plan) {
  Builder b(plan);
  for (b.now = 0; b.now < int(plan.ops.size()); ++b.now) {
    const auto waiting = b.put_off.find(b.now);
    if (waiting == b.put_off.end() && b.done.count(b.now)) continue;
    const int op = waiting == b.put_off.end() ? b.now : waiting->second;
    const Entry* found = nullptr;
    for (const Entry& e : kBuilders)
      if (plan.ops[op].kind == e.kind) found = &e;
    if (!found) fail("op " + plan.ops[op].kind + " is unknown to the engine");
    try {
      const size_t before = plan.steps.size();
      found->build(b, op);
      for (size_t s = before; s < plan.steps.size(); ++s)  // copies and padding made on its behalf
        if (plan.steps[s]->site.empty()) plan.steps[s]->site = plan.ops[op].site;
    } catch (const std::exception& e) {
      fail(plan.ops[op].kind + " at " + plan.ops[op].site + ": " + e.what());
    }
  }
  for (size_t i = 0; i < plan.outputs.size(); ++i) {
    const int value = plan.outputs[i];
    const Value& v = plan.values[value];
    if (plan.values[v.root].kind == PW_OUTPUT && plan.values[v.root].index == int(i) && v.root == value) continue;
    Value out;
    out.dtype = v.dtype;
    out.dims = v.dims;
    out.kind = PW_OUTPUT;
    out.index = int(i);
    const int number = int(plan.values.size());
    out.root = number;
    out.strides = v.dims;
    int64_t stride = 1;
    for (int a = int(v.dims.size()) - 1; a >= 0; --a) {
      out.strides[a] = stride;
      stride *= v.dims[a];
    }
    out.allocated = stride;
    const std::vector<int64_t> from = v.strides, dims = v.dims, to = out.strides;
    plan.values.push_back(std::move(out));
    b.add(copy_step(plan, value, 0, from, number, 0, to, dims));
  }
}

}  // namespace pw
