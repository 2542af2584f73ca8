// u8 x s8 products on tiles: 32 rows by 32 columns at a time, 64 bytes of K a step.
#if defined(__AMX_INT8__)
#include <cstring>

#include "ops/avx512.h"

namespace pw::amx {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 1 / 2 3: accumulators [row half][column half]; 4 5: activations; 6 7: weights.
void configure(int rows0, int rows1) {
  TileConfig c;
  const int rows[8] = {rows0, rows0, rows1, rows1, rows0, rows1, 16, 16};
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = uint8_t(rows[i] ? rows[i] : 1);
    c.colsb[i] = 64;
  }
  _tile_loadconfig(&c);
}

struct alignas(64) Scratch {
  int32_t acc[32][64];
};

// Activations of a tile: pointer to its first row and the distance between rows, per segment.
struct Rows {
  const uint8_t* base;
  int64_t stride;
};

template <bool TwoRows, bool TwoColumns>
inline __attribute__((always_inline)) void multiply(const GemmArgs& g, Rows top, Rows bottom, bool gathered,
                                                    const int8_t* b, Scratch& s) {
  _tile_zero(0);
  if (TwoColumns) _tile_zero(1);
  if (TwoRows) _tile_zero(2);
  if (TwoRows && TwoColumns) _tile_zero(3);
  for (int seg = 0; seg < g.segments; ++seg) {
    const int64_t off = gathered ? int64_t(seg) * g.seg_pad : g.seg_offset[seg];
    for (int k = 0; k < g.seg_pad; k += 64) {
      _tile_loadd(6, b, 64);
      if (TwoColumns) _tile_loadd(7, b + g.b_block, 64);
      _tile_loadd(4, top.base + off + k, top.stride);
      _tile_dpbusd(0, 4, 6);
      if (TwoColumns) _tile_dpbusd(1, 4, 7);
      if (TwoRows) {
        _tile_loadd(5, bottom.base + off + k, bottom.stride);
        _tile_dpbusd(2, 5, 6);
        if (TwoColumns) _tile_dpbusd(3, 5, 7);
      }
      b += 1024;
    }
  }
  _tile_stored(0, s.acc[0], 256);
  if (TwoColumns) _tile_stored(1, s.acc[0] + 16, 256);
  if (TwoRows) _tile_stored(2, s.acc[16], 256);
  if (TwoRows && TwoColumns) _tile_stored(3, s.acc[16] + 16, 256);
}

void store(const GemmArgs& g, const Scratch& s, int m, int rows, int column, int width) {
  const Epilogue& e = *g.epilogue;
  for (int i = 0; i < rows; ++i) {
    const int64_t at = g.c_offset[m + i];
    if (at < 0) continue;
    const uint8_t* r = e.residual ? e.residual + g.r_offset[m + i] + column : nullptr;
    const float* addend = e.addend ? e.addend + g.r_offset[m + i] + column : nullptr;
    const int columns = g.n - column;
    __m512i acc[4];
    for (int j = 0; j < width; ++j) acc[j] = _mm512_load_si512(s.acc[i] + 16 * j);
    switch (width) {
      case 4: store_row<4>(e, acc, g.n0 + column, columns, g.m0 + m + i, r, addend, g.c, at + column); break;
      case 3: store_row<3>(e, acc, g.n0 + column, columns, g.m0 + m + i, r, addend, g.c, at + column); break;
      case 2: store_row<2>(e, acc, g.n0 + column, columns, g.m0 + m + i, r, addend, g.c, at + column); break;
      default: store_row<1>(e, acc, g.n0 + column, columns, g.m0 + m + i, r, addend, g.c, at + column); break;
    }
  }
}

bool evenly_spaced(const GemmArgs& g, int m, int rows) {
  if (m + rows <= g.uniform) return true;
  for (int i = 2; i < rows; ++i)
    if (g.row_offset[m + i] - g.row_offset[m + i - 1] != g.row_offset[m + 1] - g.row_offset[m]) return false;
  return true;
}

