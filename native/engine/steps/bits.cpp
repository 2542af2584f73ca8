// Products of packed signs.
#include <algorithm>
#include <cstring>

#include "engine/layout.h"
#include "engine/pieces.h"
#include "engine/steps/product.h"
#include "engine/steps/signs.h"
#include "engine/steps/walk.h"

namespace pw {
namespace {

// Columns of +-1 in the form of BitGemmArgs. Stored weights: row o, bit (c * taps + t) of ceil(K / 8) bytes.
struct Columns {
  const uint8_t* w;
  int64_t row_bytes, channels, taps;
  bool bit(int64_t o, int64_t c, int64_t t) const {
    const int64_t k = c * taps + t;
    return (w[o * row_bytes + k / 8] >> (k % 8)) & 1;
  }
  int32_t sum(int64_t o, int64_t t) const {  // of the weights of one tap
    int32_t s = 0;
    for (int64_t c = 0; c < channels; ++c) s += bit(o, c, t) ? 1 : -1;
    return s;
  }
};

// per_segment: taps that lie side by side in a segment of `words` words, each of `pixel` bytes.
Packed pack_bits(const Columns& from, int64_t first, int64_t n, int64_t per_segment, int64_t pixel, int64_t words) {
  const int64_t segments = from.taps / per_segment, blocks = (n + 15) / 16;
  Packed p;
  p.block = segments * words * 16;
  p.codes = Buffer(blocks * p.block * 4);
  auto* out = p.codes.as<uint32_t>();
  std::memset(out, 0, size_t(blocks * p.block * 4));
  for (int64_t o = 0; o < n; ++o)
    for (int64_t t = 0; t < from.taps; ++t)
      for (int64_t c = 0; c < from.channels; ++c) {
        if (!from.bit(first + o, c, t)) continue;
        const int64_t place = t % per_segment * pixel * 8 + c;  // bit of the segment
        out[o / 16 * p.block + (t / per_segment * words + place / 32) * 16 + o % 16] |= 1u << (place % 32);
      }
  return p;
}

struct BitStep : Step {
  BitGemmFn fn;
  std::shared_ptr<const Packed> packed;
  Tail tail;
  int x;
  Walk walk;
  std::vector<int32_t> border[4];  // per axis and place: what it adds to the index into `base`
  int64_t y_base = 0;              // columns of the group
  std::vector<int64_t> segments;
  int seg_words = 1;
  uint32_t last_word = ~0u;
  int tap = 0;                     // BitGemmArgs
  int64_t n = 0, rows = 0;
  bool by_columns = false;
  Pieces pieces;                   // of the columns or the rows
  std::shared_ptr<const Buffer> base;
  // the result as bits, by thresholds on the accumulators
  std::vector<int32_t> threshold;
  std::vector<uint16_t> flip;
  // the result's signs too, for the products that read it
  int signs_value = -1;
  Signs signs;
  SignFn sign = nullptr;           // by themselves, after the product; null: with it
  std::vector<float> sign_at;
  std::vector<uint16_t> sign_flip;
  int64_t s_step[4] = {};

