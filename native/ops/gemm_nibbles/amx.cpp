// Packed weights of 4 bits: many rows on tiles of 16 by 16, whose float sums stay in registers. Zero points enter the
// tiles as further inputs: activations get the row's zero point, weights what makes minus the group's sum. The integer
// sums of a group are then scaled and added while the tiles of the next two are multiplied.
#if defined(__AMX_INT8__)
#include <cstring>

#include "ops/amx.h"
#include "ops/gemm_nibbles/codes512.h"

namespace pw::avx512 {
void gemm_nibbles(const GemmNibblesArgs&);
}

namespace pw::amx {
namespace {

constexpr int kRows = 16, kSums = 8;
constexpr int kLate = 3;              // turns from a group's product to its sum
constexpr int kChunkBytes = 512 << 10;  // of a panel's weights that stay in the second cache while rows pass

// How a group is cut: whole tiles of 64 inputs, and one of what is left and the zero point's.
struct Cut {
  int whole, tail;
  int64_t a_group, b_group;  // bytes of 16 rows, and of 16 columns
  explicit Cut(int len) {
    const int bytes = len + nibbles_extra(len);
    whole = len / 64;
    tail = bytes - 64 * whole;
    a_group = int64_t(bytes) * kRows;
    b_group = int64_t(bytes) * 16;
  }
};

// Tiles 0 .. 3: sums; 4, 5: activations; 6, 7: weights. Where there are whole tiles, 4 and 6 are theirs.
void configure(const Cut& cut) {
  TileConfig c;
  const int first = cut.whole ? 64 : cut.tail;
  for (int i = 0; i < 6; ++i) {
    c.rows[i] = kRows;
    c.colsb[i] = uint16_t(i < 4 ? 64 : i == 4 ? first : cut.tail);
  }
  c.rows[6] = uint8_t(first / 4);
  c.rows[7] = uint8_t(cut.tail / 4);
  c.colsb[6] = c.colsb[7] = 64;
  _tile_loadconfig(&c);
}

// What a turn does: the sums of the group before go to memory, this one's are multiplied, those of three groups ago are
// scaled and added to t; between tile instructions, which then need not wait for each other.
struct Turn {
  const uint8_t* a;
  const int8_t* b;
  int32_t* to;
  const int32_t* sums;
  __m512 scale;
};

PW_INLINE void add_rows(const Turn& u, int first, __m512* t) {
#pragma GCC unroll 4
  for (int i = first; i < first + 4; ++i)
    t[i] = _mm512_add_ps(t[i], _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(u.sums + 16 * i)), u.scale));
}

// Tile numbers are part of the instructions.
#define PW_TURN(acc, last, x, w)                                \
  case acc:                                                     \
    if (STORES) _tile_stored(last, u.to, 64);                   \
    if (ADDS) add_rows(u, 0, t);                                \
    if (MULTIPLIES) {                                           \
      _tile_zero(acc);                                          \
      if (WHOLE)                                                \
        for (int s = 0; s < cut.whole; ++s) {                   \
          _tile_loadd(4, u.a + s * 1024, 64);                   \
          _tile_loadd(6, u.b + s * 1024, 64);                   \
          _tile_dpbusd(acc, 4, 6);                              \
        }                                                       \
      _tile_loadd(x, u.a + cut.whole * 1024, cut.tail);         \
    }                                                           \
    if (ADDS) add_rows(u, 4, t);                                \
    if (MULTIPLIES) _tile_loadd(w, u.b + cut.whole * 1024, 64); \
    if (ADDS) add_rows(u, 8, t);                                \
    if (MULTIPLIES) _tile_dpbusd(acc, x, w);                    \
    if (ADDS) add_rows(u, 12, t);                               \
    break

template <bool WHOLE, bool STORES, bool MULTIPLIES, bool ADDS>
PW_INLINE void turn(const Cut& cut, int number, const Turn& u, __m512* t) {
  if constexpr (WHOLE) {
    switch (number) {
      PW_TURN(0, 3, 5, 7);
      PW_TURN(1, 0, 5, 7);
      PW_TURN(2, 1, 5, 7);
      PW_TURN(3, 2, 5, 7);
    }
  } else {
    switch (number) {
      PW_TURN(0, 3, 4, 6);
      PW_TURN(1, 0, 5, 7);
      PW_TURN(2, 1, 4, 6);
      PW_TURN(3, 2, 5, 7);
    }
  }
}
#undef PW_TURN

