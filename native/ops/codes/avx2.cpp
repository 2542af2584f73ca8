#if defined(__AVX2__)
#include <cstring>

#include "core/kernels.h"
#include "ops/lanes/v16_avx2.h"

namespace pw::avx2 {

#include "ops/codes/codes.inl"

}  // namespace pw::avx2
#endif