Rows rows_at(const GemmArgs& g, int m, int rows) {
  return {g.a + g.row_offset[m], rows > 1 ? g.row_offset[m + 1] - g.row_offset[m] : 64};
}

// Copies rows that are not evenly spaced side by side; result [rows][segments * seg_pad].
Rows gather(const GemmArgs& g, int m, int rows, uint8_t* to) {
  const int64_t width = int64_t(g.segments) * g.seg_pad;
  for (int i = 0; i < rows; ++i)
    for (int s = 0; s < g.segments; ++s) {
      const uint8_t* from = g.a + g.row_offset[m + i] + g.seg_offset[s];
      uint8_t* at = to + i * width + int64_t(s) * g.seg_pad;
      for (int k = 0; k < g.seg_pad; k += 64) _mm512_storeu_si512(at + k, _mm512_loadu_si512(from + k));
    }
  return {to, width};
}

void columns_of(const GemmArgs& g, int m, int rows, Rows top, Rows bottom, bool gathered, int block, int width,
                Scratch& s) {
  const bool two_rows = rows > 16;
  for (int j = 0; j < width; j += 2) {
    Scratch& half = *reinterpret_cast<Scratch*>(s.acc[0] + 16 * j);
    const int8_t* b = g.b + (block + j) * g.b_block;
    const bool two_columns = j + 1 < width;
    if (two_rows && two_columns) multiply<true, true>(g, top, bottom, gathered, b, half);
    else if (two_rows) multiply<true, false>(g, top, bottom, gathered, b, half);
    else if (two_columns) multiply<false, true>(g, top, bottom, gathered, b, half);
    else multiply<false, false>(g, top, bottom, gathered, b, half);
  }
  store(g, s, m, rows, 16 * block, width);
}

}  // namespace

void gemm(const GemmArgs& g) {
  Scratch s;
  const int blocks = (g.n + 15) / 16;
  const int full = g.m / 32 * 32;
  bool even = true;
  for (int m = 0; m < g.m && even; m += 16) even = evenly_spaced(g, m, g.m - m < 16 ? g.m - m : 16);
  int configured = -1;
  const auto with_rows = [&](int rows) {
    if (rows == configured) return;
    configure(rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 0);
    configured = rows;
  };
  if (even) {
    // weights of up to four blocks stay in the first cache while the rows pass
    for (int rest = 0; rest < 2; ++rest) {
      const int from = rest ? full : 0, to = rest ? g.m : full;
      if (from == to) continue;
      with_rows(rest ? g.m - full : 32);
      for (int block = 0; block < blocks; block += 4) {
        const int width = blocks - block < 4 ? blocks - block : 4;
        for (int m = from; m < to; m += 32) {
          const int rows = to - m < 32 ? to - m : 32;
          const Rows top = rows_at(g, m, rows < 16 ? rows : 16);
          const Rows bottom = rows > 16 ? rows_at(g, m + 16, rows - 16) : top;
          columns_of(g, m, rows, top, bottom, false, block, width, s);
        }
      }
    }
  } else {
    const int64_t width = int64_t(g.segments) * g.seg_pad;
    alignas(64) static thread_local uint8_t* buffer = nullptr;
    static thread_local int64_t capacity = 0;
    if (capacity < 32 * width) {
      if (buffer) _mm_free(buffer);
      buffer = static_cast<uint8_t*>(_mm_malloc(32 * width, 64));
      capacity = 32 * width;
    }
    for (int m = 0; m < g.m; m += 32) {
      const int rows = g.m - m < 32 ? g.m - m : 32;
      with_rows(rows);
      const Rows all = gather(g, m, rows, buffer);
      const Rows bottom = {all.base + 16 * all.stride, all.stride};
      for (int block = 0; block < blocks; block += 4)
        columns_of(g, m, rows, all, bottom, true, block, blocks - block < 4 ? blocks - block : 4, s);
    }
  }
  _tile_release();
}

}  // namespace pw::amx

#endif  // __AMX_INT8__
