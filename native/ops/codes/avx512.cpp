#if defined(__AVX512F__)
#include <cstring>

#include "core/kernels.h"
#include "ops/lanes/v16_avx512.h"

namespace pw::avx512 {

#include "ops/codes/codes.inl"

}  // namespace pw::avx512
#endif
