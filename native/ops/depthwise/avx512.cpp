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
  if (e.lut) bytes = Lut(e.lut, e.permutes)(bytes);
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

// 3 x 3 windows over whole blocks of 64, 32 or 16 channels, codes and nothing else: a column of input is interleaved once
// for all the results it takes part in. Where fewer than 64 channels are left, P stretches of the row go side by side.
template <int P>
struct Stretches {
  int64_t x[P], y[P];  // where each begins
  int length;
  explicit Stretches(const DepthwiseArgs& d) : length((d.width + P - 1) / P) {
    for (int p = 0; p < P; ++p) {  // the last ones overlap where the row cannot be shared out
      const int first = p * length < d.width - length ? p * length : d.width - length;
      x[p] = first * d.result_pixel;
      y[p] = first * d.y_pixel;
    }
  }
  PW_INLINE __m512i load(const uint8_t* from) const {
    if constexpr (P == 1) return _mm512_loadu_si512(from);
    if constexpr (P == 2) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + x[1])), 1);
    }
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    if constexpr (P == 4) {
      v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + x[1])), 1);
      v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + x[2])), 2);
      v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + x[3])), 3);
    }
    return v;
  }
  PW_INLINE void store(uint8_t* to, __m512i v) const {
    if constexpr (P == 1) _mm512_storeu_si512(to, v);
    if constexpr (P == 2) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(v));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + y[1]), _mm512_extracti64x4_epi64(v, 1));
    }
    if constexpr (P == 4) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(v));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + y[1]), _mm512_extracti32x4_epi32(v, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + y[2]), _mm512_extracti32x4_epi32(v, 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + y[3]), _mm512_extracti32x4_epi32(v, 3));
    }
  }
  // What one stretch has in its lanes, for all of them.
  static PW_INLINE __m512i spread(__m512i v) {
    return P == 1 ? v : P == 2 ? _mm512_shuffle_i64x2(v, v, 0x44) : _mm512_shuffle_i64x2(v, v, 0x00);
  }
};

// body(0) .. body(N - 1), as constants.
template <int N, class F>
PW_INLINE void each(F body) {
  if constexpr (N > 0) {
    each<N - 1>(body);
    body(std::integral_constant<int, N - 1>());
  }
}

struct alignas(64) Filter {
  __m512i w[2][12];
};

// c += a . weights number I. The offset is spelled out: gcc would keep the address of every weight in a register.
template <int I>
PW_INLINE void dot4w(__m512i& c, __m512i a, const Filter& f) {
  __asm__("vpdpbusd %c4(%2), %1, %0" : "+v"(c) : "v"(a), "r"(&f), "m"(f), "i"(64 * I));
}

template <int P, bool Whole>
class Window3 {
 public:
  Window3(const DepthwiseArgs& d, const Finish& f, const int8_t* w, int channel)
      : d_(d), f_(f), at_(d), x_(d.x + channel), y_(d.y + channel) {
    for (int i = 0; i < 12; ++i) {
      f3_.w[0][i] = Stretches<P>::spread(_mm512_loadu_si512(w + 64 * i));
      f3_.w[1][i] = _mm512_slli_epi32(f3_.w[0][i], 8);  // the same filter one row further down
    }
    for (int v = 0; v < 4; ++v) {
      bias_[v] = Stretches<P>::spread(_mm512_loadu_si512(f.e.bias + channel + 16 * v));
      multiplier_[v] = _mm512_castsi512_ps(Stretches<P>::spread(_mm512_loadu_si512(f.e.multiplier + channel + 16 * v)));
    }
  }

  void run() const {
    int row = 0;
    if (d_.result_pixel == 2 * d_.x_pixel) {
      for (; row < d_.rows; ++row) halved(row);
      return;
    }
    if (d_.result_row == d_.x_row)  // four input rows hold the windows of two results
      for (; row + 2 <= d_.rows; row += 2) same<2>(row);
    for (; row < d_.rows; ++row) same<1>(row);
  }

