#if defined(__AVX512F__)
#include <cstdint>
#include <cstring>

#include "core/kernels.h"

namespace pw::avx512 {

#include "ops/fake/fake.inl"

}  // namespace pw::avx512
#endif
