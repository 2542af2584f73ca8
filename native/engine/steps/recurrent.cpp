// LSTM and GRU layers on codes: one product for all inputs, then step by step.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/steps/product.h"

namespace pw {
namespace {

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// product(x): every row ranged, float32(acc) * sx * sw + b.
struct Product {
  const Kernels* kernels;
  std::shared_ptr<const Packed> packed;
  std::vector<int32_t> bias;
  std::vector<float> scale, bias_f32;
  int64_t k, n;
  int k_align;

  int64_t k_row() const { return padded(k, 64); }

  struct Space {
    uint8_t* codes;
    float* scales;
    int32_t* zeros;
    int64_t *x_at, *y_at;
  };
  int64_t bytes(int64_t rows) const {
    return padded(rows * k_row() + kSlack, 64) + 2 * padded(rows * 4, 64) + 2 * padded(rows * 8, 64);
  }
  Space carve(char* at, int64_t rows) const {
    Space s;
    s.codes = reinterpret_cast<uint8_t*>(at);
    at += padded(rows * k_row() + kSlack, 64);
    s.scales = reinterpret_cast<float*>(at);
    at += padded(rows * 4, 64);
    s.zeros = reinterpret_cast<int32_t*>(at);
    at += padded(rows * 4, 64);
    s.x_at = reinterpret_cast<int64_t*>(at);
    at += padded(rows * 8, 64);
    s.y_at = reinterpret_cast<int64_t*>(at);
    return s;
  }

  void run(const Space& s, const float* x, int64_t rows, float* y) const {
    for (int64_t m = 0; m < rows; ++m) {
      float lo = 0, hi = 0;
      kernels->minmax({x + m * k, k, &lo, &hi});
      float scale_of = (hi - lo) * (1.0f / 255.0f);
      if (scale_of < 1e-30f) scale_of = 1.0f;
      const float r = 1.0f / scale_of, t = std::nearbyintf(-lo * r);
      s.scales[m] = scale_of;
      s.zeros[m] = int32_t(t < 0 ? 0 : t > 255 ? 255 : t);
      kernels->quantize({x + m * k, s.codes + m * k_row(), k, r, s.zeros[m], 0, 255});
      s.x_at[m] = m * k_row();
      s.y_at[m] = m * n;
    }
    Epilogue e;
    e.out = Out::kF32;
    e.bias = bias.data();
    e.colsum = packed->colsum.data();
    e.multiplier = scale.data();
    e.bias_f32 = bias_f32.empty() ? nullptr : bias_f32.data();
    e.row_zero = s.zeros;
    e.row_scale = s.scales;
    const int64_t segment = 0;
    GemmArgs g;
    g.a = s.codes;
    g.row_offset = s.x_at;
    g.m = int(rows);
    g.seg_offset = &segment;
    g.seg_len = int(k);
    g.seg_pad = int(padded(k, k_align));
    g.b = packed->codes.as<int8_t>();
    g.b_block = packed->block;
    g.n = int(n);
    g.c = y;
    g.c_offset = s.y_at;
    g.r_offset = s.y_at;
    g.epilogue = &e;
    kernels->gemm(g);
  }
};

Product product_of(const Plan& plan, const OpNode& op, int weight, int scale, int bias) {
  const Value& w = plan.values[op.in[size_t(weight)]];
  Product p;
  p.kernels = plan.kernels;
  p.n = w.dims[0];
  p.k = w.dims[1];
  p.k_align = plan.k_align();
  const int8_t* codes = static_cast<const int8_t*>(plan.constant(op.in[size_t(weight)]).data);
  const std::string key = std::to_string(w.index) + ":linear:" + std::to_string(plan.k_align());
  p.packed = plan.model->packed(key, [&] { return pack_weights(codes, p.n, {0}, p.k, 1, p.k, plan.k_align()); });
  p.bias.assign(size_t(padded(p.n, 64)), 0);
  p.scale = columns_f32(plan, op.in[size_t(scale)], p.n);
  if (op.input(size_t(bias)) >= 0) p.bias_f32 = columns_f32(plan, op.in[size_t(bias)], p.n);
  return p;
}

struct RecurrentStep : Step {
  Product from_input, from_state;
  bool lstm, reverse;
  int x, h0, c0 = -1, y, h, c = -1;
  int64_t steps, rows, hidden, chunk;

