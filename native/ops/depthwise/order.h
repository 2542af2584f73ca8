// Where a channel stands in the arrays that a depthwise kernel reads (weights, biases, multipliers): in blocks of 64,
// vector v lane l dword d holds channel 16 l + 4 v + d, which is what two rounds of byte unpacking give.
#pragma once

namespace pw {

inline int depthwise_place(int channel) {
  const int block = channel / 64, c = channel % 64;
  return block * 64 + (c % 16 / 4) * 16 + (c / 16) * 4 + c % 4;
}

}  // namespace pw
