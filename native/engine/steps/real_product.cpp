// Float convolutions and linear layers: one packed product, or one filter per channel.
#include <algorithm>
#include <cstring>

#include "engine/pieces.h"
#include "engine/steps/codes.h"
#include "engine/steps/real_matrix.h"
#include "engine/steps/real_tail.h"
#include "engine/steps/walk.h"

namespace pw {

void weights_to_f32(const Constant& c, std::vector<float>& out);
void decode_rows(const Plan& plan, int codes, int scale, int zero, int bits, int64_t n, std::vector<float>& out);
void decode_level_rows(const Plan& plan, const OpNode& op, std::vector<float>& out);

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

// Weights of a float convolution or linear layer: stored as floats, or decoded from codes at load.
std::vector<float> float_weights(const Plan& plan, const OpNode& op) {
  std::vector<float> out;
  const OpNode* d = decoder_of(plan, op);
  if (!d && plan.is_constant(op.in[1])) {
    weights_to_f32(plan.constant(op.in[1]), out);
  } else if (d && d->kind == "linear_w") {
    decode_rows(plan, d->in[1], d->in[2], d->input(3), int(d->integer("bits")), d->integer("n"), out);
  } else if (d && d->kind == "decode") {
    const Value& w = plan.values[op.in[1]];
    const int64_t n = w.dims[0] ? w.count() / w.dims[0] : 0;
    decode_rows(plan, d->in[0], d->in[1], d->input(2), int(d->integer("bits")), n, out);
  } else if (d && d->kind == "decode_levels") {
    decode_level_rows(plan, *d, out);
  } else {
    fail("a float product's weight must be stored with the model");
  }
  return out;
}

// Weights in a kernel's form, kept with the model.
template <class Make>
std::shared_ptr<const Packed> packed_weights(Plan& plan, const OpNode& op, std::string key, Make make) {
  const OpNode* d = decoder_of(plan, op);
  const auto add = [&](int v) { key += ":" + std::to_string(v < 0 ? -1 : plan.values[v].index); };
  if (!d) {
    add(op.in[1]);
  } else {
    key += ":" + d->kind;
    for (int64_t size : plan.values[d == &op ? op.in[1] : d->out[0]].dims) key += "," + std::to_string(size);
    for (size_t i = d == &op ? 1 : 0; i < d->in.size(); ++i) add(d->in[i]);
  }
  return plan.model->packed(key, make);
}

std::vector<float> bias_of(const Plan& plan, const OpNode& op, int64_t n) {
  const int given = op.input(op.kind == "linear_w" ? 4 : 2);
  if (given < 0) return {};
  std::vector<float> bias = columns_f32(plan, given, n);
  bias.resize(bias.size() + 16);  // blocks of a group that begins within one
  return bias;
}

void describe(Step& s, const Plan& plan, const OpNode& op, const FloatTail& t, int x, const KernelRow* kernel) {
  s.ops = t.ops;
  s.site = op.site;
  s.kernel = kernel->symbol;
  s.reads = {x, t.addend};
  s.writes = {t.result};
  for (int v : {x, op.in[1], t.addend, t.result})
    if (v >= 0) s.bytes += plan.values[v].count() * dtype_size(plan.values[v].dtype);
}

constexpr int64_t kAfterRows = 56;      // rows of a product that a function is taken of, while they are in cache
constexpr int64_t kCached = 1 << 19;  // bytes of activations that stay in the second cache while the weights pass

uint16_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Columns of bf16 numbers; `k` is the depth of all segments.
Packed pack_halves(const float* w, int64_t n, int64_t segments, int64_t seg_len, const HalfLayout& layout) {
  Packed p;
  const int64_t k = segments * seg_len, length = layout.dense_len ? k : seg_len;
  const int64_t padded_len = layout.dense_len ? layout.dense_len : padded(seg_len, 2);
  const int64_t blocks = (n + 15) / 16, parts = layout.dense_len ? 1 : segments;
  p.block = parts * padded_len * 16;
  p.codes = Buffer(blocks * p.block * 2);
  uint16_t* out = p.codes.as<uint16_t>();
  std::memset(out, 0, size_t(blocks * p.block * 2));
  for (int64_t column = 0; column < n; ++column)
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < length; ++i)
        out[column / 16 * p.block + part * padded_len * 16 + i / 2 * 32 + column % 16 * 2 + i % 2] =
            rounded(w[column * k + part * length + i]);
  return p;
}

