// One filter per channel of bf16 numbers.
#include "ops/real.h"

namespace pw::scalar {

void depthwise_bf16(const DepthwiseF32Args& d) {
  const uint16_t* x = static_cast<const uint16_t*>(d.x);
  for (int i = 0; i < d.width; ++i)
    for (int c = 0; c < d.channels; ++c) {
      const float* w = d.w + int64_t(c / 32) * d.kernel_h * d.kernel_w * 32 + c % 2 * 16 + c % 32 / 2;
      float sum = 0;
      for (int ky = 0; ky < d.kernel_h; ++ky)
        for (int kx = 0; kx < d.kernel_w; ++kx, w += 32)
          sum += from_bf16(x[i * d.x_pixel + ky * d.tap_row + kx * d.tap_pixel + c]) * *w;
      store_real(d.tail, sum, i, c, d.y, i * d.y_pixel + c);
    }
}

}  // namespace pw::scalar
