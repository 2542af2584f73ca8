// LSTM and GRU layers on codes: one product for all inputs, then step by step. Threads share the units: each keeps its
// part of the weights in its own cache for all steps, and tells the others its part of the state.
#include <algorithm>
#include <cstring>

#include "engine/ranged.h"
#include "engine/steps/product.h"
#include "engine/team.h"

namespace pw {
namespace {

constexpr int64_t kUnits = 16;            // of a block
constexpr int64_t kShare = 256 * 1024;    // bytes of weights a step that make another thread worth the waiting
constexpr int64_t kTileRows = 4;          // from here on tiles are faster; below, vectors read the weights sooner
constexpr int64_t kChunk = 128;           // rows of inputs multiplied at once

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Hands out pieces of a step's scratch memory; with a null base it measures.
struct Carve {
  char* at;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = at ? reinterpret_cast<T*>(at + used) : nullptr;
    used += padded(count * int64_t(sizeof(T)), 64);
    return p;
  }
};

// Rows ranged at run time: codes, and what they mean.
struct Codes {
  uint8_t* codes;
  float* scales;
  int32_t* zeros;
};

// product(x) = float32(acc) * sx * sw + b, its columns in the order of LstmArgs.
struct Product {
  const Kernels* kernels;
  GemmFn gemm;
  std::shared_ptr<const Packed> packed;
  std::vector<int32_t> bias;
  std::vector<float> scale, bias_f32;
  int64_t k, k_pad;

  int64_t row() const { return padded(k, 64); }
  Codes carve(Carve& c, int64_t rows) const {
    return {c.take<uint8_t>(rows * row() + kSlack), c.take<float>(rows), c.take<int32_t>(rows)};
  }
  void quantize(const Codes& to, int64_t m, const float* x, float lo, float hi) const {
    const Ranged ranged(lo, hi);
    to.scales[m] = ranged.scale;
    to.zeros[m] = ranged.zero;
    kernels->quantize({x, to.codes + m * row(), k, ranged.r, ranged.zero, 0, 255});
  }
  // Columns from `first` on; y is dense. x_at, y_at: room for [rows].
  void run(const Codes& x, int64_t rows, int64_t first, int64_t columns, float* y, int64_t* x_at, int64_t* y_at) const {
    for (int64_t m = 0; m < rows; ++m) {
      x_at[m] = m * row();
      y_at[m] = m * columns;
    }
    Epilogue e;
    e.out = Out::kF32;
    e.bias = bias.data();
    e.colsum = packed->colsum.data();
    e.multiplier = scale.data();
    e.bias_f32 = bias_f32.empty() ? nullptr : bias_f32.data();
    e.row_zero = x.zeros;
    e.row_scale = x.scales;
    const int64_t segment = 0;
    GemmArgs g;
    g.a = x.codes;
    g.row_offset = x_at;
    g.m = int(rows);
    g.seg_offset = &segment;
    g.seg_len = int(k);
    g.seg_pad = int(k_pad);
    g.b = packed->codes.as<int8_t>() + first / 16 * packed->block;
    g.b_block = packed->block;
    g.n = int(columns);
    g.n0 = int(first);
    g.c = y;
    g.c_offset = y_at;
    g.r_offset = y_at;
    g.epilogue = &e;
    gemm(g);
  }
};

// Gates of sixteen units side by side.
template <class T>
std::vector<T> by_units(const T* x, int64_t gates, int64_t hidden, int64_t row) {
  std::vector<T> out(size_t(padded(hidden, kUnits) * gates * row), T(0));
  for (int64_t g = 0; g < gates; ++g)
    for (int64_t u = 0; u < hidden; ++u)
      std::copy_n(x + (g * hidden + u) * row, row, out.data() + ((u / kUnits * gates + g) * kUnits + u % kUnits) * row);
  return out;
}

Product product_of(const Plan& plan, const OpNode& op, int64_t gates, int weight, int scale, int bias) {
  const Value& w = plan.values[op.in[size_t(weight)]];
  const int64_t hidden = w.dims[0] / gates, columns = padded(hidden, kUnits) * gates;
  Product p;
  p.kernels = plan.kernels;
  p.gemm = plan.kernels->gemm;
  p.k = w.dims[1];
  p.k_pad = padded(p.k, plan.k_align());
  const int8_t* codes = static_cast<const int8_t*>(plan.constant(op.in[size_t(weight)]).data);
  const std::string key = std::to_string(w.index) + ":units:" + std::to_string(plan.k_align());
  p.packed = plan.model->packed(key, [&] {
    const std::vector<int8_t> rows = by_units(codes, gates, hidden, p.k);
    return pack_weights(rows.data(), columns, {0}, p.k, p.k, plan.k_align());
  });
  const auto spread = [&](int value) {
    std::vector<float> v = by_units(columns_f32(plan, op.in[size_t(value)], w.dims[0]).data(), gates, hidden, 1);
    v.resize(size_t(padded(columns, 64)), 0.0f);
    return v;
  };
  p.bias.assign(size_t(padded(columns, 64)), 0);
  p.scale = spread(scale);
  if (op.input(size_t(bias)) >= 0) p.bias_f32 = spread(bias);
  return p;
}

struct RecurrentStep : Step {
  Product from_input, from_state;
  bool lstm, reverse;
  int x, h0, c0 = -1, y, h, c = -1;
  int64_t gates, steps, rows, hidden, chunk;

