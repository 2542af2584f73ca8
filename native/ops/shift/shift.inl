// Included by one translation unit per instruction set, inside its namespace: the compiler makes vectors of these loops.
// Integers alone, so all of them give the same bits.

void shift(const ShiftArgs& a) {
  const int32_t zero = a.zero, low = a.lo - a.zero, high = a.hi - a.zero;
  const int32_t* __restrict acc = a.acc;
  uint8_t* __restrict y = a.y;
  if (!a.r && a.shift >= 0) {
    const int s = a.shift;
    const int32_t half = s ? int32_t(1) << (s - 1) : 1, mask = (int32_t(1) << s) - 1;  // no rest is ever 1 where s is 0
    for (int64_t i = 0; i < a.n; ++i) {
      const int32_t floor = acc[i] >> s, rest = acc[i] & mask;
      int32_t q = floor + int32_t(rest + (floor & 1) > half);  // half to even: an odd floor goes up at the half itself
      q = q > low ? q : low;
      q = q < high ? q : high;
      y[i] = uint8_t(q + zero);
    }
    return;
  }
  const int deepest = a.r && a.r_shift > a.shift ? a.r_shift : a.shift;
  const int down = deepest > 0 ? deepest : 0;
  const int64_t up = int64_t(1) << (down - a.shift), r_up = a.r ? int64_t(1) << (down - a.r_shift) : 0;
  const int64_t half = down ? int64_t(1) << (down - 1) : 1, mask = (int64_t(1) << down) - 1;
  const uint8_t* __restrict r = a.r;
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t total = acc[i] * up + (r ? (int32_t(r[i]) - a.r_zero) * r_up : 0);
    const int64_t floor = total >> down, rest = total & mask;
    int64_t q = floor + int64_t(rest + (floor & 1) > half);
    q = q > low ? q : low;
    q = q < high ? q : high;
    y[i] = uint8_t(q + zero);
  }
}
