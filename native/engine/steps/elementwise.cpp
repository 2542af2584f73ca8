// Float, integer and boolean ops that stay out of the fast path: one loop for each, kernels where they pay.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/functions.h"
#include "engine/build.h"
#include "engine/ranged.h"
#include "engine/rows.h"
#include "engine/steps/real_tail.h"

namespace pw {
namespace {

int last_step(const Value& v, const Value& out) {
  if (out.rank() == 0 || out.dims.back() == 1) return 1;
  return v.rank() > 0 && v.dims.back() != 1 ? 1 : 0;
}

// ---- unary -------------------------------------------------------------------------------------------------------

float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }
float softplus(float x) { return fn::maximum(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

using Scalar = float (*)(float, float, float);
struct Named {
  const char* name;
  Scalar fn;
};
const Named kUnary[] = {
    {"identity", [](float x, float, float) { return x; }},
    {"neg", [](float x, float, float) { return -x; }},
    {"abs", [](float x, float, float) { return std::fabs(x); }},
    {"add", [](float x, float p, float) { return x + p; }},
    {"rsub", [](float x, float p, float) { return p - x; }},
    {"div", [](float x, float p, float) { return x / p; }},
    {"rdiv", [](float x, float p, float) { return p / x; }},
    {"square", [](float x, float, float) { return x * x; }},
    {"sqrt", [](float x, float, float) { return std::sqrt(x); }},
    {"rsqrt", [](float x, float, float) { return 1.0f / std::sqrt(x); }},
    {"hardsigmoid", [](float x, float, float) { return fn::clip(x + 3.0f, 0.0f, 6.0f) * fn::kSixth; }},
    {"leaky_relu", [](float x, float p, float) { return x > 0 ? x : x * p; }},
    {"elu", [](float x, float p, float) { return x > 0 ? x : p * (fn::exp(x) - 1.0f); }},
    {"selu",
     [](float x, float, float) {
       return 1.0507009873554805f * (x > 0 ? x : 1.6732632423543772f * (fn::exp(x) - 1.0f));
     }},
    {"softsign", [](float x, float, float) { return x / (1.0f + std::fabs(x)); }},
    {"sign", [](float x, float, float) { return sign(x); }},
    {"rint", [](float x, float, float) { return std::nearbyintf(x); }},
    {"floor", [](float x, float, float) { return std::floor(x); }},
    {"ceil", [](float x, float, float) { return std::ceil(x); }},
    {"softplus", [](float x, float, float) { return softplus(x); }},
    {"mish", [](float x, float, float) { return x * std::tanh(softplus(x)); }},
    {"log", [](float x, float, float) { return std::log(x); }},
    {"sin", [](float x, float, float) { return std::sin(x); }},
    {"cos", [](float x, float, float) { return std::cos(x); }},
    {"pow", [](float x, float p, float) { return std::pow(x, p); }},
};

struct UnaryStep : Step {
  Rows rows;
  Share part;
  UnaryFn kernel_fn = nullptr;
  Scalar scalar = nullptr;
  float p, q;
  int x, y;
  void run(const Run& r, int task, int) const override {
    for_rows(rows, part, task, [&](int64_t row, int64_t at, int64_t n) {
      const float* from = r.at<float>(x) + rows.at(1, row) + at;
      float* to = r.at<float>(y) + rows.at(0, row) + at;
      if (kernel_fn) kernel_fn({from, to, n, p, q});
      else
        for (int64_t i = 0; i < n; ++i) to[i] = scalar(from[i], p, q);
    });
  }
};

}  // namespace

namespace {

// A function of rows, what they are multiplied by, their rounding: the floats between do not leave the first cache.
struct UnaryRowsStep : Step {
  UnaryFn fn;
  BinaryFn times = nullptr;
  RangedRows ranged;
  float p, q;
  int x, other = -1, y = -1;  // y: -1 where only the rounded values are read
  int64_t rows, n;
  void run(const Run& r, int task, int thread) const override {
    for (int64_t m = rows * task / tasks; m < rows * (task + 1) / tasks; ++m) {
      float* out = y < 0 ? reinterpret_cast<float*>(r.scratch(thread)) : r.at<float>(y) + m * n;
      fn({r.at<float>(x) + m * n, out, n, p, q});
      if (times) times({out, r.at<float>(other) + m * n, out, n, 1, 1});
      if (ranged) ranged.row(r, out, m);
    }
  }
};

bool build_unary_rows(Builder& b, int number, UnaryFn fn, const char* kernel) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  const Value& in = plan.values[op.in[0]];
  const int reader = plan.sole_reader(op.out[0]);
  if (!fn || reader < 0 || !in.dense() || in.dtype != PW_F32 || in.dims.empty()) return false;
  const OpNode& next = plan.ops[reader];
  auto step = std::make_unique<UnaryRowsStep>();
  int made = op.out[0], after = reader;
  if (next.kind == "binary" && next.text("fn") == "mul") {
    step->other = next.in[next.in[0] == made];
    made = next.out[0];
    const auto like = [&](int v) { return plan.values[v].dense() && plan.values[v].dims == in.dims; };
    if (step->other == op.out[0] || !like(step->other) || !like(made)) return false;
    if (b.now == number && b.done.count(reader)) return false;
    if (b.now == number && plan.values[step->other].producer > number) {  // when the other factor is there
      b.put_off[reader] = number;
      b.done.insert(reader);
      return true;
    }
    b.done.insert(reader);
    step->times = plan.kernels->mul_f32;
    after = plan.sole_reader(made);
  }
  describe(*step, plan, op, kernel);
  step->writes.clear();
  step->ops = "unary:" + op.text("fn") + (step->times ? "+mul" : "");
  if (step->times) step->reads.push_back(step->other);
  if (after < 0 || !step->ranged.take(b, after, *step)) {
    if (!step->times) return false;
    step->y = made;
    step->writes = {made};
  }
  step->fn = fn;
  step->p = op.real("p");
  step->q = op.real("q");
  step->x = op.in[0];
  step->n = in.dims.back();
  step->rows = step->n ? in.count() / step->n : 0;
  step->scratch = (step->n + 16) * 4;
  const int64_t most = std::min<int64_t>(step->rows, plan.threads * 4);
  step->tasks = plan.threads > 1 && in.count() > 10000 ? int(std::max<int64_t>(1, most)) : 1;
  b.add(std::move(step));
  return true;
}

}  // namespace

void build_unary(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<UnaryStep>();
  const std::string& name = op.text("fn");
  const KernelRow* row = nullptr;
  step->kernel_fn = unary_kernel(*plan.kernels, name, &row);
  const char* kernel = row ? row->symbol : "scalar";
  for (const Named& f : kUnary)
    if (name == f.name) step->scalar = f.fn;
  if (!step->kernel_fn && !step->scalar) fail("unknown function " + name);
  if (build_unary_rows(b, number, step->kernel_fn, kernel)) return;
  step->p = op.real("p");
  step->q = op.real("q");
  step->x = op.in[0];
  step->y = op.out[0];
  const Value &out = plan.values[op.out[0]], &in = plan.values[op.in[0]];
  step->rows = rows_of(out.dims, {out.strides, in.strides});
  step->part = share_rows(step->rows, plan.threads, 10);
  step->tasks = step->part.tasks;
  describe(*step, plan, op, kernel);
  step->ops = "unary:" + name;
  b.add(std::move(step));
}

// ---- binary ------------------------------------------------------------------------------------------------------

namespace {

enum class Fn { kAdd, kSub, kMul, kDiv, kMin, kMax, kPow, kFloorDiv, kMod, kEq, kNe, kLt, kLe, kGt, kGe, kAnd, kOr, kXor };
const std::pair<const char*, Fn> kBinary[] = {
    {"add", Fn::kAdd}, {"sub", Fn::kSub}, {"mul", Fn::kMul}, {"div", Fn::kDiv}, {"min", Fn::kMin}, {"max", Fn::kMax},
    {"pow", Fn::kPow}, {"floordiv", Fn::kFloorDiv}, {"mod", Fn::kMod}, {"eq", Fn::kEq}, {"ne", Fn::kNe},
    {"lt", Fn::kLt},   {"le", Fn::kLe},   {"gt", Fn::kGt},   {"ge", Fn::kGe},   {"and", Fn::kAnd}, {"or", Fn::kOr},
    {"xor", Fn::kXor}};

template <class T>
T floor_divide(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    if (b == 0) return 0;
    if (b == T(-1)) return T(0) - a;  // the least integer has no positive twin
    const T q = a / b;
    return q * b != a && (a < 0) != (b < 0) ? q - 1 : q;
  } else {
    return std::floor(a / b);
  }
}

template <class T>
T arithmetic(Fn f, T a, T b) {
  switch (f) {
    case Fn::kAdd: return a + b;
    case Fn::kSub: return a - b;
    case Fn::kMul: return a * b;
    case Fn::kMin: return a != a ? a : b != b ? b : a < b ? a : b;  // NaN wins, as in numpy
    case Fn::kMax: return a != a ? a : b != b ? b : a > b ? a : b;
    case Fn::kFloorDiv: return floor_divide(a, b);
    case Fn::kMod: return b == T(0) && std::is_integral_v<T> ? T(0) : a - floor_divide(a, b) * b;
    case Fn::kDiv: if constexpr (!std::is_integral_v<T>) return a / b; return 0;
    case Fn::kPow: if constexpr (!std::is_integral_v<T>) return std::pow(a, b); return 0;
    default: return 0;
  }
}

template <class T>
bool compare(Fn f, T a, T b) {
  switch (f) {
    case Fn::kEq: return a == b;
    case Fn::kNe: return a != b;
    case Fn::kLt: return a < b;
    case Fn::kLe: return a <= b;
    case Fn::kGt: return a > b;
    case Fn::kGe: return a >= b;
    case Fn::kAnd: return a && b;
    case Fn::kOr: return a || b;
    default: return bool(a) != bool(b);
  }
}

struct BinaryStep : Step {
  Rows rows;
  Share part;
  Fn f;
  int a, b, y, dtype, a_step, b_step;
  BinaryFn kernel_fn = nullptr;

