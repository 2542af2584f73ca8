// Integer weights in the order that the products read.
#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "engine/steps/product.h"

namespace pw {
namespace {

constexpr int64_t kShare = 16 << 10;  // bytes that a thread packs before it looks for more

// [channels, taps] to [taps, channels]; the number of taps known to the compiler where it is common.
template <int kTaps, class T>
void taps_first(const T* from, int64_t channels, int64_t taps, T* to) {
  const int64_t n = kTaps ? kTaps : taps;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < n; ++t) to[t * channels + c] = from[c * n + t];
}

int32_t sum_of(const int8_t* codes, int64_t n) {
  int64_t k = 0, sum = 0;
#if defined(__SSE2__)
  const __m128i flip = _mm_set1_epi8(-128);
  __m128i sums = _mm_setzero_si128();
  for (; k + 16 <= n; k += 16) {  // bytes above -128, eight to a lane
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k));
    sums = _mm_add_epi64(sums, _mm_sad_epu8(_mm_xor_si128(v, flip), _mm_setzero_si128()));
  }
  sum = _mm_cvtsi128_si64(_mm_add_epi64(sums, _mm_srli_si128(sums, 8))) - 128 * k;
#endif
  for (; k < n; ++k) sum += codes[k];
  return int32_t(sum);
}

int32_t sum_of(const int16_t* codes, int64_t n) {
  int32_t sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += codes[k];
  return sum;
}

// What lies at `from` of 16 columns, fours of codes side by side: from to[0] on those of the first four, from to[64] on
// the next. Returns how many codes of each have been moved; the others are left to the caller.
int64_t interleave(const int8_t* const* columns, int64_t from, int64_t n, int8_t* to) {
  int64_t k = 0;
#if defined(__SSE2__)
  for (; k + 16 <= n; k += 16) {
    for (int c = 0; c < 16; c += 4) {
      __m128i v[4];
      for (int i = 0; i < 4; ++i) v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns[c + i] + from + k));
      const __m128i a = _mm_unpacklo_epi32(v[0], v[1]), b = _mm_unpacklo_epi32(v[2], v[3]);
      const __m128i d = _mm_unpackhi_epi32(v[0], v[1]), e = _mm_unpackhi_epi32(v[2], v[3]);
      __m128i* quads = reinterpret_cast<__m128i*>(to + k * 16 + c * 4);
      _mm_storeu_si128(quads, _mm_unpacklo_epi64(a, b));
      _mm_storeu_si128(quads + 4, _mm_unpackhi_epi64(a, b));
      _mm_storeu_si128(quads + 8, _mm_unpacklo_epi64(d, e));
      _mm_storeu_si128(quads + 12, _mm_unpackhi_epi64(d, e));
    }
  }
#endif
  return k;
}

int64_t interleave(const int16_t* const*, int64_t, int64_t, int16_t*) { return 0; }

}  // namespace

