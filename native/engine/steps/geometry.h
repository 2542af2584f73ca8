// Sizes and strides of convolutions.
#pragma once

#include "engine/plan.h"

namespace pw {

// Sizes of a convolution in up to three spatial axes, the missing ones of size 1 in front.
struct Geometry {
  int64_t batch = 1, in_channels = 1, out_channels = 1, groups = 1;
  int64_t in[3] = {1, 1, 1}, out[3] = {1, 1, 1}, kernel[3] = {1, 1, 1};
  int64_t stride[3] = {1, 1, 1}, dilation[3] = {1, 1, 1}, begin[3] = {0, 0, 0}, end[3] = {0, 0, 0};
  int64_t rows() const { return batch * out[0] * out[1] * out[2]; }
};

// Strides of [N, *space, C] as image, three spatial axes.
struct Steps4 {
  int64_t image, axis[3];
};

inline Steps4 steps_of(const Value& v) {
  const int dims = v.rank() - 2;
  Steps4 s{v.strides[0], {0, 0, 0}};
  for (int i = 0; i < dims; ++i) s.axis[3 - dims + i] = v.strides[1 + i];
  return s;
}

// `shape`: the weight's, [O, C / groups, *kernel].
inline Geometry geometry_of(const Plan& plan, const OpNode& op, const std::vector<int64_t>& shape) {
  Geometry g;
  const Value &x = plan.values[op.in[0]], &y = plan.values[op.out[0]];
  const int dims = x.rank() - 2;
  require(dims >= 1 && dims <= 3 && int(shape.size()) == x.rank(), "a convolution of a rank that is not supported");
  g.batch = x.dims[0];
  g.in_channels = x.dims.back();
  g.out_channels = y.dims.back();
  g.groups = op.integer("groups");
  const auto &stride = op.ints("stride"), &dilation = op.ints("dilation"), &pads = op.ints("pads");
  for (int i = 0; i < dims; ++i) {
    const int a = 3 - dims + i;
    g.in[a] = x.dims[1 + i];
    g.out[a] = y.dims[1 + i];
    g.kernel[a] = shape[size_t(2 + i)];
    g.stride[a] = stride[i];
    g.dilation[a] = dilation[i];
    g.begin[a] = pads[i];
    g.end[a] = pads[dims + i];
  }
  return g;
}

inline Geometry geometry_of(const Plan& plan, const OpNode& op) {
  return geometry_of(plan, op, plan.values[op.in[1]].dims);
}

}  // namespace pw
