// The instructions of the products without VNNI: 16-bit multiply-adds and their sums; float multiply-adds; bits that differ,
// counted by table.
#if defined(__AVX2__)
#include <immintrin.h>

#include <cstdint>

#include "core/kernels.h"
#include "ops/peak/peak.h"

namespace pw::avx2 {

#define PW_CLEAR(n) "vpxor %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n\t"
#define PW_DOT(n) "vpmaddwd %1, %2, %%ymm12\n\tvpaddd %%ymm12, %%ymm" #n ", %%ymm" #n "\n\t"
#define PW_FMA(n) "vfmadd231ps %1, %2, %%ymm" #n "\n\t"

int64_t peak_i8(int64_t repeats) {
  const __m256i x = _mm256_set1_epi16(91), w = _mm256_set1_epi16(-37);
  PW_PEAK_LOOP(PW_EACH_12(PW_CLEAR), PW_EACH_12(PW_DOT), repeats, "x", x, w, PW_CLOBBERS_12, "xmm12");
  return repeats * 12 * 16;
}

int64_t peak_f32(int64_t repeats) {
  const __m256 x = _mm256_set1_ps(0.75f), w = _mm256_set1_ps(0.5f);
  PW_PEAK_LOOP(PW_EACH_12(PW_CLEAR), PW_EACH_12(PW_FMA), repeats, "x", x, w, PW_CLOBBERS_12);
  return repeats * 12 * 8;
}

// The operands stand for the table and the mask of half bytes too.
#define PW_COUNT(n)                                                                                                 \
  "vpxor %1, %2, %%ymm12\n\tvpand %2, %%ymm12, %%ymm13\n\tvpsrld $4, %%ymm12, %%ymm12\n\t"                            \
  "vpand %2, %%ymm12, %%ymm12\n\tvpshufb %%ymm13, %1, %%ymm13\n\tvpshufb %%ymm12, %1, %%ymm12\n\t"                   \
  "vpaddb %%ymm12, %%ymm13, %%ymm13\n\tvpaddb %%ymm13, %%ymm" #n ", %%ymm" #n "\n\t"

int64_t peak_bits(int64_t repeats) {
  const __m256i x = _mm256_set1_epi8(3), w = _mm256_set1_epi8(15);
  PW_PEAK_LOOP(PW_EACH_12(PW_CLEAR), PW_EACH_12(PW_COUNT), repeats, "x", x, w, PW_CLOBBERS_12, "xmm12", "xmm13");
  return repeats * 12 * 256;
}

void read(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  for (int64_t at = 0; at + 256 <= bytes; at += 256)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + at + 32 * i));
      __asm__ volatile("" : : "x"(v));
    }
}

}  // namespace pw::avx2

#endif  // __AVX2__
