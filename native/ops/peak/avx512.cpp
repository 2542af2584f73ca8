// vpdpbusd and float multiply-adds on 512 bits; bits that differ, eight words through carry-save adders.
#if defined(__AVX512VNNI__)
#include <immintrin.h>

#include <cstdint>

#include "core/kernels.h"
#include "ops/peak/peak.h"

namespace pw::avx512 {

#define PW_CLEAR(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
#define PW_DOT(n) "vpdpbusd %1, %2, %%zmm" #n "\n\t"
#define PW_FMA(n) "vfmadd231ps %1, %2, %%zmm" #n "\n\t"

int64_t peak_i8(int64_t repeats) {
  const __m512i x = _mm512_set1_epi8(91), w = _mm512_set1_epi8(-37);
  PW_PEAK_LOOP(PW_EACH_16(PW_CLEAR), PW_EACH_16(PW_DOT), repeats, "v", x, w, PW_CLOBBERS_16);
  return repeats * 16 * 64;
}

int64_t peak_f32(int64_t repeats) {
  const __m512 x = _mm512_set1_ps(0.75f), w = _mm512_set1_ps(0.5f);
  PW_PEAK_LOOP(PW_EACH_16(PW_CLEAR), PW_EACH_16(PW_FMA), repeats, "v", x, w, PW_CLOBBERS_16);
  return repeats * 16 * 16;
}

#define PW_Z(n) "%%zmm" #n
#define PW_DIFFER(n) "vpxord %1, %2, " PW_Z(n) "\n\t"
// The upper bits of a sum of three words in the third, the lower ones in the first.
#define PW_CARRY(a, b, c)                                                                                          \
  "vmovdqa64 " PW_Z(c) ", %%zmm15\n\tvpternlogd $0xe8, " PW_Z(a) ", " PW_Z(b) ", %%zmm15\n\t"                         \
  "vpternlogd $0x96, " PW_Z(c) ", " PW_Z(b) ", " PW_Z(a) "\n\tvmovdqa64 %%zmm15, " PW_Z(c) "\n\t"
// Eight words into ones, twos, fours and a count of eights, of bytes.
#define PW_EIGHT(ones, twos, fours, eights)                                                                        \
  PW_DIFFER(8) PW_DIFFER(9) PW_CARRY(ones, 8, 9)                                                                   \
  PW_DIFFER(8) PW_DIFFER(10) PW_CARRY(ones, 8, 10) PW_CARRY(twos, 9, 10)                                           \
  PW_DIFFER(8) PW_DIFFER(11) PW_CARRY(ones, 8, 11)                                                                 \
  PW_DIFFER(8) PW_DIFFER(12) PW_CARRY(ones, 8, 12) PW_CARRY(twos, 11, 12) PW_CARRY(fours, 10, 12)                   \
  "vpandd %2, %%zmm12, %%zmm13\n\tvpsrlw $4, %%zmm12, %%zmm12\n\tvpandd %2, %%zmm12, %%zmm12\n\t"                     \
  "vpshufb %%zmm13, %1, %%zmm13\n\tvpshufb %%zmm12, %1, %%zmm12\n\t"                                               \
  "vpaddb %%zmm12, %%zmm13, %%zmm13\n\tvpaddb %%zmm13, " PW_Z(eights) ", " PW_Z(eights) "\n\t"

int64_t peak_bits(int64_t repeats) {
  const __m512i x = _mm512_set1_epi8(3), w = _mm512_set1_epi8(15);  // for the table and the mask of half bytes too
  PW_PEAK_LOOP(PW_EACH_8(PW_CLEAR), PW_EIGHT(0, 1, 2, 3) PW_EIGHT(4, 5, 6, 7), repeats, "v", x, w, PW_CLOBBERS_16);
  return repeats * 2 * 8 * 512;
}

void read(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  for (int64_t at = 0; at + 512 <= bytes; at += 512)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i v = _mm512_loadu_si512(p + at + 64 * i);
      __asm__ volatile("" : : "v"(v));
    }
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
