// Products of two computed float matrices, and attention made of them: scores and probabilities stay in cache.
#include <algorithm>

#include "engine/rows.h"
#include "engine/steps/real_matrix.h"
#include "engine/steps/real_tail.h"

namespace pw {
namespace {

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where the matrices of an operand lie that is broadcast over leading axes.
std::vector<int64_t> batch_offsets(const Value& v, const std::vector<int64_t>& lead) {
  int64_t count = 1;
  for (int64_t d : lead) count *= d;
  std::vector<int64_t> out(size_t(count), 0), index(lead.size(), 0);
  const size_t own = size_t(std::max(v.rank() - 2, 0)), shift = lead.size() - own;
  for (int64_t i = 0; i < count; ++i) {
    for (size_t a = 0; a < own; ++a) out[size_t(i)] += v.dims[a] == 1 ? 0 : index[shift + a] * v.strides[a];
    for (int a = int(lead.size()) - 1; a >= 0; --a) {
      if (++index[size_t(a)] < lead[size_t(a)]) break;
      index[size_t(a)] = 0;
    }
  }
  return out;
}

// Bump allocation in scratch memory; also sizes it.
struct Carve {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t bytes) {
    char* p = base ? base + used : nullptr;
    used += padded(bytes, 64) + 64;
    return reinterpret_cast<T*>(p);
  }
};

struct FloatMatmulStep : Step {
  const Kernels* kernels;
  RightMatrix right;
  FloatTail tail;
  int a, b;
  int64_t m, batches;
  std::vector<int64_t> a_at, b_at;

  struct Space {
    void* packed;
    int64_t *x_at, *y_at;
  };
  Space carve(Carve& c) const {
    return {c.take<void>(right.bytes() + kSlack), c.take<int64_t>(m * 8), c.take<int64_t>(m * 8)};
  }

  void run(const Run& r, int task, int thread) const override {
    Carve c{r.scratch(thread)};
    const Space s = carve(c);
    const int64_t in = right.half ? 2 : 4, out = tail.out_bf16 ? 2 : 4, n = right.n;
    RealTail t = tail.at(r, 0);
    t.r_offset = s.y_at;
    for (int64_t i = 0; i < m; ++i) {
      s.x_at[i] = i * right.k;
      s.y_at[i] = i * n;
    }
    for (int64_t batch = batches * task / tasks; batch < batches * (task + 1) / tasks; ++batch) {
      right.pack(r.at<char>(b) + b_at[size_t(batch)] * in, s.packed);
      RealTail mine = t;
      const int64_t at = batch * m * n;
      if (t.addend) mine.addend = static_cast<const char*>(t.addend) + at * (t.addend_bf16 ? 2 : 4);
      char* y = r.at<char>(tail.result) + at * out;
      right.multiply(*kernels, r.at<char>(a) + a_at[size_t(batch)] * in, s.x_at, m, s.packed, y, s.y_at, mine);
      if (tail.after) {
        float* values = reinterpret_cast<float*>(y);
        tail.after({values, values, m * n, tail.p, tail.q});
      }
    }
  }
};

constexpr int64_t kQueries = 64;  // rows of scores at a time

struct FloatAttentionStep : Step {
  const Kernels* kernels;
  RightMatrix keys, values;
  FloatTail tail;
  int q, k, v;
  bool scaled = false, narrow = false;  // probabilities are rounded to bf16
  float factor = 0;
  struct Mask {
    int value;
    std::vector<int64_t> at;
    int64_t row;
    int step;
  };
  std::vector<Mask> masks;
  int64_t queries, batches;
  std::vector<int64_t> q_at, k_at, v_at;

  struct Space {
    void *keys, *values;
    float* scores;
    uint16_t* rounded;
    int64_t *q_at, *s_at, *p_at, *y_at;
  };
  int64_t score_row() const { return padded(keys.n, 16); }
  int64_t rounded_row() const { return padded(keys.n, 32); }
  Space carve(Carve& c) const {
    const int64_t rows = kQueries * 8;
    return {c.take<void>(keys.bytes() + kSlack), c.take<void>(values.bytes() + kSlack),
            c.take<float>(kQueries * score_row() * 4), c.take<uint16_t>(narrow ? kQueries * rounded_row() * 2 : 0),
            c.take<int64_t>(rows), c.take<int64_t>(rows), c.take<int64_t>(rows), c.take<int64_t>(rows)};
  }

