// What elementwise kernels are told: one row, one stretch or one pixel at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pw {

struct QuantizeArgs {  // q = clamp(rint(x * r) + zero, lo, hi)
  const float* x;
  uint8_t* y;
  int64_t n;
  float r;
  int32_t zero, lo, hi;
};
using QuantizeFn = void (*)(const QuantizeArgs&);

struct DequantizeArgs {  // y = float(q - zero) * scale
  const uint8_t* x;
  float* y;
  int64_t n;
  float scale;
  int32_t zero;
};
using DequantizeFn = void (*)(const DequantizeArgs&);

struct AddArgs {  // add_q: t = float(a - a_zero) * a_m; u = float(b - b_zero) * b_m; clamp(rint(t + u) + zero)
  const uint8_t* a;
  const uint8_t* b;
  uint8_t* y;
  int64_t n;
  int32_t a_zero, b_zero, zero, lo, hi;
  float a_m, b_m;
  int b_step;  // 1, or 0 where b is one value for the row
};
using AddFn = void (*)(const AddArgs&);

// shift: y = clamp(acc / 2^shift + zero, lo, hi), half to even; with r, acc / 2^shift + (r - r_zero) / 2^r_shift, rounded
// once. Shifts -8 .. 23: 64 bits hold the sum.
struct ShiftArgs {
  const int32_t* acc;
  const uint8_t* r;
  uint8_t* y;
  int64_t n;
  int shift, r_shift;
  int32_t r_zero, zero, lo, hi;
};
using ShiftFn = void (*)(const ShiftArgs&);

struct MulArgs {  // mul_q: clamp(rint(float((a - a_zero) * (b - b_zero)) * m) + zero)
  const uint8_t* a;
  const uint8_t* b;
  uint8_t* y;
  int64_t n;
  int32_t a_zero, b_zero, zero, lo, hi;
  float m;
  int b_step;
};
using MulFn = void (*)(const MulArgs&);

struct TableArgs {
  const uint8_t* x;
  uint8_t* y;
  int64_t n;
  const uint8_t* lut;  // [256]
};
using TableFn = void (*)(const TableArgs&);

struct TableF32Args {
  const uint8_t* x;
  float* y;
  int64_t n;
  const float* lut;  // [256]
};
using TableF32Fn = void (*)(const TableF32Args&);

struct AffineArgs {  // affine_q over one row of channels
  const uint8_t* x;
  uint8_t* y;
  int n;
  const float* m;
  const float* b;
  int32_t in_zero, zero, lo, hi;
};
using AffineFn = void (*)(const AffineArgs&);

struct MinMaxArgs {
  const float* x;
  int64_t n;
  float* lo;  // running, to be set before
  float* hi;
};
using MinMaxFn = void (*)(const MinMaxArgs&);

struct PoolArgs {  // one result pixel: over `count` rows of n channels
  const void* const* x;
  int count;
  int n;
  void* y;
  int32_t zero;  // sum: subtracted count times
  float divisor = 1;  // mean
};
using PoolFn = void (*)(const PoolArgs&);

struct SoftmaxArgs {  // y = softmax(x, or x * factor, + mask) of each row; in place allowed
  const float* x;
  float* y;
  int n;
  int64_t rows = 1;
  int64_t row = 0;  // from one row of x to the next, and of y
  bool scaled = false;
  float factor = 1;
  const float* mask = nullptr;  // or null
  int64_t mask_row = 0;
  int mask_step = 1;  // or 0 where the mask is one value for the row
};
using SoftmaxFn = void (*)(const SoftmaxArgs&);

// Attention of few rows over keys and values as they lie in memory.
struct DotsArgs {  // y[i][j] = factor * sum_k x[i][k] * keys[j][k], summed in 16 lanes
  const float* x;
  int64_t x_row;
  const float* keys;
  int64_t key_row;
  float* y;
  int64_t y_row;
  int m;
  int64_t n;
  int width;
  float factor;
};
using DotsFn = void (*)(const DotsArgs&);

struct MixArgs {  // y[i][k] += sum_j p[i][j] * values[j][k], j ascending
  const float* p;
  int64_t p_row;
  const float* values;
  int64_t value_row;
  float* y;
  int64_t y_row;
  int m;
  int64_t n;
  int width;
};
using MixFn = void (*)(const MixArgs&);

struct ProbabilitiesArgs {  // attention: s = float(acc) * factor (+ mask), e = exp(s - max), p = rint(e * (255 / sum e))
  const int32_t* acc;  // [rows][acc_row]
  int64_t acc_row;
  const float* mask;   // or null
  int64_t mask_row;
  int mask_step;       // 1, or 0 where the mask is one value for the row
  uint8_t* y;          // [rows][y_row]
  int64_t y_row;
  float* scratch;      // [4][n padded to 16]
  int rows;
  int n;               // keys
  int valid;           // keys that count for the first row; the rest get probability 0
  int valid_step;      // by how many that grows from row to row (causal: 1)
  float factor;
};
using ProbabilitiesFn = void (*)(const ProbabilitiesArgs&);

struct LayerNormArgs {
  const float* x;
  float* y;
  int n;
  const float* gain;   // or null
  const float* shift;  // or null
  float eps;
};
using LayerNormFn = void (*)(const LayerNormArgs&);  // of an RMS norm too, which has no shift

// y[i] = x[i] cos[i] - x[i + h] sin[i], y[i + h] = x[i + h] cos[i + h] + x[i] sin[i + h], h = n / 2
struct RotaryArgs {
  const float* x;
  const float* cos;
  const float* sin;
  float* y;
  int n;
};
using RotaryFn = void (*)(const RotaryArgs&);

// Blocks of `size` numbers, a power of two, times the orthonormal Hadamard matrix: sums and differences of neighbours
// 1, 2, 4 ... apart, in this order, then times `scale`. x and y may be the same.
struct HadamardArgs {
  const float* x;
  float* y;
  int64_t n;  // a multiple of size
  int64_t size;
  float scale;
};
using HadamardFn = void (*)(const HadamardArgs&);

struct UnaryArgs {
  const float* x;
  float* y;
  int64_t n;
  float p, q;
};
using UnaryFn = void (*)(const UnaryArgs&);

struct BinaryArgs {
  const float* a;
  const float* b;
  float* y;
  int64_t n;
  int a_step, b_step;  // 1 or 0
};
using BinaryFn = void (*)(const BinaryArgs&);

// One row of gates from two products, `gates` of sixteen units side by side: gate g of unit i is at
// (i / 16 * gates + g) * 16 + i % 16.
struct LstmArgs {  // gates i, f, g, o
  const float* given;
  const float* own;
  float* c;            // [n], in and out
  float* h;            // [n], out
  int n;
};
using LstmFn = void (*)(const LstmArgs&);

struct GruArgs {  // gates r, z, n
  const float* given;
  const float* own;
  const float* before;  // [n], the state
  float* h;             // [n], out
  int n;
};
using GruFn = void (*)(const GruArgs&);

}  // namespace pw
