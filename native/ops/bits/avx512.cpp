// Products of bits with AVX-512 and no population count: carry-save adders count eight words at a time (Harley and Seal, in
// Warren, Hacker's Delight, 2nd edition, 5-1), tables of half bytes the rest.
#if defined(__AVX512BW__)
#include <algorithm>
#include <vector>

#include "ops/bits/rows512.h"

namespace pw::avx512 {
namespace {

using namespace bits;

// Set bits of each byte.
PW_INLINE __m512i counts(__m512i v) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i half = _mm512_set1_epi8(15);
  return _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(v, half)),
                         _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), half)));
}

// Counts of bytes to counts of lanes of 32 bits.
PW_INLINE __m512i widened(__m512i v) {
  return _mm512_madd_epi16(_mm512_maddubs_epi16(v, _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
}

// Bit by bit, of a + b + c: the lower bit stays in a, the upper one is the result.
PW_INLINE __m512i carry(__m512i& a, __m512i b, __m512i c) {
  const __m512i upper = _mm512_ternarylogic_epi32(a, b, c, 0xe8);
  a = _mm512_ternarylogic_epi32(a, b, c, 0x96);
  return upper;
}

// Where the words of a row lie, and which of their bits count.
struct Words {
  std::vector<int64_t> at;
  std::vector<int32_t> mask;
  bool masked;

  explicit Words(const BitGemmArgs& g) : masked(g.tail != ~0u) {
    for (int s = 0; s < g.segments; ++s)
      for (int k = 0; k < g.seg_words; ++k) {
        at.push_back(g.seg_offset[s] + 4 * k);
        mask.push_back(masked && k == g.seg_words - 1 ? int32_t(g.tail) : -1);
      }
  }
};

// Differing bits of word k of a row and of 16 columns.
template <bool masked>
PW_INLINE __m512i differing(const Words& words, const uint8_t* a, const uint32_t* b, int64_t k) {
  const __m512i x = broadcast4(a + words.at[size_t(k)]), w = _mm512_loadu_si512(b + 16 * k);
  constexpr int xor_and = 0x28;
  if (masked) return _mm512_ternarylogic_epi32(x, w, _mm512_set1_epi32(words.mask[size_t(k)]), xor_and);
  return _mm512_xor_si512(x, w);
}

constexpr int kGroups = 31;  // of eight words, until a byte could hold no more: 31 * 8 < 256

// MR rows times NB blocks of 16 columns: differing bits of all words, twice.
template <int MR, int NB, bool masked>
PW_INLINE void count_twice(const Words& words, const uint8_t* a, int64_t a_step, const uint32_t* b, int64_t b_block,
                           __m512i* twice) {
  const int64_t all = int64_t(words.at.size());
  __m512i total[MR][NB];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NB; ++j) total[i][j] = _mm512_setzero_si512();
  int64_t k = 0;
  while (all - k >= 8) {
    __m512i ones[MR][NB], twos[MR][NB], fours[MR][NB], eights[MR][NB];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j)
        ones[i][j] = twos[i][j] = fours[i][j] = eights[i][j] = _mm512_setzero_si512();
    const int64_t end = k + std::min<int64_t>((all - k) / 8, kGroups) * 8;
    for (; k < end; k += 8) {
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NB; ++j) {
          const uint8_t* row = a + i * a_step;
          const uint32_t* w = b + j * b_block;
          const auto word = [&](int n) { return differing<masked>(words, row, w, k + n); };
          const __m512i two0 = carry(ones[i][j], word(0), word(1)), two1 = carry(ones[i][j], word(2), word(3));
          const __m512i four0 = carry(twos[i][j], two0, two1);
          const __m512i two2 = carry(ones[i][j], word(4), word(5)), two3 = carry(ones[i][j], word(6), word(7));
          const __m512i eight = carry(fours[i][j], four0, carry(twos[i][j], two2, two3));
          eights[i][j] = _mm512_add_epi8(eights[i][j], counts(eight));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) {
        // at most 8 + 2 * 8 + 4 * 8 a byte
        const __m512i two = counts(twos[i][j]), four = counts(fours[i][j]);
        __m512i few = _mm512_add_epi8(counts(ones[i][j]), _mm512_add_epi8(two, two));
        few = _mm512_add_epi8(few, _mm512_slli_epi16(four, 2));  // four <= 8: nothing leaves its byte
        const __m512i many = _mm512_slli_epi32(widened(eights[i][j]), 3);
        total[i][j] = _mm512_add_epi32(total[i][j], _mm512_add_epi32(many, widened(few)));
      }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      __m512i few = _mm512_setzero_si512();
      for (int64_t n = k; n < all; ++n)  // seven at most
        few = _mm512_add_epi8(few, counts(differing<masked>(words, a + i * a_step, b + j * b_block, n)));
      const __m512i sum = _mm512_add_epi32(total[i][j], widened(few));
      twice[i * NB + j] = _mm512_add_epi32(sum, sum);
    }
}

