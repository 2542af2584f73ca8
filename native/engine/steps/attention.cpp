// Products of activations with activations: matrix products and attention, head by head.
#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "engine/steps/epilogue.h"

namespace pw {
namespace {

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int32_t byte_sum(const uint8_t* x, int64_t n) {
#if defined(__SSE2__)
  __m128i sum = _mm_setzero_si128();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    sum = _mm_add_epi64(sum, _mm_sad_epu8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)), _mm_setzero_si128()));
  int32_t total = _mm_cvtsi128_si32(sum) + _mm_extract_epi16(sum, 4) + (_mm_extract_epi16(sum, 5) << 16);
  for (; i < n; ++i) total += x[i];
  return total;
#else
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
#endif
}

// Bump allocation inside a step's scratch memory; also used to size it.
struct Carve {
  char* at;
  int64_t used = 0;
  explicit Carve(char* base) : at(base) {}
  template <class T>
  T* take(int64_t count) {
    T* p = at ? reinterpret_cast<T*>(at + used) : nullptr;
    used += padded(count * int64_t(sizeof(T)), 64) + 64;
    return p;
  }
};

// One product a [m, k] x b [k, n] of codes, b packed into scratch. The accumulator of (a - za) (b - zb) is
//   sum a b' - zb' sum a - za sum b' + k za zb'   with b' = b - 128, zb' = zb - 128.
struct Operands {
  const Kernels* kernels;
  int64_t m, n, k;
  int64_t a_stride, b_stride;  // bytes between rows
  bool transposed;             // b is [n, k]
  int32_t a_zero, b_zero;
  int k_align;

  int64_t k_pad() const { return padded(k, k_align); }
  int64_t columns() const { return padded(n, 64); }

  struct Space {
    int8_t* b;
    int32_t *colsum, *bias, *constant, *row_sums;
    int64_t *x_at, *y_at;
  };
  Space carve(Carve& c) const {
    return {c.take<int8_t>(columns() / 16 * k_pad() * 16 + kSlack), c.take<int32_t>(columns()),
            c.take<int32_t>(columns()), c.take<int32_t>(columns()), c.take<int32_t>(m), c.take<int64_t>(m),
            c.take<int64_t>(m)};
  }

  // Packs b and prepares the corrections.
  void prepare(const Space& s, const uint8_t* b) const {
    kernels->pack({b, b_stride, int(k), int(n), int(k_pad()), transposed ? 1 : 0, s.b, k_pad() * 16, s.colsum});
    const int32_t zb = b_zero - 128;
    for (int64_t i = 0; i < n; ++i) {
      s.bias[i] = -a_zero * s.colsum[i] + int32_t(k) * a_zero * zb;
      s.constant[i] = zb;
    }
    for (int64_t i = n; i < columns(); ++i) s.bias[i] = s.constant[i] = 0;
  }

  // Rows of a against the packed b; e.bias, row_zero and colsum are taken up.
  void multiply(const Space& s, const uint8_t* a, int64_t rows, void* c, int64_t c_stride, Epilogue e) const {
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* row = a + i * a_stride;
      s.row_sums[i] = byte_sum(row, k);
      s.x_at[i] = i * a_stride;
      s.y_at[i] = i * c_stride;
    }
    e.bias = s.bias;
    e.colsum = s.constant;
    e.row_zero = s.row_sums;
    e.row_step = 1;
    const int64_t segment = 0;
    GemmArgs g;
    g.a = a;
    g.row_offset = s.x_at;
    g.m = int(rows);
    g.seg_offset = &segment;
    g.seg_len = int(k);
    g.seg_pad = int(k_pad());
    g.b = s.b;
    g.b_block = k_pad() * 16;
    g.n = int(n);
    g.c = c;
    g.c_offset = s.y_at;
    g.r_offset = s.y_at;
    g.epilogue = &e;
    kernels->gemm(g);
  }
};

// Leading axes of batched operands: where each product's matrices begin.
struct Batches {
  int64_t count = 1;
  std::vector<std::vector<int64_t>> offsets;  // per operand, in elements
};

