#if defined(__AVX2__)
#include <cstdint>
#include <cstring>

#include "core/kernels.h"

namespace pw::avx2 {

#include "ops/fake/fake.inl"

}  // namespace pw::avx2
#endif
