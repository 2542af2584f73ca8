// Scale and zero point of values ranged at run time (docs/numerics.md, dynamic quantization).
#pragma once

#include <cmath>
#include <cstdint>

#include "engine/build.h"

namespace pw {

struct Ranged {
  float scale, r;
  int32_t zero;
  // lo <= 0 <= hi
  Ranged(float lo, float hi) {
    scale = (hi - lo) * (1.0f / 255.0f);
    if (scale < 1e-30f) scale = 1.0f;
    r = 1.0f / scale;
    const float t = std::nearbyintf(-lo * r);
    zero = int32_t(t < 0 ? 0 : t > 255 ? 255 : t);
  }
};

// Rows rounded as soon as they are made, each to a scale and a zero point of its own, where such an op reads them.
struct RangedRows {
  MinMaxFn minmax = nullptr;
  QuantizeFn quantize = nullptr;
  int codes = -1, scale = -1, zero = -1;  // values
  int64_t n = 0;

  explicit operator bool() const { return codes >= 0; }
  void row(const Run& run, const float* x, int64_t m) const {
    float lo = 0, hi = 0;
    minmax({x, n, &lo, &hi});
    const Ranged ranged(lo, hi);
    run.at<float>(scale)[m] = ranged.scale;
    run.at<int32_t>(zero)[m] = ranged.zero;
    quantize({x, run.at<uint8_t>(codes) + m * n, n, ranged.r, ranged.zero, 0, 255});
  }
  // Takes in `reader`, an op that reads rows of n dense floats, if it is one that does this.
  bool take(Builder& b, int reader, Step& step) {
    const Plan& plan = b.plan;
    const OpNode& op = plan.ops[size_t(reader)];
    if (*this || op.kind != "dynamic_quantize" || !op.flag("per_token") || b.done.count(reader)) return false;
    if (!plan.values[size_t(op.in[0])].dense() || !plan.values[size_t(op.out[0])].dense()) return false;
    minmax = plan.kernels->minmax;
    quantize = plan.kernels->quantize;
    codes = op.out[0];
    scale = op.out[1];
    zero = op.out[2];
    n = plan.values[size_t(op.in[0])].dims.back();
    step.ops += "+" + op.kind;
    step.writes.insert(step.writes.end(), op.out.begin(), op.out.end());
    b.done.insert(reader);
    return true;
  }
};

}  // namespace pw
