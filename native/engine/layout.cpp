// Where values lie: padding kept around a tensor for the convolutions that read it, concatenations that are written in
// place, reshapes that are the same memory.
#include <algorithm>
#include <set>

#include "engine/build.h"
#include "engine/layout.h"
#include "engine/plan.h"

namespace pw {
namespace {

// Ops whose step writes results at any strides (the last axis side by side).
bool writes_strided(const Plan& plan, const OpNode& op) {
  static const std::set<std::string> kinds = {
      "requant", "requant_add", "requant_shift", "requant_add_shift", "quantize", "dequantize", "table",  "add_q", "mul_q", "affine_q", "max_pool",
      "transpose", "slice",     "concat",   "pad",        "upsample", "stuff", "expand", "conv_f32", "rescale", "unary", "binary",
      "sign"};
  return kinds.count(op.kind) > 0 || converts_bf16(plan, op);
}

bool reads_strided(const Plan& plan, const OpNode& op, int value) {
  static const std::set<std::string> kinds = {"conv",   "conv_f32", "quantize", "dequantize", "table",    "add_q",
                                              "mul_q",  "affine_q", "max_pool", "sum_pool",   "transpose", "slice",
                                              "concat", "pad",      "upsample", "stuff",      "expand",   "unary", "binary",
                                              "sign",   "conv_binary"};
  if (op.kind == "requant_add") return op.in[2] == value && op.in[0] != value;
  if (op.kind == "requant_add_shift") return op.in[1] == value;
  return kinds.count(op.kind) > 0 || converts_bf16(plan, op);
}

bool is_output(const Plan& plan, int value) {
  return std::find(plan.outputs.begin(), plan.outputs.end(), value) != plan.outputs.end();
}

std::vector<int64_t> dense_strides(const std::vector<int64_t>& dims) {
  std::vector<int64_t> strides(dims.size(), 1);
  for (int i = int(dims.size()) - 2; i >= 0; --i) strides[i] = strides[i + 1] * dims[i + 1];
  return strides;
}

bool is_conv(const OpNode& op) { return op.kind == "conv" || op.kind == "conv_f32" || op.kind == "conv_binary"; }

// Padding that the convolutions reading a value want around it. False: they disagree, or it is known too late.
bool wanted_halo(const Plan& plan, const Value& v, int number, std::vector<int64_t>& begin, std::vector<int64_t>& end,
                 int64_t& fill) {
  bool any = false;
  for (int reader : v.readers) {
    const OpNode& op = plan.ops[reader];
    if (!is_conv(op) || op.in[0] != number) continue;
    const auto& pads = op.ints("pads");
    const int dims = int(pads.size()) / 2;
    if (std::all_of(pads.begin(), pads.end(), [](int64_t p) { return p == 0; })) continue;
    if (op.kind == "conv" && op.input(3) >= 0) return false;
    const int64_t code = op.kind == "conv" ? op.integer("zero") : 0;
    if (any && code != fill) return false;
    if (!any) {
      begin.assign(v.dims.size(), 0);
      end = begin;
    }
    any = true;
    fill = code;
    for (int i = 0; i < dims; ++i) {
      begin[1 + i] = std::max(begin[1 + i], pads[i]);
      end[1 + i] = std::max(end[1 + i], pads[dims + i]);
    }
  }
  return any;
}

void place_own(Value& v, int number, std::vector<int64_t> begin, std::vector<int64_t> end, int64_t fill) {
  v.root = number;
  v.fill = fill;
  std::vector<int64_t> padded = v.dims;
  if (!begin.empty())
    for (size_t i = 0; i < padded.size(); ++i) padded[i] += begin[i] + end[i];
  v.strides = dense_strides(padded);
  v.allocated = 1;
  for (int64_t d : padded) v.allocated *= d;
  v.offset = 0;
  for (size_t i = 0; i < begin.size(); ++i) v.offset += begin[i] * v.strides[i];
  v.halo_begin = std::move(begin);
  v.halo_end = std::move(end);
}

bool strided_readers(const Plan& plan, const Value& v, int number) {
  return std::all_of(v.readers.begin(), v.readers.end(),
                     [&](int r) { return reads_strided(plan, plan.ops[r], number); });
}

bool free_to_place(const Plan& plan, int number) {
  const Value& v = plan.values[number];
  return v.kind == PW_TEMPORARY && v.producer >= 0 && !is_output(plan, number) &&
         writes_strided(plan, plan.ops[v.producer]) && strided_readers(plan, v, number);
}

void place(Plan& plan, int number) {
  Value& v = plan.values[number];
  if (v.root >= 0) return;
  std::vector<int64_t> begin, end;
  int64_t fill = 0;
  if (free_to_place(plan, number) && wanted_halo(plan, v, number, begin, end, fill))
    place_own(v, number, begin, end, fill);
  else
    place_own(v, number, {}, {}, 0);
}

// Operands of a concatenation become views of its result where nothing speaks against it.
void place_operands(Plan& plan, const OpNode& op) {
  const Value& out = plan.values[op.out[0]];
  const int axis = int(op.integer("axis"));
  int64_t at = 0;
  for (int number : op.in) {
    Value& v = plan.values[number];
    std::vector<int64_t> begin, end;
    int64_t fill = 0;
    const bool once = std::count(op.in.begin(), op.in.end(), number) == 1;
    if (once && v.root < 0 && free_to_place(plan, number) && !wanted_halo(plan, v, number, begin, end, fill) &&
        out.kind == PW_TEMPORARY) {
      v.root = out.root;
      v.strides = out.strides;
      v.offset = out.offset + at * out.strides[axis];
    }
    at += v.dims[axis];
  }
}

}  // namespace

int padded_copy(Plan& plan, int source, const std::vector<int64_t>& begin, const std::vector<int64_t>& end,
                int64_t fill) {
  Value copy;
  copy.dtype = plan.values[source].dtype;
  copy.dims = plan.values[source].dims;
  const int number = int(plan.values.size());
  place_own(copy, number, begin, end, fill);
  plan.values.push_back(std::move(copy));
  return number;
}

void assign_places(Plan& plan) {
  // results of reshapes are the memory of their operands, if both are dense (and they are: see reads_strided)
  std::vector<int> alias(plan.values.size(), -1);
  for (const OpNode& op : plan.ops)
    if (op.kind == "reshape" && !is_output(plan, op.out[0])) alias[op.out[0]] = op.in[0];
  for (int i = 0; i < int(plan.values.size()); ++i)
    if (plan.values[i].kind != PW_TEMPORARY) place_own(plan.values[i], i, {}, {}, 0);
  // an output that nothing else reads is written where the caller wants it
  std::set<int> direct;
  for (int i = 0; i < int(plan.outputs.size()); ++i) {
    Value& v = plan.values[plan.outputs[i]];
    if (v.kind != PW_TEMPORARY || !v.readers.empty() || alias[plan.outputs[i]] >= 0 || direct.count(plan.outputs[i]))
      continue;
    direct.insert(plan.outputs[i]);
    v.kind = PW_OUTPUT;
    v.index = i;
    place_own(v, plan.outputs[i], {}, {}, 0);
  }
  for (auto op = plan.ops.rbegin(); op != plan.ops.rend(); ++op) {
    for (int out : op->out)
      if (alias[out] < 0) place(plan, out);
    if (op->kind == "concat") place_operands(plan, *op);
  }
  for (const OpNode& op : plan.ops)
    for (int out : op.out)
      if (alias[out] >= 0) {
        Value& v = plan.values[out];
        const Value& from = plan.values[alias[out]];
        v.root = from.root;
        v.offset = from.offset;
        v.strides = dense_strides(v.dims);
      }
}

}  // namespace pw
