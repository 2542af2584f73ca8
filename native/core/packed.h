// Products of codes of a few bits that stay packed.
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

}  // namespace pw
