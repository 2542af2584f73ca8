// Products of bits with vpopcntd: words of activations, broadcast, against 16 columns of weights a register.
#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512BITALG__)
#include "ops/bits/rows512.h"

namespace pw::avx512vbmi {
namespace {

using namespace bits;

// c += x. As assembly: gcc 12 copies accumulators around the intrinsic.
PW_INLINE void add32(__m512i& c, __m512i x) { __asm__("vpaddd %1, %0, %0" : "+v"(c) : "v"(x)); }
PW_INLINE void add16(__m512i& c, __m512i x) { __asm__("vpaddw %1, %0, %0" : "+v"(c) : "v"(x)); }

template <int MR, int NB, bool last>
PW_INLINE void step(__m512i (&acc)[MR][NB], const uint8_t* a, int64_t a_step, const uint32_t* b, int64_t b_block,
                    __m512i tail) {
  __m512i w[NB];
#pragma GCC unroll 4
  for (int j = 0; j < NB; ++j) w[j] = _mm512_loadu_si512(b + j * b_block);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const __m512i x = broadcast4(a + i * a_step);
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      constexpr int xor_and = 0x28;
      const __m512i differ = last ? _mm512_ternarylogic_epi32(x, w[j], tail, xor_and) : _mm512_xor_si512(x, w[j]);
      add32(acc[i][j], _mm512_popcnt_epi32(differ));
    }
  }
}

// MR rows of a line times NB blocks of 16 columns, again and again from row m on; returns the first row that is left.
template <int MR, int NB, class Store>
PW_INLINE int tiles(const BitGemmArgs& g, const Store& store, const BitLine& l, int m, int block) {
  const int column = 16 * block;
  const int64_t a_step = g.a_step, b_block = g.b_block;
  const bool whole = g.tail == ~0u;
  const int words = g.seg_words - !whole;
  const __m512i tail = _mm512_set1_epi32(int(g.tail));
  for (; m + MR <= l.m; m += MR) {
    __m512i acc[MR][NB];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_setzero_si512();
    const uint32_t* b = g.b + block * b_block;
    const uint8_t* row = g.a + l.a + m * a_step;
    for (int s = 0; s < g.segments; ++s) {
      const uint8_t* a = row + g.seg_offset[s];
      for (int k = 0; k < words; ++k, a += 4, b += 16) step<MR, NB, false>(acc, a, a_step, b, b_block, tail);
      if (!whole) {
        step<MR, NB, true>(acc, a, a_step, b, b_block, tail);
        b += 16;
      }
    }
    __m512i done[MR * NB];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) done[i * NB + j] = _mm512_add_epi32(acc[i][j], acc[i][j]);
    put_rows<NB>(g, store, l, m, MR, column, done);
  }
  return m;
}

template <int MR, int NB, class Store>
void lines(const BitGemmArgs& g, const Store& given, int block) {
  const Store store = given;
  for (int i = 0; i < g.lines; ++i) {
    const BitLine l = g.line[i];
    int m = tiles<MR, NB>(g, store, l, 0, block);
    if constexpr (MR > 4) m = tiles<4, NB>(g, store, l, m, block);
    if constexpr (MR > 2) m = tiles<2, NB>(g, store, l, m, block);
    tiles<1, NB>(g, store, l, m, block);
  }
}

// Taps of 16 bits, of rows one tap apart: two rows a register, 16 columns of both, counts of 16 bits.
constexpr int kTaps = 64;
inline bool in_pairs(const BitGemmArgs& g) {
  return g.tap == 2 && g.a_step == 2 && (g.tail == ~0u || g.tail == 0xffff) && g.segments * g.seg_words * 2 <= kTaps;
}

struct Pairs {
  int taps = 0;
  int64_t at[kTaps];
  __m512i w[kTaps];  // each column's weights of a tap, twice

  Pairs(const BitGemmArgs& g, int block) {
    const uint32_t* b = g.b + block * g.b_block;
    const int each = 2 * g.seg_words - (g.tail != ~0u);
    for (int s = 0; s < g.segments; ++s)
      for (int i = 0; i < each; ++i, ++taps) {
        at[taps] = g.seg_offset[s] + 2 * i;
        const __m512i word = _mm512_loadu_si512(b + (s * g.seg_words + i / 2) * 16);
        const __m512i low = _mm512_srli_epi32(_mm512_sllv_epi32(word, _mm512_set1_epi32(i % 2 ? 0 : 16)), 16);
        w[taps] = _mm512_or_si512(low, _mm512_slli_epi32(low, 16));
      }
  }

  // `pairs` pairs of rows, again and again from row m on; returns the first row that is left.
  template <int pairs, class Store>
  PW_INLINE int tiles(const BitGemmArgs& g, const Store& store, const BitLine& l, int m, int block) const {
    for (; m + 2 * pairs <= l.m; m += 2 * pairs) {
      const uint8_t* a = g.a + l.a + 2 * m;
      __m512i acc[pairs];
#pragma GCC unroll 8
      for (int i = 0; i < pairs; ++i) acc[i] = _mm512_setzero_si512();
      for (int t = 0; t < taps; ++t) {
        const uint8_t* from = a + at[t];
        const __m512i weights = w[t];
#pragma GCC unroll 8
        for (int i = 0; i < pairs; ++i)
          add16(acc[i], _mm512_popcnt_epi16(_mm512_xor_si512(broadcast4(from + 4 * i), weights)));
      }
      __m512i done[2 * pairs];
#pragma GCC unroll 8
      for (int i = 0; i < pairs; ++i) {
        const __m512i twice = _mm512_add_epi16(acc[i], acc[i]);
        done[2 * i] = _mm512_and_si512(twice, _mm512_set1_epi32(0xffff));
        done[2 * i + 1] = _mm512_srli_epi32(twice, 16);
      }
      put_rows<1>(g, store, l, m, 2 * pairs, 16 * block, done);
    }
    return m;
  }
};

template <class Store>
void lines_in_pairs(const BitGemmArgs& g, const Store& given, int block) {
  const Store store = given;
  const Pairs p(g, block);
  for (int i = 0; i < g.lines; ++i) {
    const BitLine l = g.line[i];
    int m = p.tiles<8>(g, store, l, 0, block);
    m = p.tiles<4>(g, store, l, m, block);
    m = p.tiles<1>(g, store, l, m, block);
    tiles<1, 1>(g, store, l, m, block);
  }
}

}  // namespace

void bit_gemm(const BitGemmArgs& given) {
  const BitGemmArgs g = given;
  const Finish f(*g.epilogue);
  const bool pairs = in_pairs(g);
  const int blocks = (g.n + 15) / 16, pieces = pairs ? blocks : (blocks + 3) / 4;
  for (int i = 0, block = 0; i < pieces; ++i) {
    const int width = (blocks - block + pieces - i - 1) / (pieces - i);
    if (pairs) with_store<1>(g, f, block, [&](const auto& s) { lines_in_pairs(g, s, block); });
    else if (width == 4) with_store<4>(g, f, block, [&](const auto& s) { lines<4, 4>(g, s, block); });
    else if (width == 3) with_store<3>(g, f, block, [&](const auto& s) { lines<4, 3>(g, s, block); });
    else if (width == 2) with_store<2>(g, f, block, [&](const auto& s) { lines<8, 2>(g, s, block); });
    else with_store<1>(g, f, block, [&](const auto& s) { lines<8, 1>(g, s, block); });
    block += width;
  }
}

}  // namespace pw::avx512vbmi

#endif
