// Convolution and linear layers on codes: one packed product, or one filter per channel.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/pieces.h"
#include "engine/steps/epilogue.h"
#include "engine/steps/product.h"
#include "engine/steps/walk.h"
#include "ops/depthwise/order.h"

namespace pw {

namespace {

struct GemmStep : Step {
  GemmFn fn;
  std::shared_ptr<const Packed> packed;
  Tail tail;
  int x;
  Walk walk;
  int64_t y_base = 0;              // columns of the group
  std::vector<int64_t> segments;
  int seg_len, seg_pad;
  bool dense = false;
  int64_t n;                       // columns
  int64_t b_base = 0;              // bytes into the packed weights
  int64_t rows = 0;
  bool by_columns = false;
  Pieces pieces;                   // of the columns or the rows

  void run(const Run& r, int task, int) const override {
    const int64_t m0 = by_columns ? 0 : pieces.first(task), m1 = by_columns ? rows : pieces.end(task);
    const int64_t n0 = by_columns ? pieces.first(task) : 0, n1 = by_columns ? pieces.end(task) : n;
    const Epilogue e = tail.at(r);
    GemmArgs g;
    g.a = r.at<uint8_t>(x) + walk.x_base;
    g.segments = int(segments.size());
    g.seg_offset = segments.data();
    g.seg_len = seg_len;
    g.seg_pad = seg_pad;
    g.dense = dense;
    g.b = packed->codes.as<int8_t>() + b_base + n0 / 16 * packed->block;
    g.b_block = packed->block;
    g.b_rest = packed->rest;
    g.n = int(n1 - n0);
    g.n0 = int(y_base + n0);
    g.epilogue = &e;
    const int64_t size = e.out == Out::kU8 ? 1 : 4;
    g.c = r.at<char>(tail.result) + (y_base + n0) * size;
    Epilogue shifted = e;
    if (shifted.residual) shifted.residual += y_base + n0;
    if (shifted.addend) shifted.addend += y_base + n0;
    g.epilogue = &shifted;
    constexpr int kRows = 512;
    int64_t x_at[kRows], y_at[kRows], r_at[kRows];
    for (int64_t m = m0; m < m1; m += kRows) {
      const int64_t k = std::min<int64_t>(kRows, m1 - m);
      walk.offsets(m, k, x_at, y_at, r_at);
      g.m = int(k);
      g.m0 = int(m);
      g.row_offset = x_at;
      g.c_offset = y_at;
      g.r_offset = r_at;
      fn(g);
    }
  }

};

// Splits rows or columns among the threads: columns where weights, which all threads would read, are more than what goes
// in and out, of which a half would come from another's cache. `moved`: bytes in and out.
void share(GemmStep& s, const Plan& plan, int64_t k, int64_t moved) {
  const int64_t work = s.rows * s.n * k;
  const auto [parts, pieces] = parts_of(plan.threads, work, 200000, plan.kernels->isa == kAmx ? 300e3 : 100e3);
  s.by_columns = s.n * k > 3 * moved && s.n >= 64 * parts;
  s.pieces = s.by_columns ? cut(s.n, parts, pieces, 32, 64) : cut(s.rows, parts, pieces, 1, 32);
  s.tasks = s.pieces.tasks();
}

}  // namespace

void fold_zero(const Plan& plan, Tail& t, const OpNode& op, const std::vector<int32_t>& colsum, int64_t columns,
               int64_t depth) {
  const int32_t zero = op.input(3) >= 0 ? 0 : int32_t(op.integer("zero"));
  const int32_t* bias = op.input(2) >= 0 ? static_cast<const int32_t*>(plan.constant(op.in[2]).data) : nullptr;
  for (int64_t i = 0; i < columns; ++i) t.bias[size_t(i)] = (bias ? bias[i] : 0) - zero * colsum[size_t(i)];
  // the largest accumulator that any input can make, times its multiplier, and the residual
  const double greatest = plan.values[op.in[1]].dtype == PW_I16 ? 32768.0 : 128.0;
  bool fits = op.input(3) < 0 && !t.multiplier.empty();
  for (int64_t i = 0; i < columns && fits; ++i) {
    const double most = 255.0 * greatest * double(depth) + std::fabs(double(t.bias[size_t(i)]));
    fits = most < 2147483647.0 && most * std::fabs(t.multiplier[size_t(i)]) + 256.0 * std::fabs(t.base.r_multiplier) < 1e9;
  }
  t.base.fits = fits;
  if (op.input(3) >= 0) {
    t.row_zero = op.in[3];
    t.colsum = colsum;
    if (t.row_scale < 0) t.base.row_step = plan.values[op.in[3]].count() == 1 ? 0 : 1;
  }
}

namespace {

void describe(Step& s, const Plan& plan, const Tail& t, const OpNode& op, int x) {
  s.ops = t.ops;
  s.site = op.site;
  s.reads = {x, t.residual, t.row_scale, t.row_zero};
  s.writes = {t.result};
  const Value &in = plan.values[x], &out = plan.values[t.result], &w = plan.values[op.in[1]];
  s.bytes = in.count() + w.count() * dtype_size(w.dtype) + out.count() * dtype_size(out.dtype);
  if (t.residual >= 0) s.bytes += out.count() * dtype_size(out.dtype);
}

// Which kernel multiplies, by the width of the weights.
void choose_kernel(GemmStep& s, const Plan& plan, bool wide) {
  s.fn = wide ? plan.kernels->gemm_wide : plan.kernels->gemm;
  s.kernel = plan.kernels->row[wide ? k_gemm_wide : k_gemm]->symbol;
}

std::string layout_key(int constant, const char* what, std::initializer_list<int64_t> numbers) {
  std::string key = std::to_string(constant) + what;
  for (int64_t n : numbers) key += ":" + std::to_string(n);
  return key;
}

// Depthwise filters of few channels: neighbouring pixels stand in for further channels, `pixels` of them at a time.
int64_t pixels_together(const Geometry& g, const Steps4& xs, const Steps4& ys, bool wide) {
  const bool packed_pixels = xs.axis[2] == g.in_channels && ys.axis[2] == g.in_channels;
  // (kernels with wide vectors do that by themselves for 3 x 3 windows of 16 or 32 channels)
  const bool own = wide && g.kernel[1] == 3 && g.kernel[2] == 3 && g.in_channels % 16 == 0 && g.out[2] > 3;
  if (own || !packed_pixels || g.stride[2] != 1 || g.dilation[2] != 1 || g.in_channels > 32 || 64 % g.in_channels) return 1;
  int64_t n = 64 / g.in_channels;
  while (n > 1 && g.out[2] % n) n /= 2;
  return n;
}

struct DepthwiseStep : Step {
  DepthwiseFn fn;
  std::shared_ptr<const Packed> packed;
  Tail tail;
  int x;
  Geometry g;
  Steps4 xs, ys, rs;
  int64_t x_base, pixels = 1;
  Pieces pieces;                   // of the rows of all images

