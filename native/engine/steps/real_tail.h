// What follows a float product, found among the ops that read its result.
#pragma once

#include <string>
#include <vector>

#include "engine/build.h"

namespace pw {

struct FloatTail {
  std::vector<float> bias;   // whole blocks of 16 columns, or empty
  int addend = -1;           // value
  bool clip = false, out_bf16 = false, addend_bf16 = false;
  float lo = 0, hi = 0;
  UnaryFn after = nullptr;   // on stored rows
  float p = 0, q = 0;
  int result = -1;           // value that is written
  std::string ops, suffix;   // for reports

  // For a call whose first column is `column`; rows are set by the caller.
  RealTail at(const Run& r, int64_t column) const;
};

// Takes in the ops after `op` that its step can do: an addition, a clip or another function of one number, rounding to
// bf16. Steps of matrices (`matrices`) write dense results, and round behind a clip, but behind no other function.
FloatTail make_float_tail(Builder& b, int op, bool matrices = false);

// The kernel of a unary function, or null; and its row of the table.
UnaryFn unary_kernel(const Kernels& k, const std::string& name, const KernelRow** row);

}  // namespace pw