constexpr int kRows = 16;  // that are counted before they are stored: one way to count, many to store

// `rows` rows times NB blocks of 16 columns, row after row.
template <int NB, bool masked>
__attribute__((noinline)) void count_rows(const Words& words, const uint8_t* a, int64_t a_step, const uint32_t* b,
                                          int64_t b_block, int rows, __m512i* twice) {
  constexpr int MR = NB == 1 ? 4 : 2;
  int m = 0;
  for (; m + MR <= rows; m += MR) count_twice<MR, NB, masked>(words, a + m * a_step, a_step, b, b_block, twice + m * NB);
  for (; m < rows; ++m) count_twice<1, NB, masked>(words, a + m * a_step, a_step, b, b_block, twice + m * NB);
}

template <int NB, class Store>
void lines(const BitGemmArgs& g, const Words& words, const Store& given, int block) {
  const Store store = given;
  const auto count = words.masked ? count_rows<NB, true> : count_rows<NB, false>;
  for (int i = 0; i < g.lines; ++i) {
    const BitLine l = g.line[i];
    for (int m = 0; m < l.m; m += kRows) {
      const int rows = std::min(kRows, l.m - m);
      __m512i twice[kRows * NB];
      count(words, g.a + l.a + m * g.a_step, g.a_step, g.b + block * g.b_block, g.b_block, rows, twice);
      put_rows<NB>(g, store, l, m, rows, 16 * block, twice);
    }
  }
}

}  // namespace

void bit_gemm(const BitGemmArgs& given) {
  const BitGemmArgs g = given;
  const Finish f(*g.epilogue);
  const Words words(g);
  const int blocks = (g.n + 15) / 16;
  for (int block = 0; block < blocks; block += 2) {
    if (block + 1 < blocks) with_store<2>(g, f, block, [&](const auto& s) { lines<2>(g, words, s, block); });
    else with_store<1>(g, f, block, [&](const auto& s) { lines<1>(g, words, s, block); });
  }
}

void sign_f32(const SignArgs& a) {
  bits::signs<float, uint16_t>(a, [](const float* x, const float* t, bool each) {
    const __m512 threshold = each ? _mm512_loadu_ps(t) : _mm512_set1_ps(*t);
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), threshold, _CMP_GE_OQ);
  });
}

void sign_u8(const SignArgs& a) {
  const auto wide = [](const uint8_t* x, const uint8_t* t, bool each) {
    return _mm512_cmpge_epu8_mask(_mm512_loadu_si512(x), each ? _mm512_loadu_si512(t) : _mm512_set1_epi8(char(*t)));
  };
  const auto narrow = [](const uint8_t* x, const uint8_t* t, bool each) {
    const __m128i threshold = each ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(t)) : _mm_set1_epi8(char(*t));
    return _mm_cmpge_epu8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), threshold);
  };
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t i = bits::masks<uint8_t, uint64_t>(a, row, 0, wide);
    bits::rest<uint8_t>(a, row, bits::masks<uint8_t, uint16_t>(a, row, i, narrow));
  }
}

void sign_i32(const SignArgs& a) {
  bits::signs<int32_t, uint16_t>(a, [](const int32_t* x, const int32_t* t, bool each) {
    return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(x), each ? _mm512_loadu_si512(t) : _mm512_set1_epi32(*t));
  });
}

}  // namespace pw::avx512

#endif
