// Float products, and products with stored codes decoded on the way.
#include <algorithm>
#include <cstring>

#include "engine/build.h"

namespace pw {

void weights_to_f32(const Constant& c, std::vector<float>& out);

namespace {

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Packed pack_floats(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride) {
  Packed p;
  p.block = k * 16;
  const int64_t blocks = (n + 15) / 16;
  p.codes = Buffer(blocks * p.block * 4);
  float* out = p.codes.as<float>();
  std::memset(out, 0, size_t(blocks * p.block * 4));
  for (int64_t column = 0; column < n; ++column)
    for (int64_t i = 0; i < k; ++i) out[column / 16 * p.block + i * 16 + column % 16] = w[column * n_stride + i * k_stride];
  return p;
}

// Rows in nested loops against packed columns.
struct FloatGemmStep : Step {
  GemmF32Fn fn;
  std::shared_ptr<const Packed> packed;
  std::vector<float> bias;
  int x, y;
  int64_t count[4] = {1, 1, 1, 1}, x_step[4] = {}, y_step[4] = {};
  int64_t x_base = 0, y_base = 0, rows = 0, n = 0, column_chunk = 0, row_chunk = 0, row_tasks = 1;
  std::vector<int64_t> segments;
  int seg_len = 0;

  void run(const Run& r, int task, int) const override {
    const int64_t row_task = task % row_tasks, column_task = task / row_tasks;
    const int64_t n0 = column_task * column_chunk, n1 = std::min(n, n0 + column_chunk);
    const int64_t m0 = row_task * row_chunk, m1 = std::min(rows, m0 + row_chunk);
    constexpr int kRows = 256;
    int64_t x_at[kRows], y_at[kRows];
    GemmF32Args g;
    g.a = r.at<float>(x) + x_base;
    g.segments = int(segments.size());
    g.seg_offset = segments.data();
    g.seg_len = seg_len;
    g.b = packed->codes.as<float>() + n0 / 16 * packed->block;
    g.b_block = packed->block;
    g.n = int(n1 - n0);
    g.bias = bias.empty() ? nullptr : bias.data();
    g.n0 = int(y_base + n0);
    g.c = r.at<float>(y) + y_base + n0;
    g.row_offset = x_at;
    g.c_offset = y_at;
    for (int64_t m = m0; m < m1; m += kRows) {
      const int64_t k = std::min<int64_t>(kRows, m1 - m);
      for (int64_t i = 0; i < k; ++i) {
        int64_t rest = m + i;
        x_at[i] = y_at[i] = 0;
        for (int a = 3; a >= 0; --a) {
          x_at[i] += rest % count[a] * x_step[a];
          y_at[i] += rest % count[a] * y_step[a];
          rest /= count[a];
        }
      }
      g.m = int(k);
      fn(g);
    }
  }
};

void share(FloatGemmStep& s, int threads, int64_t k) {
  s.row_chunk = s.rows;
  s.column_chunk = s.n;
  if (threads > 1 && s.rows * s.n * k > 100000) {
    if (s.rows >= 24 * threads) s.row_chunk = padded((s.rows + threads * 3 - 1) / (threads * 3), 12);
    else if (s.n >= 32 * threads) s.column_chunk = padded((s.n + threads * 2 - 1) / (threads * 2), 32);
  }
  s.row_tasks = (s.rows + s.row_chunk - 1) / s.row_chunk;
  s.tasks = int(s.row_tasks * ((s.n + s.column_chunk - 1) / s.column_chunk));
}

std::vector<float> constant_floats(const Plan& plan, int value) {
  std::vector<float> out;
  weights_to_f32(plan.constant(value), out);
  return out;
}

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

void decode_rows(const Plan& plan, int codes, int scale, int zero, int bits, int64_t n, std::vector<float>& out);

// Weights of a float convolution or linear layer: stored as floats, or decoded from codes at load.
static std::vector<float> float_weights(Builder& b, int value, int* decode_op) {
  Plan& plan = b.plan;
  *decode_op = -1;
  if (plan.is_constant(value)) return constant_floats(plan, value);
  const int producer = plan.values[value].producer;
  if (producer >= 0 && plan.ops[producer].kind == "decode") {
    const OpNode& d = plan.ops[producer];
    std::vector<float> out;
    const int64_t rows = plan.values[value].dims[0], n = rows ? plan.values[value].count() / rows : 0;
    decode_rows(plan, d.in[0], d.in[1], d.input(2), int(d.integer("bits")), n, out);
    *decode_op = producer;
    return out;
  }
  fail("a float product's weight must be stored with the model");
}

void build_conv_f32(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const Value& out = plan.values[op.out[0]];
  const int rank = out.rank(), dims = rank - 2;
  const auto &stride = op.ints("stride"), &dilation = op.ints("dilation"), &pads = op.ints("pads");
  const int64_t groups = op.integer("groups");
  std::vector<int64_t> begin(size_t(rank), 0), end(size_t(rank), 0);
  for (int i = 0; i < dims; ++i) {
    begin[size_t(1 + i)] = pads[size_t(i)];
    end[size_t(1 + i)] = pads[size_t(dims + i)];
  }
  if (out.count() == 0) return;
  const int x = b.readable(op.in[0], begin, end, 0);
  const Value &xv = plan.values[x], &y = plan.values[op.out[0]], &w = plan.values[op.in[1]];
  const int64_t channels = w.dims[1], columns = w.dims[0] / groups;
  int64_t kernel = 1;
  for (int i = 0; i < dims; ++i) kernel *= w.dims[size_t(2 + i)];
  int decode_op;
  std::vector<float> weights;
  const std::string key = "conv_f32:" + std::to_string(w.kind == PW_CONSTANT ? w.index : -1 - op.in[1]) + ":" +
                          (w.kind == PW_CONSTANT ? "" : plan.ops[w.producer].site);
  std::vector<int64_t> segments;
  std::vector<int64_t> index(size_t(dims), 0);
  for (int64_t tap = 0; tap < kernel; ++tap) {
    int64_t at = 0;
    for (int i = 0; i < dims; ++i) at += index[size_t(i)] * dilation[size_t(i)] * xv.strides[size_t(1 + i)];
    segments.push_back(at);
    for (int i = dims - 1; i >= 0; --i) {
      if (++index[size_t(i)] < w.dims[size_t(2 + i)]) break;
      index[size_t(i)] = 0;
    }
  }
  for (int64_t group = 0; group < groups; ++group) {
    auto step = std::make_unique<FloatGemmStep>();
    const auto make = [&] {
      if (weights.empty()) weights = float_weights(b, op.in[1], &decode_op);
      std::vector<float> taps(size_t(columns * kernel * channels));
      for (int64_t o = 0; o < columns; ++o)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t k = 0; k < kernel; ++k)
            taps[size_t((o * kernel + k) * channels + c)] = weights[size_t(((group * columns + o) * channels + c) * kernel + k)];
      return pack_floats(taps.data(), columns, kernel * channels, kernel * channels, 1);
    };
    step->packed = w.kind == PW_CONSTANT ? plan.model->packed(key + ":" + std::to_string(group), make)
                                         : std::make_shared<const Packed>(make());
    if (op.input(2) >= 0) step->bias = columns_f32(plan, op.in[2], w.dims[0]);
    step->fn = plan.kernels->gemm_f32;
    step->x = x;
    step->y = op.out[0];
    step->segments = segments;
    step->seg_len = int(channels);
    step->n = columns;
    step->count[0] = y.dims[0];
    step->x_step[0] = xv.strides[0];
    step->y_step[0] = y.strides[0];
    step->x_base = group * channels;
    step->y_base = group * columns;
    for (int i = 0; i < dims; ++i) {
      const int a = 4 - dims + i;
      step->count[a] = y.dims[size_t(1 + i)];
      step->x_step[a] = stride[size_t(i)] * xv.strides[size_t(1 + i)];
      step->y_step[a] = y.strides[size_t(1 + i)];
      step->x_base -= begin[size_t(1 + i)] * xv.strides[size_t(1 + i)];
    }
    step->rows = step->count[0] * step->count[1] * step->count[2] * step->count[3];
    share(*step, plan.threads, kernel * channels);
    describe(*step, plan, op, plan.kernels->row[k_gemm_f32]->symbol);
    step->reads = {x};
    step->macs = step->rows * columns * kernel * channels;
    b.add(std::move(step));
  }
}

void build_linear_f32(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const Value &xv = plan.values[op.in[0]], &y = plan.values[op.out[0]], &w = plan.values[op.in[1]];
  require(xv.dense() && y.dense(), "a linear layer reads and writes dense rows");
  const int64_t n = w.dims[0], k = w.dims[1];
  auto step = std::make_unique<FloatGemmStep>();
  int decode_op;
  const auto make = [&] { return pack_floats(float_weights(b, op.in[1], &decode_op).data(), n, k, k, 1); };
  step->packed = w.kind == PW_CONSTANT ? plan.model->packed("linear_f32:" + std::to_string(w.index), make)
                                       : std::make_shared<const Packed>(make());
  if (op.input(2) >= 0) step->bias = columns_f32(plan, op.in[2], n);
  step->fn = plan.kernels->gemm_f32;
  step->x = op.in[0];
  step->y = op.out[0];
  step->segments = {0};
  step->seg_len = int(k);
  step->n = n;
  step->rows = k ? xv.count() / k : 0;
  if (step->rows == 0 || n == 0) return;
  step->count[3] = step->rows;
  step->x_step[3] = k;
  step->y_step[3] = n;
  share(*step, plan.threads, k);
  describe(*step, plan, op, plan.kernels->row[k_gemm_f32]->symbol);
  step->macs = step->rows * n * k;
  b.add(std::move(step));
}

namespace {

// Products of two computed matrices: the right one is packed on the way.
struct FloatMatmulStep : Step {
  GemmF32Fn fn;
  int a, b, y;
  int64_t m, n, k, batches;
  bool transposed;
  std::vector<int64_t> a_at, b_at;
  void run(const Run& r, int task, int thread) const override {
    float* packed = reinterpret_cast<float*>(r.scratch(thread));
    int64_t* rows = reinterpret_cast<int64_t*>(packed + padded(n, 16) * k + 16);
    for (int64_t i = 0; i < m; ++i) {
      rows[i] = i * k;
      rows[m + i] = i * n;
    }
    const int64_t segment = 0;
    for (int64_t batch = batches * task / tasks; batch < batches * (task + 1) / tasks; ++batch) {
      const float* right = r.at<float>(b) + b_at[size_t(batch)];
      std::memset(packed, 0, size_t(padded(n, 16) * k * 4));
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < k; ++i)
          packed[j / 16 * k * 16 + i * 16 + j % 16] = transposed ? right[j * k + i] : right[i * n + j];
      GemmF32Args g;
      g.a = r.at<float>(a) + a_at[size_t(batch)];
      g.row_offset = rows;
      g.m = int(m);
      g.seg_offset = &segment;
      g.seg_len = int(k);
      g.b = packed;
      g.b_block = k * 16;
      g.n = int(n);
      g.c = r.at<float>(y) + batch * m * n;
      g.c_offset = rows + m;
      fn(g);
    }
  }
};

std::vector<int64_t> batch_offsets(const Value& v, const std::vector<int64_t>& lead) {
  int64_t count = 1;
  for (int64_t d : lead) count *= d;
  std::vector<int64_t> out(size_t(count), 0), index(lead.size(), 0);
  const size_t own = size_t(v.rank()) - 2, shift = lead.size() - own;
  for (int64_t i = 0; i < count; ++i) {
    for (size_t a = 0; a < own; ++a) out[size_t(i)] += v.dims[a] == 1 ? 0 : index[shift + a] * v.strides[a];
    for (int a = int(lead.size()) - 1; a >= 0; --a) {
      if (++index[size_t(a)] < lead[size_t(a)]) break;
      index[size_t(a)] = 0;
    }
  }
  return out;
}

}  // namespace

