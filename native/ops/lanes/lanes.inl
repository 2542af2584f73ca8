// The elementwise, normalising and recurrent kernels on sixteen lanes. Included once per instruction set, inside its
// namespace, after the vector type; makes the same steps as scalar.cpp.

namespace {

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: a float added to it is rounded to an integer, ties to even

// exp(x), t: x clipped.
inline V exp_clipped(V x, V t) {
  const V shifted = t * set1(fn::kLog2e) + set1(kMagic), n = shifted - set1(kMagic);
  V r = t - n * set1(fn::kLn2Hi);
  r = r - n * set1(fn::kLn2Lo);
  V p = set1(fn::kExp[0]);
  for (int i = 1; i < 6; ++i) p = p * r + set1(fn::kExp[i]);
  V y = p * (r * r) + r;
  y = y + set1(1.0f);
  return where_less(x, set1(fn::kExpLow), set1(0.0f), y * power_of_magic(shifted));
}
inline V exp16(V x) { return exp_clipped(x, minimum(maximum(x, set1(fn::kExpLow)), set1(fn::kExpHigh))); }
// The same where x is known to be at most kExpHigh.
inline V exp16_below(V x) { return exp_clipped(x, maximum(x, set1(fn::kExpLow))); }

inline V sigmoid16(V x) { return set1(1.0f) / (set1(1.0f) + exp16(negate(x))); }

inline V tanh16(V x) {
  const V e = exp16_below(absolute(x) * set1(-2.0f));
  return copysign((set1(1.0f) - e) / (set1(1.0f) + e), x);
}

inline V erf16(V x) {
  const V a = absolute(x);
  const V t = set1(1.0f) / (set1(1.0f) + set1(fn::kErfP) * a);
  V p = set1(fn::kErf[0]);
  for (int i = 1; i < 5; ++i) p = p * t + set1(fn::kErf[i]);
  return copysign(set1(1.0f) - (p * t) * exp16_below(negate(a * a)), x);
}

inline V gelu16(V x) { return (set1(0.5f) * x) * (set1(1.0f) + erf16(x * set1(0.70710678118654752f))); }

inline V gelu_tanh16(V x) {
  const V inner = set1(0.79788456080286536f) * (x + set1(0.044715f) * ((x * x) * x));
  return (set1(0.5f) * x) * (set1(1.0f) + tanh16(inner));
}

inline V clip16(V x, float p, float q) { return minimum(maximum(x, set1(p)), set1(q)); }

// clamp(rint(t) + zero, lo, hi) as integers: the bounds are integers, so clamping may come first.
inline I codes(V t, int32_t zero, int32_t lo, int32_t hi) {
  return integers(clip16(t, float(lo - zero), float(hi - zero))) + set1i(zero);
}

template <class F>
inline void each(int64_t n, F body) {  // body(first, count): sixteen at a time, then the rest
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) body(i, 16);
  if (i < n) body(i, int(n - i));
}

inline V load_step(const float* p, int64_t i, int count, int step) {
  return step ? load(p + i, count, 0.0f) : set1(*p);
}

}  // namespace

void dequantize(const DequantizeArgs& a) {
  const V scale = set1(a.scale);
  const I zero = set1i(a.zero);
  each(a.n, [&](int64_t i, int count) { store(a.y + i, count, reals(load_u8(a.x + i, count) - zero) * scale); });
}

void add(const AddArgs& a) {
  const V a_m = set1(a.a_m), b_m = set1(a.b_m);
  const I a_zero = set1i(a.a_zero), b_zero = set1i(a.b_zero);
  each(a.n, [&](int64_t i, int count) {
    const V t = reals(load_u8(a.a + i, count) - a_zero) * a_m;
    const I b = a.b_step ? load_u8(a.b + i, count) : set1i(*a.b);
    store_u8(a.y + i, count, codes(t + reals(b - b_zero) * b_m, a.zero, a.lo, a.hi));
  });
}

void mul(const MulArgs& a) {
  const I a_zero = set1i(a.a_zero), b_zero = set1i(a.b_zero);
  const V m = set1(a.m);
  each(a.n, [&](int64_t i, int count) {
    const I b = a.b_step ? load_u8(a.b + i, count) : set1i(*a.b);
    store_u8(a.y + i, count, codes(reals((load_u8(a.a + i, count) - a_zero) * (b - b_zero)) * m, a.zero, a.lo, a.hi));
  });
}

