// The scalar steps that every other kernel must equal bit for bit. Included by translation units compiled for the
// baseline only.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/kernels.h"

namespace pw::scalar {

// clamp(rint(t) + zero, lo, hi); NaN gives lo.
inline uint8_t clamp_code(float t, int32_t zero, int32_t lo, int32_t hi) {
  t = std::nearbyintf(t) + float(zero);
  t = t > float(lo) ? t : float(lo);
  t = t < float(hi) ? t : float(hi);
  return uint8_t(t);
}

inline void store_one(const Epilogue& e, int32_t acc, int column, int row, const uint8_t* r, const float* addend,
                      void* c, int64_t at) {
  acc += e.bias[column];
  if (e.row_zero) acc -= e.row_zero[int64_t(row) * e.row_step] * e.colsum[column];
  if (e.out == Out::kI32) {
    static_cast<int32_t*>(c)[at] = acc;
    return;
  }
  float t = float(acc);
  if (e.out == Out::kU8) {
    t = t * e.multiplier[column];
    if (r) t = t + float(int32_t(*r) - e.r_zero) * e.r_multiplier;
    uint8_t q = clamp_code(t, e.zero, e.lo, e.hi);
    static_cast<uint8_t*>(c)[at] = e.lut ? e.lut[q] : q;
    return;
  }
  if (e.row_scale) t = t * e.row_scale[int64_t(row) * e.row_step];
  t = t * e.multiplier[column];
  if (e.bias_f32) t = t + e.bias_f32[column];
  if (addend) t = t + *addend;
  static_cast<float*>(c)[at] = t;
}

}  // namespace pw::scalar
