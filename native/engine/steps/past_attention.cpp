// Attention of tokens to come over keys and values that were kept: few of them read those as they lie, many have them
// packed as matrices first.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/steps/real_matrix.h"
#include "engine/build.h"

namespace pw {
namespace {

constexpr int64_t kFewTokens = 4;
constexpr int64_t kRows = 64;  // of scores at a time, where there are many

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct PastAttentionStep : Step {
  const Kernels* kernels;
  int q, k, v, past, count, y;
  // Where keys (0) and values (1) are codes: scales and zero points of the new ones, and both of those kept.
  int scale[2] = {-1, -1}, zero[2] = {-1, -1}, ranges = -1;
  int64_t tokens, heads, groups, width, places, blocks, block;
  float factor;

  int64_t times() const { return heads / groups; }
  int64_t most() const { return places + tokens; }  // keys
  int64_t line() const { return padded(most(), 16); }
  bool coded() const { return ranges >= 0; }
  int64_t first_kept(int which, int64_t group) const { return ((which * blocks + block) * groups + group) * places; }

  struct Space {
    float *scores, *joined[2], *keys, *values;
    int64_t *at, *score_at, *y_at;
  };
  int64_t layout(char* base, Space* s) const {
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
      char* p = base ? base + used : nullptr;
      used += padded(bytes, 64) + 64;
      return p;
    };
    const bool many = tokens > kFewTokens;
    s->scores = reinterpret_cast<float*>(take((many ? kRows : times()) * line() * 4));
    for (float*& each : s->joined) each = many || coded() ? reinterpret_cast<float*>(take(most() * width * 4)) : nullptr;
    if (!many) return used;
    s->keys = reinterpret_cast<float*>(take(line() * width * 4 + kSlack));
    s->values = reinterpret_cast<float*>(take(most() * padded(width, 16) * 4 + kSlack));
    for (int64_t** each : {&s->at, &s->score_at, &s->y_at}) *each = reinterpret_cast<int64_t*>(take(kRows * 8));
    return used;
  }

  void run(const Run& r, int task, int thread) const override {
    const int64_t seen = *r.at<int64_t>(count);
    if (seen < 0 || seen > places) {
      r.report("a count of earlier tokens is out of range");
      return;
    }
    Space s;
    layout(r.scratch(thread), &s);
    for (int64_t group = groups * task / tasks; group < groups * (task + 1) / tasks; ++group) {
      for (int which = 0; which < 2 && s.joined[0]; ++which) join(r, which, group, seen, s.joined[which]);
      tokens > kFewTokens ? many(r, s, group, seen) : few(r, s, group, seen);
    }
  }

  // Kept and new rows of a head as floats, one behind the other.
  void join(const Run& r, int which, int64_t group, int64_t seen, float* to) const {
    const int64_t kept = first_kept(which, group);
    if (!coded()) {
      std::memcpy(to, r.at<float>(past) + kept * width, size_t(seen * width * 4));
      const float* from = r.at<float>(which ? v : k) + group * width;
      for (int64_t i = 0; i < tokens; ++i)
        std::memcpy(to + (seen + i) * width, from + i * groups * width, size_t(width * 4));
      return;
    }
    const float* range = r.at<float>(ranges) + kept * 2;
    for (int64_t i = 0; i < seen; ++i)
      kernels->dequantize({r.at<uint8_t>(past) + (kept + i) * width, to + i * width, width, range[2 * i], int32_t(range[2 * i + 1])});
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t row = i * groups + group;
      kernels->dequantize({r.at<uint8_t>(which ? v : k) + row * width, to + (seen + i) * width, width,
                           r.at<float>(scale[which])[row], r.at<int32_t>(zero[which])[row]});
    }
  }

  // Runs of keys or values: those kept, and the new ones.
  struct Rows {
    const float *kept, *fresh;
    int64_t step;  // from one new row to the next
  };
  Rows rows_of(const Run& r, const Space& s, int which, int64_t group, int64_t seen) const {
    if (coded()) return {s.joined[which], s.joined[which] + seen * width, width};
    return {r.at<float>(past) + first_kept(which, group) * width, r.at<float>(which ? v : k) + group * width, groups * width};
  }