  // What all threads see, in the scratch memory of the first.
  struct Common {
    Part* parts;
    float* ranges;   // per parity, part, row: least and greatest; where they do not fit into the part
    Codes input;
    float* given;    // per part [chunk, its columns]
  };
  struct Own {
    float* product;
    Codes state;
    int64_t *x_at, *y_at;
  };
  int64_t columns() const { return gates * padded(hidden, kUnits); }
  Common common(Carve& carve) const {
    return {carve.take<Part>(tasks), carve.take<float>(2 * tasks * range_row()), from_input.carve(carve, chunk),
            carve.take<float>(chunk * columns())};
  }
  Own own(Carve& carve) const {
    return {carve.take<float>(rows * columns()), from_state.carve(carve, rows), carve.take<int64_t>(chunk),
            carve.take<int64_t>(chunk)};
  }
  int64_t range_row() const { return rows <= Part::kTold / 4 ? 0 : padded(rows * 2, 16); }
  int64_t scratch_bytes() const {
    Carve carve{nullptr};
    common(carve);
    own(carve);
    return carve.used;
  }

  void begin(const Run& r) const override {
    Carve carve{r.scratch(0)};
    Team::reset(common(carve).parts, tasks);
  }

  void run(const Run& r, int task, int thread) const override {
    Carve carve{r.scratch(0)};
    const Common all = common(carve);
    carve.at = r.scratch(thread);
    const Own mine = own(carve);
    Team team(all.parts, tasks, task);
    const Kernels& k = *from_state.kernels;
    const float* before = r.at<float>(h0);
    float* cell = lstm ? r.at<float>(c) : nullptr;

    // the units of a part
    struct Units {
      int64_t first, count, column, columns;
    };
    const auto units_of = [&](int part) {
      const int64_t blocks = padded(hidden, kUnits) / kUnits, per = gates * kUnits;
      const int64_t first = blocks * part / tasks, last = blocks * (part + 1) / tasks;
      return Units{first * kUnits, std::min(hidden, last * kUnits) - first * kUnits, first * per, (last - first) * per};
    };
    // least and greatest of a part of the state before `step`
    const auto range = [&](int part, int64_t step, int64_t n) {
      float* f = range_row() ? all.ranges + ((step & 1) * tasks + part) * range_row()
                             : all.parts[part].told + (step & 1) * (Part::kTold / 2);
      return f + 2 * n;
    };
    const auto tell = [&](int part, const Units& u, int64_t step, const float* state) {
      for (int64_t n = 0; n < rows; ++n) {
        float lo = 0, hi = 0;
        k.minmax({state + n * hidden + u.first, u.count, &lo, &hi});
        float* f = range(part, step, n);
        f[0] = lo;
        f[1] = hi;
      }
    };

    const int64_t at_once = std::max<int64_t>(chunk / std::max<int64_t>(rows, 1), 1);
    for (int64_t done = 0, step = 0; done < steps; done += at_once) {
      const int64_t span = std::min(at_once, steps - done), start = reverse ? steps - done - span : done;
      const float* x_rows = r.at<float>(x) + start * rows * from_input.k;
      const int64_t inputs = span * rows;
      team.phase([&](int part) {
        for (int64_t m = inputs * part / tasks; m < inputs * (part + 1) / tasks; ++m) {
          float lo = 0, hi = 0;
          k.minmax({x_rows + m * from_input.k, from_input.k, &lo, &hi});
          from_input.quantize(all.input, m, x_rows + m * from_input.k, lo, hi);
        }
      });
      team.phase([&](int part) {
        const Units u = units_of(part);
        if (done == 0) {
          tell(part, u, 0, before);
          for (int64_t n = 0; lstm && n < rows; ++n)
            std::memcpy(cell + n * hidden + u.first, r.at<float>(c0) + n * hidden + u.first, size_t(u.count * 4));
        }
        from_input.run(all.input, inputs, u.column, u.columns, all.given + chunk * u.column, mine.x_at, mine.y_at);
      });
      for (int64_t i = 0; i < span; ++i, ++step) {
        const int64_t t = reverse ? span - 1 - i : i;
        float* now = r.at<float>(y) + (start + t) * rows * hidden;
        bool ready = false;  // the state's codes
        team.phase([&](int part) {
          for (int64_t n = 0; n < rows && !ready; ++n) {
            float lo = 0, hi = 0;
            for (int of = 0; of < tasks; ++of) {
              const float* f = range(of, step, n);
              lo = std::min(lo, f[0]);
              hi = std::max(hi, f[1]);
            }
            from_state.quantize(mine.state, n, before + n * hidden, lo, hi);
          }
          ready = true;
          const Units u = units_of(part);
          from_state.run(mine.state, rows, u.column, u.columns, mine.product, mine.x_at, mine.y_at);
          const float* given = all.given + chunk * u.column + t * rows * u.columns;
          for (int64_t n = 0; n < rows; ++n) {
            const float *g = given + n * u.columns, *p = mine.product + n * u.columns;
            const int64_t at = n * hidden + u.first;
            if (lstm) k.lstm({g, p, cell + at, now + at, int(u.count)});
            else k.gru({g, p, before + at, now + at, int(u.count)});
          }
          tell(part, u, step + 1, now);
        });
        before = now;
      }
    }
    team.phase([&](int part) {
      const Units u = units_of(part);
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t at = n * hidden + u.first;
        std::memcpy(r.at<float>(h) + at, before + at, size_t(u.count * 4));
        if (lstm && steps == 0) std::memcpy(cell + at, r.at<float>(c0) + at, size_t(u.count * 4));
      }
    });
  }
};

