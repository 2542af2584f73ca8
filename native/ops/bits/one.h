// Rows of values to bits, one by one: the definition, and what vectors leave over. Internal to the unit that includes it.
#pragma once

#include <cstdint>

#include "core/kernels.h"

namespace pw {
namespace {
namespace bits {

// Bits of row `row` from value `i` on, a multiple of 8.
template <class T>
inline void rest(const SignArgs& a, int64_t row, int64_t i) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_row;
  const T* t = static_cast<const T*>(a.threshold);
  uint8_t* y = a.y + row * a.y_row;
  for (; i < a.n; i += 8) {
    unsigned byte = 0;
    const int64_t count = a.n - i < 8 ? a.n - i : 8;
    for (int64_t j = 0; j < count; ++j) byte |= unsigned(x[i + j] >= t[(i + j) * a.t_step]) << j;
    if (a.flip) byte ^= a.flip[i / 8] & ((1u << count) - 1);
    y[i / 8] = uint8_t(byte);
  }
}

template <class T>
inline void signs(const SignArgs& a) {
  for (int64_t row = 0; row < a.rows; ++row) rest<T>(a, row, 0);
}

}  // namespace bits
}  // namespace
}  // namespace pw
