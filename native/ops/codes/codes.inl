// Products of floats with stored codes, sixteen columns at a time. Included once per instruction set, inside its namespace,
// after the vector type.

namespace {

#define PW_ALWAYS inline __attribute__((always_inline))

constexpr bool by_nibbles(Coding c) { return c == Coding::kInteger4 || c == Coding::kLevels4; }

// Sixteen weights of one k, without zero point and scale.
template <Coding C>
struct Decoder {
  static constexpr int kBytes = by_nibbles(C) ? 8 : C == Coding::kHalf || C == Coding::kBrain ? 32 : 16;  // of a k

  explicit Decoder(const GemmCodesArgs& g) : table(g.levels) {
    if (by_nibbles(C)) few = table16(g.levels);
    if (C == Coding::kSmall8) {
      up = shift16(g.mantissa);
      sign_up = shift16(g.sign);
      // the sign is the code's first bit: it goes to bit 15, the bits below it end where float16 has its mantissa's top
      below = words(((1 << (15 - g.sign)) - 1) << g.mantissa);
    }
  }
  PW_ALWAYS V at(const uint8_t* p) const {
    if constexpr (C == Coding::kInteger8) return reals(load_i8(reinterpret_cast<const int8_t*>(p)));
    if constexpr (C == Coding::kLevels8) return entry(table, load_u8(p));
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return C == Coding::kHalf ? half_to_real(h) : brain_to_real(h);
  }
  // Of two k, which follow each other.
  PW_ALWAYS void two(const uint8_t* p, V& first, V& second) const {
    if constexpr (C == Coding::kSmall8) {
      const W c = load_words(p);
      small_floats(mixed(shifted(c, up), shifted(c, sign_up), below), first, second);
    } else {
      first = at(p);
      second = at(p + kBytes);
    }
  }
  const float* table;
  Table16 few;
  Shift16 up, sign_up;
  W below;
};

// MR rows of x against one block of 16 columns; several sums a row where one would wait for itself.
template <Coding C, int MR>
void codes_tile(const GemmCodesArgs& g, const Decoder<C>& decoder, int m, int block) {
  constexpr int U = MR == 1 ? 8 : 2, bytes = Decoder<C>::kBytes, ahead = 1024;
  const uint8_t* b = g.b + block * g.b_block;
  const float* a = g.a + m * g.lda;
  const int group = g.k / g.groups, column = 16 * block, left = g.n - column;
  const int64_t group_bytes = int64_t(by_nibbles(C) ? (group + 7) / 8 * 8 : group) * bytes;
  V total_of[MR];
  for (int i = 0; i < MR; ++i) total_of[i] = set1(0.0f);
  for (int at = 0; at < g.groups; ++at, b += group_bytes, a += group) {
    V sum[MR * U];
    for (V& s : sum) s = set1(0.0f);
    const V zero = g.zero ? load(g.zero + at * g.scale_step + column, left, 0.0f) : set1(0.0f);
    const auto step = [&](V w, int k, int u) __attribute__((always_inline)) {
      if (C == Coding::kInteger8 || C == Coding::kInteger4) w = w - zero;
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) sum[i * U + u] = fused(set1(a[i * g.lda + k]), w, sum[i * U + u]);
    };
    int k = 0;
    for (; k + 8 <= group; k += 8) {
      const uint8_t* p = b + int64_t(k) * bytes;
#pragma GCC unroll 8
      for (int line = 0; line < 8 * bytes; line += 64) __builtin_prefetch(p + line + ahead);
      if constexpr (by_nibbles(C)) {
        const I codes = load_lanes(p);
#pragma GCC unroll 8
        for (int u = 0; u < 8; ++u) step(entry(decoder.few, codes >> (4 * u)), k + u, u % U);
      } else {
#pragma GCC unroll 8
        for (int u = 0; u < 8; u += 2) {
          V w0, w1;
          decoder.two(p + u * bytes, w0, w1);
          step(w0, k + u, u % U);
          step(w1, k + u + 1, (u + 1) % U);
        }
      }
    }
    if constexpr (by_nibbles(C)) {
      if (k < group) {
        const I codes = load_lanes(b + int64_t(k) * bytes);
        for (int u = 0; k + u < group; ++u) step(entry(decoder.few, codes >> (4 * u)), k + u, 0);
      }
    } else {
      for (; k < group; ++k) {
        V w0, w1;
        uint8_t last[2 * bytes] = {};  // what `two` reads behind the last k may lie outside
        std::memcpy(last, b + int64_t(k) * bytes, bytes);
        decoder.two(last, w0, w1);
        step(w0, k, 0);
      }
    }
    const V scale = load(g.scale + at * g.scale_step + column, left, 0.0f);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      V s = sum[i * U];
      for (int u = 1; u < U; ++u) s = s + sum[i * U + u];
      total_of[i] = fused(s, scale, total_of[i]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    V y = total_of[i];
    if (g.bias) y = y + load(g.bias + column, left, 0.0f);
    store(g.c + (m + i) * g.ldc + column, left, y);
  }
}

template <Coding C>
void codes_rows(const GemmCodesArgs& g) {
  const Decoder<C> decoder(g);
  for (int block = 0; block * 16 < g.n; ++block) {
    int m = 0;
    for (; m + 4 <= g.m; m += 4) codes_tile<C, 4>(g, decoder, m, block);
    for (; m < g.m; ++m) codes_tile<C, 1>(g, decoder, m, block);
  }
}

}  // namespace

void gemm_codes(const GemmCodesArgs& g) {
  switch (g.coding) {
    case Coding::kInteger8: return codes_rows<Coding::kInteger8>(g);
    case Coding::kInteger4: return codes_rows<Coding::kInteger4>(g);
    case Coding::kLevels4: return codes_rows<Coding::kLevels4>(g);
    case Coding::kLevels8: return codes_rows<Coding::kLevels8>(g);
    case Coding::kSmall8: return codes_rows<Coding::kSmall8>(g);
    case Coding::kHalf: return codes_rows<Coding::kHalf>(g);
    case Coding::kBrain: return codes_rows<Coding::kBrain>(g);
  }
}
