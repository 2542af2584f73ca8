// Products of bits without a population count: sixteen counts by table, in bytes, widened before they can overflow.
#if defined(__AVX2__)
#include <cstring>

#include "ops/avx2.h"
#include "ops/bits/one.h"

namespace pw::avx2 {
namespace {

inline __m256i counts(__m256i v) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2,
                                         3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble)),
                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(v, 4), nibble)));
}

// Counts of bytes to counts of lanes of 32 bits.
inline __m256i widened(__m256i v) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(v, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

void store(const BitGemmArgs& g, const BitLine& l, const __m256i* total, int m, int column, int lanes) {
  alignas(32) static const int32_t none[8] = {};
  const int n = g.n0 + column;
  const int64_t at = l.c + m * g.c_step, other = l.r + m * g.r_step + column;
  const auto* base = reinterpret_cast<const __m256i*>(g.base_of(l, m) + column);
  const __m256i acc = _mm256_sub_epi32(_mm256_loadu_si256(base), _mm256_slli_epi32(*total, 1));
  if (g.threshold) {
    const __m256i t = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(g.threshold + n));
    unsigned byte = ~unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(t, acc))));
    byte ^= unsigned(g.flip[n / 16]) >> (n % 16);
    static_cast<uint8_t*>(g.c)[at + column / 8] = uint8_t(byte & (lanes >= 8 ? 255u : (1u << lanes) - 1));
    return;
  }
  Epilogue e = *g.epilogue;
  e.bias = none - n;
  store8(e, acc, n, lanes, l.m0 + m, e.residual ? e.residual + other : nullptr, e.addend ? e.addend + other : nullptr,
         g.c, at + column);
}

template <int MR>
int rows_of(const BitGemmArgs& g, const BitLine& l, int m, int block) {
  const uint32_t* weights = g.b + block * g.b_block;
  const int words = g.seg_words;
  for (; m + MR <= l.m; m += MR) {
    __m256i total[MR][2], some[MR][2];
    for (int i = 0; i < MR; ++i)
      for (int h = 0; h < 2; ++h) total[i][h] = some[i][h] = _mm256_setzero_si256();
    const uint32_t* b = weights;
    int left = 31;  // words until a byte could hold no more: 31 * 8 < 256
    for (int s = 0; s < g.segments; ++s) {
      const uint8_t* a = g.a + l.a + m * g.a_step + g.seg_offset[s];
      for (int k = 0; k < words; ++k, b += 16) {
        const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
        const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 8));
        for (int i = 0; i < MR; ++i) {
          __m256i x = broadcast4(a + i * g.a_step + 4 * k);
          if (k == words - 1) x = _mm256_and_si256(x, _mm256_set1_epi32(int(g.tail)));
          some[i][0] = _mm256_add_epi8(some[i][0], counts(_mm256_xor_si256(x, w0)));
          some[i][1] = _mm256_add_epi8(some[i][1], counts(_mm256_xor_si256(x, w1)));
        }
        if (--left == 0) {
          left = 31;
          for (int i = 0; i < MR; ++i)
            for (int h = 0; h < 2; ++h) {
              total[i][h] = _mm256_add_epi32(total[i][h], widened(some[i][h]));
              some[i][h] = _mm256_setzero_si256();
            }
        }
      }
    }
    for (int i = 0; i < MR; ++i)
      for (int h = 0; h < 2; ++h) {
        const int column = 16 * block + 8 * h;
        if (column >= g.n) continue;
        total[i][h] = _mm256_add_epi32(total[i][h], widened(some[i][h]));
        store(g, l, &total[i][h], m + i, column, g.n - column);
      }
  }
  return m;
}

}  // namespace

void bit_gemm(const BitGemmArgs& g) {
  for (int block = 0; block < (g.n + 15) / 16; ++block)
    for (const BitLine* l = g.line; l != g.line + g.lines; ++l) rows_of<1>(g, *l, rows_of<2>(g, *l, 0, block), block);
  bits::signs_of_results(g);
}

void sign_f32(const SignArgs& a) {
  bits::signs<float, uint8_t>(a, [](const float* x, const float* t, bool each) {
    const __m256 threshold = each ? _mm256_loadu_ps(t) : _mm256_set1_ps(*t);
    return uint8_t(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), threshold, _CMP_GE_OQ)));
  });
}

void sign_u8(const SignArgs& a) {
  bits::signs<uint8_t, uint32_t>(a, [](const uint8_t* x, const uint8_t* t, bool each) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i threshold = each ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t)) : _mm256_set1_epi8(char(*t));
    return uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(v, threshold), v)));
  });
}

void sign_i32(const SignArgs& a) { bits::signs<int32_t>(a); }

}  // namespace pw::avx2

#endif  // __AVX2__