Batches batches_of(const std::vector<int64_t>& lead, const std::vector<const Value*>& operands, int matrix_axes = 2) {
  Batches b;
  for (int64_t d : lead) b.count *= d;
  for (const Value* v : operands) {
    std::vector<int64_t> strides(lead.size(), 0);
    const int own = v->rank() - matrix_axes;
    for (int i = 0; i < own; ++i) {
      const size_t at = lead.size() - size_t(own) + size_t(i);
      strides[at] = v->dims[size_t(i)] == 1 ? 0 : v->strides[size_t(i)];
    }
    std::vector<int64_t> offsets(size_t(b.count), 0), index(lead.size(), 0);
    for (int64_t n = 0; n < b.count; ++n) {
      for (size_t i = 0; i < lead.size(); ++i) offsets[size_t(n)] += index[i] * strides[i];
      for (int i = int(lead.size()) - 1; i >= 0; --i) {
        if (++index[size_t(i)] < lead[size_t(i)]) break;
        index[size_t(i)] = 0;
      }
    }
    b.offsets.push_back(std::move(offsets));
  }
  return b;
}

struct MatmulStep : Step {
  Operands o;
  Tail tail;
  Batches batches;
  int a, b;
  int64_t a_pad = 0;
  void run(const Run& r, int task, int thread) const override {
    const int64_t from = batches.count * task / tasks, to = batches.count * (task + 1) / tasks;
    const Epilogue base = tail.at(r);
    const int64_t size = base.out == Out::kU8 ? 1 : 4;
    for (int64_t n = from; n < to; ++n) {
      Carve carve(r.scratch(thread));
      const Operands::Space s = o.carve(carve);
      o.prepare(s, r.at<uint8_t>(b) + batches.offsets[1][size_t(n)]);
      Epilogue e = base;
      const int64_t at = batches.offsets[2][size_t(n)];
      if (e.residual) e.residual += at;
      if (e.addend) e.addend += at;
      o.multiply(s, r.at<uint8_t>(a) + batches.offsets[0][size_t(n)], o.m, r.at<char>(tail.result) + at * size, o.n, e);
    }
  }
};

struct AttentionStep : Step {
  Operands scores, values;
  Tail tail;
  Batches batches;              // q, k, v, result, mask
  int q, k, v, mask = -1;
  int64_t t, s_len, d, e_len, y_row;
  int64_t mask_row = 0;
  int mask_step = 1;
  float factor;
  bool causal;
  int64_t chunk;

  int64_t layout(char* base, Operands::Space* first, Operands::Space* second, int32_t** acc, float** line,
                 uint8_t** p) const {
    Carve c(base);
    *first = scores.carve(c);
    *second = values.carve(c);
    *acc = c.take<int32_t>(chunk * padded(s_len, 16));
    *line = c.take<float>(4 * padded(s_len, 16));
    *p = c.take<uint8_t>(chunk * padded(s_len, 64) + kSlack);
    return c.used;
  }

  void run(const Run& r, int task, int thread) const override {
    const int64_t from = batches.count * task / tasks, to = batches.count * (task + 1) / tasks;
    Operands::Space first, second;
    int32_t* acc;
    float* line;
    uint8_t* p;
    layout(r.scratch(thread), &first, &second, &acc, &line, &p);
    const Epilogue base = tail.at(r);
    const int64_t size = base.out == Out::kU8 ? 1 : 4;
    const int64_t p_row = padded(s_len, 64), acc_row = padded(s_len, 16);
    for (int64_t n = from; n < to; ++n) {
      const uint8_t* queries = r.at<uint8_t>(q) + batches.offsets[0][size_t(n)];
      scores.prepare(first, r.at<uint8_t>(k) + batches.offsets[1][size_t(n)]);
      values.prepare(second, r.at<uint8_t>(v) + batches.offsets[2][size_t(n)]);
      const int64_t y_at = batches.offsets[3][size_t(n)];
      const float* bias = mask >= 0 ? r.at<float>(mask) + batches.offsets[4][size_t(n)] : nullptr;
      for (int64_t row = 0; row < t; row += chunk) {
        const int64_t rows = std::min(chunk, t - row);
        scores.multiply(first, queries + row * scores.a_stride, rows, acc, acc_row, Epilogue());
        scores.kernels->probabilities({acc, acc_row, bias ? bias + row * mask_row : nullptr, mask_row, mask_step, p,
                                       p_row, line, int(rows), int(s_len), causal ? int(row + 1) : int(s_len),
                                       causal ? 1 : 0, factor});
        Epilogue e = base;
        const int64_t at = y_at + row * y_row;
        if (e.residual) e.residual += at;
        if (e.addend) e.addend += at;
        values.multiply(second, p, rows, r.at<char>(tail.result) + at * size, y_row, e);
      }
    }
  }
};

}  // namespace