// 16 rows times 16 columns, `groups` of them; sums so far wait in `kept`, a row `step` floats on.
template <bool WHOLE>
void unit(const Cut& cut, const uint8_t* a, const int8_t* b, const float* scale, int groups, bool first, float* kept,
          int64_t step) {
  alignas(64) int32_t sums[kSums][kRows * 16 + 16];
  __m512 t[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) t[i] = first ? _mm512_setzero_ps() : _mm512_load_ps(kept + i * step);
  const auto at = [&](int g) {
    return Turn{a + g * cut.a_group, b + g * cut.b_group, sums[(g + kSums - 1) % kSums], sums[(g + kSums - kLate) % kSums],
                g >= kLate ? _mm512_load_ps(scale + 16 * (g - kLate)) : _mm512_setzero_ps()};
  };
  int g = 0;
  if (groups >= kLate) {
    turn<WHOLE, false, true, false>(cut, 0, at(0), t);
    for (g = 1; g < kLate; ++g) turn<WHOLE, true, true, false>(cut, g, at(g), t);
    for (; g < groups; ++g) turn<WHOLE, true, true, true>(cut, g % 4, at(g), t);
    turn<WHOLE, true, false, true>(cut, g % 4, at(g), t);
    for (++g; g < groups + kLate; ++g) turn<WHOLE, false, false, true>(cut, g % 4, at(g), t);
  } else {  // one after the other
    for (; g < groups; ++g) {
      turn<WHOLE, false, true, false>(cut, g % 4, at(g), t);
      turn<WHOLE, true, false, false>(cut, (g + 1) % 4, at(g + 1), t);
      turn<WHOLE, false, false, true>(cut, 0, at(g + kLate), t);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) _mm512_store_ps(kept + i * step, t[i]);
}

// Activations in tiles: 16 rows and a group after the other, each row's zero point behind its inputs.
void pack_rows(const GemmNibblesArgs& g, const Cut& cut, uint8_t* to) {
  const int rest = g.group_len - 64 * cut.whole;
  const __mmask64 inputs = head64(rest), all = head64(cut.tail);
  for (int m = 0; m < g.m; m += kRows) {
    if (m + kRows > g.m) std::memset(to, 0, size_t(g.groups * cut.a_group));
    const int rows = g.m - m < kRows ? g.m - m : kRows;
    for (int i = 0; i < rows; ++i) {
      const uint8_t* from = g.a + (m + i) * g.lda;
      const __m512i zero = _mm512_set1_epi8(char(g.row_zero[int64_t(m + i) * g.row_step]));
      uint8_t* tile = to;
      for (int group = 0; group < g.groups; ++group, from += rest) {
        for (int s = 0; s < cut.whole; ++s, tile += 1024, from += 64)
          _mm512_storeu_si512(tile + i * 64, _mm512_loadu_si512(from));
        _mm512_mask_storeu_epi8(tile + i * cut.tail, all, _mm512_mask_loadu_epi8(zero, inputs, from));
        tile += kRows * cut.tail;
      }
    }
    to += g.groups * cut.a_group;
  }
}

// A panel's codes as bytes, [4 blocks][groups][quads][16][4], and scales [4][groups][16].
template <int SCALE>
void widen(const GemmNibblesArgs& g, const Cut& cut, const uint8_t* b, int8_t* codes, float* scales) {
  const __m512i ones = _mm512_set1_epi8(1), eight = _mm512_set1_epi8(8);
  const __m512i most = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-127), byte = _mm512_set1_epi32(255);
  const int64_t block = g.groups * cut.b_group;
  const int extra = nibbles_extra(g.group_len);
  for (int group = 0; group < g.groups; ++group) {
    __m512i sum[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = _mm512_setzero_si512();
    for (int k = 0; k < g.group_len; k += 4, b += 128, codes += 64) {
      __m512i v[4];
      fields(b, v);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        dot4(sum[j], v[j], ones);
        _mm512_storeu_si512(codes + j * block, _mm512_sub_epi8(v[j], eight));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i left = _mm512_sub_epi32(_mm512_set1_epi32(8 * g.group_len), sum[j]);
      for (int i = 0; i < extra; i += 4) {  // numbers of a byte that add up to it
        __m512i quad = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int e = 0; e < 4; ++e) {
          const __m512i part = _mm512_max_epi32(_mm512_min_epi32(left, most), least);
          left = _mm512_sub_epi32(left, part);
          quad = _mm512_or_si512(quad, _mm512_slli_epi32(_mm512_and_si512(part, byte), 8 * e));
        }
        _mm512_storeu_si512(codes + j * block + i * 16, quad);
      }
      _mm512_store_ps(scales + (int64_t(j) * g.groups + group) * 16, scale_at<SCALE>(b, j));
    }
    codes += extra * 16;
    b += 64 * SCALE;
  }
}

