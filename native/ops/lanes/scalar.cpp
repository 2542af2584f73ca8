// Defines the elementwise, normalising and recurrent kernels, one number at a time.
#include "core/functions.h"
#include "ops/scalar.h"

namespace pw::scalar {

void quantize(const QuantizeArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) a.y[i] = clamp_code(a.x[i] * a.r, a.zero, a.lo, a.hi);
}

void dequantize(const DequantizeArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) a.y[i] = float(int32_t(a.x[i]) - a.zero) * a.scale;
}

void add(const AddArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) {
    const float t = float(int32_t(a.a[i]) - a.a_zero) * a.a_m;
    const float u = float(int32_t(a.b[i * a.b_step]) - a.b_zero) * a.b_m;
    a.y[i] = clamp_code(t + u, a.zero, a.lo, a.hi);
  }
}

void mul(const MulArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) {
    const int32_t p = (int32_t(a.a[i]) - a.a_zero) * (int32_t(a.b[i * a.b_step]) - a.b_zero);
    a.y[i] = clamp_code(float(p) * a.m, a.zero, a.lo, a.hi);
  }
}

void table(const TableArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) a.y[i] = a.lut[a.x[i]];
}

void table_f32(const TableF32Args& a) {
  for (int64_t i = 0; i < a.n; ++i) a.y[i] = a.lut[a.x[i]];
}

void affine(const AffineArgs& a) {
  for (int i = 0; i < a.n; ++i) {
    float t = float(int32_t(a.x[i]) - a.in_zero) * a.m[i];
    t = t + a.b[i];
    a.y[i] = clamp_code(t, a.zero, a.lo, a.hi);
  }
}

void minmax(const MinMaxArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) {
    *a.lo = fn::minimum(a.x[i], *a.lo);
    *a.hi = fn::maximum(a.x[i], *a.hi);
  }
}

void max_pool_u8(const PoolArgs& a) {
  for (int c = 0; c < a.n; ++c) {
    uint8_t best = 0;
    for (int i = 0; i < a.count; ++i) {
      const uint8_t v = static_cast<const uint8_t*>(a.x[i])[c];
      best = v > best ? v : best;
    }
    static_cast<uint8_t*>(a.y)[c] = best;
  }
}

void max_pool_f32(const PoolArgs& a) {
  for (int c = 0; c < a.n; ++c) {
    float best = -INFINITY;
    for (int i = 0; i < a.count; ++i) best = fn::maximum(static_cast<const float*>(a.x[i])[c], best);
    static_cast<float*>(a.y)[c] = best;
  }
}

void sum_pool(const PoolArgs& a) {
  for (int c = 0; c < a.n; ++c) {
    int32_t sum = -a.zero * a.count;
    for (int i = 0; i < a.count; ++i) sum += static_cast<const uint8_t*>(a.x[i])[c];
    static_cast<int32_t*>(a.y)[c] = sum;
  }
}

void mean_pool(const PoolArgs& a) {
  for (int c = 0; c < a.n; ++c) {
    float sum = 0;
    for (int i = 0; i < a.count; ++i) sum += static_cast<const float*>(a.x[i])[c];
    static_cast<float*>(a.y)[c] = sum / a.divisor;
  }
}

void dots(const DotsArgs& a) {
  for (int i = 0; i < a.m; ++i)
    for (int64_t j = 0; j < a.n; ++j) {
      const float *x = a.x + i * a.x_row, *key = a.keys + j * a.key_row;
      float lanes[16] = {};
      for (int k = 0; k < a.width; ++k) lanes[k % 16] = lanes[k % 16] + x[k] * key[k];
      a.y[i * a.y_row + j] = fn::lanes_total(lanes) * a.factor;
    }
}

void mix(const MixArgs& a) {
  for (int i = 0; i < a.m; ++i)
    for (int64_t j = 0; j < a.n; ++j)
      for (int k = 0; k < a.width; ++k)
        a.y[i * a.y_row + k] = a.y[i * a.y_row + k] + a.p[i * a.p_row + j] * a.values[j * a.value_row + k];
}

