// Places for values that steps add.
#pragma once

#include "engine/plan.h"

namespace pw {

// A new temporary of the same sizes as `source`, with padding around it; the caller adds the step that copies.
int padded_copy(Plan& plan, int source, const std::vector<int64_t>& begin, const std::vector<int64_t>& end,
                int64_t fill);

}  // namespace pw
