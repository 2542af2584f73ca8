// Products of bf16 numbers on tiles: up to 32 rows by 32 columns a unit, up to 32 numbers of K a step.
#if defined(__AMX_BF16__)
#include <cstring>

#include "ops/real512.h"

namespace pw::amx {
namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 1 / 2 3: sums [row half][column half]; 4 5: activations; 6 7: weights.
void configure(int top, int bottom, int step) {
  Config c;
  const int rows[8] = {top, top, bottom, bottom, top, bottom, step / 2, step / 2};
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = uint8_t(rows[i] ? rows[i] : 1);
    c.colsb[i] = uint16_t(i == 4 || i == 5 ? step * 2 : 64);
  }
  _tile_loadconfig(&c);
}

// Up to 16 rows at one distance.
struct Half {
  int m = 0, rows = 0;
  const uint16_t* base = nullptr;
  int64_t stride = 0;  // elements
};

struct alignas(64) Sums {
  float of[32][32];
};

template <bool TwoRows, bool TwoColumns>
PW_REAL_INLINE void multiply(const GemmBf16Args& g, const Half* halves, int block, bool gathered, float* sums) {
  const uint16_t* b = g.b + block * g.b_block;
  _tile_zero(0);
  if (TwoColumns) _tile_zero(1);
  if (TwoRows) _tile_zero(2);
  if (TwoRows && TwoColumns) _tile_zero(3);
  const int segments = gathered ? 1 : g.segments, length = gathered ? g.dense_len : g.seg_len;
  for (int s = 0; s < segments; ++s) {
    const int64_t off = gathered ? 0 : g.seg_offset[s];
    for (int k = 0; k < length; k += g.step) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, halves[0].base + off + k, halves[0].stride * 2);
      _tile_dpbf16ps(0, 4, 6);
      if (TwoColumns) {
        _tile_loadd(7, b + g.b_block, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (TwoRows) {
        _tile_loadd(5, halves[1].base + off + k, halves[1].stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (TwoColumns) _tile_dpbf16ps(3, 5, 7);
      }
      b += g.step * 16;
    }
  }
  _tile_stored(0, sums, 128);
  if (TwoColumns) _tile_stored(1, sums + 16, 128);
  if (TwoRows) _tile_stored(2, sums + 16 * 32, 128);
  if (TwoRows && TwoColumns) _tile_stored(3, sums + 16 * 32 + 16, 128);
}

struct Unit {
  Half halves[2];
  int block = 0, width = 0;
  bool gathered = false;
};

void store(const GemmBf16Args& g, const Unit& u, const Sums& sums) {
  for (int h = 0; h < 2; ++h)
    for (int i = 0; i < u.halves[h].rows; ++i) {
      const int m = u.halves[h].m + i;
      for (int j = 0; j < u.width; ++j) {
        const int column = 16 * (u.block + j);
        store_real(g.tail, _mm512_load_ps(sums.of[16 * h + i] + 16 * j), m, column, g.n - column, g.c,
                   g.c_offset[m] + column);
      }
    }
}

// Units in flight: the sums of the last one are stored while the next is multiplied.
class Pipeline {
 public:
  explicit Pipeline(const GemmBf16Args& g) : g_(g) {}
  void push(const Unit& u) {
    const int top = u.halves[0].rows, bottom = u.halves[1].rows;
    if (top != top_ || bottom != bottom_) {
      configure(top, bottom, g_.step);
      top_ = top;
      bottom_ = bottom;
    }
    float* sums = sums_[turn_].of[0];
    if (bottom && u.width > 1) multiply<true, true>(g_, u.halves, u.block, u.gathered, sums);
    else if (bottom) multiply<true, false>(g_, u.halves, u.block, u.gathered, sums);
    else if (u.width > 1) multiply<false, true>(g_, u.halves, u.block, u.gathered, sums);
    else multiply<false, false>(g_, u.halves, u.block, u.gathered, sums);
    if (waiting_) store(g_, last_, sums_[turn_ ^ 1]);
    last_ = u;
    waiting_ = true;
    turn_ ^= 1;
  }
  void finish() {
    if (waiting_) store(g_, last_, sums_[turn_ ^ 1]);
    _tile_release();
  }

 private:
  const GemmBf16Args& g_;
  Sums sums_[2];
  Unit last_;
  bool waiting_ = false;
  int turn_ = 0, top_ = -1, bottom_ = -1;
};

// Rows from m on that lie at one distance, at most 16; evened out over the stretch that they are part of.
Half even_rows(const GemmBf16Args& g, int m) {
  const int64_t stride = m + 1 < g.m ? g.row_offset[m + 1] - g.row_offset[m] : 0;
  int rows = g.m > m ? 1 : 0;
  const int most = 16 * 14;
  while (rows < most && m + rows < g.m && g.row_offset[m + rows] - g.row_offset[m + rows - 1] == stride) ++rows;
  if (rows > 16) rows = rows % 16 == 0 || rows >= 64 ? 16 : (rows + (rows + 15) / 16 - 1) / ((rows + 15) / 16);
  return {m, rows, g.a + g.row_offset[m], stride};
}

// Copies rows side by side, their segments joined, zeros behind.
void gather(const GemmBf16Args& g, int m, int rows, uint16_t* to) {
  for (int i = 0; i < rows; ++i) {
    uint16_t* at = to + int64_t(i) * g.dense_len;
    for (int s = 0; s < g.segments; ++s, at += g.seg_len)
      std::memcpy(at, g.a + g.row_offset[m + i] + g.seg_offset[s], size_t(g.seg_len) * 2);
    std::memset(at, 0, size_t(to + int64_t(i + 1) * g.dense_len - at) * 2);
  }
}

struct GatherBuffer {  // of one thread, kept between calls
  uint16_t* data = nullptr;
  int64_t capacity = 0;
  ~GatherBuffer() { _mm_free(data); }
  uint16_t* of(int64_t numbers) {
    if (capacity < numbers) {
      _mm_free(data);
      data = static_cast<uint16_t*>(_mm_malloc(size_t(numbers) * 2, 64));
      capacity = numbers;
    }
    return data;
  }
};

}  // namespace

