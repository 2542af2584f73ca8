// What all instruction sets share: many rows take a panel whose codes were made bytes.
#pragma once

#include "core/kernels.h"

namespace pw {
namespace {

// Panels in the form of GemmGroupedArgs, in scratch memory.
struct Widened {
  int8_t* codes;    // [4 blocks][groups][group_len / 4][16][4]
  float* scale;     // [groups][64]
  int32_t* colsum;  // alike, minus the sums
  explicit Widened(const GemmNibblesArgs& g) {
    codes = static_cast<int8_t*>(g.scratch);
    scale = reinterpret_cast<float*>(codes + int64_t(g.groups) * g.group_len * 64);
    colsum = reinterpret_cast<int32_t*>(scale + int64_t(g.groups) * 64);
  }
};

// widen(panel, to) fills `to`; product is the same instruction set's gemm_grouped.
template <class Widen>
inline void by_panels(const GemmNibblesArgs& g, Widen widen, GemmGroupedFn product) {
  const Widened to(g);
  GemmGroupedArgs p;
  static_cast<GroupedRows&>(p) = g;
  p.bits = 4;
  p.b = to.codes;
  p.b_block = int64_t(g.groups) * g.group_len * 16;
  p.scale = to.scale;
  p.colsum = to.colsum;
  p.step = 64;
  for (int column = 0; column < g.n; column += 64) {
    widen(g.b + column / 64 * g.b_panel, to);
    p.n = g.n - column < 64 ? g.n - column : 64;
    p.bias = g.bias ? g.bias + column : nullptr;
    p.c = g.c + column;
    product(p);
  }
}

// What a row's activations add to every column of a group's sum, because codes are stored 8 too high:
// -8 (sum_k a - len zero).
inline int32_t offset(int32_t sum, int32_t zero, int len) { return -8 * (sum - len * zero); }

}  // namespace
}  // namespace pw
