#include <cstdint>
#include <cstring>

#include "core/kernels.h"

namespace pw::scalar {

#include "ops/fake/fake.inl"

}  // namespace pw::scalar