  void run(const Run& r, int task, int thread) const override {
    Carve c{r.scratch(thread)};
    const Space s = carve(c);
    const int64_t width = values.n, in = keys.half ? 2 : 4, out = tail.out_bf16 ? 2 : 4;
    for (int64_t i = 0; i < kQueries; ++i) {
      s.q_at[i] = i * keys.k;
      s.s_at[i] = i * score_row();
      s.p_at[i] = i * (narrow ? rounded_row() : score_row());
      s.y_at[i] = i * width;
    }
    RealTail t = tail.at(r, 0);
    t.r_offset = s.y_at;
    for (int64_t batch = batches * task / tasks; batch < batches * (task + 1) / tasks; ++batch) {
      keys.pack(r.at<char>(k) + k_at[size_t(batch)] * in, s.keys);
      values.pack(r.at<char>(v) + v_at[size_t(batch)] * (values.half ? 2 : 4), s.values);
      for (int64_t first = 0; first < queries; first += kQueries) {
        const int64_t rows = std::min(kQueries, queries - first);
        keys.multiply(*kernels, r.at<char>(q) + (q_at[size_t(batch)] + first * keys.k) * in, s.q_at, rows, s.keys,
                      s.scores, s.s_at, RealTail());
        weigh(r, s, batch, first, rows);
        RealTail mine = t;
        const int64_t at = (batch * queries + first) * width;
        if (t.addend) mine.addend = static_cast<const char*>(t.addend) + at * (t.addend_bf16 ? 2 : 4);
        char* y = r.at<char>(tail.result) + at * out;
        const void* p = narrow ? static_cast<const void*>(s.rounded) : s.scores;
        values.multiply(*kernels, p, s.p_at, rows, s.values, y, s.y_at, mine);
        if (tail.after) {
          float* done = reinterpret_cast<float*>(y);
          tail.after({done, done, rows * width, tail.p, tail.q});
        }
      }
    }
  }

  // Scores of rows from `first` on to probabilities.
  void weigh(const Run& r, const Space& s, int64_t batch, int64_t first, int64_t rows) const {
    const int64_t n = keys.n;
    const auto of = [&](const Mask& mask) { return r.at<float>(mask.value) + mask.at[size_t(batch)] + first * mask.row; };
    SoftmaxArgs soft{s.scores, s.scores, int(n), rows, score_row()};
    if (masks.size() < 2) {
      soft.scaled = scaled;
      soft.factor = factor;
      if (!masks.empty()) {
        soft.mask = of(masks[0]);
        soft.mask_row = masks[0].row;
        soft.mask_step = masks[0].step;
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        float* row = s.scores + s.s_at[i];
        if (scaled) kernels->scale({row, row, n, factor, 0});
        for (const Mask& mask : masks) kernels->add_f32({row, of(mask) + i * mask.row, row, n, 1, mask.step});
      }
    }
    kernels->softmax(soft);
    if (!narrow) return;
    if (score_row() == n && rounded_row() == n) kernels->to_bf16({s.scores, s.rounded, rows * n});
    else
      for (int64_t i = 0; i < rows; ++i) kernels->to_bf16({s.scores + s.s_at[i], s.rounded + s.p_at[i], n});
  }
};

void describe(Step& s, const Plan& plan, const OpNode& op, const std::string& ops, const KernelRow* row) {
  s.ops = ops;
  s.site = op.site;
  s.kernel = row->symbol;
  for (const auto* list : {&s.reads, &s.writes})
    for (int v : *list)
      if (v >= 0) s.bytes += plan.values[v].count() * dtype_size(plan.values[v].dtype);
}

const KernelRow* product_row(const Plan& plan, bool half) { return plan.kernels->row[half ? k_gemm_bf16 : k_gemm_f32]; }

// Dense operands of a product of two computed matrices.
bool dense_matrices(const Plan& plan, const OpNode& op) {
  return plan.values[op.in[0]].dense() && plan.values[op.in[1]].dense();
}

int after(Builder& b, int op, const char* kind) {
  const int follower = b.follower(op, {kind});
  return follower > op ? follower : -1;
}

// softmax(a b * factor + masks) c, found at the first product; all of it is done where the last one stands.
bool put_off(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& first = plan.ops[number];
  if (!dense_matrices(plan, first)) return false;
  RealAttention found;
  found.first = number;
  std::vector<int> taken;
  int op = number;
  if (const int f = after(b, op, "unary"); f >= 0 && plan.ops[f].text("fn") == "mul") {
    found.factor = op = f;
    taken.push_back(f);
  }
  const Value& scores = plan.values[first.out[0]];
  for (int f; (f = after(b, op, "binary")) >= 0; op = f) {
    const OpNode& sum = plan.ops[f];
    const int other = sum.in[0] == plan.ops[op].out[0] ? sum.in[1] : sum.in[0];
    const bool fits = sum.text("fn") == "add" && other != plan.ops[op].out[0] && plan.values[other].dense() &&
                      plan.values[sum.out[0]].dims == scores.dims;
    if (!fits) return false;
    found.masks.push_back(other);
    taken.push_back(f);
  }
  const int softmax = after(b, op, "softmax");
  if (softmax < 0) return false;
  taken.push_back(op = softmax);
  if (const int f = after(b, op, "cast"); f >= 0 && converts_bf16(plan, plan.ops[f])) taken.push_back(op = f);
  const int last = after(b, op, "matmul_f32");
  if (last < 0 || plan.ops[last].in[0] != plan.ops[op].out[0] || plan.ops[last].in[1] == plan.ops[op].out[0]) return false;
  const OpNode& product = plan.ops[last];
  if (!plan.values[product.in[1]].dense()) return false;
  b.done.insert(taken.begin(), taken.end());
  for (int t : taken) found.ops += "+" + plan.ops[t].kind;
  b.attentions[last] = found;
  return true;
}

void build_put_off(Builder& b, int number, const RealAttention& found) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number], first = plan.ops[found.first];
  FloatTail tail = make_float_tail(b, number, true);
  auto step = std::make_unique<FloatAttentionStep>();
  const Value &q = plan.values[first.in[0]], &k = plan.values[first.in[1]], &v = plan.values[op.in[1]];
  const Value &scores = plan.values[first.out[0]], &y = plan.values[tail.result];
  require(y.dense(), "attention writes dense matrices");
  const std::vector<int64_t> lead(y.dims.begin(), y.dims.end() - 2);
  step->kernels = plan.kernels;
  step->keys = RightMatrix(plan, scores.dims.back(), q.dims.back(), q.dtype == PW_BF16, first.flag("transpose_b"));
  step->narrow = plan.values[op.in[0]].dtype == PW_BF16;
  step->values = RightMatrix(plan, y.dims.back(), scores.dims.back(), step->narrow, op.flag("transpose_b"));
  step->q = first.in[0];
  step->k = first.in[1];
  step->v = op.in[1];
  step->scaled = found.factor >= 0;
  if (step->scaled) step->factor = plan.ops[found.factor].real("p");
  step->queries = y.dims[y.dims.size() - 2];
  step->q_at = batch_offsets(q, lead);
  step->k_at = batch_offsets(k, lead);
  step->v_at = batch_offsets(v, lead);
  step->batches = int64_t(step->q_at.size());
  step->reads = {step->q, step->k, step->v, tail.addend};
  step->writes = {tail.result};
  for (int mask : found.masks) {
    Value m = plan.values[mask];
    std::vector<int64_t> dims = scores.dims;
    const std::vector<int64_t> strides = broadcast_strides(m, dims);
    m.dims.insert(m.dims.begin(), dims.size() - m.dims.size(), 1);
    m.strides = strides;
    const size_t last = dims.size() - 1;
    const bool one_row = m.dims[last - 1] == 1, one_column = m.dims[last] == 1 && dims[last] != 1;
    step->masks.push_back({mask, batch_offsets(m, lead), one_row ? 0 : strides[last - 1], one_column ? 0 : 1});
    step->reads.push_back(mask);
  }
  step->macs = step->batches * step->queries * scores.dims.back() * (q.dims.back() + y.dims.back());
  Carve size{nullptr};
  step->carve(size);
  step->scratch = size.used;
  step->tasks = plan.threads > 1 && step->macs > 50000 ? int(std::min<int64_t>(step->batches, plan.threads * 6)) : 1;
  describe(*step, plan, op, first.kind + found.ops + "+" + tail.ops, product_row(plan, step->narrow));
  step->tail = std::move(tail);
  if (y.count() > 0) b.add(std::move(step));
}

}  // namespace

