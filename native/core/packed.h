// Products of codes of a few bits that stay packed, and of grouped ones.
#pragma once

#include <cstdint>

namespace pw {

struct Epilogue;

// Few rows of activations times codes of 1, 2 or 4 bits that stay packed:
//   acc = sum_k a[m][k] * table[code[n][k]], then the epilogue
// Packed codes: panels of 64 columns (128 where bits is 1); in a panel, quads of 4 along K: for each vector of blocks,
// [16 columns][4] bytes whose fields of `bits` bits, low ones first, are the blocks of 16 columns. Columns and bytes that
// pad hold anything. Where bits is 2, the highest bit of a byte is flipped.
struct GemmBitsArgs {
  const uint8_t* a = nullptr;    // row m at a + m * lda
  int64_t lda = 0;
  int m = 0, k = 0, bits = 0;
  const uint8_t* b = nullptr;    // first panel of this call
  int64_t b_panel = 0;           // bytes from one panel to the next
  int n = 0, n0 = 0;             // columns of this call, the first one in the epilogue's arrays
  const int8_t* table = nullptr;  // [16]; where bits is 1 or 2: table[c] = base + step * c
  int32_t base = 0, step = 0;
  void* c = nullptr;             // row m, column n at c + (c_offset[m] + n) elements
  const int64_t* c_offset = nullptr;
  const int64_t* r_offset = nullptr;  // residual or addend rows
  int m0 = 0;                    // first row, to index row_zero and row_scale
  const Epilogue* epilogue = nullptr;
};
using GemmBitsFn = void (*)(const GemmBitsArgs&);

// Codes ranged at run time times weights of one scale per group (docs/numerics.md, grouped weights):
//   t = 0;  t += float(sum_{k in g} (a[m][k] - row_zero[m]) * w[n][k]) * scale[g][n]  for g ascending
//   c[m][n] = t * row_scale[m]  (+ bias[n])
struct GroupedRows {
  const uint8_t* a = nullptr;     // row m at a + m * lda; up to 3 bytes behind a group are read and count for nothing
  int64_t lda = 0;
  int m = 0, groups = 1, group_len = 0;
  int n = 0;
  const int32_t* row_zero = nullptr;  // [m], or one number where row_step is 0
  const float* row_scale = nullptr;
  int row_step = 1;
  const float* bias = nullptr;    // whole blocks of 16 columns, or null
  float* c = nullptr;             // row m at c + m * ldc
  int64_t ldc = 0;
};

// Packed weights as for GemmArgs, with groups as segments padded to 4. Where `bits` is 4, weights are -8 .. 7.
struct GemmGroupedArgs : GroupedRows {
  int bits = 8;
  const int8_t* b = nullptr;      // first column block of this call
  int64_t b_block = 0;            // bytes from one column block to the next
  const float* scale = nullptr;   // [groups][step], whole blocks of 16 columns
  const int32_t* colsum = nullptr;  // alike: minus the sum of a group's weights
  int64_t step = 0;
};
using GemmGroupedFn = void (*)(const GemmGroupedArgs&);

// Weights of 4 bits that stay packed: panels of 64 columns; in a panel, group after group, whose length is a multiple of 4:
// for each quad along K two vectors [16 columns][4] of bytes, whose low and high nibbles are the codes + 8 of blocks 0 and
// 1, then of blocks 2 and 3; then the 64 scales.
struct GemmNibblesArgs : GroupedRows {
  int scale_bytes = 2;            // float16, or 4: float32
  const uint8_t* b = nullptr;     // first panel of this call
  int64_t b_panel = 0;            // bytes from one panel to the next
  void* scratch = nullptr;        // nibbles_scratch(m, groups, group_len) bytes, aligned to 64
};
using GemmNibblesFn = void (*)(const GemmNibblesArgs&);

constexpr int kFewNibbleRows = 8;  // more are multiplied with a panel's codes as bytes

// Numbers of a byte that add up to minus the sum of a group's weights, in fours.
inline int nibbles_extra(int64_t group_len) { return int((8 * group_len + 126) / 127 + 3) / 4 * 4; }

// A panel's codes as bytes, its scales and what belongs to the sums of its groups; rows of activations and float sums; or
// sums of a few rows' activations.
inline int64_t nibbles_scratch(int64_t m, int64_t groups, int64_t group_len) {
  const int64_t rows = (m + 15) / 16 * 16, bytes = group_len + nibbles_extra(group_len);
  const int64_t many = groups * (bytes * 64 + 2 * 64 * 4) + rows * (groups * bytes + 256);
  return (m > kFewNibbleRows ? many : groups * 4 * kFewNibbleRows) + 4 * 64;
}

}  // namespace pw
