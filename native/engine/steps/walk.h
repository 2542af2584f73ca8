// The rows of a product: nested loops over an image and up to three spatial axes.
#pragma once

#include <algorithm>
#include <vector>

#include "engine/steps/geometry.h"

namespace pw {

// Distances in elements, of codes and bits in bytes: of x, the result, and what is added to it.
struct Walk {
  int64_t count[4] = {1, 1, 1, 1}, x_step[4] = {}, y_step[4] = {}, r_step[4] = {};
  int64_t x_base = 0;  // from the value's first element to the first row's, for padding
  int64_t stored = 1;  // places of the last axis whose results are stored: the others lie over the padding on the right

  int64_t rows() const { return count[0] * count[1] * count[2] * count[3]; }

  // A convolution's.
  static Walk over(const Geometry& g, const Steps4& xs, const Steps4& ys, const Steps4& rs) {
    Walk w;
    w.count[0] = g.batch;
    w.x_step[0] = xs.image;
    w.y_step[0] = ys.image;
    w.r_step[0] = rs.image;
    for (int a = 0; a < 3; ++a) {
      w.count[a + 1] = g.out[a];
      w.x_step[a + 1] = g.stride[a] * xs.axis[a];
      w.y_step[a + 1] = ys.axis[a];
      w.r_step[a + 1] = rs.axis[a];
      w.x_base -= g.begin[a] * xs.axis[a];
    }
    w.stored = g.out[2];
    return w;
  }

  // A linear layer's: `rows` of `x_row` one behind the other. Padding around the result, or what is added: by its axes.
  static Walk over(int64_t rows, int64_t x_row, const Value& y, const Value* added) {
    Walk w;
    if (y.dense() && (!added || added->dense())) {
      w.count[3] = rows;
      w.x_step[3] = x_row;
      w.y_step[3] = y.dims.back();
      if (added) w.r_step[3] = added->dims.back();
    } else {
      const int outer = y.rank() - 1;
      require(outer <= 4, "a linear result of this rank must be dense");
      for (int a = 0; a < outer; ++a, x_row *= y.dims[size_t(outer - a)]) {
        const size_t axis = size_t(outer - 1 - a);
        w.count[3 - a] = y.dims[axis];
        w.x_step[3 - a] = x_row;
        w.y_step[3 - a] = y.strides[axis];
        if (added) w.r_step[3 - a] = added->strides[axis];
      }
    }
    w.stored = w.count[3];
    return w;
  }

  void places(int64_t row, int64_t* index) const {
    for (int a = 3; a >= 0; --a) {
      index[a] = row % count[a];
      row /= count[a];
    }
  }

  // Where the rows first .. first + k lie; a result that is not stored at -1.
  void offsets(int64_t first, int64_t k, int64_t* x_at, int64_t* y_at, int64_t* r_at) const {
    int64_t index[4];
    places(first, index);
    for (int64_t i = 0; i < k;) {
      int64_t xo = 0, yo = 0, ro = 0;
      for (int a = 0; a < 3; ++a) {
        xo += index[a] * x_step[a];
        yo += index[a] * y_step[a];
        ro += index[a] * r_step[a];
      }
      for (; index[3] < count[3] && i < k; ++index[3], ++i) {
        x_at[i] = xo + index[3] * x_step[3];
        y_at[i] = index[3] < stored ? yo + index[3] * y_step[3] : -1;
        r_at[i] = ro + std::min(index[3], stored - 1) * r_step[3];  // read, though nothing is stored
      }
      if (index[3] < count[3]) continue;
      index[3] = 0;
      for (int a = 2; a >= 0; --a) {
        if (++index[a] < count[a]) break;
        index[a] = 0;
      }
    }
  }
};

// Offsets of a kernel's taps by the distances of its axes; those of a kernel row in one where they are joined.
inline std::vector<int64_t> taps_of(const Geometry& g, int64_t depth, int64_t row, int64_t column, bool joined) {
  std::vector<int64_t> taps;
  for (int64_t kd = 0; kd < g.kernel[0]; ++kd)
    for (int64_t ky = 0; ky < g.kernel[1]; ++ky)
      for (int64_t kx = 0; kx < (joined ? 1 : g.kernel[2]); ++kx) taps.push_back(kd * depth + ky * row + kx * column);
  return taps;
}

inline std::vector<int64_t> taps_of(const Geometry& g, const Steps4& xs, bool joined) {
  return taps_of(g, g.dilation[0] * xs.axis[0], g.dilation[1] * xs.axis[1], g.dilation[2] * xs.axis[2], joined);
}

}  // namespace pw
