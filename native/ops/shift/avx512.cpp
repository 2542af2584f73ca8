#if defined(__AVX512F__)
#include <cstdint>

#include "core/kernels.h"

namespace pw::avx512 {

#include "ops/shift/shift.inl"

}  // namespace pw::avx512
#endif
