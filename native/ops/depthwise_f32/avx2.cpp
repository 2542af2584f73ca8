// One filter per channel, in floats: 8 channels of up to 8 neighbouring results in registers.
#if defined(__AVX2__)
#include "ops/in_pieces.h"
#include "ops/real256.h"

namespace pw::avx2 {
namespace {

template <int P>
void pixels(const DepthwiseF32Args& d, int first, int channel) {
  const int left = d.channels - channel;
  const float* w = d.w + int64_t(channel / 16) * d.kernel_h * d.kernel_w * 16 + channel % 16;
  __m256 acc[P];
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) acc[i] = _mm256_setzero_ps();
  const int64_t x = first * d.x_pixel + channel;
  for (int ky = 0; ky < d.kernel_h; ++ky)
    for (int kx = 0; kx < d.kernel_w; ++kx, w += 16) {
      const __m256 tap = _mm256_loadu_ps(w);
      const int64_t from = x + ky * d.tap_row + kx * d.tap_pixel;
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i)
        acc[i] = _mm256_fmadd_ps(load_real(d.x, from + i * d.x_pixel, false, left), tap, acc[i]);
    }
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i)
    store_real(d.tail, acc[i], first + i, channel, left, d.y, (first + i) * d.y_pixel + channel);
}

constexpr Pixels kPixels[] = {pixels<1>, pixels<2>, pixels<3>, pixels<4>, pixels<5>, pixels<6>, pixels<7>, pixels<8>};

}  // namespace

void depthwise_f32(const DepthwiseF32Args& d) { in_pieces<8>(d, kPixels); }

}  // namespace pw::avx2

#endif  // __AVX2__
