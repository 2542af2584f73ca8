// One filter per channel of bf16 numbers: 32 channels, even and odd ones apart, of up to 8 neighbouring results in
// registers. Windows of three columns widen each number of the input once.
#if defined(__AVX512VNNI__)
#include <utility>

#include "ops/in_pieces.h"
#include "ops/real512.h"

namespace pw::avx512 {
namespace {

struct Pair {  // even and odd channels
  __m512 even, odd;
};

template <bool Whole>
PW_REAL_INLINE Pair numbers(const uint16_t* p, __mmask32 mask) {
  const __m512i v = Whole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(mask, p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))))};
}

// Rounded to bf16 in the upper half of each lane.
PW_REAL_INLINE __m512i upper(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i y = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_or_epi32(y, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
}

// Results that are floats, or to which something is added.
__attribute__((noinline)) void store_each(const DepthwiseF32Args& d, int first, int channel, int count, const Pair* acc) {
  const RealTail& t = d.tail;
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const int left = d.channels - channel;
  for (int i = 0; i < count; ++i) {
    const int64_t at = (first + i) * d.y_pixel + channel;
    store_real(t, _mm512_permutex2var_ps(acc[i].even, low, acc[i].odd), first + i, channel, left, d.y, at);
    if (left > 16)
      store_real(t, _mm512_permutex2var_ps(acc[i].even, high, acc[i].odd), first + i, channel + 16, left - 16, d.y,
                 at + 16);
  }
}

template <int P, bool Whole>
PW_REAL_INLINE void store_pairs(const DepthwiseF32Args& d, int first, int channel, __mmask32 mask, Pair (&acc)[P]) {
  const RealTail& t = d.tail;
  if (!t.out_bf16 || t.addend) {
    store_each(d, first, channel, P, acc);
    return;
  }
  Pair bias = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (t.bias) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 a = _mm512_loadu_ps(t.bias + channel), b = _mm512_loadu_ps(t.bias + channel + 16);
    bias.even = _mm512_permutex2var_ps(a, evens, b);
    bias.odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), b);
  }
  const __m512 lo = _mm512_set1_ps(t.lo), hi = _mm512_set1_ps(t.hi);
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) {
    __m512 even = _mm512_add_ps(acc[i].even, bias.even), odd = _mm512_add_ps(acc[i].odd, bias.odd);
    if (t.clip) {
      even = _mm512_min_ps(_mm512_max_ps(even, lo), hi);
      odd = _mm512_min_ps(_mm512_max_ps(odd, lo), hi);
    }
    const __m512i y = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(upper(even), 16), upper(odd));
    uint16_t* to = static_cast<uint16_t*>(d.y) + (first + i) * d.y_pixel + channel;
    if (Whole) _mm512_storeu_si512(to, y);
    else _mm512_mask_storeu_epi16(to, mask, y);
  }
}

// S: columns of input from one result to the next where windows have three columns side by side; 0: any window.
template <int S, int P, bool Whole>
void pixels(const DepthwiseF32Args& d, int first, int channel) {
  const int left = d.channels - channel;
  const __mmask32 mask = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
  const float* w = d.w + int64_t(channel) * d.kernel_h * d.kernel_w;
  Pair acc[P];
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) acc[i] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const uint16_t* x = static_cast<const uint16_t*>(d.x) + first * d.x_pixel + channel;
  for (int ky = 0; ky < d.kernel_h; ++ky, x += d.tap_row) {
    if constexpr (S > 0) {
      Pair taps[3];
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k, w += 32) taps[k] = {_mm512_loadu_ps(w), _mm512_loadu_ps(w + 16)};
#pragma GCC unroll 17
      for (int c = 0; c < (P - 1) * S + 3; ++c) {
        const Pair v = numbers<Whole>(x + c * d.tap_pixel, mask);
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i)
          if (c - i * S >= 0 && c - i * S < 3) {
            acc[i].even = _mm512_fmadd_ps(v.even, taps[c - i * S].even, acc[i].even);
            acc[i].odd = _mm512_fmadd_ps(v.odd, taps[c - i * S].odd, acc[i].odd);
          }
      }
    } else {
      for (int kx = 0; kx < d.kernel_w; ++kx, w += 32) {
        const Pair tap = {_mm512_loadu_ps(w), _mm512_loadu_ps(w + 16)};
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i) {
          const Pair v = numbers<Whole>(x + kx * d.tap_pixel + i * d.x_pixel, mask);
          acc[i].even = _mm512_fmadd_ps(v.even, tap.even, acc[i].even);
          acc[i].odd = _mm512_fmadd_ps(v.odd, tap.odd, acc[i].odd);
        }
      }
    }
  }
  store_pairs<P, Whole>(d, first, channel, mask, acc);
}

template <int S, int... I>
void row(const DepthwiseF32Args& d, std::integer_sequence<int, I...>) {
  static constexpr Pixels whole[] = {pixels<S, I + 1, true>...}, part[] = {pixels<S, I + 1, false>...};
  in_pieces<32>(d, whole, part);
}

}  // namespace

void depthwise_bf16(const DepthwiseF32Args& d) {
  constexpr auto eight = std::make_integer_sequence<int, 8>();
  if (d.kernel_w == 3 && d.x_pixel == d.tap_pixel) row<1>(d, eight);
  else if (d.kernel_w == 3 && d.x_pixel == 2 * d.tap_pixel) row<2>(d, eight);
  else row<0>(d, eight);
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