  void run(const Run& r, int task, int) const override {
    const int64_t m0 = by_columns ? 0 : pieces.first(task), m1 = by_columns ? rows : pieces.end(task);
    const int64_t n0 = by_columns ? pieces.first(task) : 0, n1 = by_columns ? pieces.end(task) : n;
    const bool bits = !threshold.empty();
    const Epilogue e = tail.at(r);
    BitGemmArgs g;
    g.a = r.at<uint8_t>(x) + walk.x_base;
    g.segments = int(segments.size());
    g.seg_offset = segments.data();
    g.seg_words = seg_words;
    g.tail = last_word;
    g.b = packed->codes.as<uint32_t>() + n0 / 16 * packed->block;
    g.b_block = packed->block;
    g.n = int(n1 - n0);
    g.n0 = int(y_base + n0);
    g.base = base->as<int32_t>();
    const int64_t size = e.out == Out::kU8 ? 1 : 4;
    char* result = r.at<char>(tail.result);
    g.c = bits ? result + (y_base + n0) / 8 : result + (y_base + n0) * size;
    if (bits) {
      g.threshold = threshold.data();
      g.flip = flip.data();
    }
    Epilogue shifted = e;
    if (shifted.residual) shifted.residual += y_base + n0;
    if (shifted.addend) shifted.addend += y_base + n0;
    g.epilogue = &shifted;
    g.tap = tap;
    uint8_t* signs_to = signs_value >= 0 ? r.at<uint8_t>(signs_value) : nullptr;
    if (!sign) g.signs = signs_to;
    g.sign_at = sign_at.data();
    g.sign_flip = sign_flip.data();
    g.a_step = walk.x_step[3];
    g.c_step = walk.y_step[3];
    g.r_step = walk.r_step[3];
    g.s_step = s_step[3];
    g.border = border[3].empty() ? nullptr : border[3].data();
    constexpr int kLines = 64;
    BitLine line[kLines];
    g.line = line;
    for (int64_t m = m0; m < m1;) {
      g.lines = 0;
      for (; g.lines < kLines && m < m1; m += line[g.lines++].m) line[g.lines] = line_of(m, m1);
      fn(g);
      for (int i = 0; i < g.lines && sign; ++i)
        signs.run(sign, size, result + line[i].c * size, walk.y_step[3], signs_to + line[i].s, s_step[3], line[i].m);
    }
  }