// A panel: groups that fit the cache at a time, row after row.
template <bool WHOLE>
void panel(const GemmNibblesArgs& g, const Cut& cut, const uint8_t* a, const int8_t* b, const float* scale, int column,
           float* kept) {
  const int left = g.n - column, blocks = left < 64 ? (left + 15) / 16 : 4;
  const int fitting = int(kChunkBytes / (cut.b_group * 4)), chunk = fitting > kLate ? fitting : kLate;
  for (int first = 0; first < g.groups; first += chunk) {
    const int groups = g.groups - first < chunk ? g.groups - first : chunk;
    for (int m = 0; m < g.m; m += kRows)
      for (int j = 0; j < blocks; ++j) {
        const int64_t at = int64_t(j) * g.groups + first;
        unit<WHOLE>(cut, a + (int64_t(m / kRows) * g.groups + first) * cut.a_group, b + at * cut.b_group, scale + at * 16,
                    groups, first == 0, kept + m * 64 + 16 * j, 64);
      }
  }
  const Columns columns(column, left, 4);
  for (int m = 0; m < g.m; ++m) {
    const __m512 row = _mm512_set1_ps(g.row_scale[int64_t(m) * g.row_step]);
    for (int j = 0; j < blocks; ++j) {
      __m512 y = _mm512_mul_ps(_mm512_load_ps(kept + m * 64 + 16 * j), row);
      if (g.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(g.bias + column + 16 * j));
      _mm512_mask_storeu_ps(g.c + m * g.ldc + column + 16 * j, columns.part[j], y);
    }
  }
}

}  // namespace

void gemm_nibbles(const GemmNibblesArgs& g) {
  const Cut cut(g.group_len);
  if (g.m <= kFewNibbleRows || cut.tail > 64) return avx512::gemm_nibbles(g);
  char* at = static_cast<char*>(g.scratch);
  const auto take = [&](int64_t bytes) {
    char* p = at;
    at += (bytes + 63) / 64 * 64;
    return p;
  };
  const int64_t blocks = (g.m + kRows - 1) / kRows;
  float* scales = reinterpret_cast<float*>(take(g.groups * 64 * 4));
  float* kept = reinterpret_cast<float*>(take(blocks * kRows * 64 * 4));
  uint8_t* rows = reinterpret_cast<uint8_t*>(take(blocks * g.groups * cut.a_group));
  int8_t* codes = reinterpret_cast<int8_t*>(take(4 * g.groups * cut.b_group));
  pack_rows(g, cut, rows);
  configure(cut);
  for (int column = 0; column < g.n; column += 64) {
    const uint8_t* from = g.b + column / 64 * g.b_panel;
    g.scale_bytes == 2 ? widen<2>(g, cut, from, codes, scales) : widen<4>(g, cut, from, codes, scales);
    (cut.whole ? panel<true> : panel<false>)(g, cut, rows, codes, scales, column, kept);
  }
  _tile_release();
}

}  // namespace pw::amx

#endif  // __AMX_INT8__
