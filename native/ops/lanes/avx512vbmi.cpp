// What permutes of bytes make fast: tables of bytes, and planes side by side.
#if defined(__AVX512VBMI__)
#include <cstring>

#include "ops/avx512.h"

namespace pw::avx512vbmi {

void table(const TableArgs& a) { look_up(a, true); }

namespace {

// Byte k of three planes side by side, planes 0 and 1 from the index's lower 7 bits, for vector `part` of the result.
struct ThreePlanes {
  __m512i two, third;
  __mmask64 from_third = 0;
  explicit ThreePlanes(int part) {
    alignas(64) uint8_t i[64], j[64];
    for (int k = 0; k < 64; ++k) {
      const int at = 64 * part + k;
      i[k] = uint8_t(at / 3 + (at % 3 == 1 ? 64 : 0));
      j[k] = uint8_t(at / 3);
      if (at % 3 == 2) from_third |= __mmask64(1) << k;
    }
    two = _mm512_load_si512(i);
    third = _mm512_load_si512(j);
  }
};

}  // namespace

void interleave(const InterleaveArgs& a) {
  const uint8_t *x0 = a.x[0], *x1 = a.x[1], *x2 = a.x[2], *x3 = a.x[3];
  uint8_t* y = a.y;
  int64_t i = 0;
  if (a.planes == 1) {
    std::memcpy(y, x0, size_t(a.n));
    return;
  }
  if (a.planes == 3) {
    static const ThreePlanes parts[3] = {ThreePlanes(0), ThreePlanes(1), ThreePlanes(2)};
    const auto pixels = [&](__mmask64 in, int64_t bytes) {
      const __m512i v0 = _mm512_maskz_loadu_epi8(in, x0 + i), v1 = _mm512_maskz_loadu_epi8(in, x1 + i);
      const __m512i v2 = _mm512_maskz_loadu_epi8(in, x2 + i);
      for (int p = 0; p < 3 && 64 * p < bytes; ++p) {
        const __m512i two = _mm512_permutex2var_epi8(v0, parts[p].two, v1);
        const __m512i v = _mm512_mask_permutexvar_epi8(two, parts[p].from_third, parts[p].third, v2);
        if (64 * p + 64 <= bytes) _mm512_storeu_si512(y + 3 * i + 64 * p, v);
        else _mm512_mask_storeu_epi8(y + 3 * i + 64 * p, head64(int(bytes - 64 * p)), v);
      }
    };
    for (; i + 64 <= a.n; i += 64) pixels(~__mmask64(0), 192);
    if (i < a.n) pixels(head64(int(a.n - i)), 3 * (a.n - i));
    return;
  }
  for (; i < a.n; ++i) {
    uint8_t* to = y + i * a.planes;
    to[0] = x0[i];
    to[1] = x1[i];
    if (a.planes > 3) to[2] = x2[i], to[3] = x3[i];
  }
}

}  // namespace pw::avx512vbmi

#endif  // __AVX512VBMI__