void build_matmul_f32(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  auto step = std::make_unique<FloatMatmulStep>();
  const Value &left = plan.values[op.in[0]], &right = plan.values[op.in[1]], &out = plan.values[op.out[0]];
  require(left.dense() && right.dense() && out.dense(), "matrix products read and write dense matrices");
  step->transposed = op.flag("transpose_b");
  step->m = out.dims[size_t(out.rank()) - 2];
  step->n = out.dims.back();
  step->k = left.dims.back();
  const std::vector<int64_t> lead(out.dims.begin(), out.dims.end() - 2);
  step->a_at = batch_offsets(left, lead);
  step->b_at = batch_offsets(right, lead);
  step->batches = int64_t(step->a_at.size());
  step->a = op.in[0];
  step->b = op.in[1];
  step->y = op.out[0];
  step->fn = plan.kernels->gemm_f32;
  step->scratch = (padded(step->n, 16) * step->k + 16) * 4 + step->m * 16 + 64;
  step->macs = step->batches * step->m * step->n * step->k;
  describe(*step, plan, op, plan.kernels->row[k_gemm_f32]->symbol);
  step->tasks = plan.threads > 1 && step->macs > 50000 ? int(std::max<int64_t>(1, std::min<int64_t>(step->batches, plan.threads * 4))) : 1;
  if (out.count() > 0) b.add(std::move(step));
}

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