  template <class T>
  void loop(const Run& r, int64_t row, int64_t at, int64_t n) const {
    const T* pa = r.at<T>(a) + rows.at(1, row) + at * a_step;
    const T* pb = r.at<T>(b) + rows.at(2, row) + at * b_step;
    const int64_t to = rows.at(0, row) + at;
    if (f >= Fn::kEq)
      for (int64_t i = 0; i < n; ++i) r.at<uint8_t>(y)[to + i] = compare(f, pa[i * a_step], pb[i * b_step]);
    else
      for (int64_t i = 0; i < n; ++i) r.at<T>(y)[to + i] = arithmetic(f, pa[i * a_step], pb[i * b_step]);
  }

  void run(const Run& r, int task, int) const override {
    for_rows(rows, part, task, [&](int64_t row, int64_t at, int64_t n) {
      if (kernel_fn) {
        kernel_fn({r.at<float>(a) + rows.at(1, row) + at * a_step, r.at<float>(b) + rows.at(2, row) + at * b_step,
                   r.at<float>(y) + rows.at(0, row) + at, n, a_step, b_step});
      } else if (dtype == PW_F32) {
        loop<float>(r, row, at, n);
      } else if (dtype == PW_I64) {
        loop<int64_t>(r, row, at, n);
      } else {
        loop<uint8_t>(r, row, at, n);
      }
    });
  }
};

}  // namespace

