// Float functions as fixed sequences of IEEE operations: the scalar form, which every vector form equals.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pw::fn {

constexpr float kLog2e = 1.44269504088896341f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
constexpr float kExpLow = -87.0f, kExpHigh = 88.0f;
constexpr float kExp[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
constexpr float kErfP = 0.3275911f;
constexpr float kErf[5] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
constexpr float kSixth = float(1.0 / 6.0);

// The second operand where the first is NaN, as maxps and minps do.
inline float maximum(float a, float b) { return a > b ? a : b; }
inline float minimum(float a, float b) { return a < b ? a : b; }
inline float clip(float x, float p, float q) { return minimum(maximum(x, p), q); }

inline float exp(float x) {
  const float t = clip(x, kExpLow, kExpHigh);
  const float n = std::nearbyintf(t * kLog2e);
  float r = t - n * kLn2Hi;
  r = r - n * kLn2Lo;
  float p = kExp[0];
  for (int i = 1; i < 6; ++i) p = p * r + kExp[i];
  float y = p * (r * r) + r;
  y = y + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < kExpLow ? 0.0f : y * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

inline float tanh(float x) {
  const float e = exp(std::fabs(x) * -2.0f);
  return std::copysign((1.0f - e) / (1.0f + e), x);
}

inline float erf(float x) {
  const float a = std::fabs(x);
  const float t = 1.0f / (1.0f + kErfP * a);
  float p = kErf[0];
  for (int i = 1; i < 5; ++i) p = p * t + kErf[i];
  const float y = 1.0f - (p * t) * exp(-(a * a));
  return std::copysign(y, x);
}

inline float gelu(float x) { return (0.5f * x) * (1.0f + erf(x * 0.70710678118654752f)); }

inline float gelu_tanh(float x) {
  const float inner = 0.79788456080286536f * (x + 0.044715f * ((x * x) * x));
  return (0.5f * x) * (1.0f + tanh(inner));
}

inline float silu(float x) { return x * sigmoid(x); }
inline float hardswish(float x) { return (x * clip(x + 3.0f, 0.0f, 6.0f)) * kSixth; }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  float out;
  if (exponent == 0) {
    out = float(mantissa) * 5.9604644775390625e-8f;  // subnormal: mantissa * 2^-24
    return sign ? -out : out;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Halves added: 8, 4, 2, 1.
inline float lanes_total(float* lanes) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
  return lanes[0];
}

}  // namespace pw::fn
