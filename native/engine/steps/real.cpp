// Products of floats with stored codes decoded on the way.
#include <algorithm>
#include <cstring>

#include "engine/build.h"

namespace pw {

namespace {

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void describe(Step& s, const Plan& plan, const OpNode& op, const char* kernel) {
  s.ops = op.kind;
  s.site = op.site;
  s.kernel = kernel;
  for (int v : op.in)
    if (v >= 0) {
      s.reads.push_back(v);
      s.bytes += plan.values[v].count() * dtype_size(plan.values[v].dtype);
    }
  s.writes = op.out;
  s.bytes += plan.values[op.out[0]].count() * 4;
}

}  // namespace

// ---- stored codes -------------------------------------------------------------------------------------------------

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

const float* row_of(const Constant* c, int64_t row) {
  return static_cast<const float*>(c->data) + (c->dims[0] == 1 ? 0 : row) * c->dims[1];
}

struct CodesStep : Step {
  GemmCodesFn fn;
  std::shared_ptr<const Packed> packed;
  std::vector<float> scale, zero, bias;
  int x, y, bits;
  int64_t m, n, k, groups, n_pad, chunk;
  void run(const Run& r, int task, int) const override {
    const int64_t n0 = task * chunk, n1 = std::min(n, n0 + chunk);
    GemmCodesArgs g;
    g.a = r.at<float>(x);
    g.lda = k;
    g.m = int(m);
    g.k = int(k);
    g.groups = int(groups);
    g.bits = bits;
    g.b = packed->codes.as<uint8_t>() + n0 / 16 * packed->block;
    g.b_block = packed->block;
    g.n = int(n1 - n0);
    g.scale = scale.data() + n0;
    g.zero = zero.empty() ? nullptr : zero.data() + n0;
    g.scale_step = n_pad;
    g.bias = bias.empty() ? nullptr : bias.data() + n0;
    g.c = r.at<float>(y) + n0;
    g.ldc = n;
    fn(g);
  }
};

}  // namespace

void build_linear_w(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<CodesStep>();
  const Stored s = stored(plan, op.in[1], op.in[2], op.input(3));
  const Value &xv = plan.values[op.in[0]], &y = plan.values[op.out[0]];
  require(xv.dense() && y.dense(), "a linear layer reads and writes dense rows");
  step->bits = int(op.integer("bits"));
  step->k = op.integer("n");
  step->n = s.rows;
  step->n_pad = padded(s.rows, 64);
  step->groups = s.groups;
  step->m = step->k ? xv.count() / step->k : 0;
  const int bits = step->bits;
  const int64_t k = step->k, n = step->n;
  step->packed = plan.model->packed("codes:" + std::to_string(plan.values[op.in[1]].index), [&] {
    Packed p;
    p.block = bits == 8 ? k * 16 : k * 8;
    p.codes = Buffer((n + 15) / 16 * p.block);
    uint8_t* out = p.codes.as<uint8_t>();
    std::memset(out, 0, size_t((n + 15) / 16 * p.block));
    const uint8_t* data = static_cast<const uint8_t*>(s.codes->data);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < k; ++i) {
        uint8_t* block = out + j / 16 * p.block;
        if (bits == 8) {
          block[i * 16 + j % 16] = data[j * s.row_bytes + i];
        } else {
          const int pair = data[j * s.row_bytes + i / 2];
          const int code = (i % 2 ? pair >> 4 : pair & 15) ^ 8;  // two's complement to offset by 8
          block[i * 8 + j % 8] = uint8_t(block[i * 8 + j % 8] | (j % 16 < 8 ? code : code << 4));
        }
      }
    return p;
  });
  const auto by_group = [&](const Constant* c) {
    std::vector<float> out(size_t(s.groups * step->n_pad), 0.0f);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t g = 0; g < s.groups; ++g) out[size_t(g * step->n_pad + j)] = row_of(c, j)[g];
    return out;
  };
  step->scale = by_group(s.scale);
  if (s.zero) step->zero = by_group(s.zero);
  if (op.input(4) >= 0) step->bias = columns_f32(plan, op.in[4], n);
  step->fn = plan.kernels->gemm_codes;
  step->x = op.in[0];
  step->y = op.out[0];
  step->macs = step->m * n * k;
  step->chunk = n;
  if (plan.threads > 1 && step->macs > 50000) step->chunk = padded((n + plan.threads * 2 - 1) / (plan.threads * 2), 16);
  describe(*step, plan, op, plan.kernels->row[k_gemm_codes]->symbol);
  step->tasks = int((n + step->chunk - 1) / std::max<int64_t>(step->chunk, 1));
  if (step->m > 0 && n > 0) b.add(std::move(step));
}

void decode_rows(const Plan& plan, int codes, int scale, int zero, int bits, int64_t n, std::vector<float>& out) {
  const Stored s = stored(plan, codes, scale, zero);
  out.resize(size_t(s.rows * n));
  for (int64_t j = 0; j < s.rows; ++j)
    plan.kernels->decode({static_cast<const char*>(s.codes->data) + j * s.row_bytes, out.data() + j * n, int(n), bits,
                          int(s.groups), row_of(s.scale, j), s.zero ? row_of(s.zero, j) : nullptr});
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

void build_decode(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const Value& out = plan.values[op.out[0]];
  bool all_products = !out.readers.empty() && plan.sole_reader(op.out[0]) >= -1;
  for (int reader : out.readers) {
    const OpNode& next = plan.ops[reader];
    all_products = all_products && (next.kind == "conv_f32" || next.kind == "linear_f32") && next.in[1] == op.out[0];
  }
  for (int o : plan.outputs) all_products = all_products && o != op.out[0];
  if (all_products) return;  // decoded once, when the product packs its weights
  const int64_t rows = out.dims[0];
  build_table_rows(b, op, 0, rows ? out.count() / rows : 0, rows, -1);
}

void build_embedding(Builder& b, int number) {
  const OpNode op = b.plan.ops[number];
  build_table_rows(b, op, 1, op.integer("n"), b.plan.values[op.in[0]].count(), op.in[0]);
}

}  // namespace pw
