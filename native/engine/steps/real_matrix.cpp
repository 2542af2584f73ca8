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
    const int64_t at = first * (transposed ? k : 1), to = first / 16 * size;
    if (half) pack_pairs(static_cast<const uint16_t*>(x) + at, n - first, static_cast<uint16_t*>(packed) + to);
    else pack_floats(static_cast<const float*>(x) + at, n - first, static_cast<float*>(packed) + to);
  }
}

// The next 16 columns, or what is left of them; whole blocks by loops of known length.
void RightMatrix::pack_floats(const float* from, int64_t left, float* to) const {
  const int64_t count = left < 16 ? left : 16;
  if (transposed) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < k; ++i) to[i * 16 + j] = from[j * k + i];
  } else if (count == 16) {
    for (int64_t i = 0; i < k; ++i) std::memcpy(to + i * 16, from + i * n, 64);
  } else {
    for (int64_t i = 0; i < k; ++i) std::memcpy(to + i * 16, from + i * n, size_t(count) * 4);
  }
}

void RightMatrix::pack_pairs(const uint16_t* from, int64_t left, uint16_t* to) const {
  const int64_t count = left < 16 ? left : 16;
  if (transposed) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i + 1 < k; i += 2) std::memcpy(to + i * 16 + 2 * j, from + j * k + i, 4);
  } else {
    for (int64_t i = 0; i + 1 < k; i += 2) {
      const uint16_t *even = from + i * n, *odd = even + n;
      uint16_t* pairs = to + i * 16;
      if (count == 16)
        for (int j = 0; j < 16; ++j) {
          const uint32_t pair = uint32_t(odd[j]) << 16 | even[j];
          std::memcpy(pairs + 2 * j, &pair, 4);
        }
      else
        for (int64_t j = 0; j < count; ++j) {
          pairs[2 * j] = even[j];
          pairs[2 * j + 1] = odd[j];
        }
    }
  }
  for (int64_t j = 0; k % 2 && j < count; ++j) to[(k - 1) * 16 + 2 * j] = from[transposed ? j * k + k - 1 : (k - 1) * n + j];
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
