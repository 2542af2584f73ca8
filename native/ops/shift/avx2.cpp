#if defined(__AVX2__)
#include <cstdint>

#include "core/kernels.h"

namespace pw::avx2 {

#include "ops/shift/shift.inl"

}  // namespace pw::avx2
#endif
