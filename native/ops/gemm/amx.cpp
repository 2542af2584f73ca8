// u8 x s8 products on tiles: 32 rows by 64 columns a unit, 64 bytes of K a step. While the tiles of one unit are
// multiplied, the accumulators of the one before are rounded and stored.
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

// Tiles 0 1 / 2 3: accumulators [row half][column half]; 4 5: activations; 6 7: weights. k: bytes of a step, up to 64.
void configure(int rows0, int rows1, int k) {
  TileConfig c;
  const int rows[8] = {rows0, rows0, rows1, rows1, rows0, rows1, k / 4, k / 4};
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = uint8_t(rows[i] ? rows[i] : 1);
    c.colsb[i] = uint16_t(i == 4 || i == 5 ? k : 64);
  }
  _tile_loadconfig(&c);
}

struct alignas(64) Scratch {
  int32_t acc[32][64];
};

// Activations of up to 16 rows: the first one, and the distance between rows.
struct Rows {
  const uint8_t* base;
  int64_t stride;
};

struct Unit {
  int m, rows, block, width;  // rows from m on, columns of `width` blocks
  Rows top, bottom;
  bool gathered;              // segments lie side by side
};

template <bool TwoRows, bool TwoColumns>
PW_INLINE void multiply(const GemmArgs& g, const Unit& u, const int8_t* b, int32_t* acc) {
  _tile_zero(0);
  if (TwoColumns) _tile_zero(1);
  if (TwoRows) _tile_zero(2);
  if (TwoRows && TwoColumns) _tile_zero(3);
  const int segments = g.dense ? 1 : g.segments;
  for (int seg = 0; seg < segments; ++seg) {
    const int64_t off = u.gathered ? int64_t(seg) * g.seg_pad : g.seg_offset[seg];
    for (int k = 0; k < g.seg_pad; k += 64) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, u.top.base + off + k, u.top.stride);
      _tile_dpbusd(0, 4, 6);
      if (TwoColumns) {
        _tile_loadd(7, b + g.b_block, 64);
        _tile_dpbusd(1, 4, 7);
      }
      if (TwoRows) {
        _tile_loadd(5, u.bottom.base + off + k, u.bottom.stride);
        _tile_dpbusd(2, 5, 6);
        if (TwoColumns) _tile_dpbusd(3, 5, 7);
      }
      b += 1024;
    }
  }
  _tile_stored(0, acc, 256);
  if (TwoColumns) _tile_stored(1, acc + 16, 256);
  if (TwoRows) _tile_stored(2, acc + 16 * 64, 256);
  if (TwoRows && TwoColumns) _tile_stored(3, acc + 16 * 64 + 16, 256);
}

void multiply_unit(const GemmArgs& g, const Unit& u, Scratch& s) {
  const bool two_rows = u.rows > 16;
  for (int j = 0; j < u.width; j += 2) {
    const int8_t* b = g.b + (u.block + j) * g.b_block;
    int32_t* acc = s.acc[0] + 16 * j;
    const bool two_columns = j + 1 < u.width;
    if (two_rows && two_columns) multiply<true, true>(g, u, b, acc);
    else if (two_rows) multiply<true, false>(g, u, b, acc);
    else if (two_columns) multiply<false, true>(g, u, b, acc);
    else multiply<false, false>(g, u, b, acc);
  }
}

template <int NB, Path path>
void store_rows(const GemmArgs& g, const Finish& f, const Unit& u, const Scratch& s) {
  const Epilogue& e = f.e;
  const int column = 16 * u.block;
  const Columns columns(g.n0 + column, g.n - column, NB);
  __m512i bias[NB];
  for (int j = 0; j < NB; ++j) bias[j] = _mm512_loadu_si512(e.bias + columns.first + 16 * j);
  for (int i = 0; i < u.rows; ++i) {
    const int64_t at = g.c_offset[u.m + i];
    if (at < 0) continue;
    const uint8_t* r = e.residual ? e.residual + g.r_offset[u.m + i] + column : nullptr;
    const float* addend = e.addend ? e.addend + g.r_offset[u.m + i] + column : nullptr;
    __m512i acc[NB];
    for (int j = 0; j < NB; ++j) acc[j] = _mm512_add_epi32(_mm512_load_si512(s.acc[i] + 16 * j), bias[j]);
    store_row<NB, path>(f, acc, columns, g.m0 + u.m + i, r, addend, g.c, at + column);
  }
}

void store_unit(const GemmArgs& g, const Finish& f, Path path, const Unit& u, const Scratch& s) {
  with_path(path, [&](auto p) {
    switch (u.width) {
      case 4: return store_rows<4, p()>(g, f, u, s);
      case 3: return store_rows<3, p()>(g, f, u, s);
      case 2: return store_rows<2, p()>(g, f, u, s);
      default: return store_rows<1, p()>(g, f, u, s);
    }
  });
}

