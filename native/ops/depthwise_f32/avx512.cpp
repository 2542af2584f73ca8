// One filter per channel, in floats: 16 channels of up to 8 neighbouring results in registers.
#if defined(__AVX512VNNI__)
#include "ops/in_pieces.h"
#include "ops/real512.h"

namespace pw::avx512 {
namespace {

template <int P>
void pixels(const DepthwiseF32Args& d, int first, int channel) {
  const __mmask16 mask = first16(d.channels - channel);
  const float* w = d.w + int64_t(channel) * d.kernel_h * d.kernel_w;
  __m512 acc[P];
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) acc[i] = _mm512_setzero_ps();
  const float* x = static_cast<const float*>(d.x) + first * d.x_pixel + channel;
  for (int ky = 0; ky < d.kernel_h; ++ky)
    for (int kx = 0; kx < d.kernel_w; ++kx, w += 16) {
      const __m512 tap = _mm512_loadu_ps(w);
      const float* from = x + ky * d.tap_row + kx * d.tap_pixel;
      if (mask == 0xffff) {
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i) acc[i] = _mm512_fmadd_ps(_mm512_loadu_ps(from + i * d.x_pixel), tap, acc[i]);
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i)
          acc[i] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, from + i * d.x_pixel), tap, acc[i]);
      }
    }
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i)
    store_real(d.tail, acc[i], first + i, channel, d.channels - channel, d.y, (first + i) * d.y_pixel + channel);
}

constexpr Pixels kPixels[] = {pixels<1>, pixels<2>, pixels<3>, pixels<4>, pixels<5>, pixels<6>, pixels<7>, pixels<8>};

}  // namespace

void depthwise_f32(const DepthwiseF32Args& d) { in_pieces<16>(d, kPixels); }

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