struct FloatGemmStep : Step {
  GemmF32Fn fn = nullptr;
  GemmBf16Fn half_fn = nullptr;  // operands of 16 bits
  ConvertFn narrow = nullptr;    // rounds rows after a function
  HalfLayout layout;
  std::vector<std::shared_ptr<const Packed>> packed;  // per group of channels
  FloatTail tail;
  int x;
  Walk walk;
  int64_t group_channels = 0;
  int64_t rows = 0, n = 0;
  bool by_columns = false;
  Pieces pieces;                   // of the columns or the rows of a group
  std::vector<int64_t> segments;
  int seg_len = 0;

  void run(const Run& r, int task, int thread) const override {
    const int64_t group = task / pieces.tasks(), of = task % pieces.tasks();
    const int64_t m0 = by_columns ? 0 : pieces.first(of), m1 = by_columns ? rows : pieces.end(of);
    const int64_t n0 = by_columns ? pieces.first(of) : 0, n1 = by_columns ? pieces.end(of) : n;
    constexpr int kRows = 224;
    int64_t x_at[kRows], y_at[kRows], r_at[kRows], w_at[kRows];
    const Packed& w = *packed[size_t(group)];
    const int64_t column = group * n + n0, size = tail.out_bf16 ? 2 : 4;
    char* c = r.at<char>(tail.result) + column * size;
    const int64_t from = walk.x_base + group * group_channels;
    RealTail t = tail.at(r, column);
    t.r_offset = r_at;
    // a function of what is then rounded is taken on rows that wait in scratch
    float* waiting = narrow ? reinterpret_cast<float*>(r.scratch(thread)) : nullptr;
    if (narrow) t.out_bf16 = false;
    const int64_t most = tail.after ? kAfterRows : kRows;
    for (int64_t m = m0; m < m1; m += most) {
      const int64_t k = std::min<int64_t>(most, m1 - m);
      walk.offsets(m, k, x_at, y_at, r_at);
      if (waiting)
        for (int64_t i = 0; i < k; ++i) w_at[i] = i * (n1 - n0);
      char* to = waiting ? reinterpret_cast<char*>(waiting) : c;
      const int64_t* at = waiting ? w_at : y_at;
      if (half_fn) {
        GemmBf16Args g;
        g.a = r.at<uint16_t>(x) + from;
        g.step = layout.step;
        g.dense_len = layout.dense_len;
        g.b = w.codes.as<uint16_t>() + n0 / 16 * w.block;
        multiply(half_fn, g, w, int(k), int(n1 - n0), x_at, to, at, t);
      } else {
        GemmF32Args g;
        g.a = r.at<float>(x) + from;
        g.b = w.codes.as<float>() + n0 / 16 * w.block;
        multiply(fn, g, w, int(k), int(n1 - n0), x_at, to, at, t);
      }
      if (!tail.after) continue;
      for (int64_t i = 0; i < k; ++i) {
        float* row = reinterpret_cast<float*>(to) + at[i];
        tail.after({row, row, n1 - n0, tail.p, tail.q});
        if (narrow) narrow({row, reinterpret_cast<uint16_t*>(c) + y_at[i], n1 - n0});
      }
    }
  }

  template <class Fn, class Args>
  void multiply(Fn kernel_fn, Args& g, const Packed& w, int m, int columns, const int64_t* x_at, void* c,
                const int64_t* c_at, const RealTail& t) const {
    g.segments = int(segments.size());
    g.seg_offset = segments.data();
    g.seg_len = seg_len;
    g.b_block = w.block;
    g.m = m;
    g.n = columns;
    g.c = c;
    g.row_offset = x_at;
    g.c_offset = c_at;
    g.tail = t;
    kernel_fn(g);
  }

