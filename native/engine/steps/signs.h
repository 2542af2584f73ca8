// How codes, floats and accumulators become signs, a bit each.
#pragma once

#include "engine/build.h"

namespace pw {

// The constants of a `sign` op: thresholds of its operand's type, and a bit per channel that turns the result.
struct Signs {
  std::vector<char> threshold;  // one, or one per channel
  bool each = false;
  int64_t channels = 0, groups = 1, group_bytes = 0;
  std::vector<uint8_t> flip;    // bits by group as the result has them, empty: none

  static Signs of(const Plan& plan, const OpNode& op) {
    Signs s;
    const Value& x = plan.values[op.in[0]];
    const Constant& t = plan.constant(op.in[1]);
    s.channels = x.dims.back();
    s.groups = op.integer("groups");
    require(s.groups > 0 && s.channels % s.groups == 0, "channels do not split into these groups");
    require(t.dtype == x.dtype && (t.count() == 1 || t.count() == s.channels), "thresholds do not fit");
    s.each = t.count() > 1;
    const char* data = static_cast<const char*>(t.data);
    s.threshold.assign(data, data + t.count() * dtype_size(t.dtype));
    s.threshold.resize(s.threshold.size() + 64);
    const int64_t per_group = s.channels / s.groups;
    s.group_bytes = (per_group + 7) / 8;
    if (op.input(2) >= 0) {
      const Constant& f = plan.constant(op.in[2]);
      require(f.dtype == PW_U8 && f.count() == s.channels, "flips do not fit");
      s.flip.assign(size_t(s.groups * s.group_bytes + 8), 0);
      for (int64_t c = 0; c < s.channels; ++c)
        if (static_cast<const uint8_t*>(f.data)[c])
          s.flip[size_t(c / per_group * s.group_bytes + c % per_group / 8)] |= uint8_t(1 << (c % per_group % 8));
    }
    return s;
  }

  // Whether the bits of all channels lie side by side, as if there were one group.
  bool flat() const { return groups == 1 || channels / groups % 8 == 0; }

  // Bits of `rows` rows of all channels that lie at these distances.
  void run(SignFn fn, int64_t size, const char* x, int64_t x_row, uint8_t* y, int64_t y_row, int64_t rows) const {
    SignArgs a;
    a.rows = rows;
    a.x_row = x_row;
    a.y_row = y_row;
    const int64_t parts = flat() ? 1 : groups, n = channels / parts;
    for (int64_t g = 0; g < parts; ++g) {
      a.n = n;
      a.x = x + g * n * size;
      a.y = y + g * group_bytes;
      a.threshold = threshold.data() + (each ? g * n * size : 0);
      a.t_step = each;
      a.flip = flip.empty() ? nullptr : flip.data() + g * group_bytes;
      if (!each && !a.flip && n % 8 == 0 && x_row == n && y_row == n / 8) {  // rows follow each other: one row
        a.n = rows * n;
        a.rows = 1;
      }
      fn(a);
    }
  }
};

inline SignFn sign_kernel(const Plan& plan, int dtype, const char** symbol) {
  const Kernels& k = *plan.kernels;
  const Op op = dtype == PW_F32 ? k_sign_f32 : dtype == PW_U8 ? k_sign_u8 : k_sign_i32;
  *symbol = k.row[op]->symbol;
  return dtype == PW_F32 ? k.sign_f32 : dtype == PW_U8 ? k.sign_u8 : k.sign_i32;
}

}  // namespace pw
