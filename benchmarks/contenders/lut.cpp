// A ternary matrix times a vector by lookup, for comparison: every pair of activations makes a table of its nine signed
// sums, every pair of weights is a code of 4 bits that picks one (the scheme called TL1 by Wang et al. 2024,
// arXiv:2410.16144, section 3.2). Exact: sums of pairs are int16, kept as a table of low and one of high bytes.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

// codes: rows in blocks of 32; of each block, pair after pair, 16 bytes: rows 0 .. 15 in low nibbles, 16 .. 31 in high ones.
// A code is 3 (w0 + 1) + w1 + 1. tables: k / 2 times 32 bytes of scratch. y[rows], rows a multiple of 32, k of 2.
extern "C" void lut_product(const uint8_t* x, const uint8_t* codes, int8_t* tables, int32_t* y, int64_t rows, int64_t k) {
  const int64_t pairs = k / 2;
  for (int64_t p = 0; p < pairs; ++p) {
    const int a = x[2 * p], b = x[2 * p + 1];
    int8_t* low = tables + p * 32;
    std::memset(low, 0, 32);
    for (int code = 0; code < 9; ++code) {
      const int sum = (code / 3 - 1) * a + (code % 3 - 1) * b;
      low[code] = int8_t(sum & 255);
      low[16 + code] = int8_t(sum >> 8);
    }
  }
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int64_t row = 0; row < rows; row += 32, codes += pairs * 16) {
    __m256i total[4] = {};  // rows 0-3 16-19, 4-7 20-23, 8-11 24-27, 12-15 28-31
    for (int64_t from = 0; from < pairs; from += 64) {  // 64 sums of at most 510 stay inside int16
      __m256i first = _mm256_setzero_si256(), second = _mm256_setzero_si256();
      const int64_t end = from + 64 < pairs ? from + 64 : pairs;
      for (int64_t p = from; p < end; ++p) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + p * 16));
        const __m256i index = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), nibble);
        const __m128i* table = reinterpret_cast<const __m128i*>(tables + p * 32);
        const __m256i low = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table)), index);
        const __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table + 1)), index);
        first = _mm256_add_epi16(first, _mm256_unpacklo_epi8(low, high));
        second = _mm256_add_epi16(second, _mm256_unpackhi_epi8(low, high));
      }
      const __m256i parts[2] = {first, second};
      for (int i = 0; i < 2; ++i) {
        const __m256i sign = _mm256_srai_epi16(parts[i], 15);
        total[2 * i] = _mm256_add_epi32(total[2 * i], _mm256_unpacklo_epi16(parts[i], sign));
        total[2 * i + 1] = _mm256_add_epi32(total[2 * i + 1], _mm256_unpackhi_epi16(parts[i], sign));
      }
    }
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + row + 4 * i), _mm256_castsi256_si128(total[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + row + 16 + 4 * i), _mm256_extracti128_si256(total[i], 1));
    }
  }
}