  // The kernel for operands of 32 or 16 bits; segments must be known.
  const KernelRow* choose(const Plan& plan, bool half, const FloatTail& t) {
    if (t.after && t.out_bf16) narrow = plan.kernels->to_bf16;
    if (half) {
      half_fn = plan.kernels->gemm_bf16;
      layout = half_layout(plan, int64_t(segments.size()), seg_len);
    } else {
      fn = plan.kernels->gemm_f32;
    }
    return plan.kernels->row[half ? k_gemm_bf16 : k_gemm_f32];
  }

  // What tells packed forms of one weight apart.
  std::string key(const char* what, const Plan& plan) const {
    std::string k = what;
    if (!half_fn) return k + "_f32";
    return k + "_bf16:" + std::to_string(plan.kernels->isa == kAmx) + ":" + std::to_string(layout.dense_len) + ":" +
           std::to_string(segments.size());
  }
};

// Splits rows and columns among tasks: whichever reads less, in pieces that leave room to balance. `row_bytes`: of new
// activations a row.
void share(FloatGemmStep& s, int threads, int64_t k, int64_t row_bytes) {
  const int64_t work = s.rows * s.n * k, groups = int64_t(s.packed.size());
  const int64_t cached = std::max<int64_t>(56, kCached / std::max<int64_t>(row_bytes, 1) / 14 * 14);
  const auto [parts, pieces] = parts_of(groups < 2 * threads ? threads : 1, work, 100000, 50e3);
  s.by_columns = parts > 1 && s.n * k > 2 * s.rows * (row_bytes / (s.half_fn ? 2 : 4) + s.n) && s.n >= 32 * parts;
  if (s.by_columns) {
    s.pieces = cut(s.n, parts, pieces, 32, 32);
  } else {
    const int few = s.rows >= 14 * parts ? parts : 1;
    s.pieces = cut(s.rows, few, std::max(pieces, int((s.rows / few + cached - 1) / cached)), 1, 14);
  }
  if (s.narrow) s.scratch = kAfterRows * (s.by_columns ? s.pieces.piece : s.n) * 4;
  s.tasks = int(groups * s.pieces.tasks());
}

struct FloatDepthwiseStep : Step {
  DepthwiseF32Fn fn;
  std::shared_ptr<const Packed> packed;
  FloatTail tail;
  int x;
  Geometry g;
  Steps4 xs, ys, rs;
  int64_t x_base;
  Pieces pieces;                   // of the rows of all images
  bool x_bf16 = false;
  ConvertFn narrow = nullptr;

  void run(const Run& r, int task, int thread) const override {
    DepthwiseF32Args d;
    d.tap_row = xs.axis[1] * g.dilation[1];
    d.tap_pixel = xs.axis[2] * g.dilation[2];
    d.kernel_h = int(g.kernel[1]);
    d.kernel_w = int(g.kernel[2]);
    d.w = packed->codes.as<float>();
    d.channels = int(g.in_channels);
    d.width = int(g.out[2]);
    d.x_pixel = xs.axis[2] * g.stride[2];
    d.y_pixel = ys.axis[2];
    const int64_t size = tail.out_bf16 ? 2 : 4;
    d.tail = tail.at(r, 0);
    float* waiting = narrow ? reinterpret_cast<float*>(r.scratch(thread)) : nullptr;
    if (narrow) d.tail.out_bf16 = false;
    std::vector<int64_t> r_at(size_t(g.out[2]));
    d.tail.r_offset = r_at.data();
    for (int64_t row = pieces.first(task); row < pieces.end(task); ++row) {
      const int64_t image = row / g.out[1], oy = row % g.out[1];
      d.x = r.at<char>(x) + (x_base + image * xs.image + oy * g.stride[1] * xs.axis[1]) * (x_bf16 ? 2 : 4);
      char* y = r.at<char>(tail.result) + (image * ys.image + oy * ys.axis[1]) * size;
      d.y = narrow ? reinterpret_cast<char*>(waiting) : y;
      if (narrow) d.y_pixel = g.in_channels;
      for (int64_t i = 0; i < g.out[2]; ++i) r_at[size_t(i)] = image * rs.image + oy * rs.axis[1] + i * rs.axis[2];
      fn(d);
      if (!tail.after) continue;
      for (int64_t i = 0; i < g.out[2]; ++i) {
        float* pixel = static_cast<float*>(d.y) + i * d.y_pixel;
        tail.after({pixel, pixel, g.in_channels, tail.p, tail.q});
        if (narrow) narrow({pixel, reinterpret_cast<uint16_t*>(y) + i * ys.axis[2], g.in_channels});
      }
    }
  }
};

