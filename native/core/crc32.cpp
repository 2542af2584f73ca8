// CRC-32 of IEEE 802.3: the checksum of a model's file, at the speed of its memory where there are carry-less products.
#include "core/crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace pw {
namespace {

constexpr uint32_t kReflected = 0xedb88320;  // the polynomial without x^32, lowest bit the highest power

// [t][b]: byte b, and t bytes of zeros behind it.
constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
  std::array<std::array<uint32_t, 256>, 8> t{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t r = b;
    for (int i = 0; i < 8; ++i) r = r & 1 ? r >> 1 ^ kReflected : r >> 1;
    t[0][b] = r;
  }
  for (size_t n = 1; n < 8; ++n)
    for (size_t b = 0; b < 256; ++b) t[n][b] = t[n - 1][b] >> 8 ^ t[0][t[n - 1][b] & 255];
  return t;
}

constexpr auto kTables = make_tables();

// The register behind more bytes; eight at a time ("slicing by 8", Kounavis and Berry 2005).
uint32_t by_tables(uint32_t r, const uint8_t* p, int64_t n) {
  for (; n >= 8; n -= 8, p += 8) {
    uint32_t low, high;
    std::memcpy(&low, p, 4);
    std::memcpy(&high, p + 4, 4);
    low ^= r;
    r = kTables[7][low & 255] ^ kTables[6][low >> 8 & 255] ^ kTables[5][low >> 16 & 255] ^ kTables[4][low >> 24] ^
        kTables[3][high & 255] ^ kTables[2][high >> 8 & 255] ^ kTables[1][high >> 16 & 255] ^ kTables[0][high >> 24];
  }
  for (; n > 0; --n, ++p) r = r >> 8 ^ kTables[0][(r ^ *p) & 255];
  return r;
}

#if defined(__x86_64__)

// x^n modulo the polynomial, reflected; one bit up, as the product of two reflected words falls one bit short.
constexpr int64_t power(int n) {
  uint32_t r = 0x80000000;
  for (int i = 0; i < n; ++i) r = r & 1 ? r >> 1 ^ kReflected : r >> 1;
  return int64_t(uint64_t(r) << 1);
}

#define PW_FOLD __attribute__((target("pclmul,sse4.1")))

PW_FOLD inline __m128i load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// 16 bytes, moved over the bits that `by` is made for, onto others.
PW_FOLD inline __m128i fold(__m128i x, __m128i by, __m128i onto) {
  return _mm_xor_si128(onto, _mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)));
}

// At least 64 bytes by folding (Gopal and others, "Fast CRC computation using PCLMULQDQ", Intel 2009).
PW_FOLD uint32_t by_products(uint32_t r, const uint8_t* p, int64_t n) {
  const __m128i by512 = _mm_set_epi64x(power(512 - 32), power(512 + 32));
  const __m128i by128 = _mm_set_epi64x(power(128 - 32), power(128 + 32));
  __m128i x[4];
  for (int i = 0; i < 4; ++i) x[i] = load(p + 16 * i);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128(int32_t(r)));
  for (p += 64, n -= 64; n >= 64; p += 64, n -= 64)
    for (int i = 0; i < 4; ++i) x[i] = fold(x[i], by512, load(p + 16 * i));
  __m128i one = fold(fold(fold(x[0], by128, x[1]), by128, x[2]), by128, x[3]);
  for (; n >= 16; p += 16, n -= 16) one = fold(one, by128, load(p));
  uint8_t left[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(left), one);
  return by_tables(by_tables(0, left, 16), p, n);
}

bool has_products() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 1)) && (c & (1u << 19));  // PCLMULQDQ, SSE4.1
}

#endif

}  // namespace

uint32_t crc32(uint32_t crc, const void* data, int64_t size) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
#if defined(__x86_64__)
  static const bool products = has_products();
  if (products && size >= 64) return ~by_products(~crc, p, size);
#endif
  return ~by_tables(~crc, p, size);
}

}  // namespace pw
