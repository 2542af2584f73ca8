// Linear layers on codes ranged at run time, whose weights have 4 bits and one scale per group: packed, as they are stored.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/pieces.h"
#include "engine/steps/grouped.h"

namespace pw {
namespace {

constexpr int64_t kRows = 128;  // whose activations stay in the second cache beside a panel

struct NibblesStep : Step {
  GemmNibblesFn fn;
  std::shared_ptr<const Packed> packed;
  GroupedOperands operands;
  Pieces rows, columns;

  void run(const Run& r, int task, int thread) const override {
    const int64_t part = task / columns.tasks(), m0 = rows.first(part), n0 = columns.first(task % columns.tasks());
    GemmNibblesArgs g;
    static_cast<GroupedRows&>(g) = operands.at(r, m0, rows.end(part), n0, columns.end(task % columns.tasks()));
    g.scale_bytes = packed->scale_bytes;
    g.b = packed->codes.as<uint8_t>() + n0 / 64 * packed->block;
    g.b_panel = packed->block;
    g.scratch = r.scratch(thread);
    fn(g);
  }
};

// The float16 that is this number, if there is one.
bool half_of(float x, uint16_t& half) {
  const float size = std::fabs(x);
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  int exponent = 0;
  if (size < 6.103515625e-5f) {  // steps of 2^-24
    const float steps = size * 16777216.0f;
    half = uint16_t(sign | int(steps));
    return steps == float(int(steps));
  }
  const float steps = std::frexp(size, &exponent) * 2048.0f;  // 1024 .. 2048, times 2^(exponent - 11)
  half = uint16_t(sign | (exponent + 14) << 10 | (int(steps) & 1023));
  return exponent <= 16 && steps == float(int(steps));
}

bool halves(const std::vector<float>& scales) {
  uint16_t half;
  for (float s : scales)
    if (!half_of(s, half)) return false;
  return true;
}

// Codes [n, k] two in a byte, low nibble first, two's complement; scales [n or 1, groups].
Packed pack_nibbles(const Constant& stored, const Constant& scale, int64_t k) {
  const int64_t n = stored.dims[0], groups = scale.dims[1], length = k / groups, row = (k + 1) / 2;
  const auto* pairs = static_cast<const uint8_t*>(stored.data);
  Packed p;
  const std::vector<float> scales = scales_f32(scale);
  p.scale_bytes = halves(scales) ? 2 : 4;
  const int64_t bytes = length * 32 + 64 * p.scale_bytes;
  p.block = groups * bytes;
  p.codes = Buffer((n + 63) / 64 * p.block);
  uint8_t* out = p.codes.as<uint8_t>();
  if (n % 64) std::memset(out + n / 64 * p.block, 0, size_t(p.block));
  for (int64_t first = 0; first < n; first += 32) {  // the columns of one vector: blocks of low and of high nibbles
    uint8_t* vector = out + first / 64 * p.block + first % 64 / 32 * 64;
    for (int64_t j = 0; j < 16; ++j) {
      const bool low = first + j < n, high = first + 16 + j < n;
      const uint8_t *below = pairs + (first + j) * row, *above = below + 16 * row;
      for (int64_t i = 0; low && i < k; i += 2) {
        const int a = below[i / 2] ^ 0x88, b = high ? above[i / 2] ^ 0x88 : 0;
        uint8_t* to = vector + i / length * bytes + i % length / 4 * 128 + j * 4 + i % 4;
        to[0] = uint8_t((a & 15) | (b & 15) << 4);
        to[1] = uint8_t(a >> 4 | (b & 0xf0));
      }
    }
  }
  for (int64_t j = 0; j < n; ++j)
    for (int64_t g = 0; g < groups; ++g) {
      const float s = scales[size_t((scale.dims[0] == 1 ? 0 : j) * groups + g)];
      uint8_t* to = out + j / 64 * p.block + g * bytes + length * 32 + j % 64 * p.scale_bytes;
      if (p.scale_bytes == 2) {
        uint16_t half = 0;
        half_of(s, half);
        std::memcpy(to, &half, 2);
      } else {
        std::memcpy(to, &s, 4);
      }
    }
  return p;
}

}  // namespace

bool build_linear_nibbles(Builder& b, const OpNode& op) {
  Plan& plan = b.plan;
  const Constant &codes = plan.constant(op.in[1]), &scale = plan.constant(op.in[2]);
  const int64_t n = codes.dims[0], k = op.integer("n"), groups = scale.dims[1], length = k / groups;
  if (op.integer("bits") != 4 || length % 4) return false;
  const int64_t m = plan.values[op.in[0]].count() / k;
  auto step = std::make_unique<NibblesStep>();
  step->operands = grouped_operands(b, op);
  const std::string key = std::to_string(plan.values[op.in[1]].index) + ":nibbles:" +
                          std::to_string(plan.values[op.in[2]].index);
  step->packed = plan.model->packed(key, [&] {
    Packed made = pack_nibbles(codes, scale, k);
    plan.model->let_go(codes);
    plan.model->let_go(scale);
    return made;
  });
  step->fn = plan.kernels->gemm_nibbles;
  step->kernel = plan.kernels->row[k_gemm_nibbles]->symbol;
  describe_grouped(*step, plan, op, step->operands, (n + 63) / 64 * step->packed->block);
  step->rows = cut(m, int((m + kRows - 1) / kRows), 1, 1, 1);
  const auto [parts, pieces] = parts_of(plan.threads, step->macs, 50000, m > 4 ? 100e3 : 30e3);
  step->columns = cut(n, parts, pieces, 64, 64);
  step->tasks = step->rows.tasks() * step->columns.tasks();
  step->scratch = nibbles_scratch(step->rows.part, groups, length);
  b.add(std::move(step));
  return true;
}

}  // namespace pw
