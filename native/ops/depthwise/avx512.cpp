// Depthwise convolution with vpdpbusd: bytes of four input rows are interleaved channel by channel, once for all the
// results that a column takes part in.
#if defined(__AVX512VNNI__)
#include "ops/avx512.h"

namespace pw::avx512 {
namespace {

struct Column {
  __m512i v[4];
};

inline __attribute__((always_inline)) Column interleave(__m512i r0, __m512i r1, __m512i r2, __m512i r3) {
  const __m512i lo01 = _mm512_unpacklo_epi8(r0, r1), hi01 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i lo23 = _mm512_unpacklo_epi8(r2, r3), hi23 = _mm512_unpackhi_epi8(r2, r3);
  return {{_mm512_unpacklo_epi16(lo01, lo23), _mm512_unpackhi_epi16(lo01, lo23), _mm512_unpacklo_epi16(hi01, hi23),
           _mm512_unpackhi_epi16(hi01, hi23)}};
}

template <bool Full>
struct Block {  // 64 channels of one result row
  const uint8_t* rows[4];  // of the quad at hand
  __mmask64 mask;
  PW_INLINE Column at(int64_t offset) const {
    if (Full)
      return interleave(_mm512_loadu_si512(rows[0] + offset), _mm512_loadu_si512(rows[1] + offset),
                        _mm512_loadu_si512(rows[2] + offset), _mm512_loadu_si512(rows[3] + offset));
    return interleave(_mm512_maskz_loadu_epi8(mask, rows[0] + offset), _mm512_maskz_loadu_epi8(mask, rows[1] + offset),
                      _mm512_maskz_loadu_epi8(mask, rows[2] + offset), _mm512_maskz_loadu_epi8(mask, rows[3] + offset));
  }
};

enum Kind { kAny, kCodes, kWholeCodes };  // codes and nothing else are the usual case

template <Kind kind, bool Full>
PW_INLINE void finish(const DepthwiseArgs& d, const Finish& f, const __m512i* raw, int channel, int x, __mmask64 mask) {
  const Epilogue& e = f.e;
  const int64_t at = x * d.y_pixel + channel;
  if (kind != kAny) {
    __m512i q[4];
    for (int v = 0; v < 4; ++v)
      q[v] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(raw[v]), _mm512_loadu_ps(e.multiplier + channel + 16 * v)));
    const __m512i bytes = kind == kWholeCodes ? f.whole_bytes(q[0], q[1], q[2], q[3]) : f.bytes(q[0], q[1], q[2], q[3]);
    if (Full) _mm512_storeu_si512(d.y + at, bytes);  // masked stores are slow
    else _mm512_mask_storeu_epi8(d.y + at, mask, bytes);
    return;
  }
  __m512i acc[4] = {raw[0], raw[1], raw[2], raw[3]};
  if (e.row_zero) {
    const __m512i z = _mm512_set1_epi32(e.row_zero[0]);
    for (int v = 0; v < 4; ++v)
      acc[v] = _mm512_sub_epi32(acc[v], _mm512_mullo_epi32(z, _mm512_loadu_si512(e.colsum + channel + 16 * v)));
  }
  if (e.out != Out::kU8) {  // by way of memory, to put the channels in order
    alignas(64) int32_t out[64];
    for (int v = 0; v < 4; ++v) {
      __m512i bits = acc[v];
      if (e.out == Out::kF32) {
        __m512 t = _mm512_cvtepi32_ps(acc[v]);
        if (e.row_scale) t = _mm512_mul_ps(t, _mm512_set1_ps(e.row_scale[0]));
        t = _mm512_mul_ps(t, _mm512_loadu_ps(e.multiplier + channel + 16 * v));
        if (e.bias_f32) t = _mm512_add_ps(t, _mm512_loadu_ps(e.bias_f32 + channel + 16 * v));
        bits = _mm512_castps_si512(t);
      }
      _mm512_store_si512(out + 16 * v, bits);
    }
    int32_t* y = static_cast<int32_t*>(static_cast<void*>(d.y)) + at;
    for (int c = 0; c < 64; ++c)
      if (mask >> c & 1) y[c] = out[(c % 16 / 4) * 16 + (c / 16) * 4 + c % 4];
    return;
  }
  __m512 t[4];
  for (int v = 0; v < 4; ++v)
    t[v] = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[v]), _mm512_loadu_ps(e.multiplier + channel + 16 * v));
  if (d.residual) {
    const __m512i r = _mm512_maskz_loadu_epi8(mask, d.residual + x * d.r_pixel + channel);
    const __m512i none = _mm512_setzero_si512();
    const Column codes = interleave(r, none, none, none);
    for (int v = 0; v < 4; ++v) t[v] = _mm512_add_ps(t[v], f.residual(codes.v[v]));
  }
  __m512i bytes = f.bytes(f.rounded(t[0]), f.rounded(t[1]), f.rounded(t[2]), f.rounded(t[3]));
  if (e.lut) bytes = Lut(e.lut)(bytes);
  _mm512_mask_storeu_epi8(d.y + at, mask, bytes);
}

