// u8 x s8 products on tiles: 32 rows by 64 columns a unit, 64 bytes of K a step. While the tiles of one unit are
// multiplied, the accumulators of the one before are rounded and stored.
#if defined(__AMX_INT8__)
#include <cstring>

#include "ops/amx.h"
#include "ops/avx512.h"

namespace pw::amx {
namespace {

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

// Where rows of activations lie: gathered ones at one distance, others by 16 at the call's own offsets.
struct Source {
  const uint8_t* base;
  int64_t stride;
  bool gathered;
  int first;  // the row at base
};

// Activations of up to 16 rows: the first one, and the distance between rows.
struct Rows {
  const uint8_t* base;
  int64_t stride;
};

Rows rows_at(const GemmArgs& g, const Source& s, int m, int rows) {
  if (s.gathered) return {s.base + (m - s.first) * s.stride, s.stride};
  return {g.a + g.row_offset[m], rows > 1 ? g.row_offset[m + 1] - g.row_offset[m] : 64};
}

// Accumulators of 16 or 32 rows by one or two blocks of columns; `meanwhile` is called after each step.
template <bool TwoRows, bool TwoColumns, class F>
PW_INLINE void multiply(const GemmArgs& g, bool gathered, Rows top, Rows bottom, const int8_t* b, int32_t* acc, F meanwhile) {
  _tile_zero(0);
  if (TwoColumns) _tile_zero(1);
  if (TwoRows) _tile_zero(2);
  if (TwoRows && TwoColumns) _tile_zero(3);
  const int segments = g.dense ? 1 : g.segments;
  for (int seg = 0; seg < segments; ++seg) {
    const int64_t off = gathered ? int64_t(seg) * g.seg_pad : g.seg_offset[seg];
    for (int k = 0; k < g.seg_pad; k += 64) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, top.base + off + k, top.stride);
      _tile_dpbusd(0, 4, 6);
      if (TwoColumns) {
        _tile_loadd(7, b + g.b_block, 64);
        _tile_dpbusd(1, 4, 7);
      }
      if (TwoRows) {
        _tile_loadd(5, bottom.base + off + k, bottom.stride);
        _tile_dpbusd(2, 5, 6);
        if (TwoColumns) _tile_dpbusd(3, 5, 7);
      }
      b += 1024;
      meanwhile();
    }
  }
  _tile_stored(0, acc, 256);
  if (TwoColumns) _tile_stored(1, acc + 16, 256);
  if (TwoRows) _tile_stored(2, acc + 16 * 64, 256);
  if (TwoRows && TwoColumns) _tile_stored(3, acc + 16 * 64 + 16, 256);
}

// NB blocks of columns over rows [m, end), 32 at a time. While the tiles of one unit are multiplied, the accumulators of
// the one before are rounded and stored.
template <int NB, Path path>
class Strip {
 public:
  Strip(const GemmArgs& g, const Finish& f, int block)
      : g_(g), f_(f), column_(16 * block), columns_(g.n0 + column_, g.n - column_, NB), weights_(g.b + block * g.b_block) {
    together_ = Codes::can(g.n - column_);
    half_ = g.n - column_ == 16 * NB - 8;
    steps_ = (g.dense ? 1 : g.segments) * ((g.seg_pad + 63) / 64);
    // a product of few steps need not load what is padding
    const int k = g.dense ? g.segments * g.seg_len : g.seg_len;
    bytes_ = k < 64 ? (k + 3) / 4 * 4 : 64;
  }

  void run(const Source& source, int m, int end) {
    const Epilogue& e = f_.e;
    __m512i bias[NB];
    __m512 multiplier[NB];
    for (int j = 0; j < NB; ++j) {
      bias[j] = _mm512_loadu_si512(e.bias + columns_.first + 16 * j);
      multiplier[j] = together_ ? _mm512_loadu_ps(e.multiplier + columns_.first + 16 * j) : _mm512_setzero_ps();
    }
    constexpr int kPairs = (NB + 1) / 2;
    const int share = (32 / Codes::rows + kPairs * steps_ - 1) / (kPairs * steps_) * Codes::rows;
    int waiting = 0, done = 0, first = m, turn = 0;  // rows of the unit before, and those already stored
    if (m + 32 <= end) configure(16, 16, bytes_);
    for (; m < end; m += 32, turn ^= 1) {
      const int rows = end - m < 32 ? end - m : 32, top = rows < 16 ? rows : 16;
      if (rows < 32) configure(top, rows - top, bytes_);
      const Rows a = rows_at(g_, source, m, top), b = rows > 16 ? rows_at(g_, source, m + 16, rows - 16) : a;
      const Scratch& last = scratch_[turn ^ 1];
      const auto meanwhile = [&] {
        if (done + share > waiting) return;
        store(last, first, done, done + share, bias, multiplier);
        done += share;
      };
#pragma GCC unroll 2
      for (int j = 0; j < NB; j += 2) {
        const int8_t* w = weights_ + j * g_.b_block;
        int32_t* acc = scratch_[turn].acc[0] + 16 * j;
        if (rows > 16) {
          if (j + 1 < NB) multiply<true, true>(g_, source.gathered, a, b, w, acc, meanwhile);
          else multiply<true, false>(g_, source.gathered, a, b, w, acc, meanwhile);
        } else {
          if (j + 1 < NB) multiply<false, true>(g_, source.gathered, a, b, w, acc, [] {});
          else multiply<false, false>(g_, source.gathered, a, b, w, acc, [] {});
        }
      }
      store(last, first, done, waiting, bias, multiplier);
      waiting = rows;
      done = 0;
      first = m;
    }
    store(scratch_[turn ^ 1], first, done, waiting, bias, multiplier);
  }

