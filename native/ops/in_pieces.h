// A row of results of a depthwise convolution in floats, cut for kernels of fixed numbers of pixels. Internal to the unit
// that includes it.
#pragma once

#include "core/kernels.h"

namespace pw {
namespace {

using Pixels = void (*)(const DepthwiseF32Args&, int first, int channel);

// Pieces of up to N pixels, as long as each other or one apart, of kLanes channels at a time. whole[n - 1] takes n pixels,
// part[n - 1] as well, of fewer channels.
template <int kLanes, int N>
inline void in_pieces(const DepthwiseF32Args& d, const Pixels (&whole)[N], const Pixels (&part)[N]) {
  for (int channel = 0; channel < d.channels; channel += kLanes)
    for (int i = 0, pieces = (d.width + N - 1) / N; pieces > 0; --pieces) {
      const int count = (d.width - i + pieces - 1) / pieces;
      (channel + kLanes <= d.channels ? whole : part)[count - 1](d, i, channel);
      i += count;
    }
}

template <int kLanes, int N>
inline void in_pieces(const DepthwiseF32Args& d, const Pixels (&any)[N]) {
  in_pieces<kLanes>(d, any, any);
}

}  // namespace
}  // namespace pw