  void run(const Run& r, int task, int) const override {
    const Epilogue e = tail.at(r);
    const int64_t size = e.out == Out::kU8 ? 1 : 4;
    DepthwiseArgs d;
    d.x_row = xs.axis[1];
    d.x_pixel = xs.axis[2];
    d.kernel_h = int(g.kernel[1]);
    d.kernel_w = int(g.kernel[2]);
    d.dilation_h = int(g.dilation[1]);
    d.dilation_w = int(g.dilation[2]);
    d.w = packed->codes.as<int8_t>();
    d.channels = int(g.in_channels * pixels);
    d.width = int(g.out[2] / pixels);
    d.result_pixel = xs.axis[2] * g.stride[2] * pixels;
    d.y_pixel = ys.axis[2] * pixels;
    d.r_pixel = rs.axis[2] * pixels;
    d.epilogue = &e;
    d.result_row = g.stride[1] * xs.axis[1];
    d.y_row = ys.axis[1];
    d.r_row = rs.axis[1];
    const int64_t end = pieces.end(task);
    for (int64_t row = pieces.first(task); row < end; row += d.rows) {
      const int64_t image = row / g.out[1], oy = row % g.out[1];
      d.rows = int(std::min(end - row, g.out[1] - oy));
      d.x = r.at<uint8_t>(x) + x_base + image * xs.image + oy * g.stride[1] * xs.axis[1];
      d.y = r.at<uint8_t>(tail.result) + (image * ys.image + oy * ys.axis[1]) * size;
      d.residual = e.residual ? e.residual + image * rs.image + oy * rs.axis[1] : nullptr;
      fn(d);
    }
  }
};

Packed pack_depthwise(const int8_t* w, const Geometry& g, int64_t pixels) {
  const int64_t channels = g.in_channels * pixels;
  const int64_t quads = (g.kernel[1] + 3) / 4, blocks = (channels + 63) / 64;
  const int64_t kernel = g.kernel[1] * g.kernel[2];
  Packed p;
  p.block = quads * g.kernel[2] * 256;
  p.codes = Buffer(blocks * p.block);
  p.colsum.assign(size_t(blocks * 64), 0);
  int8_t* out = p.codes.as<int8_t>();
  std::memset(out, 0, size_t(blocks * p.block));
  const int64_t high = g.kernel[1], wide = g.kernel[2], filters = g.in_channels, block = p.block;  // bytes alias all else
  for (int64_t c = 0, f = 0; c < channels; ++c, f = f + 1 < filters ? f + 1 : 0) {
    const int8_t* filter = w + f * kernel;
    int8_t* to = out + c / 64 * block + depthwise_place(int(c)) % 64 * 4;
    int32_t sum = 0;
    for (int64_t ky = 0; ky < high; ++ky)
      for (int64_t kx = 0; kx < wide; ++kx) {
        const int8_t v = filter[ky * wide + kx];
        to[(ky / 4 * wide + kx) * 256 + ky % 4] = v;
        sum += v;
      }
    p.colsum[size_t(c)] = sum;
  }
  return p;
}

template <class T>
std::vector<T> in_depthwise_order(const std::vector<T>& v, int64_t channels, int64_t pixels) {
  if (v.empty()) return v;
  std::vector<T> out(size_t((channels * pixels + 63) / 64 * 64), T(0));
  for (int64_t c = 0, from = 0; c < channels * pixels; ++c, from = from + 1 < channels ? from + 1 : 0)
    out[size_t(depthwise_place(int(c)))] = v[size_t(from)];
  return out;
}

void build_depthwise(Builder& b, const OpNode& op, Tail tail, const Geometry& g, int x) {
  Plan& plan = b.plan;
  auto step = std::make_unique<DepthwiseStep>();
  const int weights = plan.values[op.in[1]].index;
  const int8_t* w = static_cast<const int8_t*>(plan.constant(op.in[1]).data);
  const Steps4 xs = steps_of(plan.values[x]), ys = steps_of(plan.values[tail.result]);
  const Steps4 rs = tail.residual >= 0 ? steps_of(plan.values[tail.residual]) : ys;
  const int64_t pixels = rs.axis[2] == ys.axis[2] ? pixels_together(g, xs, ys, plan.kernels->isa >= kAvx512) : 1;
  step->packed = plan.model->packed(layout_key(weights, ":depthwise", {pixels}), [&] { return pack_depthwise(w, g, pixels); });
  fold_zero(plan, tail, op, step->packed->colsum, g.in_channels, g.kernel[1] * g.kernel[2]);
  tail.bias = in_depthwise_order(tail.bias, g.in_channels, pixels);
  tail.multiplier = in_depthwise_order(tail.multiplier, g.in_channels, pixels);
  tail.bias_f32 = in_depthwise_order(tail.bias_f32, g.in_channels, pixels);
  tail.colsum = in_depthwise_order(tail.colsum, g.in_channels, pixels);
  step->tail = std::move(tail);
  step->tail.finish();
  step->fn = plan.kernels->depthwise;
  step->kernel = plan.kernels->row[k_depthwise]->symbol;
  step->x = x;
  step->g = g;
  step->xs = xs;
  step->ys = ys;
  step->rs = rs;
  step->pixels = pixels;
  step->x_base = -(g.begin[1] * step->xs.axis[1] + g.begin[2] * step->xs.axis[2]);
  describe(*step, plan, step->tail, op, x);
  step->macs = g.rows() * g.in_channels * g.kernel[1] * g.kernel[2];
  const int64_t rows = g.batch * g.out[1];
  const auto [parts, cuts] = parts_of(plan.threads, step->macs, 100000, 100e3);
  step->pieces = cut(rows, parts, cuts, 1, 1);
  step->tasks = step->pieces.tasks();
  b.add(std::move(step));
}

}  // namespace

void build_conv(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const Geometry g = geometry_of(plan, op);
  require(g.rows() * g.out_channels == 0 || g.in_channels > 0, "no channels");
  Tail tail = make_tail(b, number, g.out_channels);
  if (g.rows() == 0 || g.out_channels == 0) return;
  // padding: around the value itself where the layout provided it, else around a copy
  const int rank = plan.values[op.in[0]].rank(), dims = rank - 2;
  std::vector<int64_t> begin(size_t(rank), 0), end(size_t(rank), 0);
  for (int i = 0; i < dims; ++i) {
    begin[size_t(1 + i)] = g.begin[3 - dims + i];
    end[size_t(1 + i)] = g.end[3 - dims + i];
  }
  int x;
  if (op.input(3) >= 0) {  // the padding's code is known only at run time
    bool any = false;
    for (int64_t p : begin) any = any || p > 0;
    for (int64_t p : end) any = any || p > 0;
    x = any ? padded_with_code(b, op.in[0], begin, end, op.in[3]) : b.readable(op.in[0], begin, end, 0);
  } else {
    x = b.readable(op.in[0], begin, end, op.integer("zero"));
  }
  const Value &xv = plan.values[x], &yv = plan.values[tail.result];
  require(xv.strides.back() == 1 && yv.strides.back() == 1, "channels must lie side by side");
  const bool depthwise = g.groups == g.in_channels && g.groups == g.out_channels && g.groups > 1 && g.kernel[0] == 1 &&
                         g.in[0] == 1 && xv.rank() <= 4;
  const bool wide = plan.values[op.in[1]].dtype == PW_I16, tiles = plan.kernels->isa == kAmx && !wide;
  if (depthwise && !wide) return build_depthwise(b, op, std::move(tail), g, x);

  const Steps4 xs = steps_of(xv), ys = steps_of(yv);
  const Steps4 rs = tail.residual >= 0 ? steps_of(plan.values[tail.residual]) : Steps4{};
  const int64_t channels = g.in_channels / g.groups, columns = g.out_channels / g.groups;
  const int64_t kernel = g.kernel[0] * g.kernel[1] * g.kernel[2];
  const bool joined = g.groups == 1 && g.dilation[2] == 1 && (xs.axis[2] == channels || g.kernel[2] == 1);
  const std::vector<int64_t> x_segments = taps_of(g, xs, joined);
  std::vector<int64_t> w_segments = taps_of(g, g.kernel[1] * g.kernel[2], g.kernel[2], 1, joined);
  const int64_t seg_len = (joined ? g.kernel[2] : 1) * channels;
  // tiles load rows at one distance: where strides forbid that, rows are gathered, and their segments joined
  const bool strided = g.stride[1] != 1 || g.stride[2] != 1 || g.stride[0] != 1;
  const bool dense = tiles && strided && kernel > 1 && seg_len < 64;
  const int weights = plan.values[op.in[1]].index;
  const int8_t* w = static_cast<const int8_t*>(plan.constant(op.in[1]).data);
  const int k_align = wide ? 4 : plan.k_align();
  for (int64_t& s : w_segments) s *= channels;
  std::vector<int32_t> all_sums(size_t((g.out_channels + 63) / 64 * 64), 0);
  std::vector<std::shared_ptr<const Packed>> packed;
  for (int64_t group = 0; group < g.groups; ++group) {
    const std::string key = layout_key(weights, ":conv", {group, joined, dense, k_align, plan.splits()});
    packed.push_back(plan.model->packed(key, [&] {
      if (wide)
        return pack_weights(reinterpret_cast<const int16_t*>(w) + group * columns * kernel * channels, columns, w_segments,
                            seg_len, kernel * channels, k_align, kernel);
      const int8_t* from = w + group * columns * kernel * channels;
      if (dense) return pack_weights(from, columns, {0}, kernel * channels, kernel * channels, plan.k_align(), kernel);
      Packed p = pack_weights(from, columns, w_segments, seg_len, kernel * channels, plan.k_align(), kernel);
      return plan.splits() ? split(std::move(p), columns, int64_t(w_segments.size())) : std::move(p);
    }));
    for (int64_t i = 0; i < columns; ++i) all_sums[size_t(group * columns + i)] = packed.back()->colsum[size_t(i)];
  }
  fold_zero(plan, tail, op, all_sums, g.out_channels, channels * kernel);
  for (int64_t group = 0; group < g.groups; ++group) {
    auto step = std::make_unique<GemmStep>();
    step->packed = packed[size_t(group)];
    step->tail = tail;
    step->tail.finish();
    choose_kernel(*step, plan, wide);
    step->x = x;
    step->segments = x_segments;
    step->seg_len = int(seg_len);
    step->dense = dense;
    const int64_t padded_len = dense ? kernel * channels : seg_len;
    step->seg_pad = int((padded_len + k_align - 1) / k_align * k_align);
    step->n = columns;
    step->walk = Walk::over(g, xs, ys, rs);
    step->walk.x_base += group * channels;
    step->y_base = group * columns;
    // rows at one distance throughout, if those over the padding on the right are computed too (tiles want that)
    const int64_t pitch = xs.axis[2] ? xs.axis[1] / std::max<int64_t>(xs.axis[2], 1) : 0;
    if (tiles && g.stride[2] == 1 && g.stride[1] == 1 && g.out[1] > 1 && kernel > 1 &&
        pitch > g.out[2] && pitch * 3 <= g.out[2] * 4) {
      step->walk.count[3] = pitch;
    }
    step->rows = step->walk.rows();
    describe(*step, plan, step->tail, op, x);
    share(*step, plan, seg_len * int64_t(x_segments.size()), step->bytes - plan.values[op.in[1]].count() * (wide ? 2 : 1));
    step->macs = g.rows() * columns * channels * kernel;
    b.add(std::move(step));
  }
}

int linear_rows(Builder& b, const OpNode& op) {
  const std::vector<int64_t> none(size_t(b.plan.values[op.in[0]].rank()), 0);
  const int x = b.readable(op.in[0], none, none, 0);
  require(b.plan.values[x].dense(), "a linear layer reads dense rows");
  return x;
}

void build_linear(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const Value& w = plan.values[op.in[1]];
  const int64_t n = w.dims[0], k = w.dims[1];
  const bool wide = w.dtype == PW_I16;
  const int k_align = wide ? 4 : plan.k_align();
  const OpNode* unpack = w.producer >= 0 && plan.ops[w.producer].kind == "unpack" ? &plan.ops[w.producer] : nullptr;
  if (unpack && build_linear_bits(b, number)) return;
  Tail tail = make_tail(b, number, n);
  const int64_t rows = k ? plan.values[op.in[0]].count() / k : 0;
  if (rows == 0 || n == 0) return;
  const int x = linear_rows(b, op);
  auto step = std::make_unique<GemmStep>();
  const int stored = unpack ? plan.values[unpack->in[0]].index : w.index;
  const int zeros = unpack && unpack->in.size() > 2 ? plan.values[unpack->in[2]].index : -1;
  const std::string key = layout_key(stored, unpack ? ":unpacked" : ":linear", {k_align, plan.splits(), zeros});
  step->packed = plan.model->packed(key, [&] {
    if (wide) return pack_weights(static_cast<const int16_t*>(plan.constant(op.in[1]).data), n, {0}, k, k, k_align);
    const std::vector<int8_t> expanded = unpack ? unpacked_codes(plan, *unpack) : std::vector<int8_t>();
    const int8_t* codes = unpack ? expanded.data() : static_cast<const int8_t*>(plan.constant(op.in[1]).data);
    Packed p = pack_weights(codes, n, {0}, k, k, plan.k_align());
    return plan.splits() ? split(std::move(p), n, 1) : std::move(p);
  });
  fold_zero(plan, tail, op, step->packed->colsum, n, k);
  const Value& y = plan.values[tail.result];
  step->tail = std::move(tail);
  step->tail.finish();
  choose_kernel(*step, plan, wide);
  step->x = x;
  step->segments = {0};
  step->seg_len = int(k);
  step->seg_pad = int((k + k_align - 1) / k_align * k_align);
  step->n = n;
  step->walk = Walk::over(rows, k, y, step->tail.residual < 0 ? nullptr : &plan.values[step->tail.residual]);
  step->rows = rows;
  describe(*step, plan, step->tail, op, x);
  share(*step, plan, k, step->bytes - n * k * (wide ? 2 : 1));
  step->macs = rows * n * k;
  b.add(std::move(step));
}

}  // namespace pw