void build_matmul_f32(Builder& b, int number) {
  Plan& plan = b.plan;
  if (const auto found = b.attentions.find(number); found != b.attentions.end())
    return build_put_off(b, number, found->second);
  if (put_off(b, number)) return;
  const OpNode op = plan.ops[number];
  FloatTail tail = make_float_tail(b, number, true);
  auto step = std::make_unique<FloatMatmulStep>();
  const Value &left = plan.values[op.in[0]], &right = plan.values[op.in[1]], &out = plan.values[tail.result];
  require(dense_matrices(plan, op) && out.dense(), "matrix products read and write dense matrices");
  const std::vector<int64_t> lead(out.dims.begin(), out.dims.end() - 2);
  step->kernels = plan.kernels;
  step->right = RightMatrix(plan, out.dims.back(), left.dims.back(), left.dtype == PW_BF16, op.flag("transpose_b"));
  step->m = out.dims[out.dims.size() - 2];
  step->a_at = batch_offsets(left, lead);
  step->b_at = batch_offsets(right, lead);
  step->batches = int64_t(step->a_at.size());
  step->a = op.in[0];
  step->b = op.in[1];
  step->reads = {step->a, step->b, tail.addend};
  step->writes = {tail.result};
  Carve size{nullptr};
  step->carve(size);
  step->scratch = size.used;
  step->macs = step->batches * step->m * step->right.n * step->right.k;
  step->tasks = plan.threads > 1 && step->macs > 50000 ? int(std::min<int64_t>(step->batches, plan.threads * 4)) : 1;
  describe(*step, plan, op, tail.ops, product_row(plan, step->right.half));
  step->tail = std::move(tail);
  if (out.count() > 0) b.add(std::move(step));
}

}  // namespace pw
