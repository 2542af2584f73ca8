// Depthwise convolution without VNNI, exact: bytes of four rows interleaved, even and odd ones widened to 16 bits.
#if defined(__AVX2__)
#include <vector>

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

// Weights of 32 channels, widened to 16 bits: of each vector of packed bytes the even ones, then the odd ones.
void widen(const int8_t* w, int taps, int16_t* to) {
  for (int v = 0; v < taps * 4; ++v, to += 32) {
    const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + v / 4 * 256 + v % 4 * 64));
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8), odd = _mm256_srai_epi16(weights, 8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), even);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), odd);
  }
}

// 32 channels of one result pixel; in accumulator v, lane l, dword d is channel 16 l + 4 v + d.
void finish(const DepthwiseArgs& d, const __m256i* acc, int channel, int count, int x) {
  const Epilogue& e = *d.epilogue;
  const int base = channel / 64 * 64, half = channel % 64 / 32;
  const uint8_t* residual = d.residual ? d.residual + x * d.r_pixel + channel : nullptr;
  if (e.out == Out::kU8 && !e.row_zero) {
    __m256i wide[4], q[4];
    if (residual) {
      const __m256i r = load32(residual, count), none = _mm256_setzero_si256();
      const __m256i low = _mm256_unpacklo_epi8(r, none), high = _mm256_unpackhi_epi8(r, none);
      wide[0] = _mm256_unpacklo_epi16(low, none), wide[1] = _mm256_unpackhi_epi16(low, none);
      wide[2] = _mm256_unpacklo_epi16(high, none), wide[3] = _mm256_unpackhi_epi16(high, none);
    }
    for (int i = 0; i < 4; ++i) {
      const int place = base + 16 * i + 8 * half;
      q[i] = codes8(e, biased(e, acc[i], place), place, residual ? wide + i : nullptr);
    }
    alignas(32) uint8_t codes[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes),
                       _mm256_packus_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])));
    if (e.lut)
      for (uint8_t& code : codes) code = e.lut[code];
    std::memcpy(d.y + x * d.y_pixel + channel, codes, size_t(count));
    return;
  }
  // the epilogue's arrays have the order of the accumulators: run it on vectors, then put the channels in order
  for (int i = 0; i < 4; ++i) {
    uint8_t r[8] = {};
    if (residual)
      for (int j = 0; j < 8; ++j) {
        const int c = 16 * (j / 4) + 4 * i + j % 4;
        if (c < count) r[j] = residual[c];
      }
    alignas(32) int32_t out[8];
    store8(e, acc[i], base + 16 * i + 8 * half, 8, 0, residual ? r : nullptr, nullptr, out, 0);
    const int size = e.out == Out::kU8 ? 1 : 4;
    for (int j = 0; j < 8; ++j) {
      const int c = 16 * (j / 4) + 4 * i + j % 4;
      if (c < count)
        std::memcpy(d.y + (x * d.y_pixel + channel + c) * size, reinterpret_cast<uint8_t*>(out) + j * size, size);
    }
  }
}

template <bool kWhole>
void result(const DepthwiseArgs& d, const int16_t* w, int channel, int count, int x) {
  __m256i acc[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  const __m256i low_bytes = _mm256_set1_epi16(0x00ff);
  const int64_t row = d.dilation_h * d.x_row;
  for (int y = 0; y < d.kernel_h; y += 4) {
    const uint8_t* column = d.x + x * d.result_pixel + channel + y * row;
    const int last = d.kernel_h - 1 - y;  // rows behind it have weights of zero
    const int64_t at[4] = {0, (last < 1 ? last : 1) * row, (last < 2 ? last : 2) * row, (last < 3 ? last : 3) * row};
    for (int kx = 0; kx < d.kernel_w; ++kx, column += d.dilation_w * d.x_pixel, w += 128) {
      __m256i r[4];
      for (int i = 0; i < 4; ++i) r[i] = load32(column + at[i], kWhole ? 32 : count);
      const __m256i lo01 = _mm256_unpacklo_epi8(r[0], r[1]), hi01 = _mm256_unpackhi_epi8(r[0], r[1]);
      const __m256i lo23 = _mm256_unpacklo_epi8(r[2], r[3]), hi23 = _mm256_unpackhi_epi8(r[2], r[3]);
      const __m256i rows[4] = {_mm256_unpacklo_epi16(lo01, lo23), _mm256_unpackhi_epi16(lo01, lo23),
                               _mm256_unpacklo_epi16(hi01, hi23), _mm256_unpackhi_epi16(hi01, hi23)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * i));
        const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * i + 16));
        const __m256i x_even = _mm256_and_si256(rows[i], low_bytes), x_odd = _mm256_srli_epi16(rows[i], 8);
        acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(x_even, even));
        acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(x_odd, odd));
      }
    }
  }
  finish(d, acc, channel, kWhole ? 32 : count, x);
}

}  // namespace

void depthwise(const DepthwiseArgs& all) {
  const int taps = (all.kernel_h + 3) / 4 * all.kernel_w;
  std::vector<int16_t> wide(size_t(taps) * 128);
  for (int channel = 0; channel < all.channels; channel += 32) {
    widen(all.w + channel / 64 * int64_t(taps) * 256 + channel % 64, taps, wide.data());
    const int count = all.channels - channel < 32 ? all.channels - channel : 32;
    for (int i = 0; i < all.rows; ++i) {
      const DepthwiseArgs d = all.row(i);
      for (int x = 0; x < d.width; ++x)
        count == 32 ? result<true>(d, wide.data(), channel, count, x) : result<false>(d, wide.data(), channel, count, x);
    }
  }
}

}  // namespace pw::avx2

#endif  // __AVX2__
