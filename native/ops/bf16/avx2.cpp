// Floats to bf16 and back, eight at a time.
#if defined(__AVX2__)
#include "ops/real256.h"

namespace pw::avx2 {

void to_bf16(const ConvertArgs& a) {
  for (int64_t i = 0; i < a.n; i += 8) {
    const int count = int(a.n - i < 8 ? a.n - i : 8);
    store_values(a.y, i, true, count, load_real(a.x, i, false, count));
  }
}

void widen_bf16(const ConvertArgs& a) {
  for (int64_t i = 0; i < a.n; i += 8) {
    const int count = int(a.n - i < 8 ? a.n - i : 8);
    store_values(a.y, i, false, count, load_real(a.x, i, true, count));
  }
}

}  // namespace pw::avx2

#endif  // __AVX2__