void build_matmul(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const bool transposed = op.flag("transpose_b");
  const Value& out = plan.values[op.out[0]];
  Tail tail = make_tail(b, number, out.dims.back());
  const Value &av = plan.values[op.in[0]], &bv = plan.values[op.in[1]], &y = plan.values[tail.result];
  require(av.dense() && bv.dense() && y.dense(), "matrix products read and write dense matrices");
  auto step = std::make_unique<MatmulStep>();
  const std::vector<int64_t> none(size_t(av.rank()), 0);
  step->a = b.readable(op.in[0], none, none, 0);
  step->b = op.in[1];
  const Value& a = plan.values[step->a];
  const Value& bw = plan.values[step->b];
  const size_t last = size_t(a.rank()) - 1, b_last = size_t(bw.rank()) - 1;
  step->o = {plan.kernels, a.dims[last - 1], transposed ? bw.dims[b_last - 1] : bw.dims[b_last], a.dims[last],
             a.dims[last], bw.dims[b_last], transposed, int32_t(op.integer("a_zero")), int32_t(op.integer("b_zero")),
             plan.k_align()};
  const std::vector<int64_t> lead(plan.values[tail.result].dims.begin(), plan.values[tail.result].dims.end() - 2);
  step->batches = batches_of(lead, {&a, &bw, &plan.values[tail.result]});
  tail.finish();
  step->tail = std::move(tail);
  Carve size(nullptr);
  step->o.carve(size);
  step->scratch = size.used;
  step->ops = step->tail.ops;
  step->site = op.site;
  step->kernel = plan.kernels->row[k_gemm]->symbol;
  step->macs = step->batches.count * step->o.m * step->o.n * step->o.k;
  step->bytes = a.count() + bw.count() + plan.values[step->tail.result].count() * 4;
  step->tasks = plan.threads > 1 && step->macs > 100000 ? int(std::min<int64_t>(step->batches.count, plan.threads * 4)) : 1;
  step->tasks = std::max(step->tasks, 1);
  step->reads = {step->a, step->b, step->tail.residual};
  step->writes = {step->tail.result};
  if (step->o.m * step->o.n > 0) b.add(std::move(step));
}

bool swaps_heads(const Plan& plan, int op) {
  const OpNode& node = plan.ops[size_t(op)];
  if (node.kind != "transpose") return false;
  const auto& perm = node.ints("perm");
  return perm.size() == 4 && perm[0] == 0 && perm[1] == 2 && perm[2] == 1 && perm[3] == 3;
}

bool swaps_for_attention(const Plan& plan, int op) {
  if (!swaps_heads(plan, op)) return false;
  const OpNode& node = plan.ops[size_t(op)];
  const int reader = plan.sole_reader(node.out[0]);
  if (reader < 0 || plan.ops[size_t(reader)].kind != "attention") return false;
  const Value& in = plan.values[size_t(node.in[0])];
  // rows are read a little beyond their end: only the arena allows that
  return plan.ops[size_t(reader)].input(3) != node.out[0] && in.dense() &&
         plan.values[size_t(in.root)].kind == PW_TEMPORARY;
}