void build_binary(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<BinaryStep>();
  const std::string& name = op.text("fn");
  bool known = false;
  for (const auto& [text, f] : kBinary)
    if (name == text) {
      step->f = f;
      known = true;
    }
  if (!known) fail("unknown function " + name);
  step->a = op.in[0];
  step->b = op.in[1];
  step->y = op.out[0];
  const Value &out = plan.values[op.out[0]], &left = plan.values[op.in[0]], &right = plan.values[op.in[1]];
  step->dtype = left.dtype;
  step->a_step = last_step(left, out);
  step->b_step = last_step(right, out);
  step->rows = rows_of(out.dims, {out.strides, broadcast_strides(left, out.dims), broadcast_strides(right, out.dims)});
  step->part = share_rows(step->rows, plan.threads, 4);
  step->tasks = step->part.tasks;
  const char* kernel = "scalar";
  if (step->dtype == PW_F32 && step->f == Fn::kAdd) {
    step->kernel_fn = plan.kernels->add_f32;
    kernel = plan.kernels->row[k_add_f32]->symbol;
  } else if (step->dtype == PW_F32 && step->f == Fn::kMul) {
    step->kernel_fn = plan.kernels->mul_f32;
    kernel = plan.kernels->row[k_mul_f32]->symbol;
  }
  describe(*step, plan, op, kernel);
  step->ops = "binary:" + name;
  b.add(std::move(step));
}