void softmax(const SoftmaxArgs& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const float *x = a.x + row * a.row, *mask = a.mask ? a.mask + row * a.mask_row : nullptr;
    float* y = a.y + row * a.row;
    float best = -INFINITY;
    for (int i = 0; i < a.n; ++i) {
      y[i] = a.scaled ? x[i] * a.factor : x[i];
      if (mask) y[i] = y[i] + mask[i * a.mask_step];
      best = fn::maximum(y[i], best);
    }
    float lanes[16] = {};
    for (int i = 0; i < a.n; ++i) {
      y[i] = fn::exp(y[i] - best);
      lanes[i % 16] = lanes[i % 16] + y[i];
    }
    const float total = fn::lanes_total(lanes);
    for (int i = 0; i < a.n; ++i) y[i] = y[i] / total;
  }
}

void probabilities(const ProbabilitiesArgs& a) {
  for (int row = 0; row < a.rows; ++row) {
    const int32_t* acc = a.acc + row * a.acc_row;
    const int valid = a.valid + row * a.valid_step;
    float best = -INFINITY;
    for (int i = 0; i < a.n; ++i) {
      float s = float(acc[i]) * a.factor;
      if (a.mask) s = s + a.mask[row * a.mask_row + i * a.mask_step];
      a.scratch[i] = i < valid ? s : -INFINITY;
      best = fn::maximum(a.scratch[i], best);
    }
    float lanes[16] = {};
    for (int i = 0; i < a.n; ++i) {
      a.scratch[i] = fn::exp(a.scratch[i] - best);
      lanes[i % 16] = lanes[i % 16] + a.scratch[i];
    }
    const float r = 255.0f / fn::lanes_total(lanes);
    for (int i = 0; i < a.n; ++i) a.y[row * a.y_row + i] = clamp_code(a.scratch[i] * r, 0, 0, 255);
  }
}

void layer_norm(const LayerNormArgs& a) {
  const float n = float(a.n);
  float lanes[16] = {};
  for (int i = 0; i < a.n; ++i) lanes[i % 16] = lanes[i % 16] + a.x[i];
  const float mean = fn::lanes_total(lanes) / n;
  float squares[16] = {};
  for (int i = 0; i < a.n; ++i) {
    const float d = a.x[i] - mean;
    squares[i % 16] = squares[i % 16] + d * d;
  }
  const float r = 1.0f / std::sqrt(fn::lanes_total(squares) / n + a.eps);
  for (int i = 0; i < a.n; ++i) {
    float y = (a.x[i] - mean) * r;
    if (a.gain) y = y * a.gain[i];
    if (a.shift) y = y + a.shift[i];
    a.y[i] = y;
  }
}

void rms_norm(const LayerNormArgs& a) {
  float squares[16] = {};
  for (int i = 0; i < a.n; ++i) squares[i % 16] = squares[i % 16] + a.x[i] * a.x[i];
  const float r = 1.0f / std::sqrt(fn::lanes_total(squares) / float(a.n) + a.eps);
  for (int i = 0; i < a.n; ++i) {
    const float y = a.x[i] * r;
    a.y[i] = a.gain ? y * a.gain[i] : y;
  }
}

void rotary(const RotaryArgs& a) {
  const int h = a.n / 2;
  for (int i = 0; i < h; ++i) {
    a.y[i] = a.x[i] * a.cos[i] + -a.x[i + h] * a.sin[i];
    a.y[i + h] = a.x[i + h] * a.cos[i + h] + a.x[i] * a.sin[i + h];
  }
}