void build(Builder& b, int number, bool lstm) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  auto step = std::make_unique<RecurrentStep>();
  const int s = lstm ? 2 : 1;  // states
  const Value& x = plan.values[op.in[0]];
  for (int v : op.in) require(v < 0 || plan.values[v].dense(), "a recurrent layer reads dense tensors");
  for (int v : op.out) require(plan.values[v].dense(), "a recurrent layer writes dense tensors");
  step->lstm = lstm;
  step->reverse = op.flag("reverse");
  step->gates = lstm ? 4 : 3;
  step->from_input = product_of(plan, op, step->gates, 1 + s, 2 + s, 5 + s);
  step->from_state = product_of(plan, op, step->gates, 3 + s, 4 + s, 6 + s);
  step->steps = x.dims[0];
  step->rows = x.dims[1];
  // weights packed for tiles are read by vectors too
  if (plan.kernels->isa == kAmx && step->rows < kTileRows) step->from_state.gemm = kernels_for(kAvx512).gemm;
  step->hidden = step->from_state.k;
  step->x = op.in[0];
  step->h0 = op.in[1];
  step->y = op.out[0];
  step->h = op.out[1];
  if (lstm) {
    step->c0 = op.in[2];
    step->c = op.out[2];
  }
  const int64_t weights = step->hidden * step->hidden * step->gates;
  const int64_t shares = weights * std::max<int64_t>(1, step->rows / 8) / kShare, blocks = padded(step->hidden, kUnits) / kUnits;
  step->tasks = int(std::max<int64_t>(1, std::min({int64_t(plan.threads), shares, blocks})));
  step->chunk = std::max(step->rows, std::min<int64_t>(step->steps * step->rows, kChunk));
  step->scratch = step->scratch_bytes();
  step->ops = op.kind;
  step->site = op.site;
  step->kernel = plan.kernels->row[k_gemm]->symbol;
  step->macs = step->steps * step->rows * (step->from_input.k + step->hidden) * step->gates * step->hidden;
  step->bytes = step->steps * weights;
  for (int v : op.in)
    if (v >= 0) step->reads.push_back(v);
  step->writes = op.out;
  b.add(std::move(step));
}

}  // namespace

void build_lstm(Builder& b, int number) { build(b, number, true); }
void build_gru(Builder& b, int number) { build(b, number, false); }

}  // namespace pw