// ---- where, cast, iota, full ----------------------------------------------------------------------------------------

namespace {

struct WhereStep : Step {
  Rows rows;
  int c, a, b, y, size, steps[3];
  void run(const Run& r, int, int) const override {
    for (int64_t row = 0; row < rows.count; ++row)
      for (int64_t i = 0; i < rows.length; ++i) {
        const bool pick = r.at<uint8_t>(c)[rows.at(1, row) + i * steps[0]];
        const int64_t at = pick ? rows.at(2, row) + i * steps[1] : rows.at(3, row) + i * steps[2];
        std::memcpy(r.at<char>(y) + (rows.at(0, row) + i) * size, r.at<char>(pick ? a : b) + at * size, size_t(size));
      }
  }
};

double read(const void* p, int dtype, int64_t i) {
  switch (dtype) {
    case PW_F32: return static_cast<const float*>(p)[i];
    case PW_I64: return double(static_cast<const int64_t*>(p)[i]);
    case PW_I32: return static_cast<const int32_t*>(p)[i];
    case PW_F16: return fn::half_to_float(static_cast<const uint16_t*>(p)[i]);
    case PW_BF16: {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[i]) << 16;
      float v;
      std::memcpy(&v, &bits, 4);
      return v;
    }
    default: return static_cast<const uint8_t*>(p)[i];
  }
}

struct CastStep : Step {
  int x, y, from, to;
  int64_t n;
  void run(const Run& r, int, int) const override {
    const void* in = r.place(x);
    for (int64_t i = 0; i < n; ++i) {
      if (to == PW_I64 && from == PW_I64) {
        r.at<int64_t>(y)[i] = static_cast<const int64_t*>(in)[i];
        continue;
      }
      const double v = read(in, from, i);
      if (to == PW_F32) r.at<float>(y)[i] = float(v);
      else if (to == PW_I64) r.at<int64_t>(y)[i] = v >= 9.2233720368547758e18 || !(v > -9.2233720368547758e18) ? std::numeric_limits<int64_t>::min() : int64_t(v);
      else r.at<uint8_t>(y)[i] = v != 0;
    }
  }
};

struct ConvertStep : Step {
  ConvertFn fn;
  Rows rows;
  Share part;
  int x, y;
  int64_t x_size, y_size;
  void run(const Run& r, int task, int) const override {
    for_rows(rows, part, task, [&](int64_t row, int64_t at, int64_t n) {
      fn({r.at<char>(x) + (rows.at(1, row) + at) * x_size, r.at<char>(y) + (rows.at(0, row) + at) * y_size, n});
    });
  }
};

