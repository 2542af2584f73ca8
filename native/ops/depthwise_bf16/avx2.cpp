// One filter per channel of bf16 numbers: 16 channels, even and odd ones apart, of up to 4 neighbouring results.
#if defined(__AVX2__)
#include "ops/in_pieces.h"
#include "ops/real256.h"

namespace pw::avx2 {
namespace {

template <int P>
void pixels(const DepthwiseF32Args& d, int first, int channel) {
  const int left = d.channels - channel;
  const float* w = d.w + int64_t(channel / 32) * d.kernel_h * d.kernel_w * 32 + channel % 32 / 2;
  __m256 even[P], odd[P];
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i) even[i] = odd[i] = _mm256_setzero_ps();
  const uint16_t* x = static_cast<const uint16_t*>(d.x) + first * d.x_pixel + channel;
  for (int ky = 0; ky < d.kernel_h; ++ky)
    for (int kx = 0; kx < d.kernel_w; ++kx, w += 32) {
      const __m256 tap_even = _mm256_loadu_ps(w), tap_odd = _mm256_loadu_ps(w + 16);
      const uint16_t* from = x + ky * d.tap_row + kx * d.tap_pixel;
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i) {
        __m256i pairs;
        if (left >= 16) {
          pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * d.x_pixel));
        } else {
          alignas(32) uint16_t part[16] = {};
          std::memcpy(part, from + i * d.x_pixel, 2 * size_t(left));
          pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(part));
        }
        const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        const __m256 high = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
        even[i] = _mm256_fmadd_ps(low, tap_even, even[i]);
        odd[i] = _mm256_fmadd_ps(high, tap_odd, odd[i]);
      }
    }
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i) {
    const __m256 low = _mm256_unpacklo_ps(even[i], odd[i]), high = _mm256_unpackhi_ps(even[i], odd[i]);
    const int64_t at = (first + i) * d.y_pixel + channel;
    store_real(d.tail, _mm256_permute2f128_ps(low, high, 0x20), first + i, channel, left, d.y, at);
    store_real(d.tail, _mm256_permute2f128_ps(low, high, 0x31), first + i, channel + 8, left - 8, d.y, at + 8);
  }
}

constexpr Pixels kPixels[] = {pixels<1>, pixels<2>, pixels<3>, pixels<4>};

}  // namespace

void depthwise_bf16(const DepthwiseF32Args& d) { in_pieces<16>(d, kPixels); }

}  // namespace pw::avx2

#endif  // __AVX2__
