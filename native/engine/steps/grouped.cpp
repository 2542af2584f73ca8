// Linear layers on codes ranged at run time, whose weights have one scale per group of inputs.
#include <algorithm>

#include "core/functions.h"
#include "engine/steps/grouped.h"

namespace pw {
namespace {

struct GroupedStep : Step {
  GemmGroupedFn fn;
  std::shared_ptr<const Packed> packed;  // its colsum: minus the sums of the groups, [groups][n_pad]
  std::vector<float> scale;
  GroupedOperands operands;
  int bits;
  int64_t m, n_pad, row_chunk, column_chunk, row_tasks;

  void run(const Run& r, int task, int) const override {
    const int64_t m0 = task % row_tasks * row_chunk, n0 = task / row_tasks * column_chunk;
    GemmGroupedArgs g;
    static_cast<GroupedRows&>(g) =
        operands.at(r, m0, std::min(m, m0 + row_chunk), n0, std::min(operands.n, n0 + column_chunk));
    g.bits = bits;
    g.b = packed->codes.as<int8_t>() + n0 / 16 * packed->block;
    g.b_block = packed->block;
    g.scale = scale.data() + n0;
    g.colsum = packed->colsum.data() + n0;
    g.step = n_pad;
    fn(g);
  }
};

// Codes [n, k] as stored, nibbles widened, in the form of GemmGroupedArgs.
Packed pack_groups(const Constant& stored, int bits, int64_t n, int64_t k, int64_t groups) {
  std::vector<int8_t> wide;
  const int8_t* w = static_cast<const int8_t*>(stored.data);
  if (bits == 4) {
    const uint8_t* pairs = static_cast<const uint8_t*>(stored.data);
    const int64_t row = (k + 1) / 2;
    wide.resize(size_t(n * k));
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < k; ++i) {
        const int code = i % 2 ? pairs[j * row + i / 2] >> 4 : pairs[j * row + i / 2] & 15;
        wide[size_t(j * k + i)] = int8_t((code ^ 8) - 8);
      }
    w = wide.data();
  }
  const int64_t length = k / groups, n_pad = (n + 63) / 64 * 64;
  std::vector<int64_t> segments;
  for (int64_t g = 0; g < groups; ++g) segments.push_back(g * length);
  Packed p = pack_weights(w, n, segments, length, k, 4);
  p.colsum.assign(size_t(groups * n_pad), 0);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < k; ++i) p.colsum[size_t(i / length * n_pad + j)] -= w[j * k + i];
  return p;
}

// Rows and columns among tasks: columns in whole panels of 64, and rows where there are too few of those.
void share(GroupedStep& s, int threads) {
  s.row_chunk = std::max<int64_t>(s.m, 1);
  const int64_t n = s.operands.n;
  s.column_chunk = n;
  if (threads > 1 && s.macs > 100000) {
    const int64_t panels = (n + 63) / 64, pieces = std::min<int64_t>(panels, threads * 2);
    s.column_chunk = (panels + pieces - 1) / pieces * 64;
    const int64_t more = std::min<int64_t>((threads * 2 + pieces - 1) / pieces, std::max<int64_t>(s.m / 12, 1));
    s.row_chunk = (s.m + more - 1) / more;
  }
  s.row_tasks = (s.m + s.row_chunk - 1) / s.row_chunk;
  s.tasks = int(s.row_tasks * ((n + s.column_chunk - 1) / s.column_chunk));
}

}  // namespace

std::vector<float> scales_f32(const Constant& c) {
  const auto* stored = static_cast<const float*>(c.data);
  if (c.dtype != PW_F16) return {stored, stored + c.count()};
  std::vector<float> out(size_t(c.count()));
  for (size_t i = 0; i < out.size(); ++i) out[i] = fn::half_to_float(static_cast<const uint16_t*>(c.data)[i]);
  return out;
}

GroupedRows GroupedOperands::at(const Run& r, int64_t m0, int64_t m1, int64_t n0, int64_t n1) const {
  GroupedRows g;
  g.a = r.at<uint8_t>(x) + m0 * k;
  g.lda = k;
  g.m = int(m1 - m0);
  g.groups = int(groups);
  g.group_len = int(k / groups);
  g.n = int(n1 - n0);
  g.row_zero = r.at<int32_t>(zero) + m0 * row_step;
  g.row_scale = r.at<float>(row) + m0 * row_step;
  g.row_step = row_step;
  g.bias = bias.empty() ? nullptr : bias.data() + n0;
  g.c = r.at<float>(y) + m0 * n + n0;
  g.ldc = n;
  return g;
}

GroupedOperands grouped_operands(Builder& b, const OpNode& op) {
  Plan& plan = b.plan;
  GroupedOperands o;
  o.x = linear_rows(b, op);
  require(plan.values[op.out[0]].dense(), "a linear layer writes dense rows");
  o.zero = op.in[3];
  o.row = op.in[4];
  o.y = op.out[0];
  o.row_step = plan.values[op.in[3]].count() == 1 ? 0 : 1;
  o.k = op.integer("n");
  o.n = plan.constant(op.in[1]).dims[0];
  o.groups = plan.constant(op.in[2]).dims[1];
  if (op.input(5) >= 0) o.bias = columns_f32(plan, op.in[5], o.n);
  return o;
}

void describe_grouped(Step& s, const Plan& plan, const OpNode& op, const GroupedOperands& o, int64_t weight_bytes) {
  const int64_t m = plan.values[op.in[0]].count() / o.k;
  s.macs = m * o.n * o.k;
  s.bytes = m * o.k + weight_bytes + m * o.n * 4;
  s.ops = op.kind;
  s.site = op.site;
  s.reads = {o.x, o.zero, o.row};
  s.writes = {o.y};
}

void build_linear_grouped(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const Constant &codes = plan.constant(op.in[1]), &scale = plan.constant(op.in[2]);
  const int64_t n = codes.dims[0], k = op.integer("n"), groups = scale.dims[1];
  const int64_t m = plan.values[op.in[0]].count() / k;
  if (m == 0 || n == 0) return;
  if (build_linear_nibbles(b, op)) return;
  const int bits = int(op.integer("bits"));
  auto step = std::make_unique<GroupedStep>();
  step->operands = grouped_operands(b, op);
  const std::string key = std::to_string(plan.values[op.in[1]].index) + ":grouped:" + std::to_string(groups);
  step->packed = plan.model->packed(key, [&] { return pack_groups(codes, bits, n, k, groups); });
  step->n_pad = (n + 63) / 64 * 64;
  step->scale.assign(size_t(groups * step->n_pad), 0.0f);
  const std::vector<float> stored = scales_f32(scale);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t g = 0; g < groups; ++g)
      step->scale[size_t(g * step->n_pad + j)] = stored[size_t((scale.dims[0] == 1 ? 0 : j) * groups + g)];
  step->fn = plan.kernels->gemm_grouped;
  step->kernel = plan.kernels->row[k_gemm_grouped]->symbol;
  step->bits = bits;
  step->m = m;
  describe_grouped(*step, plan, op, step->operands, n * k + groups * n * 8);
  share(*step, plan.threads);
  b.add(std::move(step));
}

}  // namespace pw