// `width`: channels of a block, 16, or 32 with even and odd ones apart.
Packed pack_depthwise(const float* w, int64_t channels, int64_t kernel, int64_t width) {
  Packed p;
  p.block = kernel * width;
  const int64_t blocks = (channels + width - 1) / width;
  p.codes = Buffer(blocks * p.block * 4);
  float* out = p.codes.as<float>();
  std::memset(out, 0, size_t(blocks * p.block * 4));
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t lane = width == 16 ? c % 16 : c % 2 * 16 + c % 32 / 2;
    for (int64_t k = 0; k < kernel; ++k) out[c / width * p.block + k * width + lane] = w[c * kernel + k];
  }
  return p;
}

void build_depthwise(Builder& b, const OpNode& op, FloatTail tail, const Geometry& g, int x) {
  Plan& plan = b.plan;
  auto step = std::make_unique<FloatDepthwiseStep>();
  const int64_t kernel = g.kernel[1] * g.kernel[2];
  const bool half = plan.values[x].dtype == PW_BF16;
  step->packed = packed_weights(plan, op, half ? "depthwise_bf16" : "depthwise_f32", [&] {
    return pack_depthwise(float_weights(plan, op).data(), g.in_channels, kernel, half ? 32 : 16);
  });
  step->fn = half ? plan.kernels->depthwise_bf16 : plan.kernels->depthwise_f32;
  step->x_bf16 = half;
  if (tail.after && tail.out_bf16) {
    step->narrow = plan.kernels->to_bf16;
    step->scratch = g.out[2] * g.in_channels * 4;
  }
  step->x = x;
  step->g = g;
  step->xs = steps_of(plan.values[x]);
  step->ys = steps_of(plan.values[tail.result]);
  step->rs = tail.addend >= 0 ? steps_of(plan.values[tail.addend]) : Steps4{};
  step->x_base = -(g.begin[1] * step->xs.axis[1] + g.begin[2] * step->xs.axis[2]);
  const int64_t rows = g.batch * g.out[1];
  step->macs = g.rows() * g.in_channels * kernel;
  const auto [parts, cuts] = parts_of(plan.threads, step->macs, 50000, 25e3);
  step->pieces = cut(rows, parts, cuts, 1, 1);
  step->tasks = step->pieces.tasks();
  describe(*step, plan, op, tail, x, plan.kernels->row[half ? k_depthwise_bf16 : k_depthwise_f32]);
  step->tail = std::move(tail);
  b.add(std::move(step));
}

}  // namespace

