// Scale and zero point of values ranged at run time (docs/numerics.md, dynamic quantization).
#pragma once

#include <cmath>
#include <cstdint>

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

}  // namespace pw
