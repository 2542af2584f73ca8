// What a kernel is told, and the table of kernels. A row of kernels.inc makes a kernel; the strongest row that the
// chosen instruction set allows is used.
#pragma once

#include <cstdint>

#include "core/cpu.h"
#include "core/elementwise.h"
#include "core/packed.h"

namespace pw {

// ---- from accumulators to results --------------------------------------------------------------------------------

enum class Out { kI32, kU8, kF32 };

// What happens to an int32 accumulator of column n, in this order (docs/numerics.md):
//   acc += bias[n]                      with the constant zero point already taken in
//   acc -= row_zero[m] * colsum[n]      if row_zero
//   kI32: store
//   kU8:  t = float(acc) * multiplier[n];  t += float(r - r_zero) * r_multiplier  if residual
//         q = clamp(rint(t) + zero, lo, hi);  q = lut[q]  if lut
//   kF32: t = float(acc);  t *= row_scale[m] if row_scale;  t *= multiplier[n];  t += bias_f32[n] if bias_f32
//         t += addend[m][n] if addend
struct Epilogue {
  Out out = Out::kI32;
  const int32_t* bias = nullptr;        // [N padded to 16], never null
  const float* multiplier = nullptr;    // [N padded to 16]
  const int32_t* colsum = nullptr;      // [N padded to 16]
  const int32_t* row_zero = nullptr;    // [M], or one number where row_step is 0
  const float* row_scale = nullptr;     // likewise
  int row_step = 1;
  const float* bias_f32 = nullptr;      // [N padded to 16]
  const uint8_t* residual = nullptr;    // rows at the offsets of the result, times residual_rows
  const float* addend = nullptr;
  int32_t r_zero = 0;
  float r_multiplier = 0;
  int32_t zero = 0, lo = 0, hi = 255;
  const uint8_t* lut = nullptr;         // [256]
  bool permutes = false;                // the processor permutes bytes (kAvx512Vbmi): tables are faster
  bool fits = false;                    // no t can leave int32: clamping may follow the conversion
};

struct EpilogueArgs {  // one row of accumulators
  const int32_t* acc;
  void* y;
  int n;
  const Epilogue* epilogue;  // bias and multiplier as arrays
  const uint8_t* residual;
  const float* addend;
  int row;
};
using EpilogueFn = void (*)(const EpilogueArgs&);

// ---- u8 x s8 products ----------------------------------------------------------------------------------------------

// What is left of the weights of one block where two neighbours along K could make a sum beyond 16 bits with u8 values:
// the block then holds them clamped to -64 .. 64. The rest, in quads, is a second product: quad i of it is at quad
// place[i].quad of segment place[i].segment. Codes follow `places`, 64 bytes each.
struct Rest {
  struct Place {
    int32_t segment, quad;
  };
  int32_t count, capacity;
  int32_t unused[14];
  const Place* places() const { return reinterpret_cast<const Place*>(this + 1); }
  const int8_t* codes() const { return reinterpret_cast<const int8_t*>(places() + (capacity + 7) / 8 * 8); }
  static int64_t bytes(int64_t capacity) { return int64_t(sizeof(Rest)) + (capacity + 7) / 8 * 64 + capacity * 64; }
};

// Packed weights: blocks of 16 columns; in a block, segment after segment, quads of 4 along K: [16 columns][4].
// Every segment is padded with zeros to a multiple of `k_align`. That is one tile row per quad, so AMX reads the same.
// Weights of 16 bits (gemm_wide) lie in the same order, two bytes each; no row is left unstored, no block split in two.
struct GemmArgs {
  const uint8_t* a = nullptr;      // row m, segment s, byte k at a + row_offset[m] + seg_offset[s] + k
  const int64_t* row_offset = nullptr;
  int m = 0;                       // rows of this call
  int uniform = 0;                 // rows from the first on that lie row_stride apart (all of them, or 0: unknown)
  int64_t row_stride = 0;
  int segments = 1;
  const int64_t* seg_offset = nullptr;
  int seg_len = 0;                 // bytes of K in a segment
  int seg_pad = 0;                 // the same, padded to k_align
  bool dense = false;              // the weights hold the segments side by side, padded once (tiles: rows are gathered)
  const int8_t* b = nullptr;       // first column block of this call
  int64_t b_block = 0;             // bytes from one column block to the next
  int64_t b_rest = 0;              // bytes from a block to its Rest, if it is split in two: see there
  int n = 0;                       // columns of this call
  int n0 = 0;                      // first column, to index the epilogue's arrays
  void* c = nullptr;               // row m, column n at c + (c_offset[m] + n) elements
  const int64_t* c_offset = nullptr;  // -1: the row is not stored
  const int64_t* r_offset = nullptr;  // residual or addend rows
  int m0 = 0;                      // first row, to index row_zero and row_scale
  const Epilogue* epilogue = nullptr;
};
using GemmFn = void (*)(const GemmArgs&);

// ---- bits x bits products --------------------------------------------------------------------------------------------

// Rows that lie evenly, as those of an image do.
struct BitLine {
  int64_t a = 0, c = 0, r = 0, s = 0;  // where its first row lies: bytes, elements, elements, bytes
  int32_t base = 0;                    // added to the index into `base`
  int first = 0, m = 0;                // place of its first row in `border`, rows
  int m0 = 0;                          // number of its first row, to index row_zero and row_scale
};

// Products of values that are -1 or 1, a bit each (1: one). With `base` the number of terms, bias and border taken in,
//   acc = base[line.base + border[line.first + i] + n] - 2 * popcount(a xor b)
// and then the epilogue, or with `threshold`: bit n of a row = (acc >= threshold[n]) xor bit n of flip.
// Packed weights: blocks of 16 columns; segment after segment, words of 32 bits along K: [16 columns].
struct BitGemmArgs {
  const uint8_t* a = nullptr;         // row i, segment s, byte k at a + line.a + i * a_step + seg_offset[s] + k
  const BitLine* line = nullptr;
  int lines = 0;
  int64_t a_step = 0, c_step = 0, r_step = 0, s_step = 0;
  int segments = 1;
  const int64_t* seg_offset = nullptr;
  int seg_words = 0;                  // words of 32 bits in a segment
  uint32_t tail = ~0u;                // which bits of a segment's last word are read
  int tap = 0;                        // bytes of a tap where segments hold whole taps, or 0
  const uint32_t* b = nullptr;        // first column block of this call
  int64_t b_block = 0;                // words from one column block to the next
  int n = 0, n0 = 0;                  // columns of this call; the first one, to index the epilogue, base and threshold
  const int32_t* base = nullptr;      // [border cases][columns padded to 64]
  const int32_t* border = nullptr;    // [places of a line], or null: 0
  void* c = nullptr;                  // column n of a row at c + (line.c + i * c_step + n) elements; bits: ... + n / 8
  const Epilogue* epilogue = nullptr;  // its bias is not read; residual and addend rows at line.r + i * r_step
  const int32_t* threshold = nullptr;  // [columns padded to 64], or null
  const uint16_t* flip = nullptr;      // a bit a column
  // the signs of results that are floats: bit n = (result >= sign_at[n]) xor bit n of sign_flip
  uint8_t* signs = nullptr;            // at signs + line.s + i * s_step + n / 8, or null
  const float* sign_at = nullptr;      // [columns padded to 64]
  const uint16_t* sign_flip = nullptr;