template <class T>
Packed pack_weights(const T* w, int64_t n, const std::vector<int64_t>& segments, int64_t seg_len, int64_t n_stride,
                    int k_align, int64_t taps) {
  constexpr int64_t kQuad = 4 * sizeof(T);
  const int64_t seg_pad = (seg_len + k_align - 1) / k_align * k_align;
  const int64_t blocks = (n + 15) / 16;
  Packed p;
  p.block = int64_t(segments.size()) * seg_pad * 16 * int64_t(sizeof(T));
  p.codes = Buffer(blocks * p.block);
  p.colsum.assign(size_t((n + 63) / 64 * 64), 0);
  int8_t* out = p.codes.as<int8_t>();
  if (n % 16) std::memset(out + (blocks - 1) * p.block, 0, size_t(p.block));
  const auto turn = taps == 9 ? taps_first<9, T> : taps == 49 ? taps_first<49, T> : taps_first<0, T>;
  const auto pack = [&](int64_t block, std::vector<T>& turned) {
    const int64_t count = std::min<int64_t>(16, n - 16 * block);
    const T* columns[16];
    for (int64_t c = 0; c < count; ++c) {
      columns[c] = w + (16 * block + c) * n_stride;
      if (taps <= 1) continue;
      turn(columns[c], n_stride / taps, taps, turned.data() + c * n_stride);
      columns[c] = turned.data() + c * n_stride;
    }
    T* b = reinterpret_cast<T*>(out + block * p.block);  // four codes of a column, of the next; the next four 64 on
    for (int64_t segment : segments) {
      const int64_t moved = count == 16 ? interleave(columns, segment, seg_len, b) : 0;
      for (int64_t c = 0; c < count; ++c) {
        const T* from = columns[c] + segment;
        T* to = b + c * 4;
        p.colsum[size_t(16 * block + c)] += sum_of(from, seg_len);
        int64_t k = moved;
        for (; k + 4 <= seg_len; k += 4) std::memcpy(to + k * 16, from + k, kQuad);
        if (k < seg_len) {
          T rest[4] = {};
          std::memcpy(rest, from + k, size_t(seg_len - k) * sizeof(T));
          std::memcpy(to + k * 16, rest, kQuad);
          k += 4;
        }
        for (; k < seg_pad; k += 4) std::memset(to + k * 16, 0, kQuad);
      }
      b += seg_pad * 16;
    }
  };
  const int64_t at_once = std::max<int64_t>(1, kShare / std::max<int64_t>(1, p.block));
  Helpers::share((blocks + at_once - 1) / at_once, [&](int64_t part) {
    std::vector<T> turned(size_t(taps > 1 ? 16 * n_stride : 0));
    for (int64_t block = part * at_once; block < std::min(blocks, (part + 1) * at_once); ++block) pack(block, turned);
  });
  return p;
}

template Packed pack_weights(const int8_t*, int64_t, const std::vector<int64_t>&, int64_t, int64_t, int, int64_t);
template Packed pack_weights(const int16_t*, int64_t, const std::vector<int64_t>&, int64_t, int64_t, int, int64_t);

namespace {

// Of two neighbours along K: whether 255 times either can leave 16 bits.
bool leaves(int a, int b) {
  const int above = (a > 0 ? a : 0) + (b > 0 ? b : 0), below = (a < 0 ? a : 0) + (b < 0 ? b : 0);
  return above > 128 || below < -128;
}

bool leaves(const int8_t* quad) {
  for (int i = 0; i < 64; i += 2)
    if (leaves(quad[i], quad[i + 1])) return true;
  return false;
}

}  // namespace

Packed split(Packed p, int64_t n, int64_t segments) {
  const int64_t blocks = (n + 15) / 16, quads = p.block / 64;
  int64_t most = 0, all = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t count = 0;
    for (int64_t q = 0; q < quads; ++q) count += leaves(p.codes.as<int8_t>() + b * p.block + q * 64);
    most = std::max(most, count);
    all += count;
  }
  if (all * 20 > blocks * quads * 19) return p;  // twice the work at twice the speed is no gain
  Packed out;
  out.colsum = std::move(p.colsum);
  out.rest = p.block;
  out.block = p.block + Rest::bytes(most);
  out.codes = Buffer(blocks * out.block);
  std::memset(out.codes.as<int8_t>(), 0, size_t(out.codes.bytes()));
  for (int64_t b = 0; b < blocks; ++b) {
    int8_t* to = out.codes.as<int8_t>() + b * out.block;
    std::memcpy(to, p.codes.as<int8_t>() + b * p.block, size_t(p.block));
    Rest* rest = reinterpret_cast<Rest*>(to + out.rest);
    rest->capacity = int32_t(most);
    auto* place = const_cast<Rest::Place*>(rest->places());
    auto* left = const_cast<int8_t*>(rest->codes());
    for (int64_t q = 0; q < quads; ++q) {
      int8_t* quad = to + q * 64;
      if (!leaves(quad)) continue;
      place[rest->count] = {int32_t(q / (quads / segments)), int32_t(q % (quads / segments))};
      for (int i = 0; i < 64; i += 2) {
        if (!leaves(quad[i], quad[i + 1])) continue;
        for (int j = i; j < i + 2; ++j) {
          const int8_t kept = int8_t(std::clamp<int>(quad[j], -64, 64));
          left[rest->count * 64 + j] = int8_t(quad[j] - kept);
          quad[j] = kept;
        }
      }
      ++rest->count;
    }
  }
  return out;
}

}  // namespace pw