struct IotaStep : Step {
  int y;
  int64_t n, start, step;
  void run(const Run& r, int, int) const override {
    for (int64_t i = 0; i < n; ++i) r.at<int64_t>(y)[i] = start + step * i;
  }
};

}  // namespace

bool converts_bf16(const Plan& plan, const OpNode& op) {
  if (op.kind != "cast") return false;
  const int from = plan.values[op.in[0]].dtype, to = plan.values[op.out[0]].dtype;
  return (from == PW_F32 && to == PW_BF16) || (from == PW_BF16 && to == PW_F32);
}

std::unique_ptr<Step> convert_step(const Plan& plan, int from, int to, const std::string& site) {
  auto step = std::make_unique<ConvertStep>();
  const Value &in = plan.values[from], &out = plan.values[to];
  const bool narrow = out.dtype == PW_BF16;
  step->fn = narrow ? plan.kernels->to_bf16 : plan.kernels->widen_bf16;
  step->kernel = plan.kernels->row[narrow ? k_to_bf16 : k_widen_bf16]->symbol;
  step->x = from;
  step->y = to;
  step->x_size = dtype_size(in.dtype);
  step->y_size = dtype_size(out.dtype);
  step->rows = rows_of(out.dims, {out.strides, in.strides});
  step->part = share_rows(step->rows, plan.threads, 4);
  step->tasks = step->part.tasks;
  step->ops = "cast";
  step->site = site;
  step->reads = {from};
  step->writes = {to};
  step->bytes = in.count() * 6;
  return step;
}

void weights_to_f32(const Constant& c, std::vector<float>& out) {
  out.resize(size_t(c.count()));
  for (int64_t i = 0; i < c.count(); ++i) out[size_t(i)] = float(read(c.data, c.dtype, i));
}

void build_where(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<WhereStep>();
  const Value& out = plan.values[op.out[0]];
  step->c = op.in[0];
  step->a = op.in[1];
  step->b = op.in[2];
  step->y = op.out[0];
  step->size = int(dtype_size(out.dtype));
  std::vector<std::vector<int64_t>> strides = {out.strides};
  for (int i = 0; i < 3; ++i) {
    strides.push_back(broadcast_strides(plan.values[op.in[size_t(i)]], out.dims));
    step->steps[i] = last_step(plan.values[op.in[size_t(i)]], out);
  }
  step->rows = rows_of(out.dims, strides);
  describe(*step, plan, op, "scalar");
  b.add(std::move(step));
}

void build_cast(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<CastStep>();
  const Value &in = plan.values[op.in[0]], &out = plan.values[op.out[0]];
  if (converts_bf16(plan, op)) {
    const bool later = out.dtype == PW_F32 && out.root == op.out[0] && !out.readers.empty() && out.kind == PW_TEMPORARY;
    if (later) b.widened[out.root] = op.in[0];
    else b.add(convert_step(plan, op.in[0], op.out[0], op.site));
    return;
  }
  require(in.dense() && out.dense(), "a cast between places that are not dense");
  step->x = op.in[0];
  step->y = op.out[0];
  step->from = in.dtype;
  step->to = out.dtype;
  step->n = in.count();
  describe(*step, plan, op, "scalar");
  b.add(std::move(step));
}

void build_iota(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<IotaStep>();
  step->y = op.out[0];
  step->n = plan.values[op.out[0]].count();
  step->start = op.integer("start");
  step->step = op.integer("step");
  describe(*step, plan, op, "scalar");
  b.add(std::move(step));
}

void build_full(Builder& b, int number) {
  const OpNode& op = b.plan.ops[number];
  const Attribute& value = op.attrs.at("value");
  auto step = fill_step(b.plan, op.out[0], value.kind == 0 ? double(value.ints[0]) : value.floats[0]);
  step->site = op.site;
  b.add(std::move(step));
}

}  // namespace pw
