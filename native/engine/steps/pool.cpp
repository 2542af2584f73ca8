// Pools and sums over codes.
#include <algorithm>

#include "engine/steps/epilogue.h"

namespace pw {
namespace {

struct Window {
  int64_t images, channels, in[3] = {1, 1, 1}, out[3] = {1, 1, 1}, kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1};
  int64_t dilation[3] = {1, 1, 1}, begin[3] = {0, 0, 0};
  int64_t x_image, x_axis[3] = {0, 0, 0}, y_image, y_axis[3] = {0, 0, 0};
  int64_t pixels() const { return images * out[0] * out[1] * out[2]; }
};

Window window_of(const Plan& plan, const OpNode& op, int result, bool dilated) {
  const Value &x = plan.values[op.in[0]], &y = plan.values[result];
  const int dims = x.rank() - 2;
  require(dims >= 1 && dims <= 3, "a pool of a rank that is not supported");
  Window w;
  w.images = x.dims[0];
  w.channels = x.dims.back();
  w.x_image = x.strides[0];
  w.y_image = y.strides[0];
  const auto &kernel = op.ints("kernel"), &stride = op.ints("stride"), &pads = op.ints("pads");
  for (int i = 0; i < dims; ++i) {
    const int a = 3 - dims + i;
    w.in[a] = x.dims[size_t(1 + i)];
    w.out[a] = plan.values[op.out[0]].dims[size_t(1 + i)];
    w.kernel[a] = kernel[size_t(i)];
    w.stride[a] = stride[size_t(i)];
    w.begin[a] = pads[size_t(i)];
    if (dilated) w.dilation[a] = op.ints("dilation")[size_t(i)];
    w.x_axis[a] = x.strides[size_t(1 + i)];
    w.y_axis[a] = y.strides[size_t(1 + i)];
  }
  return w;
}

struct PoolStep : Step {
  PoolFn fn;
  Window w;
  int x, y;
  int64_t x_size, y_size;
  int32_t zero = 0;
  EpilogueFn epilogue = nullptr;  // sums: what follows
  Tail tail;
  bool count_pads = false;  // means: of all taps of a window, outside too

  void run(const Run& r, int task, int thread) const override {
    const int64_t lines = w.images * w.out[0] * w.out[1];
    const int64_t from = lines * task / tasks, to = lines * (task + 1) / tasks;
    std::vector<const void*> taps(size_t(w.kernel[0] * w.kernel[1] * w.kernel[2]));
    Epilogue e;
    if (epilogue) e = tail.at(r);
    int32_t* sums = reinterpret_cast<int32_t*>(r.scratch(thread));
    const char* from_x = r.at<char>(x);
    char* to_y = r.at<char>(y);
    for (int64_t line = from; line < to; ++line) {
      const int64_t oy = line % w.out[1], od = line / w.out[1] % w.out[0], image = line / (w.out[1] * w.out[0]);
      const Range depth = inside(0, od), height = inside(1, oy);
      const char* base = from_x + image * w.x_image * x_size;
      const int64_t start = image * w.y_image + od * w.y_axis[0] + oy * w.y_axis[1];
      for (int64_t ox = 0; ox < w.out[2]; ++ox) {
        const Range width = inside(2, ox);
        int count = 0;
        for (int64_t d = depth.first; d < depth.end; d += w.dilation[0])
          for (int64_t i = height.first; i < height.end; i += w.dilation[1])
            for (int64_t j = width.first; j < width.end; j += w.dilation[2])
              taps[size_t(count++)] = base + (d * w.x_axis[0] + i * w.x_axis[1] + j * w.x_axis[2]) * x_size;
        const int64_t at = start + ox * w.y_axis[2];
        void* out = epilogue ? static_cast<void*>(sums) : to_y + at * y_size;
        fn({taps.data(), count, int(w.channels), out, zero, float(count_pads ? int64_t(taps.size()) : count)});
        if (epilogue)
          epilogue({sums, to_y + at * y_size, int(w.channels), &e, e.residual ? e.residual + at : nullptr,
                    e.addend ? e.addend + at : nullptr, 0});
      }
    }
  }

  // What a window covers along an axis.
  struct Range {
    int64_t first, end;
  };
  Range inside(int axis, int64_t at) const {
    const int64_t from = at * w.stride[axis] - w.begin[axis], step = w.dilation[axis];
    const int64_t skipped = from < 0 ? (-from + step - 1) / step * step : 0;
    return {from + skipped, std::min(w.in[axis], from + w.kernel[axis] * step)};
  }
};

void finish(Builder& b, std::unique_ptr<PoolStep> step, const OpNode& op, const std::string& ops, int64_t cost) {
  Plan& plan = b.plan;
  const Value &in = plan.values[step->x], &out = plan.values[step->y];
  require(in.strides.back() == 1 && out.strides.back() == 1, "channels must lie side by side");
  step->x_size = dtype_size(in.dtype);
  step->y_size = dtype_size(out.dtype);
  step->ops = ops;
  step->site = op.site;
  step->bytes = in.count() * step->x_size + out.count() * step->y_size;
  const int64_t lines = step->w.images * step->w.out[0] * step->w.out[1];
  const int64_t work = step->w.pixels() * step->w.channels * cost;
  step->tasks = plan.threads > 1 && work > 200000 ? int(std::min<int64_t>(lines, plan.threads * 4)) : 1;
  step->reads = {step->x, step->tail.residual};
  step->writes = {step->y};
  if (step->w.pixels() * step->w.channels > 0) b.add(std::move(step));
}

}  // namespace

