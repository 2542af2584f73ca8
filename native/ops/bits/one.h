// Rows of values to bits, one by one: the definition, and what vectors leave over. Internal to the unit that includes it.
#pragma once

#include <cstdint>
#include <cstring>

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

// Bits of row `row` from value `i` on, a whole mask of them at a time; how far it came. compare(x, t, each): a mask of values
// against thresholds, of which there is one for each, or one for all.
template <class T, class Mask, class Compare>
inline int64_t masks(const SignArgs& a, int64_t row, int64_t i, Compare compare) {
  constexpr int64_t kBits = 8 * sizeof(Mask);
  const T* x = static_cast<const T*>(a.x) + row * a.x_row;
  const T* t = static_cast<const T*>(a.threshold);
  uint8_t* y = a.y + row * a.y_row;
  const bool each = a.t_step != 0;
  for (; i + kBits <= a.n; i += kBits) {
    Mask mask = compare(x + i, each ? t + i : t, each), flip = 0;
    if (a.flip) std::memcpy(&flip, a.flip + i / 8, sizeof flip);
    mask = Mask(mask ^ flip);
    std::memcpy(y + i / 8, &mask, sizeof mask);
  }
  return i;
}

template <class T, class Mask, class Compare>
inline void signs(const SignArgs& a, Compare compare) {
  for (int64_t row = 0; row < a.rows; ++row) rest<T>(a, row, masks<T, Mask>(a, row, 0, compare));
}

template <class T>
inline void signs(const SignArgs& a) {
  for (int64_t row = 0; row < a.rows; ++row) rest<T>(a, row, 0);
}

// The signs of rows of floats that a product has stored.
inline void signs_of_results(const BitGemmArgs& g) {
  for (const BitLine* l = g.line; l != g.line + g.lines && g.signs; ++l)
    for (int m = 0; m < l->m; ++m) {
      const float* x = static_cast<const float*>(g.c) + l->c + m * g.c_step;
      for (int n = 0; n < g.n; n += 8) {
        unsigned byte = 0;
        for (int j = 0; j < 8 && n + j < g.n; ++j) {
          const int column = g.n0 + n + j;
          const bool flip = (g.sign_flip[column / 16] >> (column % 16)) & 1;
          byte |= unsigned((x[n + j] >= g.sign_at[column]) != flip) << j;
        }
        g.signs[l->s + m * g.s_step + n / 8] = uint8_t(byte);
      }
    }
}

}  // namespace bits
}  // namespace
}  // namespace pw
