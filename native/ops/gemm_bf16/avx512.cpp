// Products of bf16 numbers, widened.
#if defined(__AVX512VNNI__)
#include "ops/gemm_bf16/tile512.h"

namespace pw::avx512 {
namespace {

struct Widened {
  static PW_REAL_INLINE __m512 low(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static PW_REAL_INLINE __m512 high(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
  }
  template <int NB>
  static PW_REAL_INLINE void row(__m512 (&acc)[NB], __m512i x, const __m512i (&w)[NB]) {
    const __m512 even = low(x), odd = high(x);
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) acc[j] = _mm512_fmadd_ps(even, low(w[j]), acc[j]);
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) acc[j] = _mm512_fmadd_ps(odd, high(w[j]), acc[j]);
  }
};

}  // namespace

void gemm_bf16(const GemmBf16Args& g) { multiply_bf16<Widened, 10>(g); }

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
