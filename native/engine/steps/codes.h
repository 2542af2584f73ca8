// Float products of few rows on stored codes.
#pragma once

#include "engine/build.h"

namespace pw {

constexpr int64_t kFewRowsOfCodes = 8;

// A step for a linear layer of float rows on codes, levels or numbers of 16 bits; false where another is better.
bool build_codes(Builder& b, int op);

// The op that decodes the weight of a float product; null where it is stored as floats.
inline const OpNode* decoder_of(const Plan& plan, const OpNode& op) {
  if (op.kind == "linear_w") return &op;
  const int producer = plan.values[op.in[1]].producer;
  return producer < 0 ? nullptr : &plan.ops[producer];
}

// Scales or zero points of a row; one row may stand for all.
inline const float* row_of(const Constant* c, int64_t row) {
  return static_cast<const float*>(c->data) + (c->dims[0] == 1 ? 0 : row) * c->dims[1];
}

}  // namespace pw
