// Products of bits with vpopcntd: words of activations, broadcast, against 16 columns of weights a register.
#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512BITALG__)
#include <cstring>

#include "ops/avx512.h"
#include "ops/bits/one.h"

namespace pw::avx512vbmi {
namespace {

// c += x. As assembly: gcc 12 copies accumulators around the intrinsic.
PW_INLINE void add32(__m512i& c, __m512i x) { __asm__("vpaddd %1, %0, %0" : "+v"(c) : "v"(x)); }
PW_INLINE void add16(__m512i& c, __m512i x) { __asm__("vpaddw %1, %0, %0" : "+v"(c) : "v"(x)); }

// What becomes of rows of NB vectors of accumulators. Copied where it is used, so that its numbers stay in registers.
template <int NB>
struct Bits {  // thresholds
  uint8_t* c;
  int64_t step;
  const int32_t* threshold;
  uint64_t flip = 0, counted = 0;
  int count;

  Bits(const BitGemmArgs& g, const Columns& columns, int column)
      : c(static_cast<uint8_t*>(g.c) + column / 8),
        step(g.c_step),
        threshold(g.threshold + columns.first),
        count(columns.count) {
    for (int j = 0; j < NB; ++j) {
      counted |= uint64_t(columns.part[j]) << (16 * j);
      flip |= uint64_t(g.flip[columns.first / 16 + j]) << (16 * j);
    }
    flip &= counted;
  }
  using Row = uint8_t*;
  PW_INLINE Row row(const BitLine& l, int m) const { return c + l.c + m * step; }
  PW_INLINE void put(const __m512i* acc, Row& y) const {
    uint64_t bits = 0;
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j)
      bits |= uint64_t(uint16_t(_mm512_cmpge_epi32_mask(acc[j], _mm512_loadu_si512(threshold + 16 * j)))) << (16 * j);
    bits = (bits & counted) ^ flip;
    if (count == 16 * NB) std::memcpy(y, &bits, 2 * NB);
    else std::memcpy(y, &bits, size_t(count + 7) / 8);
    y += step;
  }
};

// Floats and perhaps their signs; `whole`: of all columns.
template <int NB, bool add, bool sign, bool whole>
struct Floats {
  float* c;
  const float* addend;
  uint8_t* signs;
  int64_t c_step, r_step, s_step;
  __m512 multiplier[NB], bias[NB], sign_at[NB];
  uint64_t flip = 0, counted = 0;
  __mmask16 part[NB];
  int count;

  Floats(const BitGemmArgs& g, const Columns& columns, int column) {
    const Epilogue& e = *g.epilogue;
    c = static_cast<float*>(g.c) + column;
    addend = add ? e.addend + column : nullptr;
    signs = sign ? g.signs + column / 8 : nullptr;
    c_step = g.c_step;
    r_step = g.r_step;
    s_step = g.s_step;
    count = columns.count;
    for (int j = 0; j < NB; ++j) {
      multiplier[j] = _mm512_loadu_ps(e.multiplier + columns.first + 16 * j);
      bias[j] = _mm512_set1_ps(-0.0f);  // x + -0 = x
      if (e.bias_f32) bias[j] = _mm512_loadu_ps(e.bias_f32 + columns.first + 16 * j);
      part[j] = columns.part[j];
      counted |= uint64_t(part[j]) << (16 * j);
      if (!sign) continue;
      sign_at[j] = _mm512_loadu_ps(g.sign_at + columns.first + 16 * j);
      flip |= uint64_t(g.sign_flip[columns.first / 16 + j]) << (16 * j);
    }
    flip &= counted;
  }
  struct Row {
    float* to;
    const float* from;
    uint8_t* signs;
  };
  PW_INLINE Row row(const BitLine& l, int m) const {
    return {c + l.c + m * c_step, add ? addend + l.r + m * r_step : nullptr, sign ? signs + l.s + m * s_step : nullptr};
  }
  PW_INLINE void put(const __m512i* acc, Row& y) const {
    uint64_t bits = 0;
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      __m512 t = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[j]), multiplier[j]), bias[j]);
      const float* from = y.from + 16 * j;
      if (add) t = _mm512_add_ps(t, whole ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(part[j], from));
      if (whole) _mm512_storeu_ps(y.to + 16 * j, t);
      else _mm512_mask_storeu_ps(y.to + 16 * j, part[j], t);
      if (sign) bits |= uint64_t(uint16_t(_mm512_cmp_ps_mask(t, sign_at[j], _CMP_GE_OQ))) << (16 * j);
    }
    y.to += c_step;
    if (add) y.from += r_step;
    if (!sign) return;
    if (!whole) bits &= counted;
    bits ^= flip;
    std::memcpy(y.signs, &bits, whole ? size_t(2 * NB) : size_t(count + 7) / 8);
    y.signs += s_step;
  }
};

template <int NB, Path path>
struct Rest {
  const BitGemmArgs& g;
  const Columns& columns;
  int column;
  const Finish& f;

  struct Row {
    int64_t at, other;
    int number;
  };
  PW_INLINE Row row(const BitLine& l, int m) const {
    return {l.c + m * g.c_step + column, l.r + m * g.r_step + column, l.m0 + m};
  }
  PW_INLINE void put(const __m512i* acc, Row& y) const {
    const Epilogue& e = f.e;
    store_row<NB, path>(f, acc, columns, y.number++, e.residual ? e.residual + y.other : nullptr,
                        e.addend ? e.addend + y.other : nullptr, g.c, y.at);
    y.at += g.c_step;
    y.other += g.r_step;
  }
};

// Calls body with the constants that say what becomes of accumulators.
template <int NB, class F>
PW_INLINE void with_store(const BitGemmArgs& g, const Finish& f, int block, F body) {
  const int column = 16 * block;
  const Columns columns(g.n0 + column, g.n - column, NB);
  const Epilogue& e = *g.epilogue;
  if (g.threshold) return body(Bits<NB>(g, columns, column));
  if (e.out == Out::kF32 && !e.row_scale && !e.row_zero) {
    const bool whole = columns.count == 16 * NB, add = e.addend;
    if (!g.signs && add) return body(Floats<NB, true, false, false>(g, columns, column));
    if (!g.signs) return body(Floats<NB, false, false, false>(g, columns, column));
    if (add && whole) return body(Floats<NB, true, true, true>(g, columns, column));
    if (add) return body(Floats<NB, true, true, false>(g, columns, column));
    if (whole) return body(Floats<NB, false, true, true>(g, columns, column));
    return body(Floats<NB, false, true, false>(g, columns, column));
  }
  with_path(path_of(e), [&](auto p) { body(Rest<NB, p()>{g, columns, column, f}); });
}

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

// Rows of a line from row m on, twice their counts given.
template <int MR, int NB, class Store>
PW_INLINE void put_rows(const BitGemmArgs& g, const Store& store, const BitLine& l, int m, int column,
                        const __m512i* counts) {
  const int32_t* start = g.base + l.base + g.n0 + column;
  const int32_t* border = g.border ? g.border + l.first + m : nullptr;
  auto to = store.row(l, m);
#pragma GCC unroll 1
  for (const __m512i* end = counts + MR * NB; counts != end; counts += NB) {
    const int32_t* base = border ? start + *border++ : start;
    __m512i acc[NB];
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) acc[j] = _mm512_sub_epi32(_mm512_loadu_si512(base + 16 * j), counts[j]);
    store.put(acc, to);
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
    put_rows<MR, NB>(g, store, l, m, column, done);
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
      put_rows<2 * pairs, 1>(g, store, l, m, 16 * block, done);
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

}  // namespace pw::avx512vbmi

#endif
