// Float products of few rows whose weights are stored in 16 bits or less: decoded in registers, as memory is what they
// wait for. With more rows they are float products on weights that are decoded once (real_product.cpp).
#include <algorithm>
#include <cstring>

#include "core/functions.h"
#include "engine/pieces.h"
#include "engine/steps/codes.h"

namespace pw {
namespace {

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A table of small floats: the code's bits below the sign, `mantissa` further left, are a float16, `factor` times too small.
struct Small {
  int bits = 0, mantissa = 0;
  float factor = 1;
};

// Bits of the mantissa and the sign's place that explain a table of 256 levels, if any do; codes in `used` count.
bool small_floats(const float* levels, const bool* used, Small& found) {
  for (int bits = 8; bits >= 4; --bits)
    for (int m = 1; m <= 3; ++m) {
      const auto half = [&](int code) {
        const int below = (1 << (bits - 1)) - 1;
        return fn::half_to_float(uint16_t((code << (16 - bits) & 0x8000) | (code & below) << (10 - m)));
      };
      const float factor = levels[1] / half(1);
      bool same = bits - 1 - m <= 5 && factor > 0 && factor < 1e6f;
      for (int code = 0; same && code < 256; ++code)
        same = !used[code] || (code < 1 << bits && levels[code] == half(code) * factor);
      if (same) {
        found = {bits, 10 - m, factor};
        return true;
      }
    }
  return false;
}

// What a product's weight is made of.
struct Source {
  const Constant* codes = nullptr;
  const Constant* scale = nullptr;  // or null: ones
  const Constant* zero = nullptr;
  const float* levels = nullptr;
  int64_t rows = 0, k = 0, groups = 1;
  int bits = 8;
  std::string key;
};

bool source_of(const Plan& plan, const OpNode& op, Source& s) {
  const OpNode* from = decoder_of(plan, op);
  int codes = op.in[1], scale = op.input(2), zero = op.input(3);
  if (!from) {
    if (!plan.is_constant(op.in[1])) return false;
    s.bits = 16;
    s.codes = &plan.constant(op.in[1]);
    if (s.codes->dtype != PW_F16 && s.codes->dtype != PW_BF16) return false;
  } else if (from != &op) {
    const bool levels = from->kind == "decode_levels";
    if (!levels && from->kind != "decode") return false;
    codes = from->in[0];
    scale = from->in[levels ? 2 : 1];
    zero = levels ? -1 : from->input(2);
    if (levels) {
      s.levels = static_cast<const float*>(plan.constant(from->in[1]).data);
      s.key = ":" + std::to_string(plan.values[from->in[1]].index);
    }
  }
  if (from) {
    s.bits = int(from->integer("bits"));
    s.codes = &plan.constant(codes);
    s.scale = &plan.constant(scale);
    s.zero = zero >= 0 ? &plan.constant(zero) : nullptr;
    s.groups = s.scale->dims[1];
  }
  s.key = "codes:" + std::to_string(plan.values[codes].index) + s.key + "/" + std::to_string(s.groups);
  s.rows = s.codes->dims[0];
  return true;
}

std::vector<float> by_group(const Source& s, const Constant* c, int64_t step, float factor) {
  std::vector<float> out(size_t(s.groups * step), 0.0f);
  for (int64_t j = 0; j < s.rows; ++j)
    for (int64_t g = 0; g < s.groups; ++g) out[size_t(g * step + j)] = (c ? row_of(c, j)[g] : 1.0f) * factor;
  return out;
}

Packed pack_codes(const Source& s) {
  Packed p;
  const int64_t n = s.rows, k = s.k;
  const int64_t group = k / s.groups, padded_group = s.bits == 4 ? padded(group, 8) : group;
  p.block = s.groups * padded_group * 2 * s.bits;
  p.codes = Buffer((n + 15) / 16 * p.block);
  uint8_t* out = p.codes.as<uint8_t>();
  std::memset(out, 0, size_t((n + 15) / 16 * p.block));
  const int64_t row_bytes = s.codes->dims[1] * (s.bits == 16 ? 2 : 1);
  const int flip = s.levels ? 0 : 8;  // two's complement to offset by 8
  bool used[256] = {};
  for (int64_t j = 0; j < n; ++j) {
    const uint8_t* row = static_cast<const uint8_t*>(s.codes->data) + j * row_bytes;
    uint8_t* block = out + j / 16 * p.block;
    for (int64_t i = 0; i < k; ++i) {
      if (s.bits == 4) {
        const int code = (i % 2 ? row[i / 2] >> 4 : row[i / 2] & 15) ^ flip;
        const int64_t at = i / group * padded_group + i % group;
        uint8_t& pair = block[at / 8 * 64 + j % 16 * 4 + at % 8 / 2];
        pair = uint8_t(pair | code << at % 2 * 4);
      } else if (s.bits == 8) {
        block[i * 16 + j % 16] = row[i];
        used[row[i]] = true;
      } else {
        std::memcpy(block + (i * 16 + j % 16) * 2, row + i * 2, 2);
      }
    }
  }
  Small small;
  if (s.bits == 8 && s.levels && small_floats(s.levels, used, small)) {
    p.mantissa = small.mantissa;
    p.sign = 16 - small.bits;
    p.factor = small.factor;
  }
  return p;
}

struct CodesStep : Step {
  GemmCodesFn fn;
  std::shared_ptr<const Packed> packed;
  std::vector<float> levels, scale, zero, bias;
  int x, y;
  GemmCodesArgs args;
  Pieces pieces;
  void run(const Run& r, int task, int) const override {
    const int64_t n0 = pieces.first(task);
    GemmCodesArgs g = args;
    g.a = r.at<float>(x);
    g.levels = levels.data();
    g.b = packed->codes.as<uint8_t>() + n0 / 16 * packed->block;
    g.b_block = packed->block;
    g.n = int(pieces.end(task) - n0);
    g.scale = scale.data() + n0;
    g.zero = zero.empty() ? nullptr : zero.data() + n0;
    g.bias = bias.empty() ? nullptr : bias.data() + n0;
    g.c = r.at<float>(y) + n0;
    fn(g);
  }
};

}  // namespace

bool build_codes(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  const Value &xv = plan.values[op.in[0]], &y = plan.values[op.out[0]];
  Source s;
  if (xv.dtype != PW_F32 || y.dtype != PW_F32 || !source_of(plan, op, s)) return false;
  s.k = xv.dims.back();
  const int64_t rows = s.k ? xv.count() / s.k : 0;
  if (rows > kFewRowsOfCodes || rows == 0 || s.rows == 0) return false;
  require(xv.dense() && y.dense(), "a linear layer reads and writes dense rows");
  auto step = std::make_unique<CodesStep>();
  GemmCodesArgs& g = step->args;
  step->packed = plan.model->packed(s.key, [&] { return pack_codes(s); });
  const int64_t n_pad = padded(s.rows, 64);
  const bool small = step->packed->mantissa != 0;
  if (s.bits == 16) g.coding = s.codes->dtype == PW_F16 ? Coding::kHalf : Coding::kBrain;
  else if (s.bits == 4) g.coding = s.levels ? Coding::kLevels4 : Coding::kInteger4;
  else g.coding = !s.levels ? Coding::kInteger8 : small ? Coding::kSmall8 : Coding::kLevels8;
  if (s.levels) step->levels.assign(s.levels, s.levels + (1 << s.bits));
  else if (s.bits == 4)
    for (int i = -8; i < 8; ++i) step->levels.push_back(float(i));
  g.mantissa = step->packed->mantissa;
  g.sign = step->packed->sign;
  g.m = int(rows);
  g.k = int(s.k);
  g.lda = s.k;
  g.groups = int(s.groups);
  g.scale_step = n_pad;
  g.ldc = s.rows;
  step->scale = by_group(s, s.scale, n_pad, step->packed->factor);
  if (s.zero) step->zero = by_group(s, s.zero, n_pad, 1.0f);
  const int bias = op.input(op.kind == "linear_w" ? 4 : 2);
  if (bias >= 0) step->bias = columns_f32(plan, bias, s.rows);
  step->fn = plan.kernels->gemm_codes;
  step->x = op.in[0];
  step->y = op.out[0];
  step->macs = rows * s.rows * s.k;
  const auto [parts, cuts] = parts_of(plan.threads, step->macs, 50000, 10e3);
  step->pieces = cut(s.rows, parts, cuts, 16, 16);
  step->tasks = step->pieces.tasks();
  step->ops = op.kind;
  step->site = op.site;
  step->kernel = plan.kernels->row[k_gemm_codes]->symbol;
  step->reads = {step->x};
  step->writes = {step->y};
  step->bytes = (xv.count() + y.count()) * 4 + s.rows * s.k * s.bits / 8 + s.groups * s.rows * 4;
  b.add(std::move(step));
  return true;
}

}  // namespace pw
