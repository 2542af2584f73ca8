// Products of bits with vpopcntd: words of activations, broadcast, against 16 columns of weights a register.
#if defined(__AVX512VPOPCNTDQ__)
#include <cstring>

#include "ops/avx512.h"
#include "ops/bits/one.h"

namespace pw::avx512 {
namespace {

PW_INLINE __m512i word(const uint8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

template <int MR, int NB>
PW_INLINE void step(__m512i (&acc)[MR][NB], const uint8_t* const* a, int at, const uint32_t* b, int64_t b_block,
                    bool last, __m512i tail) {
  __m512i w[NB];
#pragma GCC unroll 4
  for (int j = 0; j < NB; ++j) w[j] = _mm512_loadu_si512(b + j * b_block);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    __m512i x = word(a[i] + at);
    if (last) x = _mm512_and_si512(x, tail);
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_add_epi32(acc[i][j], _mm512_popcnt_epi32(_mm512_xor_si512(x, w[j])));
  }
}

// MR rows times NB blocks of 16 columns, again and again from row m on; returns the first row that is left.
template <int MR, int NB, Path path>
int tiles(const BitGemmArgs& g, const Finish& f, int m, int block) {
  const Epilogue& e = f.e;
  const int column = 16 * block;
  const Columns columns(g.n0 + column, g.n - column, NB);
  const bool whole = g.tail == ~0u;
  const int words = g.seg_words - !whole;
  const __m512i tail = _mm512_set1_epi32(int(g.tail));
  for (; m + MR <= g.m; m += MR) {
    __m512i acc[MR][NB];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_setzero_si512();
    const uint32_t* b = g.b + block * g.b_block;
    for (int s = 0; s < g.segments; ++s) {
      const uint8_t* a[MR];
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) a[i] = g.a + g.seg_offset[s] + g.row_offset[m + i];
      for (int k = 0; k < words; ++k, b += 16) step<MR, NB>(acc, a, 4 * k, b, g.b_block, false, tail);
      if (!whole) {
        step<MR, NB>(acc, a, 4 * words, b, g.b_block, true, tail);
        b += 16;
      }
    }
    __m512i done[MR * NB];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const int32_t* base = g.base + g.base_row[m + i] + g.n0 + column;
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j)
        done[i * NB + j] = _mm512_sub_epi32(_mm512_loadu_si512(base + 16 * j), _mm512_slli_epi32(acc[i][j], 1));
    }
    for (int i = 0; i < MR; ++i) {
      const int64_t at = g.c_offset[m + i];
      if (g.threshold) {
        const int first = g.n0 + column;
        uint64_t bits = 0;
        for (int j = 0; j < NB; ++j) {
          const __mmask16 mask =
              _mm512_cmpge_epi32_mask(done[i * NB + j], _mm512_loadu_si512(g.threshold + first + 16 * j));
          bits |= uint64_t(uint16_t((mask ^ g.flip[first / 16 + j]) & columns.part[j])) << (16 * j);
        }
        std::memcpy(static_cast<uint8_t*>(g.c) + at + column / 8, &bits, size_t(columns.count + 7) / 8);
        continue;
      }
      const uint8_t* r = e.residual ? e.residual + g.r_offset[m + i] + column : nullptr;
      const float* addend = e.addend ? e.addend + g.r_offset[m + i] + column : nullptr;
      store_row<NB, path>(f, done + i * NB, columns, g.m0 + m + i, r, addend, g.c, at + column);
    }
  }
  return m;
}

template <int MR, int NB, Path path>
void rows_of(const BitGemmArgs& g, const Finish& f, int block) {
  int m = tiles<MR, NB, path>(g, f, 0, block);
  if constexpr (MR > 8) m = tiles<8, NB, path>(g, f, m, block);
  if constexpr (MR > 4) m = tiles<4, NB, path>(g, f, m, block);
  if constexpr (MR > 2) m = tiles<2, NB, path>(g, f, m, block);
  tiles<1, NB, path>(g, f, m, block);
}

}  // namespace