  const int32_t* base_of(const BitLine& l, int i) const {
    return base + l.base + (border ? border[l.first + i] : 0) + n0;
  }
};
using BitGemmFn = void (*)(const BitGemmArgs&);

// Bits of values against thresholds: bit i of a row = (x[i] >= t[i]) xor flip; bits behind the n-th are 0.
struct SignArgs {
  const void* x = nullptr;      // f32, u8 or i32
  uint8_t* y = nullptr;
  int64_t rows = 0, x_row = 0;  // elements from row to row
  int64_t y_row = 0;            // bytes
  int64_t n = 0;
  const void* threshold = nullptr;  // of x's type, [n], or one where t_step is 0
  int t_step = 0;
  const uint8_t* flip = nullptr;    // bits [n / 8, up], or null: none
};
using SignFn = void (*)(const SignArgs&);

// ---- depthwise convolution ---------------------------------------------------------------------------------------

// Rows of results of a depthwise convolution, channels last. Elements of y where they are not said to be bytes.
// Packed weights: for each block of 64 channels, for each quad of kernel rows, for each kernel column: 256 bytes, four
// rows' weights per channel, channels in the order of `depthwise_order`.
struct DepthwiseArgs {
  const uint8_t* x = nullptr;      // first input row of this result row, first column, first channel
  int64_t x_row = 0;               // bytes between input rows
  int64_t x_pixel = 0;             // bytes between the input columns of a window
  int64_t result_pixel = 0;        // bytes between the first input columns of neighbouring results
  int kernel_h = 0, kernel_w = 0, dilation_h = 1, dilation_w = 1;
  const int8_t* w = nullptr;
  int channels = 0;
  int width = 0;                   // result columns
  int rows = 1;                    // result rows
  int64_t result_row = 0;          // bytes between the first input rows of neighbouring result rows
  uint8_t* y = nullptr;
  int64_t y_pixel = 0, y_row = 0;
  const Epilogue* epilogue = nullptr;  // kU8 or kI32 or kF32
  const uint8_t* residual = nullptr;
  int64_t r_pixel = 0, r_row = 0;