// XB neighbouring results at a time; KW and S known, columns not dilated.
template <int KW, int S, int XB, Kind kind, bool Full>
inline void results(const DepthwiseArgs& d, const Finish& f, const int8_t* w, int channel, int x, __mmask64 mask) {
  __m512i acc[XB][4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m512i bias = _mm512_loadu_si512(f.e.bias + channel + 16 * v);
#pragma GCC unroll 4
    for (int o = 0; o < XB; ++o) acc[o][v] = bias;
  }
  const int quads = (d.kernel_h + 3) / 4;
  for (int quad = 0; quad < quads; ++quad) {
    Block<Full> block{{}, mask};
    for (int i = 0; i < 4; ++i) {
      const int ky = 4 * quad + i < d.kernel_h ? 4 * quad + i : d.kernel_h - 1;  // its weights are zero beyond
      block.rows[i] = d.x + ky * d.dilation_h * d.x_row + x * d.result_pixel + channel;
    }
#pragma GCC unroll 16
    for (int column = 0; column < (XB - 1) * S + KW; ++column) {
      const Column c = block.at(column * d.x_pixel);
#pragma GCC unroll 4
      for (int o = 0; o < XB; ++o) {
        const int kx = column - o * S;
        if (kx >= 0 && kx < KW)
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) dot4m(acc[o][v], c.v[v], w + (quad * KW + kx) * 256 + 64 * v);
      }
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < XB; ++o) finish<kind, Full>(d, f, acc[o], channel, x + o, mask);
}

void any(const DepthwiseArgs& d, const Finish& f, const int8_t* w, int channel, int x, __mmask64 mask) {
  __m512i acc[4];
  for (int v = 0; v < 4; ++v) acc[v] = _mm512_loadu_si512(f.e.bias + channel + 16 * v);
  const int quads = (d.kernel_h + 3) / 4;
  for (int quad = 0; quad < quads; ++quad) {
    Block<false> block{{}, mask};
    for (int i = 0; i < 4; ++i) {
      const int ky = 4 * quad + i < d.kernel_h ? 4 * quad + i : d.kernel_h - 1;
      block.rows[i] = d.x + ky * d.dilation_h * d.x_row + x * d.result_pixel + channel;
    }
    for (int kx = 0; kx < d.kernel_w; ++kx) {
      const Column c = block.at(int64_t(kx) * d.dilation_w * d.x_pixel);
      for (int v = 0; v < 4; ++v) dot4m(acc[v], c.v[v], w + (quad * d.kernel_w + kx) * 256 + 64 * v);
    }
  }
  finish<kAny, false>(d, f, acc, channel, x, mask);
}

template <int KW, int S, Kind kind, bool Full>
void row(const DepthwiseArgs& d, const Finish& f, const int8_t* w, int channel, __mmask64 mask) {
  int x = 0;
  for (; x + 4 <= d.width; x += 4) results<KW, S, 4, kind, Full>(d, f, w, channel, x, mask);
  for (; x < d.width; ++x) results<KW, S, 1, kind, Full>(d, f, w, channel, x, mask);
}

template <int KW, int S>
void choose(const DepthwiseArgs& d, const Finish& f, const int8_t* w, int channel, __mmask64 mask) {
  const Epilogue& e = f.e;
  const bool codes = e.out == Out::kU8 && !e.row_zero && !d.residual && !e.lut && e.fits;
  const bool whole = codes && e.zero == 0 && e.lo == 0 && e.hi == 255, full = mask == ~__mmask64(0);
  if (whole && full) row<KW, S, kWholeCodes, true>(d, f, w, channel, mask);
  else if (codes && full) row<KW, S, kCodes, true>(d, f, w, channel, mask);
  else if (codes) row<KW, S, kCodes, false>(d, f, w, channel, mask);
  else row<KW, S, kAny, false>(d, f, w, channel, mask);
}

}  // namespace

void depthwise(const DepthwiseArgs& d) {
  const Finish f(*d.epilogue);
  const int64_t w_block = int64_t((d.kernel_h + 3) / 4) * d.kernel_w * 256;
  for (int channel = 0; channel < d.channels; channel += 64) {
    const int left = d.channels - channel;
    const __mmask64 mask = head64(left);
    const int8_t* w = d.w + channel / 64 * w_block;
    const bool whole = d.dilation_w == 1 && d.x_pixel > 0 && d.result_pixel % d.x_pixel == 0;
    const int64_t shape = whole ? d.kernel_w * 10 + d.result_pixel / d.x_pixel : 0;
    switch (shape) {
      case 31: choose<3, 1>(d, f, w, channel, mask); break;
      case 32: choose<3, 2>(d, f, w, channel, mask); break;
      case 34: choose<3, 4>(d, f, w, channel, mask); break;
      case 51: choose<5, 1>(d, f, w, channel, mask); break;
      case 52: choose<5, 2>(d, f, w, channel, mask); break;
      case 71: choose<7, 1>(d, f, w, channel, mask); break;
      case 72: choose<7, 2>(d, f, w, channel, mask); break;
      default:
        for (int x = 0; x < d.width; ++x) any(d, f, w, channel, x, mask);
    }
  }
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