void affine(const AffineArgs& a) {
  const I zero = set1i(a.in_zero);
  each(a.n, [&](int64_t i, int count) {
    const V t = reals(load_u8(a.x + i, count) - zero) * load(a.m + i, count, 0.0f) + load(a.b + i, count, 0.0f);
    store_u8(a.y + i, count, codes(t, a.zero, a.lo, a.hi));
  });
}

void minmax(const MinMaxArgs& a) {
  V lo = set1(*a.lo), hi = set1(*a.hi);
  each(a.n, [&](int64_t i, int count) {
    lo = minimum(load(a.x + i, count, *a.lo), lo);
    hi = maximum(load(a.x + i, count, *a.hi), hi);
  });
  *a.lo = -greatest(negate(lo));
  *a.hi = greatest(hi);
}

namespace {

// R rows and four keys at a time: their sums do not wait for each other.
template <int R>
void dots_of(const DotsArgs& a, int row) {
  const float* x = a.x + row * a.x_row;
  float* y = a.y + row * a.y_row;
  const auto key_dots = [&](int64_t j, auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    V sum[R][kKeys];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kKeys; ++c) sum[r][c] = set1(0.0f);
    each(a.width, [&](int64_t k, int count) {
      V key[kKeys];
      for (int c = 0; c < kKeys; ++c) key[c] = load(a.keys + (j + c) * a.key_row + k, count, 0.0f);
      for (int r = 0; r < R; ++r) {
        const V v = load(x + r * a.x_row + k, count, 0.0f);
        for (int c = 0; c < kKeys; ++c) sum[r][c] = sum[r][c] + v * key[c];
      }
    });
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kKeys; ++c) y[r * a.y_row + j + c] = total(sum[r][c]) * a.factor;
  };
  int64_t j = 0;
  for (; j + 4 <= a.n; j += 4) key_dots(j, std::integral_constant<int, 4>());
  for (; j < a.n; ++j) key_dots(j, std::integral_constant<int, 1>());
}

