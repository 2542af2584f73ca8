// What the machine reaches on registers alone, and reading: without vectors.
#include <cstdint>
#include <cstring>

#include "core/kernels.h"

namespace pw::scalar {

int64_t peak_i8(int64_t repeats) {
  int32_t acc[8] = {}, x = 91, w = -37;
  for (int64_t r = 0; r < repeats; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __asm__ volatile("" : "+r"(x), "+r"(w));  // a product of its own each time
      acc[i] += x * w;
    }
  for (int32_t& a : acc) __asm__ volatile("" : "+r"(a));
  return repeats * 8;
}

int64_t peak_f32(int64_t repeats) {
  float acc[8] = {}, x = 0.75f, w = 0.5f;
  for (int64_t r = 0; r < repeats; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __asm__ volatile("" : : "r"(&x), "r"(&w) : "memory");
      acc[i] += x * w;
    }
  volatile float sink = 0;
  for (float a : acc) sink = sink + a;
  return repeats * 8;
}

int64_t peak_bits(int64_t repeats) {
  int32_t acc[8] = {};
  uint32_t x = 0x5a5a1234, w = 0x0ff0abcd;
  for (int64_t r = 0; r < repeats; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __asm__ volatile("" : "+r"(x), "+r"(w));
      acc[i] += __builtin_popcount(x ^ w);
    }
  for (int32_t& a : acc) __asm__ volatile("" : "+r"(a));
  return repeats * 8 * 32;
}

void read(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  uint64_t acc[4] = {};
  for (int64_t at = 0; at + 32 <= bytes; at += 32)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      uint64_t v;
      std::memcpy(&v, p + at + 8 * i, 8);
      acc[i] |= v;
    }
  for (uint64_t& a : acc) __asm__ volatile("" : "+r"(a));
}

}  // namespace pw::scalar
