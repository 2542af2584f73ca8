// SHA-256 (FIPS 180-4) on the instructions for it: the checksum of a model's file at the speed of its memory.
#include "core/sha256.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace pw {
namespace {

#if defined(__x86_64__)

alignas(64) const uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// The state in the order that the instructions want: (A, B, E, F) and (C, D, G, H), highest first.
struct State {
  __m128i abef, cdgh;
};

#define PW_SHA __attribute__((target("sha,sse4.1,ssse3")))

PW_SHA State initial() {
  return {_mm_set_epi32(0x6a09e667, int(0xbb67ae85), 0x510e527f, int(0x9b05688c)),
          _mm_set_epi32(0x3c6ef372, int(0xa54ff53a), 0x1f83d9ab, 0x5be0cd19)};
}

PW_SHA void blocks(State& state, const uint8_t* data, int64_t count) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i abef = state.abef, cdgh = state.cdgh;
  for (; count > 0; --count, data += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      __m128i& now = w[i % 4];
      if (i < 4) {
        now = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i), big_endian);
      } else {  // w[t] = s1(w[t - 2]) + w[t - 7] + s0(w[t - 15]) + w[t - 16], four at a time
        const __m128i last = w[(i + 3) % 4];
        now = _mm_add_epi32(_mm_sha256msg1_epu32(now, w[(i + 1) % 4]), _mm_alignr_epi8(last, w[(i + 2) % 4], 4));
        now = _mm_sha256msg2_epu32(now, last);
      }
      const __m128i k = _mm_add_epi32(now, _mm_load_si128(reinterpret_cast<const __m128i*>(kRound) + i));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, k);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(k, 0x0e));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  state = {abef, cdgh};
}

bool supported() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 19))) return false;  // SSE4.1, which brings SSSE3
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29));
}

#endif

}  // namespace

bool can_sha256() {
#if defined(__x86_64__)
  static const bool can = supported();
  return can;
#else
  return false;
#endif
}

void sha256(int count, const void* const* data, const int64_t* sizes, uint8_t* digest, const std::atomic<bool>& stop) {
#if defined(__x86_64__)
  State state = initial();
  uint8_t rest[128];  // what is not yet a block; at the end the padding too
  int64_t held = 0, total = 0;
  for (int i = 0; i < count; ++i) {
    const uint8_t* at = static_cast<const uint8_t*>(data[i]);
    int64_t left = sizes[i];
    total += left;
    if (held > 0) {
      const int64_t n = left < 64 - held ? left : 64 - held;
      std::memcpy(rest + held, at, size_t(n));
      held += n, at += n, left -= n;
      if (held < 64) continue;
      blocks(state, rest, 1);
      held = 0;
    }
    constexpr int64_t kPiece = 1 << 14;
    for (int64_t done = 0; done < left / 64; done += kPiece) {
      if (stop.load(std::memory_order_relaxed)) return;
      blocks(state, at + done * 64, std::min(kPiece, left / 64 - done));
    }
    held = left % 64;
    if (held > 0) std::memcpy(rest, at + left - held, size_t(held));
  }
  std::memset(rest + held, 0, size_t(128 - held));
  rest[held] = 0x80;
  const int64_t ends = held < 56 ? 64 : 128;
  for (int i = 0; i < 8; ++i) rest[ends - 1 - i] = uint8_t(uint64_t(total) * 8 >> (8 * i));
  blocks(state, rest, ends / 64);
  uint32_t abef[4], cdgh[4];
  std::memcpy(abef, &state.abef, 16);
  std::memcpy(cdgh, &state.cdgh, 16);
  const uint32_t words[8] = {abef[3], abef[2], cdgh[3], cdgh[2], abef[1], abef[0], cdgh[1], cdgh[0]};
  for (int i = 0; i < 32; ++i) digest[i] = uint8_t(words[i / 4] >> (24 - 8 * (i % 4)));
#endif
}

}  // namespace pw
