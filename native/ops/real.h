// bf16 numbers and the end of a float product, scalar.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/functions.h"
#include "core/kernels.h"

namespace pw {
namespace {

inline float from_bf16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// To nearest, ties to even; a NaN stays one, and quiet.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void store_real(const RealTail& t, float y, int m, int n, void* c, int64_t at) {
  if (t.bias) y += t.bias[n];
  if (t.addend) {
    const int64_t from = t.r_offset[m] + n;
    y += t.addend_bf16 ? from_bf16(static_cast<const uint16_t*>(t.addend)[from]) : static_cast<const float*>(t.addend)[from];
  }
  if (t.clip) y = fn::clip(y, t.lo, t.hi);
  if (t.out_bf16) static_cast<uint16_t*>(c)[at] = to_bf16(y);
  else static_cast<float*>(c)[at] = y;
}

}  // namespace
}  // namespace pw
