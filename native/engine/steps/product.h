// Packing of integer weights, shared by the products.
#pragma once

#include "engine/steps/epilogue.h"

namespace pw {

// Columns of a product in the form of GemmArgs: column n, segment s, k is element segments[s] + k of the n_stride codes
// from w + n * n_stride. With `taps`, a column is [channels, taps], and its elements are counted in the order [taps,
// channels].
template <class T>  // int8_t or int16_t
Packed pack_weights(const T* w, int64_t n, const std::vector<int64_t>& segments, int64_t seg_len, int64_t n_stride,
                    int k_align, int64_t taps = 1);
// The rows that a linear layer reads: dense ones.
int linear_rows(Builder& b, const OpNode& op);
// The same weights in two parts (`Rest`), for products that add neighbours in 16 bits.
Packed split(Packed p, int64_t n, int64_t segments);

// The accumulator's bias with the constant zero point taken in: b - zero * sum(w); and whether clamping may wait.
void fold_zero(const Plan& plan, Tail& t, const OpNode& op, const std::vector<int32_t>& colsum, int64_t columns,
               int64_t depth);

// Codes that an `unpack` op holds, one byte each, by its table.
std::vector<int8_t> unpacked_codes(const Plan& plan, const OpNode& unpack);
// A linear layer of few rows on codes that stay packed. False: they are better expanded.
bool build_linear_bits(Builder& b, int op);

// A copy of a value with padding whose code is in a value of one number.
int padded_with_code(Builder& b, int value, const std::vector<int64_t>& begin, const std::vector<int64_t>& end,
                     int code);

}  // namespace pw