void bit_gemm(const BitGemmArgs& g) {
  const Finish f(*g.epilogue);
  const int blocks = (g.n + 15) / 16, pieces = (blocks + 3) / 4;
  with_path(g.threshold ? kGeneral : path_of(*g.epilogue), [&](auto p) {
    for (int i = 0, block = 0; i < pieces; ++i) {
      const int width = (blocks - block + pieces - i - 1) / (pieces - i);
      switch (width) {
        case 4: rows_of<6, 4, p()>(g, f, block); break;
        case 3: rows_of<8, 3, p()>(g, f, block); break;
        case 2: rows_of<12, 2, p()>(g, f, block); break;
        default: rows_of<16, 1, p()>(g, f, block); break;
      }
      block += width;
    }
  });
}

void sign_f32(const SignArgs& a) {
  const auto* t = static_cast<const float*>(a.threshold);
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* x = static_cast<const float*>(a.x) + row * a.x_row;
    uint8_t* y = a.y + row * a.y_row;
    int64_t i = 0;
    for (; i + 16 <= a.n; i += 16) {
      const __m512 threshold = a.t_step ? _mm512_loadu_ps(t + i) : _mm512_set1_ps(*t);
      uint16_t mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), threshold, _CMP_GE_OQ), flip = 0;
      if (a.flip) std::memcpy(&flip, a.flip + i / 8, 2);
      mask ^= flip;
      std::memcpy(y + i / 8, &mask, 2);
    }
    bits::rest<float>(a, row, i);
  }
}

void sign_u8(const SignArgs& a) {
  const auto* t = static_cast<const uint8_t*>(a.threshold);
  for (int64_t row = 0; row < a.rows; ++row) {
    const uint8_t* x = static_cast<const uint8_t*>(a.x) + row * a.x_row;
    uint8_t* y = a.y + row * a.y_row;
    int64_t i = 0;
    for (; i + 64 <= a.n; i += 64) {
      const __m512i threshold = a.t_step ? _mm512_loadu_si512(t + i) : _mm512_set1_epi8(char(*t));
      uint64_t mask = _mm512_cmpge_epu8_mask(_mm512_loadu_si512(x + i), threshold), flip = 0;
      if (a.flip) std::memcpy(&flip, a.flip + i / 8, 8);
      mask ^= flip;
      std::memcpy(y + i / 8, &mask, 8);
    }
    for (; i + 16 <= a.n; i += 16) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
      const __m128i threshold =
          a.t_step ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(t + i)) : _mm_set1_epi8(char(*t));
      uint16_t mask = _mm_cmpge_epu8_mask(v, threshold), flip = 0;
      if (a.flip) std::memcpy(&flip, a.flip + i / 8, 2);
      mask ^= flip;
      std::memcpy(y + i / 8, &mask, 2);
    }
    bits::rest<uint8_t>(a, row, i);
  }
}

void sign_i32(const SignArgs& a) {
  const auto* t = static_cast<const int32_t*>(a.threshold);
  for (int64_t row = 0; row < a.rows; ++row) {
    const int32_t* x = static_cast<const int32_t*>(a.x) + row * a.x_row;
    uint8_t* y = a.y + row * a.y_row;
    int64_t i = 0;
    for (; i + 16 <= a.n; i += 16) {
      const __m512i threshold = a.t_step ? _mm512_loadu_si512(t + i) : _mm512_set1_epi32(*t);
      uint16_t mask = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(x + i), threshold), flip = 0;
      if (a.flip) std::memcpy(&flip, a.flip + i / 8, 2);
      mask ^= flip;
      std::memcpy(y + i / 8, &mask, 2);
    }
    bits::rest<int32_t>(a, row, i);
  }
}

}  // namespace pw::avx512

#endif