void gemm_bf16(const GemmBf16Args& g) {
  const int blocks = (g.n + 15) / 16;
  Pipeline pipeline(g);
  Unit u;
  if (g.dense_len > 0) {
    static thread_local GatherBuffer buffer;
    const int64_t half = 32 * int64_t(g.dense_len);
    uint16_t* space = buffer.of(2 * half);
    u.gathered = true;
    for (int m = 0, turn = 0; m < g.m; m += 32, turn ^= 1) {
      const int rows = g.m - m < 32 ? g.m - m : 32;
      uint16_t* at = space + turn * half;
      gather(g, m, rows, at);
      u.halves[0] = {m, rows < 16 ? rows : 16, at, g.dense_len};
      u.halves[1] = {m + 16, rows < 16 ? 0 : rows - 16, at + 16 * int64_t(g.dense_len), g.dense_len};
      for (u.block = 0; u.block < blocks; u.block += 2) {
        u.width = blocks - u.block < 2 ? 1 : 2;
        pipeline.push(u);
      }
    }
  } else {
    // the weights of a unit stay in the first cache while the rows pass
    for (u.block = 0; u.block < blocks; u.block += 2) {
      u.width = blocks - u.block < 2 ? 1 : 2;
      for (int m = 0; m < g.m;) {
        u.halves[0] = even_rows(g, m);
        m += u.halves[0].rows;
        u.halves[1] = m < g.m ? even_rows(g, m) : Half{};
        m += u.halves[1].rows;
        pipeline.push(u);
      }
    }
  }
  pipeline.finish();
}

}  // namespace pw::amx

#endif  // __AMX_BF16__
