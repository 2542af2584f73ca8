#include <cstring>

#include "core/functions.h"
#include "core/kernels.h"

namespace pw::scalar {
namespace {

// Weight of row k of a block, column j, without zero point and scale.
float weight(const GemmCodesArgs& g, const uint8_t* block, int64_t k, int j) {
  const auto nibble = [&] { return block[k / 8 * 64 + j * 4 + k % 8 / 2] >> k % 2 * 4 & 15; };
  const auto code = [&] { return int(block[k * 16 + j]); };
  const auto sixteen = [&] {
    uint16_t bits;
    std::memcpy(&bits, block + (k * 16 + j) * 2, 2);
    return bits;
  };
  switch (g.coding) {
    case Coding::kInteger8: return float(int8_t(code()));
    case Coding::kInteger4:
    case Coding::kLevels4: return g.levels[nibble()];
    case Coding::kLevels8: return g.levels[code()];
    case Coding::kSmall8: {
      const int below = (1 << (15 - g.sign)) - 1;
      return fn::half_to_float(uint16_t((code() << g.sign & 0x8000) | (code() & below) << g.mantissa));
    }
    case Coding::kHalf: return fn::half_to_float(sixteen());
    case Coding::kBrain: break;
  }
  const uint32_t bits = uint32_t(sixteen()) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

}  // namespace

void gemm_codes(const GemmCodesArgs& g) {
  const bool nibbles = g.coding == Coding::kInteger4 || g.coding == Coding::kLevels4;
  const int group = g.k / g.groups, padded = (group + 7) / 8 * 8;
  for (int m = 0; m < g.m; ++m)
    for (int n = 0; n < g.n; ++n) {
      const uint8_t* block = g.b + (n / 16) * g.b_block;
      float y = 0;
      for (int at = 0; at < g.groups; ++at) {
        float sum = 0;
        for (int k = at * group; k < (at + 1) * group; ++k) {
          float w = weight(g, block, nibbles ? at * padded + k - at * group : k, n % 16);
          if (g.zero) w = w - g.zero[at * g.scale_step + n];
          sum += g.a[m * g.lda + k] * w;
        }
        y += sum * g.scale[at * g.scale_step + n];
      }
      g.c[m * g.ldc + n] = g.bias ? y + g.bias[n] : y;
    }
}

}  // namespace pw::scalar
