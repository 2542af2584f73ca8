// Codes of a few bits: linear layers of few rows read them packed, as memory is what such layers wait for.
#include <algorithm>
#include <cstring>

#include "engine/steps/product.h"

namespace pw {
namespace {

constexpr int64_t kFewRows = 8;
constexpr int64_t kFewRowsOfTiles = 3;  // more are faster on expanded weights and tiles, if the cache holds the weights
constexpr int64_t kCached = int64_t(2) << 20;
constexpr int64_t kDeepest = 65536;  // sums of bytes as they are stay inside int32

struct Coded {  // what an `unpack` op says
  const uint8_t* codes;
  const int8_t* table;
  const int8_t* zero;  // of the rows, or null
  int64_t rows, columns, row_bytes;
  int bits;

  int code(int64_t row, int64_t column) const {
    const int per = 8 / bits;
    return codes[row * row_bytes + column / per] >> (column % per * bits) & ((1 << bits) - 1);
  }

  int8_t level(int64_t row, int64_t column) const {
    const int8_t entry = table[code(row, column)];
    return zero ? int8_t(std::clamp(entry - zero[row], -127, 127)) : entry;
  }
};

Coded coded(const Plan& plan, const OpNode& op) {
  const Constant &codes = plan.constant(op.in[0]), &table = plan.constant(op.in[1]);
  const std::vector<int64_t>& dims = plan.values[op.out[0]].dims;
  const int bits = int(op.integer("bits"));
  const Constant* zero = op.in.size() > 2 ? &plan.constant(op.in[2]) : nullptr;
  Coded c{static_cast<const uint8_t*>(codes.data), static_cast<const int8_t*>(table.data),
          zero ? static_cast<const int8_t*>(zero->data) : nullptr, dims[0], 1, codes.dims[1], bits};
  for (size_t i = 1; i < dims.size(); ++i) c.columns *= dims[i];
  require(table.dtype == PW_I8, "levels of 16 bits are expanded before they come here");
  require(bits == 1 || bits == 2 || bits == 4, "codes of so many bits have no packed form");
  require(table.count() == int64_t(1) << bits && codes.dims[0] == c.rows &&
              codes.dims[1] == (c.columns * bits + 7) / 8, "packed codes do not fit their table or shape");
  require(!zero || (zero->dtype == PW_I8 && zero->count() == c.rows), "zero points of packed codes are i8, one for each row");
  return c;
}

// The panels of GemmBitsArgs. Codes that a table of two bits cannot tell by steps are stored with four.
Packed pack_panels(const Coded& w, int bits) {
  const int64_t panel = bits == 1 ? 128 : 64, fields = 8 / bits, quad = panel / 2 * bits;
  Packed p;
  p.block = (w.columns + 3) / 4 * quad;
  const int64_t panels = (w.rows + panel - 1) / panel;
  p.codes = Buffer(panels * p.block);
  p.colsum.assign(size_t((w.rows + 63) / 64 * 64), 0);
  uint8_t* out = p.codes.as<uint8_t>();
  std::memset(out, 0, size_t(panels * p.block));
  for (int64_t n = 0; n < w.rows; ++n) {
    const int64_t block = n % panel / 16, shift = block % fields * bits;
    uint8_t* column = out + n / panel * p.block + block / fields * 64 + n % 16 * 4;
    int32_t sum = 0;
    for (int64_t k = 0; k < w.columns; ++k) {
      int code = w.code(n, k);
      sum += w.table[code];
      if (bits == 2 && block == 3) code ^= 2;
      column[k / 4 * quad + k % 4] |= uint8_t(code << shift);
    }
    p.colsum[size_t(n)] = sum;
  }
  return p;
}

struct BitsStep : Step {
  GemmBitsFn fn;
  std::shared_ptr<const Packed> packed;
  Tail tail;
  int8_t table[16] = {};
  int32_t base = 0, step = 0;
  int x, bits;
  int64_t m, n, k, panel, column_chunk;
  int64_t y_row[kFewRows], r_row[kFewRows];

  void run(const Run& r, int task, int) const override {
    const int64_t n0 = task * column_chunk, n1 = std::min(n, n0 + column_chunk);
    Epilogue e = tail.at(r);
    if (e.residual) e.residual += n0;
    if (e.addend) e.addend += n0;
    GemmBitsArgs g;
    g.a = r.at<uint8_t>(x);
    g.lda = k;
    g.m = int(m);
    g.k = int(k);
    g.bits = bits;
    g.b = packed->codes.as<uint8_t>() + n0 / panel * packed->block;
    g.b_panel = packed->block;
    g.n = int(n1 - n0);
    g.n0 = int(n0);
    g.table = table;
    g.base = base;
    g.step = step;
    g.c = r.at<char>(tail.result) + n0 * (e.out == Out::kU8 ? 1 : 4);
    g.c_offset = y_row;
    g.r_offset = r_row;
    g.epilogue = &e;
    fn(g);
  }
};

// Elements from a value's first element to each of its rows.
void row_offsets(const Value& v, int64_t* offsets) {
  const int outer = v.rank() - 1;
  require(v.strides[size_t(outer)] == 1 || v.dims[size_t(outer)] == 1, "the columns of a row lie side by side");
  const int64_t rows = v.dims[size_t(outer)] ? v.count() / v.dims[size_t(outer)] : 0;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t rest = i;
    offsets[i] = 0;
    for (int a = outer - 1; a >= 0; --a) {
      offsets[i] += rest % v.dims[size_t(a)] * v.strides[size_t(a)];
      rest /= v.dims[size_t(a)];
    }
  }
}

struct UnpackStep : Step {
  Coded w;
  int y;