// Units in flight: the accumulators of the last one wait while the next is multiplied.
class Pipeline {
 public:
  explicit Pipeline(const GemmArgs& g) : g_(g), finish_(*g.epilogue), path_(path_of(*g.epilogue)) {
    // a product of few steps need not load what is padding
    const int k = g.dense ? g.segments * g.seg_len : g.seg_len;
    step_ = k < 64 ? (k + 3) / 4 * 4 : 64;
  }
  void push(const Unit& u) {
    const int rows = u.rows;
    if (rows != configured_) {
      configure(rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 0, step_);
      configured_ = rows;
    }
    multiply_unit(g_, u, scratch_[turn_]);
    if (waiting_) store_unit(g_, finish_, path_, last_, scratch_[turn_ ^ 1]);
    last_ = u;
    waiting_ = true;
    turn_ ^= 1;
  }
  void finish() {
    if (waiting_) store_unit(g_, finish_, path_, last_, scratch_[turn_ ^ 1]);
    _tile_release();
  }

 private:
  const GemmArgs& g_;
  Finish finish_;
  Path path_;
  Scratch scratch_[2];
  Unit last_;
  bool waiting_ = false;
  int turn_ = 0, configured_ = -1, step_ = 64;
};

bool evenly_spaced(const GemmArgs& g, int m, int rows) {
  for (int i = 2; i < rows; ++i)
    if (g.row_offset[m + i] - g.row_offset[m + i - 1] != g.row_offset[m + 1] - g.row_offset[m]) return false;
  return true;
}

Rows rows_at(const GemmArgs& g, int m, int rows) {
  return {g.a + g.row_offset[m], rows > 1 ? g.row_offset[m + 1] - g.row_offset[m] : 64};
}

// Copies rows side by side; result [rows][segments * seg_pad], or all segments without gaps where g.dense.
Rows gather(const GemmArgs& g, int m, int rows, uint8_t* to) {
  const int64_t width = g.dense ? g.seg_pad : int64_t(g.segments) * g.seg_pad;
  const int64_t step = g.dense ? g.seg_len : g.seg_pad;
  for (int i = 0; i < rows; ++i)
    for (int s = 0; s < g.segments; ++s) {
      const uint8_t* from = g.a + g.row_offset[m + i] + g.seg_offset[s];
      uint8_t* at = to + i * width + s * step;
      // whole vectors: what is written too far is written again by the next segment or row
      if (step <= 32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      } else {
        for (int k = 0; k < step; k += 64) _mm512_storeu_si512(at + k, _mm512_loadu_si512(from + k));
      }
    }
  return {to, width};
}

struct GatherBuffer {  // of one thread, kept between calls
  uint8_t* data = nullptr;
  int64_t capacity = 0;
  ~GatherBuffer() { _mm_free(data); }
  uint8_t* of(int64_t bytes) {
    if (capacity < bytes) {
      _mm_free(data);
      data = static_cast<uint8_t*>(_mm_malloc(size_t(bytes), 64));
      capacity = bytes;
    }
    return data;
  }
};

}  // namespace

void gemm(const GemmArgs& g) {
  const int blocks = (g.n + 15) / 16, full = g.m / 32 * 32;
  const int units = (blocks + 3) / 4, most = units ? (blocks + units - 1) / units : 1;  // blocks of a unit, evened out
  bool even = !g.dense;
  for (int m = 0; m < g.m && even; m += 16) even = evenly_spaced(g, m, g.m - m < 16 ? g.m - m : 16);
  Pipeline pipeline(g);
  const auto unit = [&](int m, int block, bool gathered, Rows all) {
    const int rows = g.m - m < 32 ? g.m - m : 32;
    const int width = blocks - block < most ? blocks - block : most;
    Unit u{m, rows, block, width, all, {all.base + 16 * all.stride, all.stride}, gathered};
    if (!gathered) {
      u.top = rows_at(g, m, rows < 16 ? rows : 16);
      u.bottom = rows > 16 ? rows_at(g, m + 16, rows - 16) : u.top;
    }
    pipeline.push(u);
  };
  if (even) {
    // the weights of a unit stay in the first cache while the rows pass; odd rows last, for their own tile shape
    for (int block = 0; block < blocks; block += most)
      for (int m = 0; m < full; m += 32) unit(m, block, false, {});
    if (full < g.m)
      for (int block = 0; block < blocks; block += most) unit(full, block, false, {});
  } else {
    // rows are gathered one unit ahead: tiles cannot be loaded from stores that are still under way
    static thread_local GatherBuffer buffer;
    const int64_t size = 32 * (g.dense ? g.seg_pad : int64_t(g.segments) * g.seg_pad) + 64;
    uint8_t* halves[2] = {buffer.of(2 * size), nullptr};
    halves[1] = halves[0] + size;
    const auto rows_of = [&](int m) { return g.m - m < 32 ? g.m - m : 32; };
    Rows next = g.m > 0 ? gather(g, 0, rows_of(0), halves[0]) : Rows{};
    for (int m = 0, turn = 1; m < g.m; m += 32, turn ^= 1) {
      const Rows all = next;
      if (m + 32 < g.m) next = gather(g, m + 32, rows_of(m + 32), halves[turn]);
      for (int block = 0; block < blocks; block += most) unit(m, block, true, all);
    }
  }
  pipeline.finish();
}

}  // namespace pw::amx

#endif  // __AMX_INT8__