  void few(const Run& r, const Space& s, int64_t group, int64_t seen) const {
    const int rows = int(times()), w = int(width);
    const Rows key = rows_of(r, s, 0, group, seen), value = rows_of(r, s, 1, group, seen);
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t at = (i * heads + group * times()) * width;
      const float* x = r.at<float>(q) + at;
      float* out = r.at<float>(y) + at;
      kernels->dots({x, width, key.kept, width, s.scores, line(), rows, seen, w, factor});
      kernels->dots({x, width, key.fresh, key.step, s.scores + seen, line(), rows, i + 1, w, factor});
      kernels->softmax({s.scores, s.scores, int(seen + i + 1), rows, line()});
      std::fill(out, out + rows * width, 0.0f);
      kernels->mix({s.scores, line(), value.kept, width, out, width, rows, seen, w});
      kernels->mix({s.scores + seen, line(), value.fresh, value.step, out, width, rows, i + 1, w});
    }
  }

  void multiply(const float* a, const int64_t* a_at, int64_t m, const float* b, int64_t b_block, int64_t length, int64_t n,
                float* c, const int64_t* c_at) const {
    const int64_t segment = 0;
    GemmF32Args g;
    g.a = a;
    g.row_offset = a_at;
    g.m = int(m);
    g.seg_offset = &segment;
    g.seg_len = int(length);
    g.b = b;
    g.b_block = b_block;
    g.n = int(n);
    g.c = c;
    g.c_offset = c_at;
    kernels->gemm_f32(g);
  }

  void many(const Run& r, const Space& s, int64_t group, int64_t seen) const {
    const int64_t all = seen + tokens;
    RightMatrix keys, values;
    keys.n = values.k = all;
    keys.k = values.n = width;
    keys.transposed = true;
    keys.pack(s.joined[0], s.keys);
    values.pack(s.joined[1], s.values);
    for (int64_t first = 0; first < tokens * times(); first += kRows) {  // rows: token after token, all heads of each
      const int64_t rows = std::min(kRows, tokens * times() - first), last = (first + rows - 1) / times();
      const int64_t n = seen + last + 1;  // keys that any of the rows sees
      for (int64_t i = 0; i < rows; ++i) {
        s.at[i] = s.y_at[i] = ((first + i) / times() * heads + group * times() + (first + i) % times()) * width;
        s.score_at[i] = i * line();
      }
      multiply(r.at<float>(q), s.at, rows, s.keys, keys.block(), width, n, s.scores, s.score_at);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t valid = seen + (first + i) / times() + 1;
        float* p = s.scores + i * line();
        kernels->softmax({p, p, int(valid), 1, 0, true, factor});
        std::fill(p + valid, p + n, 0.0f);
      }
      multiply(s.scores, s.score_at, rows, s.values, values.block(), n, width, r.at<float>(y), s.y_at);
    }
  }
};

}  // namespace

void build_past_attention(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  auto step = std::make_unique<PastAttentionStep>();
  for (int value : op.in) require(plan.values[value].dense(), "attention over earlier tokens reads dense tensors");
  require(plan.values[op.out[0]].dense(), "attention over earlier tokens writes a dense tensor");
  const bool coded = op.kind == "past_attention_q";  // q, k, scale, zero, v, scale, zero, past, ranges, count
  step->kernels = plan.kernels;
  step->q = op.in[0];
  step->k = op.in[1];
  step->v = op.in[coded ? 4 : 2];
  step->past = op.in[coded ? 7 : 3];
  step->count = op.in[coded ? 9 : 4];
  step->y = op.out[0];
  step->reads = {step->q, step->k, step->v, step->past, step->count};
  if (coded) {
    step->ranges = op.in[8];
    for (int which = 0; which < 2; ++which) {
      step->scale[which] = op.in[size_t(2 + 3 * which)];
      step->zero[which] = op.in[size_t(3 + 3 * which)];
      step->reads.insert(step->reads.end(), {step->scale[which], step->zero[which]});
    }
    step->reads.push_back(step->ranges);
  }
  const std::vector<int64_t>&q = plan.values[step->q].dims, &past = plan.values[step->past].dims;
  step->tokens = q[1];
  step->heads = q[2];
  step->width = q[3];
  step->blocks = past[1];
  step->groups = past[2];
  step->places = past[3];
  step->block = op.integer("block");
  step->factor = op.real("factor");
  if (step->tokens * step->heads * step->width == 0) return;
  PastAttentionStep::Space space;
  step->scratch = step->layout(nullptr, &space);
  step->macs = step->tokens * step->heads * step->most() * step->width * 2;
  step->bytes = 8 * plan.values[step->q].count() +
                2 * (step->tokens + step->places) * step->groups * step->width * (coded ? 1 : 4);
  step->tasks = plan.threads > 1 && step->macs > 100000 ? int(std::min<int64_t>(step->groups, plan.threads * 4)) : 1;
  step->ops = op.kind;
  step->site = op.site;
  step->kernel = plan.kernels->row[step->tokens > kFewTokens ? k_gemm_f32 : k_dots]->symbol;
  step->writes = {step->y};
  b.add(std::move(step));
}

}  // namespace pw
