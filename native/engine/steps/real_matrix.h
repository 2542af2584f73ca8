// Right operands of float products: how numbers of 16 bits lie for the kernel that runs, and packing of computed ones.
#pragma once

#include "engine/plan.h"

namespace pw {

// See GemmBf16Args.
struct HalfLayout {
  int step = 2, dense_len = 0;
};
HalfLayout half_layout(const Plan& plan, int64_t segments, int64_t seg_len);

// A computed matrix [k, n], or [n, k] if transposed, of f32 or bf16, dense, as the right operand of a product.
struct RightMatrix {
  int64_t n = 0, k = 0;
  bool half = false, transposed = false;
  HalfLayout layout;

  RightMatrix() = default;
  RightMatrix(const Plan& plan, int64_t n, int64_t k, bool half, bool transposed);
  int64_t block() const;                        // numbers of a block of 16 columns
  int64_t bytes() const;                        // of the packed form
  void pack(const void* x, void* packed) const;
  // c [m rows at c_at] = a [m rows at a_at] times the packed form.
  void multiply(const Kernels& kernels, const void* a, const int64_t* a_at, int64_t m, const void* packed, void* c,
                const int64_t* c_at, const RealTail& tail) const;

 private:
  void pack_floats(const float* from, int64_t left, float* to) const;
  void pack_pairs(const uint16_t* from, int64_t left, uint16_t* to) const;
};

}  // namespace pw