void hadamard(const HadamardArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) a.y[i] = a.x[i];
  for (int64_t h = 1; h < a.size; h *= 2)
    for (int64_t i = 0; i < a.n; i += 2 * h)
      for (int64_t j = i; j < i + h; ++j) {
        const float first = a.y[j], second = a.y[j + h];
        a.y[j] = first + second;
        a.y[j + h] = first - second;
      }
  for (int64_t i = 0; i < a.n; ++i) a.y[i] = a.y[i] * a.scale;
}

#define PW_UNARY(name, expression)                        \
  void name(const UnaryArgs& a) {                         \
    for (int64_t i = 0; i < a.n; ++i) {                   \
      const float x = a.x[i];                             \
      a.y[i] = expression;                                \
    }                                                     \
  }
PW_UNARY(exp, fn::exp(x))
PW_UNARY(sigmoid, fn::sigmoid(x))
PW_UNARY(tanh, fn::tanh(x))
PW_UNARY(erf, fn::erf(x))
PW_UNARY(gelu, fn::gelu(x))
PW_UNARY(gelu_tanh, fn::gelu_tanh(x))
PW_UNARY(silu, fn::silu(x))
PW_UNARY(hardswish, fn::hardswish(x))
PW_UNARY(clip, fn::clip(x, a.p, a.q))
PW_UNARY(scale, x * a.p)
#undef PW_UNARY

void add_f32(const BinaryArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) a.y[i] = a.a[i * a.a_step] + a.b[i * a.b_step];
}

void mul_f32(const BinaryArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) a.y[i] = a.a[i * a.a_step] * a.b[i * a.b_step];
}

void lstm(const LstmArgs& a) {
  for (int i = 0; i < a.n; ++i) {
    const int at = i / 16 * 64 + i % 16;
    const auto gate = [&](int g) { return a.given[at + 16 * g] + a.own[at + 16 * g]; };
    const float in = fn::sigmoid(gate(0)), forget = fn::sigmoid(gate(1)), cell = fn::tanh(gate(2)), out = fn::sigmoid(gate(3));
    a.c[i] = forget * a.c[i] + in * cell;
    a.h[i] = out * fn::tanh(a.c[i]);
  }
}

void gru(const GruArgs& a) {
  for (int i = 0; i < a.n; ++i) {
    const int at = i / 16 * 48 + i % 16;
    const float r = fn::sigmoid(a.given[at] + a.own[at]), z = fn::sigmoid(a.given[at + 16] + a.own[at + 16]);
    const float n = fn::tanh(a.given[at + 32] + r * a.own[at + 32]);
    a.h[i] = (1.0f - z) * n + z * a.before[i];
  }
}

void decode(const DecodeArgs& a) {
  const int group = a.n / a.groups;
  for (int k = 0; k < a.n; ++k) {
    int code;
    if (a.bits == 8) {
      code = static_cast<const int8_t*>(a.codes)[k];
    } else {
      const int pair = static_cast<const uint8_t*>(a.codes)[k / 2];
      code = ((k % 2 ? pair >> 4 : pair & 15) ^ 8) - 8;
    }
    float w = float(code);
    if (a.zero) w = w - a.zero[k / group];
    a.y[k] = w * a.scale[k / group];
  }
}

void pack(const PackArgs& a) {
  for (int block = 0; block * 16 < a.n; ++block)
    for (int j = 0; j < 16; ++j) {
      const int n = block * 16 + j;
      int8_t* b = a.b + block * a.b_block + j * 4;
      int32_t sum = 0;
      for (int k = 0; k < a.k_pad; ++k) {
        int8_t v = 0;
        if (n < a.n && k < a.k)
          v = int8_t((a.transposed ? a.x[n * a.stride + k] : a.x[k * a.stride + n]) - 128);
        b[(k / 4) * 64 + k % 4] = v;
        sum += v;
      }
      a.colsum[n] = sum;
    }
}

void interleave(const InterleaveArgs& a) {
  for (int64_t i = 0; i < a.n; ++i)
    for (int p = 0; p < a.planes; ++p) a.y[i * a.planes + p] = a.x[p][i];
}

}  // namespace pw::scalar
