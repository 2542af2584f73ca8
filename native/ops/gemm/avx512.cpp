// u8 x s8 products with vpdpbusd: four-byte activation broadcasts against packed weights, accumulators in registers.
#if defined(__AVX512VNNI__)
#include <cstring>

#include "ops/avx512.h"

namespace pw::avx512 {
namespace {

inline __attribute__((always_inline)) __m512i broadcast4(const uint8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// MR rows times NB blocks of 16 columns.
template <int MR, int NB, Path path>
void tile(const GemmArgs& g, const Finish& f, int m, int block) {
  const Epilogue& e = f.e;
  const int column = 16 * block;
  const Columns columns(g.n0 + column, g.n - column, NB);
  __m512i acc[MR][NB];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_loadu_si512(e.bias + g.n0 + column + 16 * j);
  const int8_t* b = g.b + block * g.b_block;
  const int quads = (g.seg_len + 3) / 4;
  const int64_t skip = int64_t(g.seg_pad / 4 - quads) * 64;
  for (int s = 0; s < g.segments; ++s) {
    const uint8_t* a[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) a[i] = g.a + g.row_offset[m + i] + g.seg_offset[s];
    for (int q = 0; q < quads; ++q) {
      __m512i w[NB];
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) w[j] = _mm512_loadu_si512(b + j * g.b_block);
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
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const int64_t at = g.c_offset[m + i];
    if (at < 0) continue;
    const uint8_t* r = e.residual ? e.residual + g.r_offset[m + i] + column : nullptr;
    const float* addend = e.addend ? e.addend + g.r_offset[m + i] + column : nullptr;
    store_row<NB, path>(f, acc[i], columns, g.m0 + m + i, r, addend, g.c, at + column);
  }
}

template <int MR, int NB, Path path>
void rows_of(const GemmArgs& g, const Finish& f, int block) {
  int m = 0;
  for (; m + MR <= g.m; m += MR) tile<MR, NB, path>(g, f, m, block);
  // the rest in halves, so that no more than log2(MR) small tiles remain
  if constexpr (MR > 8)
    for (; m + 8 <= g.m; m += 8) tile<8, NB, path>(g, f, m, block);
  if constexpr (MR > 4)
    for (; m + 4 <= g.m; m += 4) tile<4, NB, path>(g, f, m, block);
  if constexpr (MR > 2)
    for (; m + 2 <= g.m; m += 2) tile<2, NB, path>(g, f, m, block);
  for (; m < g.m; ++m) tile<1, NB, path>(g, f, m, block);
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
        default: rows_of<14, 1, p()>(g, f, block); break;
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
