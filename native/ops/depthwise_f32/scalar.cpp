// One filter per channel, in floats.
#include "ops/real.h"

namespace pw::scalar {

void depthwise_f32(const DepthwiseF32Args& d) {
  const float* x = static_cast<const float*>(d.x);
  for (int i = 0; i < d.width; ++i)
    for (int c = 0; c < d.channels; ++c) {
      const float* w = d.w + int64_t(c / 16) * d.kernel_h * d.kernel_w * 16 + c % 16;
      float sum = 0;
      for (int ky = 0; ky < d.kernel_h; ++ky)
        for (int kx = 0; kx < d.kernel_w; ++kx, w += 16)
          sum += x[i * d.x_pixel + ky * d.tap_row + kx * d.tap_pixel + c] * *w;
      store_real(d.tail, sum, i, c, d.y, i * d.y_pixel + c);
    }
}

}  // namespace pw::scalar