  // One of the rows by itself.
  DepthwiseArgs row(int i) const;
};
using DepthwiseFn = void (*)(const DepthwiseArgs&);

inline DepthwiseArgs DepthwiseArgs::row(int i) const {
  DepthwiseArgs d = *this;
  d.x += i * result_row;
  d.y += i * y_row * (epilogue->out == Out::kU8 ? 1 : 4);
  if (residual) d.residual += i * r_row;
  d.rows = 1;
  return d;
}

// ---- training --------------------------------------------------------------------------------------------------

// One stretch of values under one scale. t = x * r, q = clamp(rint(t), lo, hi) with the zero point taken out of the
// bounds.  fake_quantize: y = q * s.  fake_gradient: y = g * (1 + delta * sign(g) * (t - rint(t))) inside the bounds (to
// 1e-4 of a step), 0 outside; sums: of g * (rint(t) - t) inside, of g below, of g above.
struct FakeArgs {
  const void* x;
  const void* g;
  void* y;
  int64_t n;
  bool bf16;
  float r, s, lo, hi, delta;
  double* sums;
};
using FakeFn = void (*)(const FakeArgs&);

// ---- float products -------------------------------------------------------------------------------------------------

// What happens to a float sum of column n, in this order: + bias[n]; + addend[m][n]; clamp to lo .. hi; rounded to bf16
// where the result is one.
struct RealTail {
  const float* bias = nullptr;         // from the call's first column on, whole blocks of 16; or null
  const void* addend = nullptr;        // f32 or bf16, or null
  const int64_t* r_offset = nullptr;   // its rows, in elements
  bool addend_bf16 = false, out_bf16 = false, clip = false;
  float lo = 0, hi = 0;
};

// Packed weights: blocks of 16 columns, [K][16] floats each.
struct GemmF32Args {
  const float* a = nullptr;        // row m, segment s, element k at a + row_offset[m] + seg_offset[s] + k
  const int64_t* row_offset = nullptr;
  int m = 0;
  int segments = 1;
  const int64_t* seg_offset = nullptr;
  int seg_len = 0;
  const float* b = nullptr;        // first column block of this call
  int64_t b_block = 0;             // floats from one column block to the next
  int n = 0;
  void* c = nullptr;               // row m, column n at c + (c_offset[m] + n) elements
  const int64_t* c_offset = nullptr;
  RealTail tail;
};
using GemmF32Fn = void (*)(const GemmF32Args&);

// Products of bf16 numbers, summed in floats. Packed weights: blocks of 16 columns; in a block, segment after segment,
// pairs along K: [16 columns][2], an odd one out with a zero. Tiles take `step` numbers of K at a time, which divide a
// segment; where nothing does, dense_len is the length of all segments joined and padded to the step, in the weights too.
struct GemmBf16Args {
  const uint16_t* a = nullptr;     // as in GemmF32Args
  const int64_t* row_offset = nullptr;
  int m = 0;
  int segments = 1;
  const int64_t* seg_offset = nullptr;
  int seg_len = 0;
  int step = 2, dense_len = 0;
  const uint16_t* b = nullptr;
  int64_t b_block = 0;             // numbers from one column block to the next
  int n = 0;
  void* c = nullptr;
  const int64_t* c_offset = nullptr;
  RealTail tail;
};
using GemmBf16Fn = void (*)(const GemmBf16Args&);

struct ConvertArgs {  // between f32 and bf16
  const void* x;
  void* y;
  int64_t n;
};
using ConvertFn = void (*)(const ConvertArgs&);

// One row of results of a depthwise convolution in floats, channels last. All distances in elements.
// Packed weights: for each block of 16 channels, for each tap: 16 floats.
struct DepthwiseF32Args {
  const void* x = nullptr;         // f32 or bf16: first input row of this result row, first column, first channel
  int64_t tap_row = 0, tap_pixel = 0;  // between the taps of a window
  int64_t x_pixel = 0;             // between the first input columns of neighbouring results
  int kernel_h = 0, kernel_w = 0;
  const float* w = nullptr;
  int channels = 0;
  int width = 0;                   // result columns
  void* y = nullptr;
  int64_t y_pixel = 0;
  RealTail tail;                   // its rows are result columns
};
using DepthwiseF32Fn = void (*)(const DepthwiseF32Args&);  // depthwise_f32: x is f32
// depthwise_bf16: x is bf16; weights in blocks of 32 channels: for each tap those of the even ones, then of the odd ones.

// How weights of a float product are stored, and decoded on the way:
enum class Coding : int {
  kInteger8,  // two's complement
  kInteger4,  // offset by 8: places in a table of those integers
  kLevels4,   // places in a table of 16 floats
  kLevels8,   // places in a table of 256
  kSmall8,    // floats of at most 8 bits: `mantissa` ahead of them make a float of 16 bits, the sign moved by `sign`
  kHalf,      // float16
  kBrain,     // bfloat16
};

// Float rows times stored codes, decoded in registers:
//   y[m][n] = sum_g scale[g][n] * sum_{k in g} x[m][k] * (code[n][k] - zero[g][n])  (+ bias[n])
// Packed: blocks of 16 columns; k after k, 32 bytes (16 bits) or 16 (8 bits). Of 4 bits, groups are padded to eights of k:
// four bytes a column, the first k in the lowest bits.
struct GemmCodesArgs {
  const float* a = nullptr;  // row m at a + m * lda
  int64_t lda = 0;
  int m = 0, k = 0, groups = 1;
  Coding coding = Coding::kInteger8;
  const float* levels = nullptr;
  int mantissa = 0, sign = 0;
  const uint8_t* b = nullptr;
  int64_t b_block = 0;       // bytes from one column block to the next
  int n = 0;
  const float* scale = nullptr;  // [groups][scale_step]
  const float* zero = nullptr;   // alike, or null
  int64_t scale_step = 0;
  const float* bias = nullptr;   // or null
  float* c = nullptr;        // row m at c + m * ldc
  int64_t ldc = 0;
};
using GemmCodesFn = void (*)(const GemmCodesArgs&);

// One row of codes to floats: y[k] = (code[k] - zero[g]) * scale[g].
struct DecodeArgs {
  const void* codes;   // i8, or nibbles (low first, two's complement)
  float* y;            // [n]
  int n, bits, groups;
  const float* scale;  // [groups]
  const float* zero;   // [groups] or null
};
using DecodeFn = void (*)(const DecodeArgs&);

// Activations as the right operand of a product: packed as weights are (GemmArgs), u8 turned to s8 by subtracting 128.
struct PackArgs {
  const uint8_t* x;   // transposed: row n, byte k at x + n * stride + k; else row k, byte n at x + k * stride + n
  int64_t stride;
  int k, n, k_pad;    // k_pad: multiple of the product kernel's k_align
  int transposed;
  int8_t* b;          // whole blocks of 16 columns, padding zero
  int64_t b_block;
  int32_t* colsum;    // [n padded to 16]: sum over k of the packed codes
};
using PackFn = void (*)(const PackArgs&);

struct InterleaveArgs {  // y[i * planes + p] = x[p][i]
  const uint8_t* x[4];
  int planes;
  int64_t n;
  uint8_t* y;
};
using InterleaveFn = void (*)(const InterleaveArgs&);

// Peaks: independent multiply-adds on registers, `repeats` rounds of them; how many they were.
using PeakFn = int64_t (*)(int64_t repeats);
// Reads all bytes, a multiple of 512.
using ReadFn = void (*)(const void* data, int64_t bytes);

// ---- the table -----------------------------------------------------------------------------------------------------

enum Op : int {
#define PW_OP(name, type) k_##name,
#include "core/ops.inc"
#undef PW_OP
  kOpCount
};

struct KernelRow {
  Op op;
  const char* op_name;
  int isa;
  const char* symbol;
  void* fn;
};
const KernelRow* kernel_rows(int* count);

// Kernels of one instruction set, every entry filled.
struct Kernels {
  int isa = 0;
  const KernelRow* row[kOpCount] = {};
#define PW_OP(name, type) type name = nullptr;
#include "core/ops.inc"
#undef PW_OP
};
const Kernels& kernels_for(int isa);

}  // namespace pw
