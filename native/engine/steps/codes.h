// Float products of few rows on stored codes.
#pragma once

#include "engine/build.h"

namespace pw {

constexpr int64_t kFewRowsOfCodes = 8;

// A step for a linear layer of float rows on codes, levels or numbers of 16 bits; false where another is better.
bool build_codes(Builder& b, int op);

}  // namespace pw
