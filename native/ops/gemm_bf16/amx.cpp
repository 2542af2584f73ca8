// Products of bf16 numbers on tiles: up to 32 rows by 32 columns a unit, up to 32 numbers of K a step.
#if defined(__AMX_BF16__)
#include <cstring>

#include "ops/amx.h"
#include "ops/real512.h"

namespace pw::amx {
namespace {

// Tiles 0 1 / 2 3: sums [row half][column half]; 4 5: activations; 6 7: weights.
void configure(int top, int bottom, int step) {
  TileConfig c;
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

constexpr int kAhead = 6144;  // bytes of weights that are on their way from afar

PW_REAL_INLINE void fetch(const uint16_t* b, int bytes) {
  const char* p = reinterpret_cast<const char*>(b) + kAhead;
  for (int i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
}

// `first`: the weights have not been read before.
template <bool TwoRows, bool TwoColumns>
PW_REAL_INLINE void multiply(const GemmBf16Args& g, const Half* halves, int block, bool gathered, bool first,
                             float* sums) {
  const uint16_t* b = g.b + block * g.b_block;
  _tile_zero(0);
  if (TwoColumns) _tile_zero(1);
  if (TwoRows) _tile_zero(2);
  if (TwoRows && TwoColumns) _tile_zero(3);
  const int segments = gathered ? 1 : g.segments, length = gathered ? g.dense_len : g.seg_len;
  for (int s = 0; s < segments; ++s) {
    const int64_t off = gathered ? 0 : g.seg_offset[s];
    for (int k = 0; k < length; k += g.step) {
      if (first) {
        fetch(b, g.step * 32);
        if (TwoColumns) fetch(b + g.b_block, g.step * 32);
      }
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
  bool gathered = false, first = false;
};

enum class Added { kNothing, kFloats, kHalves };

// Rows of 32 columns, all of which count. Numbers below 2^-126 are rounded to zero.
template <Added added, bool half>
void store_whole(const GemmBf16Args& g, const Unit& u, const Sums& sums) {
  const RealTail& t = g.tail;
  const int column = 16 * u.block;
  const __m512 none = _mm512_setzero_ps();
  const __m512 bias[2] = {t.bias ? _mm512_loadu_ps(t.bias + column) : none,
                          t.bias ? _mm512_loadu_ps(t.bias + column + 16) : none};
  const __m512 lo = _mm512_set1_ps(t.clip ? t.lo : -__builtin_inff()), hi = _mm512_set1_ps(t.clip ? t.hi : __builtin_inff());
  for (int h = 0; h < 2; ++h)
    for (int i = 0; i < u.halves[h].rows; ++i) {
      const int m = u.halves[h].m + i;
      __m512 y[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) y[j] = _mm512_add_ps(_mm512_load_ps(sums.of[16 * h + i] + 16 * j), bias[j]);
      if constexpr (added == Added::kFloats) {
        const float* r = static_cast<const float*>(t.addend) + t.r_offset[m] + column;
        y[0] = _mm512_add_ps(y[0], _mm512_loadu_ps(r));
        y[1] = _mm512_add_ps(y[1], _mm512_loadu_ps(r + 16));
      } else if constexpr (added == Added::kHalves) {
        const uint16_t* r = static_cast<const uint16_t*>(t.addend) + t.r_offset[m] + column;
        y[0] = _mm512_add_ps(y[0], widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(r))));
        y[1] = _mm512_add_ps(y[1], widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(r + 16))));
      }
      if (t.clip) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) y[j] = _mm512_min_ps(_mm512_max_ps(y[j], lo), hi);
      }
      if constexpr (half) {
        uint16_t* to = static_cast<uint16_t*>(g.c) + g.c_offset[m] + column;
        _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y[1], y[0])));
      } else {
        float* to = static_cast<float*>(g.c) + g.c_offset[m] + column;
        _mm512_storeu_ps(to, y[0]);
        _mm512_storeu_ps(to + 16, y[1]);
      }
    }
}

void store(const GemmBf16Args& g, const Unit& u, const Sums& sums) {
  if (u.width == 2 && 16 * u.block + 32 <= g.n) {
    const bool half = g.tail.out_bf16;
    if (!g.tail.addend)
      return half ? store_whole<Added::kNothing, true>(g, u, sums) : store_whole<Added::kNothing, false>(g, u, sums);
    if (!g.tail.addend_bf16)
      return half ? store_whole<Added::kFloats, true>(g, u, sums) : store_whole<Added::kFloats, false>(g, u, sums);
    return half ? store_whole<Added::kHalves, true>(g, u, sums) : store_whole<Added::kHalves, false>(g, u, sums);
  }
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
    if (bottom && u.width > 1) multiply<true, true>(g_, u.halves, u.block, u.gathered, u.first, sums);
    else if (bottom) multiply<true, false>(g_, u.halves, u.block, u.gathered, u.first, sums);
    else if (u.width > 1) multiply<false, true>(g_, u.halves, u.block, u.gathered, u.first, sums);
    else multiply<false, false>(g_, u.halves, u.block, u.gathered, u.first, sums);
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

// Copies rows side by side, their segments joined, zeros behind. In whole vectors: what is written too far is written
// again by the next segment or row.
void gather(const GemmBf16Args& g, int m, int rows, uint16_t* to) {
  const int left = g.dense_len - g.segments * g.seg_len;  // below 32
  const __mmask32 behind = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
  for (int i = 0; i < rows; ++i) {
    uint16_t* at = to + int64_t(i) * g.dense_len;
    for (int s = 0; s < g.segments; ++s, at += g.seg_len) {
      const uint16_t* from = g.a + g.row_offset[m + i] + g.seg_offset[s];
      for (int k = 0; k < g.seg_len; k += 32) _mm512_storeu_si512(at + k, _mm512_loadu_si512(from + k));
    }
    _mm512_mask_storeu_epi16(at, behind, _mm512_setzero_si512());
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
    const int64_t half = 32 * int64_t(g.dense_len) + 32;
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
        u.first = m == 0;
        pipeline.push(u);
      }
    }
  } else {
    // the weights of a unit stay in the first cache while the rows pass
    for (u.block = 0; u.block < blocks; u.block += 2) {
      u.width = blocks - u.block < 2 ? 1 : 2;
      for (int m = 0; m < g.m;) {
        u.first = m == 0;
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