 private:
  struct Cursor {  // a column of four input rows
    const uint8_t *a, *b, *c, *d;
    int64_t offset;
  };
  Cursor at(int row, int last) const {
    const uint8_t* first = x_ + row * d_.result_row;
    const int64_t step = d_.x_row;
    return {first, first + step, first + 2 * step, first + last * step, 0};
  }
  PW_INLINE Column next(Cursor& c, int64_t pixel) const {
    const int64_t o = c.offset;
    c.offset += pixel;
    return interleave(at_.load(c.a + o), at_.load(c.b + o), at_.load(c.c + o), at_.load(c.d + o));
  }
  PW_INLINE void finish(const __m512i* acc, uint8_t* y) const {
    __m512i q[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) q[v] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[v]), multiplier_[v]));
    at_.store(y, Whole ? f_.whole_bytes(q[0], q[1], q[2], q[3]) : f_.bytes(q[0], q[1], q[2], q[3]));
  }

  // Windows one column apart, in R result rows: each column begins one result, goes on with another, ends a third.
  template <int R>
  void same(int row) const {
    const int64_t pixel = d_.x_pixel, y_pixel = d_.y_pixel, y_row = d_.y_row;
    Cursor c = at(row, R + 1);
    uint8_t* y = y_ + row * y_row;
    __m512i acc[3][R][4];
    const auto step = [&](auto slot, auto ends) __attribute__((always_inline)) {
      constexpr int kMiddle = (slot() + 2) % 3, kLast = (slot() + 1) % 3;
      const Column in = next(c, pixel);
      each<R>([&](auto r) __attribute__((always_inline)) {
        each<4>([&](auto v) __attribute__((always_inline)) {
          if (ends()) dot4w<12 * r() + 8 + v()>(acc[kLast][r()][v()], in.v[v()], f3_);
        });
        if (ends()) finish(acc[kLast][r()], y + r() * y_row);
        each<4>([&](auto v) __attribute__((always_inline)) {
          acc[slot()][r()][v()] = bias_[v()];
          dot4w<12 * r() + v()>(acc[slot()][r()][v()], in.v[v()], f3_);
          dot4w<12 * r() + 4 + v()>(acc[kMiddle][r()][v()], in.v[v()], f3_);
        });
      });
      if (ends()) y += y_pixel;
    };
    constexpr std::integral_constant<int, 0> k0;
    constexpr std::integral_constant<int, 1> k1;
    constexpr std::integral_constant<int, 2> k2;
    each<R>([&](auto r) { each<4>([&](auto v) { acc[2][r()][v()] = bias_[v()]; }); });
    step(k0, std::false_type());
    step(k1, std::false_type());
    int left = at_.length;
    for (; left >= 3; left -= 3) {
      step(k2, std::true_type());
      step(k0, std::true_type());
      step(k1, std::true_type());
    }
    if (left > 0) step(k2, std::true_type());
    if (left > 1) step(k0, std::true_type());
  }

  // Windows two columns apart: every other column ends one result and begins the next.
  void halved(int row) const {
    const int64_t pixel = d_.x_pixel, y_pixel = d_.y_pixel;
    Cursor c = at(row, 2);
    uint8_t* y = y_ + row * d_.y_row;
    __m512i acc[2][4];
    const auto step = [&](auto slot) __attribute__((always_inline)) {
      constexpr int kNext = slot() ^ 1;
      const Column odd = next(c, pixel);
      each<4>([&](auto v) __attribute__((always_inline)) { dot4w<4 + v()>(acc[slot()][v()], odd.v[v()], f3_); });
      const Column even = next(c, pixel);
      each<4>([&](auto v) __attribute__((always_inline)) {
        dot4w<8 + v()>(acc[slot()][v()], even.v[v()], f3_);
        acc[kNext][v()] = bias_[v()];
        dot4w<v()>(acc[kNext][v()], even.v[v()], f3_);
      });
      finish(acc[slot()], y);
      y += y_pixel;
    };
    const Column first = next(c, pixel);
    each<4>([&](auto v) __attribute__((always_inline)) {
      acc[0][v()] = bias_[v()];
      dot4w<v()>(acc[0][v()], first.v[v()], f3_);
    });
    int left = at_.length;
    for (; left >= 2; left -= 2) {
      step(std::integral_constant<int, 0>());
      step(std::integral_constant<int, 1>());
    }
    if (left > 0) step(std::integral_constant<int, 0>());
  }

  const DepthwiseArgs& d_;
  const Finish& f_;
  const Stretches<P> at_;
  const uint8_t* x_;
  uint8_t* y_;
  Filter f3_;
  __m512i bias_[4];
  __m512 multiplier_[4];
};

// Channels from `channel` on, if they are 64 and more, 32 or 16.
bool window3(const DepthwiseArgs& d, const Finish& f, const int8_t* w, int channel) {
  const Epilogue& e = f.e;
  const bool codes = e.out == Out::kU8 && !e.row_zero && !d.residual && !e.lut && e.fits;
  const bool near = d.result_pixel == d.x_pixel || d.result_pixel == 2 * d.x_pixel;
  if (!codes || !near || d.kernel_h != 3 || d.kernel_w != 3 || d.dilation_h != 1 || d.dilation_w != 1) return false;
  const int left = d.channels - channel, count = left >= 64 ? 64 : left;
  const bool whole = e.zero == 0 && e.lo == 0 && e.hi == 255;
  const auto go = [&](auto p) {
    if (whole) Window3<p(), true>(d, f, w, channel).run();
    else Window3<p(), false>(d, f, w, channel).run();
  };
  if (count == 64) go(std::integral_constant<int, 1>());
  else if (count == 32 && d.width > 1) go(std::integral_constant<int, 2>());
  else if (count == 16 && d.width > 3) go(std::integral_constant<int, 4>());
  else return false;
  return true;
}

void result_row(const DepthwiseArgs& d, const Finish& f, const int8_t* w, int channel) {
  const __mmask64 mask = head64(d.channels - channel);
  const bool whole = d.dilation_w == 1 && d.x_pixel > 0 && d.result_pixel % d.x_pixel == 0;
  const int64_t shape = whole ? d.kernel_w * 10 + d.result_pixel / d.x_pixel : 0;
  switch (shape) {
    case 31: return choose<3, 1>(d, f, w, channel, mask);
    case 32: return choose<3, 2>(d, f, w, channel, mask);
    case 34: return choose<3, 4>(d, f, w, channel, mask);
    case 51: return choose<5, 1>(d, f, w, channel, mask);
    case 52: return choose<5, 2>(d, f, w, channel, mask);
    case 71: return choose<7, 1>(d, f, w, channel, mask);
    case 72: return choose<7, 2>(d, f, w, channel, mask);
    default:
      for (int x = 0; x < d.width; ++x) any(d, f, w, channel, x, mask);
  }
}

}  // namespace

void depthwise(const DepthwiseArgs& d) {
  const Finish f(*d.epilogue);
  const int64_t w_block = int64_t((d.kernel_h + 3) / 4) * d.kernel_w * 256;
  for (int channel = 0; channel < d.channels; channel += 64) {
    const int8_t* w = d.w + channel / 64 * w_block;
    if (window3(d, f, w, channel)) continue;
    for (int i = 0; i < d.rows; ++i) result_row(d.row(i), f, w, channel);
  }
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