namespace {

// An operand of attention as [..., rows, width] with strides; `from` is the value that is read.
Value operand(const Plan& plan, int value, int* from) {
  Value v = plan.values[size_t(value)];
  *from = value;
  if (v.producer < 0 || !swaps_for_attention(plan, v.producer)) return v;
  *from = plan.ops[size_t(v.producer)].in[0];
  v.strides = plan.values[size_t(*from)].strides;
  std::swap(v.strides[1], v.strides[2]);
  return v;
}

}  // namespace

void build_attention(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  Tail tail = make_tail(b, number, plan.values[op.out[0]].dims.back());
  auto step = std::make_unique<AttentionStep>();
  const Value k = operand(plan, op.in[1], &step->k), v = operand(plan, op.in[2], &step->v);
  Value q = operand(plan, op.in[0], &step->q);
  if (step->q == op.in[0]) {
    const std::vector<int64_t> none(size_t(q.rank()), 0);
    step->q = b.readable(op.in[0], none, none, 0);
    q = plan.values[step->q];
  }
  step->mask = op.input(3);
  Value y = plan.values[tail.result];
  if (const int swap = plan.sole_reader(tail.result); swap > tail.last_op && swaps_heads(plan, swap) && tail.residual < 0) {
    tail.result = plan.ops[size_t(swap)].out[0];
    tail.ops += "+transpose";
    b.done.insert(swap);
    y.strides = plan.values[tail.result].strides;
    std::swap(y.strides[1], y.strides[2]);
  }
  for (const Value* each : std::initializer_list<const Value*>{&q, &k, &v, &y})
    require(each->strides.back() == 1, "attention reads and writes whole rows");
  const size_t last = size_t(q.rank()) - 1;
  step->t = q.dims[last - 1];
  step->d = q.dims[last];
  step->s_len = k.dims[last - 1];
  step->e_len = v.dims[last];
  step->factor = op.real("factor");
  step->causal = op.flag("causal");
  step->chunk = std::min<int64_t>(step->t, 96);
  step->scores = {plan.kernels, step->chunk, step->s_len, step->d, q.strides[last - 1], k.strides[last - 1], true,
                  int32_t(op.integer("q_zero")), int32_t(op.integer("k_zero")), plan.k_align()};
  step->values = {plan.kernels, step->chunk, step->e_len, step->s_len, padded(step->s_len, 64), v.strides[last - 1], false, 0,
                  int32_t(op.integer("v_zero")), plan.k_align()};
  step->y_row = y.strides[last - 1];
  const std::vector<int64_t> lead(q.dims.begin(), q.dims.end() - 2);
  std::vector<const Value*> operands = {&q, &k, &v, &y};
  Value mask;
  if (step->mask >= 0) {
    mask = plan.values[step->mask];
    require(mask.dense(), "attention reads a dense mask");
    while (mask.rank() < 2) {
      mask.dims.insert(mask.dims.begin(), 1);
      mask.strides.insert(mask.strides.begin(), 0);
    }
    const size_t m_last = size_t(mask.rank()) - 1;
    step->mask_row = mask.dims[m_last - 1] == 1 ? 0 : mask.strides[m_last - 1];
    step->mask_step = mask.dims[m_last] == 1 && step->s_len > 1 ? 0 : 1;
    operands.push_back(&mask);
  }
  step->batches = batches_of(lead, operands);
  tail.finish();
  step->tail = std::move(tail);
  Operands::Space first, second;
  int32_t* acc;
  float* line;
  uint8_t* p;
  step->scratch = step->layout(nullptr, &first, &second, &acc, &line, &p);
  step->ops = step->tail.ops;
  step->site = op.site;
  step->kernel = plan.kernels->row[k_gemm]->symbol;
  step->macs = step->batches.count * step->t * step->s_len * (step->d + step->e_len);
  step->bytes = q.count() + k.count() + v.count() + y.count();
  step->tasks = plan.threads > 1 && step->macs > 50000 ? int(std::min<int64_t>(step->batches.count, plan.threads * 6)) : 1;
  step->tasks = std::max(step->tasks, 1);
  step->reads = {step->q, step->k, step->v, step->mask, step->tail.residual};
  step->writes = {step->tail.result};
  if (step->t * step->s_len > 0) b.add(std::move(step));
}

}  // namespace pw
