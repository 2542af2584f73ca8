// Defines the depthwise convolution: one filter per channel.
#include "ops/depthwise/order.h"
#include "ops/scalar.h"

namespace pw::scalar {

namespace {

void result_row(const DepthwiseArgs& d) {
  const int quads = (d.kernel_h + 3) / 4;
  for (int x = 0; x < d.width; ++x)
    for (int c = 0; c < d.channels; ++c) {
      const int place = depthwise_place(c);
      int32_t acc = 0;
      for (int ky = 0; ky < d.kernel_h; ++ky)
        for (int kx = 0; kx < d.kernel_w; ++kx) {
          const uint8_t v = d.x[ky * d.dilation_h * d.x_row + x * d.result_pixel + kx * d.dilation_w * d.x_pixel + c];
          const int64_t block = (int64_t(c / 64) * quads + ky / 4) * d.kernel_w + kx;
          acc += int32_t(v) * int32_t(d.w[block * 256 + (place % 64) * 4 + ky % 4]);
        }
      const uint8_t* r = d.residual ? d.residual + x * d.r_pixel + c : nullptr;
      store_one(*d.epilogue, acc, place, 0, r, nullptr, d.y, x * d.y_pixel + c);
    }
}

}  // namespace

void depthwise(const DepthwiseArgs& d) {
  for (int i = 0; i < d.rows; ++i) result_row(d.row(i));
}

}  // namespace pw::scalar