// R rows, up to C times 16 numbers of each.
template <int R, int C>
void mix_of(const MixArgs& a, int row, int64_t first, int width) {
  const float *p = a.p + row * a.p_row, *values = a.values + first;
  float* y = a.y + row * a.y_row + first;
  V sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = load(y + r * a.y_row + 16 * c, width - 16 * c, 0.0f);
  for (int64_t j = 0; j < a.n; ++j) {
    V value[C];
    for (int c = 0; c < C; ++c) value[c] = load(values + j * a.value_row + 16 * c, width - 16 * c, 0.0f);
    for (int r = 0; r < R; ++r) {
      const V share = set1(p[r * a.p_row + j]);
      for (int c = 0; c < C; ++c) sum[r][c] = sum[r][c] + share * value[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(y + r * a.y_row + 16 * c, width - 16 * c, sum[r][c]);
}

template <int R>
void mix_rows(const MixArgs& a, int row) {
  int64_t k = 0;
  for (; k + 64 <= a.width; k += 64) mix_of<R, 4>(a, row, k, 64);
  for (; k < a.width; k += 16) mix_of<R, 1>(a, row, k, int(a.width - k));
}

}  // namespace

void dots(const DotsArgs& a) {
  int i = 0;
  for (; i + 4 <= a.m; i += 4) dots_of<4>(a, i);
  for (; i < a.m; ++i) dots_of<1>(a, i);
}

void mix(const MixArgs& a) {
  int i = 0;
  for (; i + 4 <= a.m; i += 4) mix_rows<4>(a, i);
  for (; i < a.m; ++i) mix_rows<1>(a, i);
}

namespace {

// R rows side by side, so that one row's sums need not be waited for.
template <int R>
void softmax_of(const SoftmaxArgs& a, int64_t row) {
  const float *x = a.x + row * a.row, *mask = a.mask ? a.mask + row * a.mask_row : nullptr;
  float* y = a.y + row * a.row;
  const V factor = set1(a.factor);
  const bool changed = a.scaled || mask;
  V top[R], sum[R];
  for (int r = 0; r < R; ++r) top[r] = set1(-INFINITY);
  each(a.n, [&](int64_t i, int count) {
    for (int r = 0; r < R; ++r) {
      V s = load(x + r * a.row + i, count, -INFINITY);
      if (changed) {
        if (a.scaled) s = s * factor;
        if (mask) s = s + load_step(mask + r * a.mask_row, i * a.mask_step, count, a.mask_step);
        store(y + r * a.row + i, count, s);
        if (count < 16) s = load(y + r * a.row + i, count, -INFINITY);
      }
      top[r] = maximum(s, top[r]);
    }
  });
  for (int r = 0; r < R; ++r) {
    top[r] = set1(greatest(top[r]));
    sum[r] = set1(0.0f);
  }
  if (changed) x = y;
  each(a.n, [&](int64_t i, int count) {
    for (int r = 0; r < R; ++r) {
      const V e = exp16_below(load(x + r * a.row + i, count, -INFINITY) - top[r]);
      store(y + r * a.row + i, count, e);
      sum[r] = sum[r] + (count == 16 ? e : load(y + r * a.row + i, count, 0.0f));
    }
  });
  for (int r = 0; r < R; ++r) sum[r] = set1(total(sum[r]));
  each(a.n, [&](int64_t i, int count) {
    for (int r = 0; r < R; ++r) store(y + r * a.row + i, count, load(y + r * a.row + i, count, 0.0f) / sum[r]);
  });
}

}  // namespace

void softmax(const SoftmaxArgs& a) {
  int64_t row = 0;
  for (; row + 4 <= a.rows; row += 4) softmax_of<4>(a, row);
  for (; row < a.rows; ++row) softmax_of<1>(a, row);
}

namespace {

// As above. kAll: every key counts for every row.
template <int R, bool kAll>
void probabilities_of(const ProbabilitiesArgs& a, int row) {
  const V factor = set1(a.factor);
  const int64_t line = (a.n + 15) / 16 * 16;
  const int32_t* acc = a.acc + row * a.acc_row;
  const float* mask = a.mask ? a.mask + row * a.mask_row : nullptr;
  V best[R];
  for (int r = 0; r < R; ++r) best[r] = set1(-INFINITY);
  each(a.n, [&](int64_t i, int count) {
    for (int r = 0; r < R; ++r) {
      V s = reals(load_i32(acc + r * a.acc_row + i, count)) * factor;
      if (mask) s = s + load_step(mask + r * a.mask_row, i * a.mask_step, count, a.mask_step);
      float* out = a.scratch + r * line;
      store(out + i, s);
      if (!kAll || count < 16) {
        const int64_t valid = a.valid + (row + r) * int64_t(a.valid_step), end = i + 16;
        const int64_t known = valid < i + count ? valid : i + count;  // beyond: nothing
        if (known < end) {
          for (int64_t j = known < i ? i : known; j < end; ++j) out[j] = -INFINITY;
          s = load(out + i);
        }
      }
      best[r] = maximum(s, best[r]);
    }
  });
  V top[R], sum[R];
  for (int r = 0; r < R; ++r) {
    top[r] = set1(greatest(best[r]));
    sum[r] = set1(0.0f);
  }
  for (int64_t i = 0; i < a.n; i += 16)
    for (int r = 0; r < R; ++r) {
      const V e = exp16_below(load(a.scratch + r * line + i) - top[r]);
      store(a.scratch + r * line + i, e);
      sum[r] = sum[r] + e;
    }
  for (int r = 0; r < R; ++r) sum[r] = set1(255.0f / total(sum[r]));
  uint8_t* y = a.y + row * a.y_row;
  each(a.n, [&](int64_t i, int count) {
    for (int r = 0; r < R; ++r)
      store_u8(y + r * a.y_row + i, count, codes(load(a.scratch + r * line + i) * sum[r], 0, 0, 255));
  });
}

template <bool kAll>
void probabilities_of(const ProbabilitiesArgs& a) {
  int row = 0;
  for (; row + 4 <= a.rows; row += 4) probabilities_of<4, kAll>(a, row);
  for (; row < a.rows; ++row) probabilities_of<1, kAll>(a, row);
}

}  // namespace

void probabilities(const ProbabilitiesArgs& a) {
  if (a.valid >= a.n) probabilities_of<true>(a);
  else probabilities_of<false>(a);
}

void layer_norm(const LayerNormArgs& a) {
  const float n = float(a.n);
  V sum = set1(0.0f);
  each(a.n, [&](int64_t i, int count) { sum = sum + load(a.x + i, count, 0.0f); });
  const float mean = total(sum) / n;
  const V centre = set1(mean);
  V squares = set1(0.0f);
  each(a.n, [&](int64_t i, int count) {
    const V d = load(a.x + i, count, mean) - centre;
    squares = squares + d * d;
  });
  const float r = 1.0f / std::sqrt(total(squares) / n + a.eps);
  each(a.n, [&](int64_t i, int count) {
    V y = (load(a.x + i, count, 0.0f) - centre) * set1(r);
    if (a.gain) y = y * load(a.gain + i, count, 0.0f);
    if (a.shift) y = y + load(a.shift + i, count, 0.0f);
    store(a.y + i, count, y);
  });
}

void rms_norm(const LayerNormArgs& a) {
  V squares = set1(0.0f);
  each(a.n, [&](int64_t i, int count) {
    const V x = load(a.x + i, count, 0.0f);
    squares = squares + x * x;
  });
  const V r = set1(1.0f / std::sqrt(total(squares) / float(a.n) + a.eps));
  each(a.n, [&](int64_t i, int count) {
    V y = load(a.x + i, count, 0.0f) * r;
    if (a.gain) y = y * load(a.gain + i, count, 0.0f);
    store(a.y + i, count, y);
  });
}

void rotary(const RotaryArgs& a) {
  const int h = a.n / 2;
  each(h, [&](int64_t i, int count) {
    const V x = load(a.x + i, count, 0.0f), z = load(a.x + h + i, count, 0.0f);
    store(a.y + i, count, x * load(a.cos + i, count, 0.0f) + negate(z) * load(a.sin + i, count, 0.0f));
    store(a.y + h + i, count, z * load(a.cos + h + i, count, 0.0f) + x * load(a.sin + h + i, count, 0.0f));
  });
}

void hadamard(const HadamardArgs& a) {
  // within sixteen lanes, all in one pass; partners of a lane are `h` lanes away
  each(a.n, [&](int64_t i, int count) {
    V v = load(a.x + i, count, 0.0f);
    for (int h = 1; h < 16 && h < a.size; h *= 2) v = partners(v, h) + upper_negated(v, h);
    store(a.y + i, count, a.size <= 16 ? v * set1(a.scale) : v);
  });
  for (int64_t h = 16; h < a.size; h *= 2) {
    const V scale = set1(a.scale);
    const bool last = 2 * h == a.size;
    for (int64_t i = 0; i < a.n; i += 2 * h)
      for (int64_t j = i; j < i + h; j += 16) {
        const V first = load(a.y + j), second = load(a.y + j + h);
        const V sum = first + second, difference = first - second;
        store(a.y + j, last ? sum * scale : sum);
        store(a.y + j + h, last ? difference * scale : difference);
      }
  }
}

#define PW_UNARY(name, expression)                              \
  void name(const UnaryArgs& a) {                               \
    each(a.n, [&](int64_t i, int count) {                       \
      const V x = load(a.x + i, count, 0.0f);                   \
      store(a.y + i, count, expression);                        \
    });                                                         \
  }
PW_UNARY(exp, exp16(x))
PW_UNARY(sigmoid, sigmoid16(x))
PW_UNARY(tanh, tanh16(x))
PW_UNARY(erf, erf16(x))
PW_UNARY(gelu, gelu16(x))
PW_UNARY(gelu_tanh, gelu_tanh16(x))
PW_UNARY(silu, x* sigmoid16(x))
PW_UNARY(hardswish, (x * clip16(x + set1(3.0f), 0.0f, 6.0f)) * set1(fn::kSixth))
PW_UNARY(clip, clip16(x, a.p, a.q))
PW_UNARY(scale, x* set1(a.p))
#undef PW_UNARY

void add_f32(const BinaryArgs& a) {
  each(a.n, [&](int64_t i, int count) {
    store(a.y + i, count, load_step(a.a, i * a.a_step, count, a.a_step) + load_step(a.b, i * a.b_step, count, a.b_step));
  });
}

void mul_f32(const BinaryArgs& a) {
  each(a.n, [&](int64_t i, int count) {
    store(a.y + i, count, load_step(a.a, i * a.a_step, count, a.a_step) * load_step(a.b, i * a.b_step, count, a.b_step));
  });
}

void lstm(const LstmArgs& a) {
  each(a.n, [&](int64_t i, int count) {
    const auto gate = [&](int g) { return load(a.given + 4 * i + 16 * g) + load(a.own + 4 * i + 16 * g); };
    const V in = sigmoid16(gate(0)), forget = sigmoid16(gate(1)), cell = tanh16(gate(2)), out = sigmoid16(gate(3));
    const V c = forget * load(a.c + i, count, 0.0f) + in * cell;
    store(a.c + i, count, c);
    store(a.h + i, count, out * tanh16(c));
  });
}

void gru(const GruArgs& a) {
  each(a.n, [&](int64_t i, int count) {
    const auto given = [&](int g) { return load(a.given + 3 * i + 16 * g); };
    const auto own = [&](int g) { return load(a.own + 3 * i + 16 * g); };
    const V r = sigmoid16(given(0) + own(0)), z = sigmoid16(given(1) + own(1));
    const V n = tanh16(given(2) + r * own(2));
    store(a.h + i, count, (set1(1.0f) - z) * n + z * load(a.before + i, count, 0.0f));
  });
}

void decode(const DecodeArgs& a) {
  const int group = a.n / a.groups;
  for (int g = 0; g < a.groups; ++g) {
    const V scale = set1(a.scale[g]), zero = set1(a.zero ? a.zero[g] : 0.0f);
    each(group, [&](int64_t i, int count) {
      const int64_t k = int64_t(g) * group + i;
      int8_t bytes[16] = {};
      if (a.bits == 8) {
        std::memcpy(bytes, static_cast<const int8_t*>(a.codes) + k, count);
      } else {
        const uint8_t* pairs = static_cast<const uint8_t*>(a.codes);
        for (int j = 0; j < count; ++j) {
          const int pair = pairs[(k + j) / 2];
          bytes[j] = int8_t((((k + j) % 2 ? pair >> 4 : pair & 15) ^ 8) - 8);
        }
      }
      V w = reals(load_i8(bytes, count));
      if (a.zero) w = w - zero;
      store(a.y + k, count, w * scale);
    });
  }
}

void pack(const PackArgs& a) {
  const int whole = a.k / 4 * 4;
  for (int block = 0; block * 16 < a.n; ++block) {
    int8_t* to = a.b + block * a.b_block;
    const int columns = a.n - block * 16 < 16 ? a.n - block * 16 : 16;
    if (columns < 16 || whole < a.k_pad) std::memset(to, 0, size_t(a.k_pad) * 16);
    if (a.transposed) {
      for (int j = 0; j < columns; ++j) {
        const uint8_t* x = a.x + (block * 16 + j) * a.stride;
        for (int k = 0; k < whole; k += 4) {
          uint32_t v;
          std::memcpy(&v, x + k, 4);
          v ^= 0x80808080u;
          std::memcpy(to + k * 16 + j * 4, &v, 4);
        }
        for (int k = whole; k < a.k; ++k) to[whole * 16 + j * 4 + k - whole] = int8_t(x[k] ^ 0x80);
      }
    } else {
      const __m128i flip = _mm_set1_epi8(int8_t(0x80));
      for (int k = 0; k < a.k; k += 4) {
        __m128i r[4];
        for (int i = 0; i < 4; ++i) {
          alignas(16) uint8_t bytes[16];
          const uint8_t* x = a.x + (k + i) * a.stride + block * 16;
          if (k + i >= a.k) {
            r[i] = _mm_setzero_si128();
            continue;
          }
          if (columns == 16) {
            r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
          } else {
            std::memset(bytes, 0x80, 16);
            std::memcpy(bytes, x, columns);
            r[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
          }
          r[i] = _mm_xor_si128(r[i], flip);
        }
        const __m128i lo01 = _mm_unpacklo_epi8(r[0], r[1]), hi01 = _mm_unpackhi_epi8(r[0], r[1]);
        const __m128i lo23 = _mm_unpacklo_epi8(r[2], r[3]), hi23 = _mm_unpackhi_epi8(r[2], r[3]);
        __m128i* out = reinterpret_cast<__m128i*>(to + k * 16);
        _mm_storeu_si128(out, _mm_unpacklo_epi16(lo01, lo23));
        _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(lo01, lo23));
        _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(hi01, hi23));
        _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(hi01, hi23));
      }
    }
    // sums of the packed codes, four of a column side by side
    const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
    __m256i s0 = _mm256_setzero_si256(), s1 = s0;
    for (int k = 0; k < a.k_pad; k += 4) {
      const __m256i* at = reinterpret_cast<const __m256i*>(to + k * 16);
      // 1 (u8) times code (s8), pairs added: at most 256 in magnitude, nothing saturates
      s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, _mm256_loadu_si256(at)), ones16));
      s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, _mm256_loadu_si256(at + 1)), ones16));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.colsum + block * 16), s0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.colsum + block * 16 + 8), s1);
  }
}
