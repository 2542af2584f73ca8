// Rounding in training and its pseudo-gradient. Included once per instruction set, inside its namespace: plain loops of
// sixteen lanes that the compiler turns into that set's vectors. Every set makes the same steps in the same order.

namespace {

constexpr int kLanes = 16, kBlock = 512;
constexpr float kSlack = 1e-4f;  // of a step: the value that set the range is inside, however its code was rounded

struct F32 {
  using Type = float;
  static void load(const float* p, int count, float* out) {
    for (int i = 0; i < count; ++i) out[i] = p[i];
  }
  static void store(const float* in, int count, float* p) {
    for (int i = 0; i < count; ++i) p[i] = in[i];
  }
};

struct BF16 {  // rounds to nearest even; NaN stays NaN
  using Type = uint16_t;
  static void load(const uint16_t* p, int count, float* out) {
    uint32_t bits[kBlock];
    for (int i = 0; i < count; ++i) bits[i] = uint32_t(p[i]) << 16;
    std::memcpy(out, bits, 4 * size_t(count));
  }
  static void store(const float* in, int count, uint16_t* p) {
    uint32_t bits[kBlock];
    std::memcpy(bits, in, 4 * size_t(count));
    for (int i = 0; i < count; ++i) {
      const uint32_t rounded = (bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) >> 16;
      p[i] = (bits[i] & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fc0u) : uint16_t(rounded);
    }
  }
};

template <class T>
void round_row(const FakeArgs& a) {
  using Type = typename T::Type;
  const Type* x = static_cast<const Type*>(a.x);
  Type* y = static_cast<Type*>(a.y);
  float v[kBlock];
  for (int64_t first = 0; first < a.n; first += kBlock) {
    const int count = int(a.n - first < kBlock ? a.n - first : kBlock);
    T::load(x + first, count, v);
    for (int i = 0; i < count; ++i) {
      float q = __builtin_rintf(v[i] * a.r);
      q = q < a.lo ? a.lo : q;  // a NaN passes both
      q = q > a.hi ? a.hi : q;
      v[i] = q * a.s;
    }
    T::store(v, count, y + first);
  }
}

template <class T>
void gradient_row(const FakeArgs& a) {
  using Type = typename T::Type;
  const Type* x = static_cast<const Type*>(a.x);
  const Type* g = static_cast<const Type*>(a.g);
  Type* y = static_cast<Type*>(a.y);
  float v[kBlock], w[kBlock], out[kBlock];
  const float least = a.lo - kSlack, most = a.hi + kSlack;
  double sum[3] = {0, 0, 0};
  for (int64_t first = 0; first < a.n; first += kBlock) {
    const int count = int(a.n - first < kBlock ? a.n - first : kBlock);
    T::load(x + first, count, v);
    T::load(g + first, count, w);
    for (int i = count; i < kBlock; ++i) v[i] = w[i] = 0;
    float in[kBlock], low[kBlock], high[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const float t = v[i] * a.r, d = w[i], error = __builtin_rintf(t) - t;
      const float bend = d > 0.0f ? -a.delta : a.delta;  // -delta * sign(d), where d is not 0
      low[i] = t < least ? d : 0.0f;
      high[i] = t > most ? d : 0.0f;
      const float kept = t < least ? 0.0f : t > most ? 0.0f : d;
      in[i] = kept * error;
      out[i] = kept + kept * (bend * error);
    }
    float inside[kLanes] = {}, below[kLanes] = {}, above[kLanes] = {};
    for (int i = 0; i < kBlock; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) inside[k] += in[i + k];
      for (int k = 0; k < kLanes; ++k) below[k] += low[i + k];
      for (int k = 0; k < kLanes; ++k) above[k] += high[i + k];
    }
    T::store(out, count, y + first);
    float s[3] = {0, 0, 0};
    for (int k = 0; k < kLanes; ++k) {
      s[0] += inside[k];
      s[1] += below[k];
      s[2] += above[k];
    }
    for (int j = 0; j < 3; ++j) sum[j] += s[j];
  }
  for (int j = 0; j < 3; ++j) a.sums[j] = sum[j];
}

}  // namespace

void fake_quantize(const FakeArgs& a) { a.bf16 ? round_row<BF16>(a) : round_row<F32>(a); }
void fake_gradient(const FakeArgs& a) { a.bf16 ? gradient_row<BF16>(a) : gradient_row<F32>(a); }