void build_conv_f32(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  if (plan.values[op.out[0]].count() == 0) return;
  const Geometry g = geometry_of(plan, op);
  const int dims = plan.values[op.in[0]].rank() - 2;
  std::vector<int64_t> begin(size_t(dims + 2), 0), end(size_t(dims + 2), 0);
  for (int i = 0; i < dims; ++i) {
    begin[size_t(1 + i)] = g.begin[3 - dims + i];
    end[size_t(1 + i)] = g.end[3 - dims + i];
  }
  FloatTail tail = make_float_tail(b, number);
  tail.bias = bias_of(plan, op, g.out_channels);
  const int x = b.readable(op.in[0], begin, end, 0);
  const bool depthwise = g.groups == g.in_channels && g.groups == g.out_channels && g.groups > 1 && dims <= 2;
  if (depthwise) return build_depthwise(b, op, std::move(tail), g, x);

  const Steps4 xs = steps_of(plan.values[x]), ys = steps_of(plan.values[tail.result]);
  const Steps4 rs = tail.addend >= 0 ? steps_of(plan.values[tail.addend]) : Steps4{};
  const int64_t channels = g.in_channels / g.groups, columns = g.out_channels / g.groups;
  const int64_t kernel = g.kernel[0] * g.kernel[1] * g.kernel[2];
  // taps beside each other whose channels follow each other are one segment
  const bool half = plan.values[x].dtype == PW_BF16;
  const bool joined = g.groups == 1 && g.dilation[2] == 1 && xs.axis[2] == channels;
  auto step = std::make_unique<FloatGemmStep>();
  step->segments = taps_of(g, xs, joined);
  step->seg_len = int((joined ? g.kernel[2] : 1) * channels);
  const KernelRow* row = step->choose(plan, half, tail);
  const std::string how = step->key("conv", plan);
  for (int64_t group = 0; group < g.groups; ++group)
    step->packed.push_back(packed_weights(plan, op, how + ":" + std::to_string(group), [&] {
      // the weight [O, C, *kernel] with the taps outside of the channels, as rows are read
      const std::vector<float> w = float_weights(plan, op);
      std::vector<float> taps(size_t(columns * kernel * channels));
      const float* from = w.data() + group * columns * channels * kernel;
      for (int64_t o = 0; o < columns; ++o)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t k = 0; k < kernel; ++k)
            taps[size_t((o * kernel + k) * channels + c)] = from[(o * channels + c) * kernel + k];
      if (half) return pack_halves(taps.data(), columns, int64_t(step->segments.size()), step->seg_len, step->layout);
      return pack_floats(taps.data(), columns, kernel * channels, kernel * channels, 1);
    }));
  step->x = x;
  step->n = columns;
  step->group_channels = channels;
  step->walk = Walk::over(g, xs, ys, rs);
  step->rows = g.rows();
  share(*step, plan.threads, kernel * channels, channels * (half ? 2 : 4) * g.stride[1] * g.stride[2]);
  describe(*step, plan, op, tail, x, row);
  step->macs = step->rows * g.out_channels * kernel * channels;
  step->tail = std::move(tail);
  b.add(std::move(step));
}

void build_linear_f32(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const int64_t n = plan.values[op.in[1]].dims[0], k = plan.values[op.in[0]].dims.back();
  const int64_t rows = k ? plan.values[op.in[0]].count() / k : 0;
  if (rows == 0 || n == 0) return;
  if (build_codes(b, number)) return;
  FloatTail tail = make_float_tail(b, number);
  tail.bias = bias_of(plan, op, n);
  const Value& y = plan.values[tail.result];
  require(plan.values[op.in[0]].dense(), "a linear layer reads dense rows");
  auto step = std::make_unique<FloatGemmStep>();
  const bool half = plan.values[op.in[0]].dtype == PW_BF16;
  step->x = op.in[0];
  step->segments = {0};
  step->seg_len = int(k);
  const KernelRow* row = step->choose(plan, half, tail);
  step->packed = {packed_weights(plan, op, step->key("linear", plan), [&] {
    const std::vector<float> w = float_weights(plan, op);
    return half ? pack_halves(w.data(), n, 1, k, step->layout) : pack_floats(w.data(), n, k, k, 1);
  })};
  step->n = n;
  step->rows = rows;
  step->walk = Walk::over(rows, k, y, tail.addend < 0 ? nullptr : &plan.values[tail.addend]);
  share(*step, plan.threads, k, k * (half ? 2 : 4));
  describe(*step, plan, op, tail, op.in[0], row);
  step->macs = rows * n * k;
  step->tail = std::move(tail);
  b.add(std::move(step));
}

}  // namespace pw