 private:
  using Codes = Together<NB, path>;

  // Rows i to end of the unit at row m.
  PW_INLINE void store(const Scratch& s, int m, int i, int end, const __m512i* bias, const __m512* multiplier) const {
    const Epilogue& e = f_.e;
    if (together_) {
      const uint8_t* residual = path == kResidual ? e.residual + column_ : nullptr;
      uint8_t* c = static_cast<uint8_t*>(g_.c) + column_;
      const int64_t *c_offset = g_.c_offset + m, *r_offset = path == kResidual ? g_.r_offset + m : nullptr;
      for (; i + Codes::rows <= end; i += Codes::rows) {
        __m512i acc[4];
#pragma GCC unroll 4
        for (int k = 0; k < Codes::rows; ++k)
#pragma GCC unroll 4
          for (int j = 0; j < NB; ++j) acc[k * NB + j] = _mm512_add_epi32(bias[j], _mm512_load_si512(s.acc[i + k] + 16 * j));
        Codes::store(f_, acc, multiplier, c_offset + i, residual, path == kResidual ? r_offset + i : nullptr, c, half_);
      }
    }
    if (i < end) store_slowly(s, m, i, end);
  }

  __attribute__((noinline)) void store_slowly(const Scratch& s, int m, int i, int end) const {
    const Epilogue& e = f_.e;
    for (; i < end; ++i) {
      const int64_t at = g_.c_offset[m + i];
      if (at < 0) continue;
      const uint8_t* r = e.residual ? e.residual + g_.r_offset[m + i] + column_ : nullptr;
      const float* addend = e.addend ? e.addend + g_.r_offset[m + i] + column_ : nullptr;
      __m512i acc[NB];
      for (int j = 0; j < NB; ++j)
        acc[j] = _mm512_add_epi32(_mm512_loadu_si512(e.bias + columns_.first + 16 * j), _mm512_load_si512(s.acc[i] + 16 * j));
      store_row<NB, path>(f_, acc, columns_, g_.m0 + m + i, r, addend, g_.c, at + column_);
    }
  }

  const GemmArgs& g_;
  const Finish& f_;
  const int column_;
  const Columns columns_;
  const int8_t* weights_;
  bool together_, half_;
  int steps_, bytes_;
  Scratch scratch_[2];
};

bool evenly_spaced(const GemmArgs& g, int m, int rows) {
  for (int i = 2; i < rows; ++i)
    if (g.row_offset[m + i] - g.row_offset[m + i - 1] != g.row_offset[m + 1] - g.row_offset[m]) return false;
  return true;
}

// Copies rows side by side; result [rows][segments * seg_pad], or all segments without gaps where g.dense.
Source gather(const GemmArgs& g, int m, int rows, uint8_t* to) {
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
  return {to, width, true, m};
}

constexpr int64_t kGathered = 1 << 17;  // bytes of rows at a time: a small part of the second cache

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
  const int blocks = (g.n + 15) / 16;
  const int strips = (blocks + 3) / 4, even_share = strips ? (blocks + strips - 1) / strips : 1;
  const int most = blocks > 2 ? (even_share + 1) / 2 * 2 : even_share;  // blocks of a strip, evened out, in pairs
  const Finish f(*g.epilogue);
  // the weights of a strip stay in the first cache while the rows pass
  const auto run = [&](const Source& source, int m, int end) {
    with_path(path_of(*g.epilogue), [&](auto p) {
      for (int block = 0; block < blocks; block += most) {
        switch (blocks - block < most ? blocks - block : most) {
          case 4: Strip<4, p()>(g, f, block).run(source, m, end); break;
          case 3: Strip<3, p()>(g, f, block).run(source, m, end); break;
          case 2: Strip<2, p()>(g, f, block).run(source, m, end); break;
          default: Strip<1, p()>(g, f, block).run(source, m, end); break;
        }
      }
    });
  };
  bool even = !g.dense;
  for (int m = 0; m < g.m && even; m += 16) even = evenly_spaced(g, m, g.m - m < 16 ? g.m - m : 16);
  if (even) {
    run({g.a, 0, false, 0}, 0, g.m);
  } else {
    // many rows at a time: tiles cannot be loaded from stores that are still under way
    static thread_local GatherBuffer buffer;
    const int64_t width = g.dense ? g.seg_pad : int64_t(g.segments) * g.seg_pad;
    const int64_t fit = kGathered / width / 32 * 32;
    const int chunk = fit < 64 ? 64 : fit < g.m ? int(fit) : g.m;
    uint8_t* rows = buffer.of(chunk * width + 64);
    for (int m = 0; m < g.m; m += chunk) {
      const int end = g.m - m < chunk ? g.m : m + chunk;
      run(gather(g, m, end - m, rows), m, end);
    }
  }
  _tile_release();
}

}  // namespace pw::amx

#endif  // __AMX_INT8__
