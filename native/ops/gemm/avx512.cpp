// u8 x s8 products with vpdpbusd: four-byte activation broadcasts against packed weights, accumulators in registers.
#if defined(__AVX512VNNI__)
#include <cstring>

#include "ops/avx512.h"

namespace pw::avx512 {
namespace {

// Rows that are stored one by one: partial blocks, floats, zero points of rows.
template <int NB, Path path>
__attribute__((noinline)) void store_slowly(const GemmArgs& g, const Finish& f, const __m512i* acc, int rows, int m, int column) {
  const Epilogue& e = f.e;
  const Columns columns(g.n0 + column, g.n - column, NB);
  for (int i = 0; i < rows; ++i) {
    const int64_t at = g.c_offset[m + i];
    if (at < 0) continue;
    const uint8_t* r = e.residual ? e.residual + g.r_offset[m + i] + column : nullptr;
    const float* addend = e.addend ? e.addend + g.r_offset[m + i] + column : nullptr;
    store_row<NB, path>(f, acc + i * NB, columns, g.m0 + m + i, r, addend, g.c, at + column);
  }
}

// MR rows times NB blocks of 16 columns, again and again from row m on; returns the first row that is left. One: there
// is a single segment.
template <int MR, int NB, Path path, bool One>
int tiles_of(const GemmArgs& g, const Finish& f, int m, int block) {
  const Epilogue& e = f.e;
  const int column = 16 * block;
  using Codes = Together<NB, path>;
  const bool together = Codes::can(g.n - column), half = g.n - column == 16 * NB - 8;
  const int32_t* bias = e.bias + g.n0 + column;
  const float* multiplier = together ? e.multiplier + g.n0 + column : nullptr;
  const uint8_t* residual = path == kResidual ? e.residual + column : nullptr;
  uint8_t* __restrict c = static_cast<uint8_t*>(g.c) + column;
  const int8_t* weights = g.b + block * g.b_block;
  const int64_t b_block = g.b_block;
  const int quads = (g.seg_len + 3) / 4, segments = One ? 1 : g.segments;
  const int64_t skip = int64_t(g.seg_pad / 4 - quads) * 64;
  const int64_t *seg_offset = g.seg_offset, *row = g.row_offset, *c_row = g.c_offset, *r_row = g.r_offset;
  const uint8_t* from = g.a + (One ? seg_offset[0] : 0);
  // The first tiles ask for the next columns' weights, a line each step: out of the second cache they come too late.
  const bool more = One && m == 0 && 16 * (block + NB) < g.n;
  const int8_t *ahead = more ? weights + NB * b_block : weights, *const last = ahead + NB * b_block;
  int64_t line = more ? 64 : 0;
  for (const int rows = g.m; m + MR <= rows; m += MR) {
    if (ahead >= last) line = 0;
    __m512i acc[MR][NB];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_loadu_si512(bias + 16 * j);
    const int8_t* b = weights;
    for (int s = 0; s < segments; ++s) {
      const uint8_t* at = One ? from : from + seg_offset[s];
      const uint8_t* a[MR];
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) a[i] = at + row[m + i];
      for (int q = 0; q < quads; ++q) {
        if (One) {
          _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
          ahead += line;
        }
        __m512i w[NB];
#pragma GCC unroll 4
        for (int j = 0; j < NB; ++j) w[j] = _mm512_loadu_si512(b + j * b_block);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const __m512i x = broadcast4(a[i] + 4 * q);
#pragma GCC unroll 4
          for (int j = 0; j < NB; ++j) dot4(acc[i][j], x, w[j]);
        }
        b += 64;
      }
      b += skip;
    }
    if (MR % Codes::rows == 0 && __builtin_expect(together, 1)) {
      __m512 m4[NB];
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) m4[j] = _mm512_loadu_ps(multiplier + 16 * j);
#pragma GCC unroll 16
      for (int i = 0; i + Codes::rows <= MR; i += Codes::rows)
        Codes::store(f, acc[i], m4, c_row + m + i, residual, path == kResidual ? r_row + m + i : nullptr, c, half);
    } else {
      __m512i spilled[MR * NB];
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NB; ++j) spilled[i * NB + j] = acc[i][j];
      store_slowly<NB, path>(g, f, spilled, MR, m, column);
    }
  }
  return m;
}

template <int MR, int NB, Path path>
int tiles(const GemmArgs& g, const Finish& f, int m, int block) {
  if constexpr (MR > 4)
    if (g.segments == 1) return tiles_of<MR, NB, path, true>(g, f, m, block);
  return tiles_of<MR, NB, path, false>(g, f, m, block);
}

template <int MR, int NB, Path path>
void rows_of(const GemmArgs& g, const Finish& f, int block) {
  int m = tiles<MR, NB, path>(g, f, 0, block);
  // the rest in halves, so that no more than log2(MR) small tiles remain
  if constexpr (MR > 8) m = tiles<8, NB, path>(g, f, m, block);
  if constexpr (MR > 4) m = tiles<4, NB, path>(g, f, m, block);
  if constexpr (MR > 2) m = tiles<2, NB, path>(g, f, m, block);
  tiles<1, NB, path>(g, f, m, block);
}

}  // namespace

void gemm(const GemmArgs& g) {
  const Finish f(*g.epilogue);
  const int blocks = (g.n + 15) / 16;
  with_path(path_of(*g.epilogue), [&](auto p) {
    // columns in pieces of up to four blocks, evened out
    const int pieces = (blocks + 3) / 4;
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

void epilogue(const EpilogueArgs& a) {
  const Finish f(*a.epilogue);
  with_path(path_of(*a.epilogue), [&](auto p) {
    for (int n = 0; n < a.n; n += 64) {
      const Columns columns(n, a.n - n, 4);
      __m512i acc[4];
      for (int j = 0; j < 4; ++j) {
        const __m512i raw = _mm512_maskz_loadu_epi32(columns.part[j], a.acc + n + 16 * j);
        acc[j] = _mm512_add_epi32(raw, _mm512_loadu_si512(a.epilogue->bias + n + 16 * j));
      }
      store_row<4, p()>(f, acc, columns, a.row, a.residual ? a.residual + n : nullptr,
                        a.addend ? a.addend + n : nullptr, a.y, n);
    }
  });
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