void build_max_pool(Builder& b, int number) {
  const OpNode op = b.plan.ops[number];
  auto step = std::make_unique<PoolStep>();
  step->x = op.in[0];
  step->y = op.out[0];
  step->w = window_of(b.plan, op, step->y, true);
  const int dtype = b.plan.values[step->x].dtype;
  const int slot = dtype == PW_U8 ? k_max_pool_u8 : dtype == PW_BF16 ? k_max_pool_bf16 : k_max_pool_f32;
  const Kernels& k = *b.plan.kernels;
  step->fn = slot == k_max_pool_u8 ? k.max_pool_u8 : slot == k_max_pool_bf16 ? k.max_pool_bf16 : k.max_pool_f32;
  step->kernel = b.plan.kernels->row[slot]->symbol;
  const int64_t taps = step->w.kernel[0] * step->w.kernel[1] * step->w.kernel[2];
  finish(b, std::move(step), op, op.kind, taps);
}

void build_avg_pool(Builder& b, int number) {
  const OpNode op = b.plan.ops[number];
  auto step = std::make_unique<PoolStep>();
  step->x = op.in[0];
  step->y = op.out[0];
  step->w = window_of(b.plan, op, step->y, false);
  step->fn = b.plan.kernels->mean_pool;
  step->count_pads = op.flag("count_pads");
  step->kernel = b.plan.kernels->row[k_mean_pool]->symbol;
  finish(b, std::move(step), op, op.kind, 8);
}

namespace {

void build_sums(Builder& b, int number, Window w, const OpNode& op, Tail tail) {
  auto step = std::make_unique<PoolStep>();
  step->x = op.in[0];
  step->y = tail.result;
  step->w = w;
  step->zero = int32_t(op.integer("zero"));
  step->fn = b.plan.kernels->sum_pool;
  step->epilogue = b.plan.kernels->epilogue;
  step->kernel = b.plan.kernels->row[k_sum_pool]->symbol;
  tail.finish();
  step->tail = std::move(tail);
  step->scratch = (w.channels + 63) / 64 * 64 * 4;
  const int64_t taps = w.kernel[0] * w.kernel[1] * w.kernel[2];
  const std::string ops = step->tail.ops;
  finish(b, std::move(step), op, ops, taps);
}

}  // namespace

void build_sum_pool(Builder& b, int number) {
  const OpNode op = b.plan.ops[number];
  Tail tail = make_tail(b, number, b.plan.values[op.out[0]].dims.back());
  const Window w = window_of(b.plan, op, tail.result, false);
  build_sums(b, number, w, op, std::move(tail));
}

namespace {

// Any axes: element by element.
struct SumStep : Step {
  int x, y;
  int32_t zero;
  std::vector<int64_t> kept, kept_strides, gone, gone_strides;
  int64_t count = 1, taps = 1;
  void run(const Run& r, int, int) const override {
    std::vector<int64_t> place(kept.size(), 0);
    for (int64_t i = 0; i < count; ++i) {
      int64_t at = 0;
      for (size_t a = 0; a < kept.size(); ++a) at += place[a] * kept_strides[a];
      std::vector<int64_t> inner(gone.size(), 0);
      int32_t sum = 0;
      for (int64_t j = 0; j < taps; ++j) {
        int64_t off = at;
        for (size_t a = 0; a < gone.size(); ++a) off += inner[a] * gone_strides[a];
        sum += int32_t(r.at<uint8_t>(x)[off]) - zero;
        for (int a = int(gone.size()) - 1; a >= 0; --a) {
          if (++inner[size_t(a)] < gone[size_t(a)]) break;
          inner[size_t(a)] = 0;
        }
      }
      r.at<int32_t>(y)[i] = sum;
      for (int a = int(kept.size()) - 1; a >= 0; --a) {
        if (++place[size_t(a)] < kept[size_t(a)]) break;
        place[size_t(a)] = 0;
      }
    }
  }
};

}  // namespace

void build_sum_q(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode op = plan.ops[number];
  const Value& in = plan.values[op.in[0]];
  const auto& axes = op.ints("axes");
  const int rank = in.rank(), dims = rank - 2;
  // all spatial axes of [N, *space, C]: one window over the whole image
  bool spatial = dims >= 1 && dims <= 3 && int(axes.size()) == dims;
  for (int i = 0; spatial && i < dims; ++i) spatial = axes[size_t(i)] == 1 + i;
  if (spatial && in.strides.back() == 1) {
    Tail tail = make_tail(b, number, in.dims.back());
    const Value& out = plan.values[tail.result];
    Window w;
    w.images = in.dims[0];
    w.channels = in.dims.back();
    w.x_image = in.strides[0];
    w.y_image = out.rank() == 2 ? out.strides[0] : out.strides[0];
    for (int i = 0; i < dims; ++i) {
      const int a = 3 - dims + i;
      w.in[a] = w.kernel[a] = in.dims[size_t(1 + i)];
      w.x_axis[a] = in.strides[size_t(1 + i)];
    }
    build_sums(b, number, w, op, std::move(tail));
    return;
  }
  auto step = std::make_unique<SumStep>();
  step->x = op.in[0];
  step->y = op.out[0];
  step->zero = int32_t(op.integer("zero"));
  for (int i = 0; i < rank; ++i) {
    const bool reduced = std::find(axes.begin(), axes.end(), i) != axes.end();
    (reduced ? step->gone : step->kept).push_back(in.dims[size_t(i)]);
    (reduced ? step->gone_strides : step->kept_strides).push_back(in.strides[size_t(i)]);
    (reduced ? step->taps : step->count) *= in.dims[size_t(i)];
  }
  require(plan.values[op.out[0]].dense(), "sums are written densely");
  step->ops = op.kind;
  step->site = op.site;
  step->kernel = "sum";
  step->bytes = in.count();
  step->reads = {op.in[0]};
  step->writes = {op.out[0]};
  b.add(std::move(step));
}

}  // namespace pw
