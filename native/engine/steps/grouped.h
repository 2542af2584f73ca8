// Linear layers whose weights have one scale per group of inputs.
#pragma once

#include "engine/build.h"
#include "engine/steps/product.h"

namespace pw {

// Stored scales, float32 or float16, as they lie.
std::vector<float> scales_f32(const Constant& c);
// The activations of such a layer, as dense rows.
int grouped_rows(Builder& b, const OpNode& op);
// Weights of 4 bits that stay packed; false: they must become bytes.
bool build_linear_nibbles(Builder& b, const OpNode& op);

}  // namespace pw
