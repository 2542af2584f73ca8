// Stored codes decoded to floats: rows of a table, and the weights of products when they are packed.
#include <algorithm>
#include <cstring>

#include "engine/steps/codes.h"

namespace pw {

namespace {

struct Stored {
  const Constant* codes;
  const Constant* scale;
  const Constant* zero;
  int64_t rows, groups, row_bytes;
};

Stored stored(const Plan& plan, int codes, int scale, int zero) {
  Stored s;
  s.codes = &plan.constant(codes);
  s.scale = &plan.constant(scale);
  s.zero = zero >= 0 ? &plan.constant(zero) : nullptr;
  s.rows = s.codes->dims[0];
  s.row_bytes = s.codes->dims[1];
  s.groups = s.scale->dims[1];
  return s;
}

}  // namespace

void decode_rows(const Plan& plan, int codes, int scale, int zero, int bits, int64_t n, std::vector<float>& out) {
  const Stored s = stored(plan, codes, scale, zero);
  out.resize(size_t(s.rows * n));
  for (int64_t j = 0; j < s.rows; ++j)
    plan.kernels->decode({static_cast<const char*>(s.codes->data) + j * s.row_bytes, out.data() + j * n, int(n), bits,
                          int(s.groups), row_of(s.scale, j), s.zero ? row_of(s.zero, j) : nullptr});
}

void decode_level_rows(const Plan& plan, const OpNode& op, std::vector<float>& out) {
  const Constant &codes = plan.constant(op.in[0]), &scale = plan.constant(op.in[2]);
  const float* levels = static_cast<const float*>(plan.constant(op.in[1]).data);
  const int64_t rows = codes.dims[0], groups = scale.dims[1], bits = op.integer("bits");
  const int64_t n = rows ? plan.values[op.out[0]].count() / rows : 0, group = n / groups;
  out.resize(size_t(rows * n));
  for (int64_t j = 0; j < rows; ++j) {
    const uint8_t* row = static_cast<const uint8_t*>(codes.data) + j * codes.dims[1];
    for (int64_t i = 0; i < n; ++i) {
      const int code = bits == 8 ? row[i] : i % 2 ? row[i / 2] >> 4 : row[i / 2] & 15;
      out[size_t(j * n + i)] = levels[code] * row_of(&scale, j)[i / group];
    }
  }
}

namespace {

struct DecodeStep : Step {  // rows of a table, all of them or those asked for
  Stored s;
  DecodeFn fn;
  int ids = -1, y, bits;
  int64_t n, count;
  void run(const Run& r, int task, int) const override {
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
      int64_t row = ids >= 0 ? r.at<int64_t>(ids)[i] : i;
      if (row < 0) row += s.rows;
      if (row < 0 || row >= s.rows) {
        r.report("an index is out of range");
        return;
      }
      fn({static_cast<const char*>(s.codes->data) + row * s.row_bytes, r.at<float>(y) + i * n, int(n), bits,
          int(s.groups), row_of(s.scale, row), s.zero ? row_of(s.zero, row) : nullptr});
    }
  }
};

void build_table_rows(Builder& b, const OpNode& op, int first, int64_t n, int64_t count, int ids) {
  Plan& plan = b.plan;
  auto step = std::make_unique<DecodeStep>();
  step->s = stored(plan, op.in[size_t(first)], op.in[size_t(first) + 1], op.input(size_t(first) + 2));
  step->fn = plan.kernels->decode;
  step->ids = ids;
  step->y = op.out[0];
  step->bits = int(op.integer("bits"));
  step->n = n;
  step->count = count;
  require(plan.values[op.out[0]].dense(), "decoded rows are written densely");
  describe(*step, plan, op, plan.kernels->row[k_decode]->symbol);
  step->bytes = count * n * 5;
  step->tasks = plan.threads > 1 && count * n > 40000 ? plan.threads * 2 : 1;
  b.add(std::move(step));
}

}  // namespace

namespace {

// Whether nothing but float products reads a weight: those decode it when they pack it.
bool for_products(const Plan& plan, int value) {
  const Value& out = plan.values[value];
  bool all = !out.readers.empty() && plan.sole_reader(value) >= -1;
  for (int reader : out.readers) {
    const OpNode& next = plan.ops[reader];
    all = all && (next.kind == "conv_f32" || next.kind == "linear_f32") && next.in[1] == value;
  }
  for (int o : plan.outputs) all = all && o != value;
  return all;
}

}  // namespace

void build_decode(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  if (for_products(plan, op.out[0])) return;
  const Value& out = plan.values[op.out[0]];
  const int64_t rows = out.dims[0];
  build_table_rows(b, op, 0, rows ? out.count() / rows : 0, rows, -1);
}

void build_decode_levels(Builder& b, int number) {
  const int value = b.plan.ops[number].out[0];
  const bool unread = b.plan.values[value].readers.empty() && b.plan.values[value].kind == PW_TEMPORARY;
  require(unread || for_products(b.plan, value), "levels are decoded for the weights of float products alone");
}

void build_embedding(Builder& b, int number) {
  const OpNode op = b.plan.ops[number];
  build_table_rows(b, op, 1, op.integer("n"), b.plan.values[op.in[0]].count(), op.in[0]);
}

}  // namespace pw