  void run(const Run& r, int, int) const override {
    int8_t* out = r.at<int8_t>(y);
    for (int64_t n = 0; n < w.rows; ++n)
      for (int64_t k = 0; k < w.columns; ++k) *out++ = w.level(n, k);
  }
};

}  // namespace

std::vector<int8_t> unpacked_codes(const Plan& plan, const OpNode& unpack) {
  const Coded w = coded(plan, unpack);
  std::vector<int8_t> out(size_t(w.rows * w.columns));
  for (int64_t n = 0; n < w.rows; ++n)
    for (int64_t k = 0; k < w.columns; ++k) out[size_t(n * w.columns + k)] = w.level(n, k);
  return out;
}

bool build_linear_bits(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const OpNode& unpack = plan.ops[plan.values[op.in[1]].producer];
  const Coded w = coded(plan, unpack);
  const int64_t n = w.rows, k = w.columns, rows = k ? plan.values[op.in[0]].count() / k : 0;
  if (w.zero || rows == 0 || n == 0 || rows > kFewRows || k > kDeepest) return false;
  // without tiles: more than four rows are decoded for twice, which eight rows are worth
  const bool many = plan.kernels->isa == kAmx ? rows > kFewRowsOfTiles : rows > kFewRows / 2 && rows < kFewRows;
  if (many && n * k < kCached) return false;
  Tail tail = make_tail(b, number, n);
  const int x = linear_rows(b, op);
  auto step = std::make_unique<BitsStep>();
  std::memcpy(step->table, w.table, size_t(1) << w.bits);
  step->bits = w.bits;
  step->base = w.table[0];
  step->step = w.table[1] - w.table[0];
  for (int c = 0; c < 1 << w.bits && w.bits < 4; ++c)
    if (w.table[c] != step->base + c * step->step) step->bits = 4;
  const int bits = step->bits;
  const std::string key = std::to_string(plan.values[unpack.in[0]].index) + ":bits:" + std::to_string(bits);
  step->packed = plan.model->packed(key, [&] { return pack_panels(w, bits); });
  fold_zero(plan, tail, op, step->packed->colsum, n, k);
  row_offsets(plan.values[tail.result], step->y_row);
  row_offsets(plan.values[tail.residual < 0 ? tail.result : tail.residual], step->r_row);
  step->tail = std::move(tail);
  step->tail.finish();
  step->fn = plan.kernels->gemm_bits;
  step->kernel = plan.kernels->row[k_gemm_bits]->symbol;
  step->x = x;
  step->m = rows;
  step->n = n;
  step->k = k;
  step->panel = bits == 1 ? 128 : 64;
  step->macs = rows * n * k;
  const int64_t panels = (n + step->panel - 1) / step->panel;
  const int64_t pieces = plan.threads > 1 && step->macs > 400000 ? std::min<int64_t>(panels, plan.threads * 2) : 1;
  step->column_chunk = (panels + pieces - 1) / pieces * step->panel;
  step->tasks = int((n + step->column_chunk - 1) / step->column_chunk);
  step->ops = step->tail.ops;
  step->site = op.site;
  step->bytes = rows * k + n * k * bits / 8 + rows * n * (step->tail.base.out == Out::kU8 ? 1 : 4);
  step->reads = {x, step->tail.residual, step->tail.row_scale, step->tail.row_zero};
  step->writes = {step->tail.result};
  b.add(std::move(step));
  return true;
}

// Linear layers take the codes as they are stored; for all else they are expanded at every run.
void build_unpack(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  const Value& y = plan.values[op.out[0]];
  bool wanted = y.kind == PW_OUTPUT || std::count(plan.outputs.begin(), plan.outputs.end(), op.out[0]) > 0;
  for (int reader : y.readers) wanted = wanted || plan.ops[reader].kind != "linear" || plan.ops[reader].in[0] == op.out[0];
  if (!wanted || y.count() == 0) return;
  require(y.dense(), "codes are expanded densely");
  auto step = std::make_unique<UnpackStep>();
  step->w = coded(plan, op);
  step->y = op.out[0];
  step->ops = op.kind;
  step->site = op.site;
  step->writes = {step->y};
  b.add(std::move(step));
}

}  // namespace pw
