// What follows a product, found among the ops that read its accumulators.
#pragma once

#include <optional>

#include "engine/build.h"

namespace pw {

// The epilogue of a step: constants that it owns, and values resolved at run time.
struct Tail {
  Epilogue base;                      // pointers below are set when the tail is finished
  std::vector<int32_t> bias;          // natural order, padded
  std::vector<float> multiplier, bias_f32;
  std::vector<int32_t> colsum;
  int residual = -1, row_scale = -1, row_zero = -1;  // values
  int result = -1;                    // value that is written
  std::string ops;                    // for reports
  int last_op = -1;                   // whose result is written
  std::string kernel_suffix;

  void finish();                      // sets the pointers of `base`
  // The epilogue of one run.
  Epilogue at(const Run& r) const;
};

// Whether the epilogue's float arithmetic gives what this requantization by shifts, of this product, says.
bool shifts_in_float(const Plan& plan, const OpNode& product, const OpNode& op);

// Whether the op should be built later, where floats are added to its result that are not made yet; then it will be.
bool put_off(Builder& b, int op);

// Takes in the ops after `op` that its step can do. `columns` is the size of the accumulators' last axis.
Tail make_tail(Builder& b, int op, int64_t columns);

}  // namespace pw
