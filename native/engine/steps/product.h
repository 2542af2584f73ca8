// Packing of integer weights, shared by the products.
#pragma once

#include "engine/build.h"

namespace pw {

// Columns of a product in the form of GemmArgs: column n, segment s, k at w[n * n_stride + segments[s] + k * k_stride].
Packed pack_weights(const int8_t* w, int64_t n, const std::vector<int64_t>& segments, int64_t seg_len, int64_t k_stride,
                    int64_t n_stride, int k_align);

// A copy of a value with padding whose code is in a value of one number.
int padded_with_code(Builder& b, int value, const std::vector<int64_t>& begin, const std::vector<int64_t>& end,
                     int code);

}  // namespace pw
