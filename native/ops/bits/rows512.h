// What becomes of products of bits, for the AVX-512 kernels: shared by those that count with an instruction and those that
// count without. Internal to the unit that includes it.
#pragma once

#include <cstring>

#include "ops/avx512.h"
#include "ops/bits/one.h"

namespace pw {
namespace {
namespace bits {

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

// `rows` rows of a line from row m on, twice their counts given.
template <int NB, class Store>
PW_INLINE void put_rows(const BitGemmArgs& g, const Store& store, const BitLine& l, int m, int rows, int column,
                        const __m512i* counts) {
  const int32_t* start = g.base + l.base + g.n0 + column;
  const int32_t* border = g.border ? g.border + l.first + m : nullptr;
  auto to = store.row(l, m);
#pragma GCC unroll 1
  for (const __m512i* end = counts + rows * NB; counts != end; counts += NB) {
    const int32_t* base = border ? start + *border++ : start;
    __m512i acc[NB];
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) acc[j] = _mm512_sub_epi32(_mm512_loadu_si512(base + 16 * j), counts[j]);
    store.put(acc, to);
  }
}

}  // namespace bits
}  // namespace
}  // namespace pw
