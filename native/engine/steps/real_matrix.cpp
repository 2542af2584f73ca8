#include "engine/steps/real_matrix.h"

#include <cstring>

namespace pw {
namespace {

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

HalfLayout half_layout(const Plan& plan, int64_t segments, int64_t seg_len) {
  if (plan.kernels->isa != kAmx) return {};
  for (int step = 32; step >= 16; step -= 2)
    if (seg_len % step == 0) return {step, 0};
  if (segments == 1 && seg_len > 0 && seg_len < 32 && seg_len % 2 == 0) return {int(seg_len), 0};
  return {32, int(padded(segments * seg_len, 32))};
}

RightMatrix::RightMatrix(const Plan& plan, int64_t n, int64_t k, bool half, bool transposed)
    : n(n), k(k), half(half), transposed(transposed) {
  if (half) layout = half_layout(plan, 1, k);
}

int64_t RightMatrix::block() const {
  if (!half) return k * 16;
  return (layout.dense_len ? layout.dense_len : padded(k, 2)) * 16;
}

int64_t RightMatrix::bytes() const { return padded(n, 16) / 16 * block() * (half ? 2 : 4); }

void RightMatrix::pack(const void* x, void* packed) const {
  const int64_t size = block();
  if (n % 16 || (half && size != k * 16)) std::memset(packed, 0, size_t(bytes()));
  for (int64_t first = 0; first < n; first += 16) {
    const int64_t count = n - first < 16 ? n - first : 16;
    if (!half) {
      const float* from = static_cast<const float*>(x) + first * (transposed ? k : 1);
      float* to = static_cast<float*>(packed) + first / 16 * size;
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < count; ++j) to[i * 16 + j] = transposed ? from[j * k + i] : from[i * n + j];
      continue;
    }
    const uint16_t* from = static_cast<const uint16_t*>(x) + first * (transposed ? k : 1);
    uint16_t* to = static_cast<uint16_t*>(packed) + first / 16 * size;
    for (int64_t i = 0; i + 1 < k; i += 2)
      for (int64_t j = 0; j < count; ++j) {
        uint16_t* pair = to + i * 16 + 2 * j;
        if (transposed) {
          std::memcpy(pair, from + j * k + i, 4);
        } else {
          pair[0] = from[i * n + j];
          pair[1] = from[(i + 1) * n + j];
        }
      }
    if (k % 2)
      for (int64_t j = 0; j < count; ++j) to[(k - 1) * 16 + 2 * j] = transposed ? from[j * k + k - 1] : from[(k - 1) * n + j];
  }
}

void RightMatrix::multiply(const Kernels& kernels, const void* a, const int64_t* a_at, int64_t m, const void* packed,
                           void* c, const int64_t* c_at, const RealTail& tail) const {
  const int64_t segment = 0;
  const auto fill = [&](auto& g) {
    g.row_offset = a_at;
    g.m = int(m);
    g.seg_offset = &segment;
    g.seg_len = int(k);
    g.b_block = block();
    g.n = int(n);
    g.c = c;
    g.c_offset = c_at;
    g.tail = tail;
  };
  if (half) {
    GemmBf16Args g;
    fill(g);
    g.a = static_cast<const uint16_t*>(a);
    g.b = static_cast<const uint16_t*>(packed);
    g.step = layout.step;
    g.dense_len = layout.dense_len;
    kernels.gemm_bf16(g);
  } else {
    GemmF32Args g;
    fill(g);
    g.a = static_cast<const float*>(a);
    g.b = static_cast<const float*>(packed);
    kernels.gemm_f32(g);
  }
}

}  // namespace pw
