// Floats to bf16 and back, and the greatest of bf16 numbers.
#include "ops/real.h"

namespace pw::scalar {

void to_bf16(const ConvertArgs& a) {
  for (int64_t i = 0; i < a.n; ++i)
    static_cast<uint16_t*>(a.y)[i] = pw::to_bf16(static_cast<const float*>(a.x)[i]);
}

void widen_bf16(const ConvertArgs& a) {
  for (int64_t i = 0; i < a.n; ++i)
    static_cast<float*>(a.y)[i] = from_bf16(static_cast<const uint16_t*>(a.x)[i]);
}

void max_pool_bf16(const PoolArgs& a) {
  for (int c = 0; c < a.n; ++c) {
    uint16_t best = 0xff80;  // minus infinity
    for (int i = 0; i < a.count; ++i) {
      const uint16_t v = static_cast<const uint16_t*>(a.x[i])[c];
      if (from_bf16(v) > from_bf16(best)) best = v;
    }
    static_cast<uint16_t*>(a.y)[c] = best;
  }
}

}  // namespace pw::scalar
