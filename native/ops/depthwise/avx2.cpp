// Depthwise convolution without VNNI, exact: bytes of four rows interleaved, even and odd ones widened to 16 bits.
#if defined(__AVX2__)
#include "ops/avx2.h"
#include "ops/depthwise/order.h"

namespace pw::avx2 {
namespace {

inline __m256i load32(const uint8_t* p, int count) {
  if (count >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  alignas(32) uint8_t bytes[32] = {};
  std::memcpy(bytes, p, count);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
}

// 32 channels: accumulator v, lane l, dword d is channel 16 l + 4 v + d.
void result(const DepthwiseArgs& d, const int8_t* w, int channel, int x) {
  const int count = d.channels - channel < 32 ? d.channels - channel : 32;
  const int half = channel % 64 / 32;
  __m256i acc[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  const int quads = (d.kernel_h + 3) / 4;
  const __m256i low_bytes = _mm256_set1_epi16(0x00ff);
  for (int quad = 0; quad < quads; ++quad)
    for (int kx = 0; kx < d.kernel_w; ++kx) {
      __m256i r[4];
      for (int i = 0; i < 4; ++i) {
        const int ky = 4 * quad + i < d.kernel_h ? 4 * quad + i : d.kernel_h - 1;
        const int64_t column = x * d.result_pixel + kx * d.dilation_w * d.x_pixel;
        r[i] = load32(d.x + ky * d.dilation_h * d.x_row + column + channel, count);
      }
      const __m256i lo01 = _mm256_unpacklo_epi8(r[0], r[1]), hi01 = _mm256_unpackhi_epi8(r[0], r[1]);
      const __m256i lo23 = _mm256_unpacklo_epi8(r[2], r[3]), hi23 = _mm256_unpackhi_epi8(r[2], r[3]);
      const __m256i v[4] = {_mm256_unpacklo_epi16(lo01, lo23), _mm256_unpackhi_epi16(lo01, lo23),
                            _mm256_unpacklo_epi16(hi01, hi23), _mm256_unpackhi_epi16(hi01, hi23)};
      const int8_t* at = w + (quad * d.kernel_w + kx) * 256 + 32 * half;
      for (int i = 0; i < 4; ++i) {
        const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 64 * i));
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8), odd = _mm256_srai_epi16(weights, 8);
        const __m256i x_even = _mm256_and_si256(v[i], low_bytes), x_odd = _mm256_srli_epi16(v[i], 8);
        acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(x_even, even));
        acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(x_odd, odd));
      }
    }
  const uint8_t* residual = d.residual ? d.residual + x * d.r_pixel + channel : nullptr;
  // the epilogue's arrays have the order of the accumulators: run it on vectors, then put the channels in order
  const int base = channel / 64 * 64;
  for (int i = 0; i < 4; ++i) {
    uint8_t r[8] = {};
    if (residual)
      for (int j = 0; j < 8; ++j) {
        const int c = 16 * (j / 4) + 4 * i + j % 4;
        if (c < count) r[j] = residual[c];
      }
    alignas(32) int32_t out[8];
    store8(*d.epilogue, acc[i], base + 16 * i + 8 * half, 8, 0, residual ? r : nullptr, nullptr, out, 0);
    const int size = d.epilogue->out == Out::kU8 ? 1 : 4;
    for (int j = 0; j < 8; ++j) {
      const int c = 16 * (j / 4) + 4 * i + j % 4;
      if (c < count)
        std::memcpy(d.y + (x * d.y_pixel + channel + c) * size, reinterpret_cast<uint8_t*>(out) + j * size, size);
    }
  }
}

void result_row(const DepthwiseArgs& d) {
  const int64_t w_block = int64_t((d.kernel_h + 3) / 4) * d.kernel_w * 256;
  for (int channel = 0; channel < d.channels; channel += 32)
    for (int x = 0; x < d.width; ++x) result(d, d.w + channel / 64 * w_block, channel, x);
}

}  // namespace

void depthwise(const DepthwiseArgs& d) {
  for (int i = 0; i < d.rows; ++i) result_row(d.row(i));
}

}  // namespace pw::avx2

#endif  // __AVX2__