  void run(const Run& r, int, int thread) const override {
    char* at = r.scratch(thread);
    float* given = reinterpret_cast<float*>(at);
    at += padded(chunk * from_input.n * 4, 64);
    float* own = reinterpret_cast<float*>(at);
    at += padded(rows * from_state.n * 4, 64);
    const Product::Space state = from_state.carve(at, rows);
    at += from_state.bytes(rows);
    const Product::Space input = from_input.carve(at, chunk);
    float *hidden_state = r.at<float>(h), *cell = lstm ? r.at<float>(c) : nullptr;
    std::memcpy(hidden_state, r.at<float>(h0), size_t(rows * hidden * 4));
    if (lstm) std::memcpy(cell, r.at<float>(c0), size_t(rows * hidden * 4));
    const int64_t at_once = std::max<int64_t>(chunk / std::max<int64_t>(rows, 1), 1);
    for (int64_t done = 0; done < steps; done += at_once) {
      const int64_t count = std::min(at_once, steps - done), first = reverse ? steps - done - count : done;
      from_input.run(input, r.at<float>(x) + first * rows * from_input.k, count * rows, given);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = reverse ? count - 1 - i : i;
        from_state.run(state, hidden_state, rows, own);
        for (int64_t n = 0; n < rows; ++n) {
          const float* g = given + (t * rows + n) * from_input.n;
          const float* o = own + n * from_state.n;
          if (lstm) from_state.kernels->lstm({g, o, cell + n * hidden, hidden_state + n * hidden, int(hidden)});
          else from_state.kernels->gru({g, o, hidden_state + n * hidden, int(hidden)});
        }
        std::memcpy(r.at<float>(y) + (first + t) * rows * hidden, hidden_state, size_t(rows * hidden * 4));
      }
    }
  }
};

void build(Builder& b, int number, bool lstm) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  auto step = std::make_unique<RecurrentStep>();
  const int s = lstm ? 2 : 1;  // states
  const Value& x = plan.values[op.in[0]];
  for (int v : op.in) require(v < 0 || plan.values[v].dense(), "a recurrent layer reads dense tensors");
  for (int v : op.out) require(plan.values[v].dense(), "a recurrent layer writes dense tensors");
  step->lstm = lstm;
  step->reverse = op.flag("reverse");
  step->from_input = product_of(plan, op, 1 + s, 2 + s, 5 + s);
  step->from_state = product_of(plan, op, 3 + s, 4 + s, 6 + s);
  step->steps = x.dims[0];
  step->rows = x.dims[1];
  step->hidden = step->from_state.k;
  step->x = op.in[0];
  step->h0 = op.in[1];
  step->y = op.out[0];
  step->h = op.out[1];
  if (lstm) {
    step->c0 = op.in[2];
    step->c = op.out[2];
  }
  step->chunk = std::max(step->rows, std::min<int64_t>(step->steps * step->rows, 128));
  step->scratch = padded(step->chunk * step->from_input.n * 4, 64) + padded(step->rows * step->from_state.n * 4, 64) +
                  step->from_state.bytes(step->rows) + step->from_input.bytes(step->chunk) + 256;
  step->ops = op.kind;
  step->site = op.site;
  step->kernel = plan.kernels->row[k_gemm]->symbol;
  step->macs = step->steps * step->rows * (step->from_input.k + step->hidden) * step->from_input.n;
  step->bytes = step->steps * step->hidden * step->from_state.n;
  for (int v : op.in)
    if (v >= 0) step->reads.push_back(v);
  step->writes = op.out;
  b.add(std::move(step));
}

}  // namespace

void build_lstm(Builder& b, int number) { build(b, number, true); }
void build_gru(Builder& b, int number) { build(b, number, false); }

}  // namespace pw