  // The rows from `first` on that lie evenly, but none from `end` on.
  BitLine line_of(int64_t first, int64_t end) const {
    int64_t index[4];
    walk.places(first, index);
    BitLine l;
    for (int a = 0; a < 4; ++a) {
      l.a += index[a] * walk.x_step[a];
      l.c += index[a] * walk.y_step[a];
      l.r += index[a] * walk.r_step[a];
      l.s += index[a] * s_step[a];
      if (a < 3 && !border[a].empty()) l.base += border[a][size_t(index[a])];
    }
    l.first = int(index[3]);
    l.m = int(std::min(walk.count[3] - index[3], end - first));
    l.m0 = int(first);
    return l;
  }
};

// Splits rows and columns among tasks. depth: bits of K.
void share(BitStep& s, int threads, int64_t depth) {
  const int64_t work = s.rows * s.n * depth / 32;
  const auto [parts, pieces] = parts_of(threads, work, 100000, 12e3);
  s.by_columns = s.signs_value < 0 && s.n > 4 * s.rows && s.n >= 64 * parts;
  s.pieces = s.by_columns ? cut(s.n, parts, pieces, 64, 64) : cut(s.rows, parts, pieces, 1, 12);
  s.tasks = s.pieces.tasks();
}

// The op's own results as bits: a `sign` that alone reads the accumulators.
const OpNode* take_signs(Builder& b, int number, Tail& tail) {
  Plan& plan = b.plan;
  if (tail.last_op != number) return nullptr;
  const int after = b.follower(number, {"sign"});
  if (after < 0 || !Signs::of(plan, plan.ops[after]).flat()) return nullptr;
  b.done.insert(after);
  tail.ops += "+sign";
  tail.last_op = after;
  tail.result = plan.ops[after].out[0];
  return &plan.ops[after];
}

struct Thresholds {
  std::vector<int32_t> at;
  std::vector<uint16_t> flip;
};

Thresholds thresholds_of(const Plan& plan, const OpNode& op, int64_t columns) {
  Thresholds t;
  const Constant& c = plan.constant(op.in[1]);
  require(c.dtype == PW_I32, "thresholds of accumulators are integers");
  t.at.assign(size_t((columns + 63) / 64 * 64), 0);
  t.flip.assign(size_t((columns + 63) / 64 * 4), 0);
  for (int64_t i = 0; i < columns; ++i) t.at[size_t(i)] = static_cast<const int32_t*>(c.data)[c.count() == 1 ? 0 : i];
  if (op.input(2) >= 0) {
    const auto* f = static_cast<const uint8_t*>(plan.constant(op.in[2]).data);
    for (int64_t i = 0; i < columns; ++i) t.flip[size_t(i / 16)] |= uint16_t(f[i] ? 1u << (i % 16) : 0);
  }
  return t;
}

// A `sign` op among the readers of the step's result that the step can do as well; -1: none.
int also_signed(Builder& b, const Tail& tail, int64_t columns, int64_t groups) {
  Plan& plan = b.plan;
  if (tail.base.out == Out::kI32 || groups > 1) return -1;
  for (int reader : plan.values[tail.result].readers) {
    const OpNode& op = plan.ops[reader];
    if (op.kind == "sign" && !b.done.count(reader) && plan.values[op.in[0]].dims.back() == columns) return reader;
  }
  return -1;
}

std::string key_of(int constant, std::initializer_list<int64_t> numbers) {
  std::string key = std::to_string(constant) + ":bits";
  for (int64_t n : numbers) key += ":" + std::to_string(n);
  return key;
}

// The signs of the step's results: in the product where they are floats, else after it.
void sign_results(BitStep& s, const Plan& plan, const OpNode& op) {
  const Steps4 steps = steps_of(plan.values[op.out[0]]);
  s.signs = Signs::of(plan, op);
  s.signs_value = op.out[0];
  s.s_step[0] = steps.image;
  for (int a = 0; a < 3; ++a) s.s_step[a + 1] = steps.axis[a];
  s.tail.ops += "+sign";
  if (s.tail.base.out != Out::kF32 || s.tail.row_scale >= 0 || !s.signs.flat()) {
    const char* symbol;
    s.sign = sign_kernel(plan, plan.values[op.in[0]].dtype, &symbol);
    return;
  }
  const auto* at = reinterpret_cast<const float*>(s.signs.threshold.data());
  const int64_t padded = (s.n + 63) / 64 * 64;
  s.sign_at.assign(size_t(padded), 0.0f);
  s.sign_flip.assign(size_t(padded / 16), 0);
  for (int64_t i = 0; i < s.n; ++i) {
    s.sign_at[size_t(i)] = at[s.signs.each ? i : 0];
    const bool flip = !s.signs.flip.empty() && (s.signs.flip[size_t(i / 8)] >> (i % 8) & 1);
    s.sign_flip[size_t(i / 16)] |= uint16_t(unsigned(flip) << (i % 16));
  }
}

void describe(BitStep& s, const Plan& plan, const OpNode& op) {
  s.ops = s.tail.ops;
  s.site = op.site;
  s.kernel = plan.kernels->row[k_bit_gemm]->symbol;
  s.reads = {s.x, s.tail.residual, s.tail.row_scale};
  if (s.threshold.empty() && s.rows * s.n == plan.values[s.tail.result].count()) s.over = s.tail.residual;
  s.writes = {s.tail.result};
  if (s.signs_value >= 0) s.writes.push_back(s.signs_value);
}

// In memory that vectors read without crossing lines.
std::shared_ptr<const Buffer> aligned(const std::vector<int32_t>& numbers) {
  auto b = std::make_shared<Buffer>(int64_t(numbers.size() * 4));
  std::memcpy(b->as<int32_t>(), numbers.data(), numbers.size() * 4);
  return b;
}

// What the sum of K products of bits starts from: K and the bias.
std::vector<int32_t> depth_and_bias(const Plan& plan, const OpNode& op, int64_t columns, int64_t depth) {
  std::vector<int32_t> base(size_t((columns + 63) / 64 * 64), int32_t(depth));
  if (op.input(2) >= 0) {
    const auto* bias = static_cast<const int32_t*>(plan.constant(op.in[2]).data);
    for (int64_t i = 0; i < columns; ++i) base[size_t(i)] += bias[i];
  }
  return base;
}

// Sums over the taps that a border cuts off, for every combination of cuts: there the input's bits are 0, which counts
// as -1, where a padded zero would add nothing. Fills in `border`.
std::vector<int32_t> border_cases(BitStep& s, const Geometry& g, const Columns& w, const std::vector<int32_t>& plain) {
  std::vector<std::pair<int64_t, int64_t>> cases[3];  // taps that lie inside, first and last + 1
  for (int a = 0; a < 3; ++a) {
    s.border[a + 1].resize(size_t(g.out[a]));
    for (int64_t o = 0; o < g.out[a]; ++o) {
      const int64_t at = o * g.stride[a] - g.begin[a];
      int64_t first = 0, last = g.kernel[a];
      while (first < g.kernel[a] && at + first * g.dilation[a] < 0) ++first;
      while (last > first && at + (last - 1) * g.dilation[a] >= g.in[a]) --last;
      const auto found = std::find(cases[a].begin(), cases[a].end(), std::make_pair(first, last));
      s.border[a + 1][size_t(o)] = int32_t(found - cases[a].begin());
      if (found == cases[a].end()) cases[a].emplace_back(first, last);
    }
  }
  const auto n = [&](int a) { return int64_t(cases[a].size()); };
  const int64_t step = int64_t(plain.size());
  require(n(0) * n(1) * n(2) * step < (int64_t(1) << 28), "a convolution with too many kinds of borders");
  for (int32_t& v : s.border[1]) v *= int32_t(n(1) * n(2) * step);
  for (int32_t& v : s.border[2]) v *= int32_t(n(2) * step);
  for (int32_t& v : s.border[3]) v *= int32_t(step);
  std::vector<int32_t> sums(size_t(g.out_channels * w.taps));
  for (int64_t o = 0; o < g.out_channels; ++o)
    for (int64_t t = 0; t < w.taps; ++t) sums[size_t(o * w.taps + t)] = w.sum(o, t);
  std::vector<int32_t> base;
  for (const auto& z : cases[0])
    for (const auto& y : cases[1])
      for (const auto& x : cases[2]) {
        const size_t at = base.size();
        base.insert(base.end(), plain.begin(), plain.end());
        int64_t t = 0;
        for (int64_t i = 0; i < g.kernel[0]; ++i)
          for (int64_t j = 0; j < g.kernel[1]; ++j)
            for (int64_t k = 0; k < g.kernel[2]; ++k, ++t) {
              const bool inside = i >= z.first && i < z.second && j >= y.first && j < y.second && k >= x.first && k < x.second;
              for (int64_t o = 0; o < g.out_channels && !inside; ++o) base[at + size_t(o)] += sums[size_t(o * w.taps + t)];
            }
      }
  return base;
}

}  // namespace

void build_conv_binary(Builder& b, int number) {
  Plan& plan = b.plan;
  if (put_off(b, number)) return;
  const OpNode op = plan.ops[number];
  const auto& shape = op.ints("shape");  // [O, C / groups, *kernel]
  const Geometry g = geometry_of(plan, op, shape);
  Tail tail = make_tail(b, number, g.out_channels);
  const int64_t columns = g.out_channels / g.groups, channels = shape[1], pixel = (channels + 7) / 8;
  const OpNode* last = g.groups == 1 || columns % 16 == 0 ? take_signs(b, number, tail) : nullptr;
  const Thresholds cut = last ? thresholds_of(plan, *last, g.out_channels) : Thresholds();
  if (g.rows() == 0 || g.out_channels == 0) return;
  const int rank = plan.values[op.in[0]].rank(), dims = rank - 2;
  std::vector<int64_t> begin(size_t(rank), 0), end(size_t(rank), 0);
  for (int i = 0; i < dims; ++i) {
    begin[size_t(1 + i)] = g.begin[3 - dims + i];
    end[size_t(1 + i)] = g.end[3 - dims + i];
  }
  const int x = b.readable(op.in[0], begin, end, 0);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
  const Constant& weights = plan.constant(op.in[1]);
  const Columns w{static_cast<const uint8_t*>(weights.data), (channels * taps + 7) / 8, channels, taps};
  int also = also_signed(b, tail, g.out_channels, last ? 2 : g.groups);
  if (also >= 0) b.done.insert(also);
  const Value &xv = plan.values[x], &yv = plan.values[tail.result];
  require(xv.strides.back() == 1 && yv.strides.back() == 1, "channels must lie side by side");
  const Steps4 xs = steps_of(xv), ys = steps_of(yv);
  const Steps4 rs = tail.residual >= 0 ? steps_of(plan.values[tail.residual]) : ys;
  // taps of a kernel row lie side by side where pixels do
  const bool joined = g.groups == 1 && g.dilation[2] == 1 && (xs.axis[2] == pixel || g.kernel[2] == 1);
  const int64_t per_segment = joined ? g.kernel[2] : 1, words = (per_segment * pixel + 3) / 4;
  const int64_t used = per_segment * pixel % 4;
  const std::vector<int64_t> segments = taps_of(g, xs, joined);
  std::shared_ptr<const Buffer> base;
  for (int64_t group = 0; group < g.groups; ++group) {
    auto step = std::make_unique<BitStep>();
    step->packed = plan.model->packed(key_of(plan.values[op.in[1]].index, {group, per_segment}), [&] {
      return pack_bits(w, group * columns, columns, per_segment, pixel, words);
    });
    std::vector<int32_t> cases = border_cases(*step, g, w, depth_and_bias(plan, op, g.out_channels, channels * taps));
    if (!base) base = aligned(cases);
    step->base = base;
    step->tail = tail;
    step->tail.finish();
    step->fn = plan.kernels->bit_gemm;
    step->x = x;
    step->segments = segments;
    step->seg_words = int(words);
    step->last_word = used ? (1u << (8 * used)) - 1 : ~0u;
    step->n = columns;
    step->walk = Walk::over(g, xs, ys, rs);
    step->walk.x_base += group * pixel;
    step->y_base = group * columns;
    step->threshold = cut.at;
    step->flip = cut.flip;
    if (also >= 0) sign_results(*step, plan, plan.ops[also]);
    if (joined && pixel == 2) step->tap = 2;
    step->rows = g.rows();
    share(*step, plan.threads, channels * taps);
    describe(*step, plan, op);
    step->macs = g.rows() * columns * channels * taps;
    b.add(std::move(step));
  }
}

void build_linear_binary(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const int64_t k = op.integer("n"), n = plan.values[op.in[1]].dims[0], bytes = (k + 7) / 8;
  Tail tail = make_tail(b, number, n);
  const OpNode* last = take_signs(b, number, tail);
  const Thresholds cut = last ? thresholds_of(plan, *last, n) : Thresholds();
  const int64_t rows = bytes ? plan.values[op.in[0]].count() / bytes : 0;
  if (rows == 0 || n == 0) return;
  const int x = linear_rows(b, op);
  const Value& y = plan.values[tail.result];
  auto step = std::make_unique<BitStep>();
  const Columns w{static_cast<const uint8_t*>(plan.constant(op.in[1]).data), bytes, k, 1};
  const int64_t words = (bytes + 3) / 4;
  step->packed = plan.model->packed(key_of(plan.values[op.in[1]].index, {}), [&] {
    return pack_bits(w, 0, n, 1, bytes, words);
  });
  step->base = aligned(depth_and_bias(plan, op, n, k));
  step->tail = std::move(tail);
  step->tail.finish();
  step->fn = plan.kernels->bit_gemm;
  step->x = x;
  step->segments = {0};
  step->seg_words = int(words);
  step->last_word = bytes % 4 ? (1u << (8 * (bytes % 4))) - 1 : ~0u;
  step->n = n;
  step->threshold = cut.at;
  step->flip = cut.flip;
  step->walk = Walk::over(rows, bytes, y, step->tail.residual < 0 ? nullptr : &plan.values[step->tail.residual]);
  step->rows = rows;
  share(*step, plan.threads, k);
  describe(*step, plan, op);
  step->macs = rows * n * k;
  b.add(std::move(step));
}

}  // namespace pw
