// Linear layers whose weights have one scale per group of inputs.
#pragma once

#include "engine/build.h"
#include "engine/steps/product.h"

namespace pw {

// Where such a layer's operands and result lie.
struct GroupedOperands {
  int x = -1, zero = -1, row = -1, y = -1, row_step = 1;
  int64_t k = 0, n = 0, groups = 1;
  std::vector<float> bias;

  // Rows m0 .. m1 - 1, columns n0 .. n1 - 1.
  GroupedRows at(const Run& r, int64_t m0, int64_t m1, int64_t n0, int64_t n1) const;
};
// Those of an op, named to its step with the rest that all such steps say.
GroupedOperands grouped_operands(Builder& b, const OpNode& op);
void describe_grouped(Step& s, const Plan& plan, const OpNode& op, const GroupedOperands& o, int64_t weight_bytes);

// Stored scales, float32 or float16, as they lie.
std::vector<float> scales_f32(const Constant& c);
// Weights of 4 bits that stay packed; false: they must become bytes.
bool build_linear_nibbles(Builder& b, const OpNode& op);

}  // namespace pw
