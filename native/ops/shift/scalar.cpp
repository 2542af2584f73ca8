#include <cstdint>

#include "core/kernels.h"

namespace pw::scalar {

#include "ops/shift/shift.inl"

}  // namespace pw::scalar
