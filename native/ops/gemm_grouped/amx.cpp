// Grouped weights on tiles: 16 rows by 16 columns a unit, whose float sums stay in registers. The integer sums of a group
// are scaled and added while the tiles of the next two groups are multiplied.
#if defined(__AMX_INT8__)
#include "ops/amx.h"
#include "ops/avx512.h"

namespace pw::avx512 {
void gemm_grouped(const GemmGroupedArgs&);
}

namespace pw::amx {
namespace {

constexpr int kRows = 16, kAhead = 2, kSums = 4;
constexpr int kFewRows = 9, kShortGroup = 16;  // up to so many rows, and below so many inputs, vectors are faster

// Tiles 0 .. 3: sums; 4, 5: activations; 6, 7: weights. k: bytes of a step, up to 64.
void configure(int rows, int k) {
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = uint8_t(i < 6 ? rows : k / 4);
    c.colsb[i] = uint16_t(i == 4 || i == 5 ? k : 64);
  }
  _tile_loadconfig(&c);
}

// Tile numbers are part of the instructions.
#define PW_GROUP(acc, x, w)                                                       \
  case acc:                                                                       \
    _tile_zero(acc);                                                              \
    for (int s = 0; s < steps; ++s) {                                             \
      _tile_loadd(x, a + s * 64, lda);                                            \
      _tile_loadd(w, b + s * 1024, 64);                                           \
      _tile_dpbusd(acc, x, w);                                                    \
    }                                                                             \
    _tile_stored(acc, sums, 64);                                                  \
    break

// Integer sums of one group, zero points left out.
PW_INLINE void multiply(int turn, const uint8_t* a, int64_t lda, const int8_t* b, int steps, int32_t* sums) {
  switch (turn) {
    PW_GROUP(0, 4, 6);
    PW_GROUP(1, 5, 7);
    PW_GROUP(2, 4, 6);
    PW_GROUP(3, 5, 7);
  }
}
#undef PW_GROUP

// Adds the scaled sums of one group to t, sums and zero points being whole numbers below 2^24 throughout: floats hold
// them, so that this multiply-add rounds nothing.
PW_INLINE void add_group(const GemmGroupedArgs& g, int64_t at, const int32_t* sums, const float* zero, __m512* t) {
  const __m512 scale = _mm512_loadu_ps(g.scale + at), colsum = _mm512_cvtepi32_ps(_mm512_loadu_si512(g.colsum + at));
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const __m512 products = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * i));
    const __m512 exact = _mm512_fmadd_ps(_mm512_set1_ps(zero[i]), colsum, products);
    t[i] = _mm512_add_ps(t[i], _mm512_mul_ps(exact, scale));
  }
}

void unit(const GemmGroupedArgs& g, int m, int rows, int block, int steps, int k) {
  alignas(64) int32_t sums[kSums][kRows * 16];
  float zero[kRows] = {};
  for (int i = 0; i < rows; ++i) zero[i] = float(g.row_zero[int64_t(m + i) * g.row_step]);
  const int column = 16 * block;
  const uint8_t* a = g.a + m * g.lda;
  const int8_t* b = g.b + block * g.b_block;
  __m512 t[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) t[i] = _mm512_setzero_ps();
  for (int group = 0; group < g.groups + kAhead; ++group) {
    if (group < g.groups) {
      multiply(group % kSums, a, g.lda, b, steps, sums[group % kSums]);
      a += g.group_len;
      b += int64_t(steps) * k * 16;
    }
    const int done = group - kAhead;
    if (done >= 0) add_group(g, done * g.step + column, sums[done % kSums], zero, t);
  }
  const Columns columns(column, g.n - column, 1);
  const __m512 bias = g.bias ? _mm512_loadu_ps(g.bias + column) : _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) continue;
    __m512 y = _mm512_mul_ps(t[i], _mm512_set1_ps(g.row_scale[int64_t(m + i) * g.row_step]));
    if (g.bias) y = _mm512_add_ps(y, bias);
    _mm512_mask_storeu_ps(g.c + (m + i) * g.ldc + column, columns.part[0], y);
  }
}

// Rows of the product that go through tiles.
int tiled_rows(const GemmGroupedArgs& g, int quads) {
  const bool whole = quads <= 16 || quads % 16 == 0;  // one shape of tile for all steps
  const bool exact = int64_t(g.group_len) * 255 * (1 << (g.bits - 1)) < 1 << 24;
  const int rest = g.m % kRows;
  return whole && exact && g.group_len >= kShortGroup ? g.m - (rest <= kFewRows ? rest : 0) : 0;
}

}  // namespace

void gemm_grouped(const GemmGroupedArgs& g) {
  const int quads = (g.group_len + 3) / 4, steps = (quads + 15) / 16, k = steps > 1 ? 64 : 4 * quads;
  const int tiled = tiled_rows(g, quads);
  int shape = 0;
  for (int block = 0; block * 16 < g.n; ++block)
    for (int m = 0; m < tiled; m += kRows) {
      const int rows = tiled - m < kRows ? tiled - m : kRows;
      if (rows != shape) configure(shape = rows, k);
      unit(g, m, rows, block, steps, k);
    }
  if (shape) _tile_release();
  if (tiled == g.m) return;
  GemmGroupedArgs few = g;
  few.m = g.m - tiled;
  few.a += tiled * g.lda;
  few.c += tiled * g.ldc;
  few.row_zero += int64_t(tiled) * g.row_step;
  few.row_scale += int64_t(tiled) * g.row_step;
  avx512::gemm_grouped(few);
}

}  // namespace pw::amx

#endif  // __AMX_INT8__
