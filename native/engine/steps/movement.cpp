// Ops that move values: copies between strided places, padding, gathers.
#include <algorithm>
#include <cstring>

#include "engine/build.h"
#include "engine/layout.h"
#include "engine/steps/product.h"

namespace pw {
namespace {

struct CopyStep : Step {
  int from, to;
  int64_t from_offset, to_offset, size;              // size: bytes of an element
  std::vector<int64_t> dims, from_strides, to_strides;  // axes joined, outermost first; the last is a run

  void run(const Run& r, int task, int) const override {
    const char* x = r.at<char>(from) + from_offset * size;
    char* y = r.at<char>(to) + to_offset * size;
    // the first axis is shared among tasks
    const int64_t lo = dims[0] * task / tasks, hi = dims[0] * (task + 1) / tasks;
    for (int64_t i = lo; i < hi; ++i) level(1, x + i * from_strides[0] * size, y + i * to_strides[0] * size);
  }

  void level(size_t axis, const char* x, char* y) const {
    if (axis == dims.size()) return copy_one(x, y);
    const int64_t n = dims[axis], xs = from_strides[axis] * size, ys = to_strides[axis] * size;
    if (axis + 1 == dims.size()) return run_of(x, y, n, xs, ys);
    if (axis + 2 == dims.size() && ys != size && to_strides[axis + 1] == 1 && xs == size) {
      const int64_t m = dims[axis + 1], to = to_strides[axis], from = from_strides[axis + 1];
      if (size == 1) return transposed<uint8_t>(x, y, n, m, to, from);
      if (size == 2) return transposed<uint16_t>(x, y, n, m, to, from);
      if (size == 4) return transposed<uint32_t>(x, y, n, m, to, from);
    }
    for (int64_t i = 0; i < n; ++i) level(axis + 1, x + i * xs, y + i * ys);
  }

  void copy_one(const char* x, char* y) const { std::memcpy(y, x, size_t(size)); }

  void run_of(const char* x, char* y, int64_t n, int64_t xs, int64_t ys) const {
    if (xs == size && ys == size) {
      std::memcpy(y, x, size_t(n * size));
      return;
    }
    switch (size) {
      case 1: for (int64_t i = 0; i < n; ++i) y[i * ys] = x[i * xs]; break;
      case 2: for (int64_t i = 0; i < n; ++i) std::memcpy(y + i * ys, x + i * xs, 2); break;
      case 4: for (int64_t i = 0; i < n; ++i) std::memcpy(y + i * ys, x + i * xs, 4); break;
      default: for (int64_t i = 0; i < n; ++i) std::memcpy(y + i * ys, x + i * xs, size_t(size));
    }
  }

  // y[i * ys + j] = x[i + j * xs], in blocks that stay in the first cache
  template <class T>
  static void transposed(const char* from, char* to, int64_t n, int64_t m, int64_t ys, int64_t xs) {
    constexpr int64_t kBlock = 32;
    const T* x = reinterpret_cast<const T*>(from);
    T* y = reinterpret_cast<T*>(to);
    if (m <= 4) {  // the channels of an image
      for (int64_t j = 0; j < m; ++j)
        for (int64_t i = 0; i < n; ++i) y[i * ys + j] = x[i + j * xs];
      return;
    }
    for (int64_t i0 = 0; i0 < n; i0 += kBlock)
      for (int64_t j0 = 0; j0 < m; j0 += kBlock)
        for (int64_t i = i0; i < std::min(n, i0 + kBlock); ++i)
          for (int64_t j = j0; j < std::min(m, j0 + kBlock); ++j) y[i * ys + j] = x[i + j * xs];
  }
};

struct FillStep : Step {
  int to;
  int64_t size;
  char pattern[8];
  bool zeros = false;
  std::vector<std::pair<int64_t, int64_t>> ranges;  // first element and number of elements, from the memory's start
  bool whole_root = false;
  int64_t root_offset = 0;

  void run(const Run& r, int, int) const override {
    char* y = r.at<char>(to) - root_offset * size;
    for (const auto& [first, n] : ranges) {
      if (size == 1 || zeros) {
        std::memset(y + first * size, pattern[0], size_t(n * size));
      } else {
        for (int64_t i = 0; i < n; ++i) std::memcpy(y + (first + i) * size, pattern, size_t(size));
      }
    }
  }
};

void set_pattern(FillStep& s, int dtype, double value) {
  std::memset(s.pattern, 0, sizeof s.pattern);
  switch (dtype) {
    case PW_BF16: { const float v = float(value); std::memcpy(s.pattern, reinterpret_cast<const char*>(&v) + 2, 2); break; }
    case PW_F32: { const float v = float(value); std::memcpy(s.pattern, &v, 4); break; }
    case PW_I32: { const int32_t v = int32_t(value); std::memcpy(s.pattern, &v, 4); break; }
    case PW_I64: { const int64_t v = int64_t(value); std::memcpy(s.pattern, &v, 8); break; }
    default: s.pattern[0] = char(int(value));
  }
  s.zeros = std::all_of(s.pattern, s.pattern + sizeof s.pattern, [](char c) { return c == 0; });
}

// Fills a padded region whose code is known only at run time.
struct CodeHaloStep : Step {
  int to, code;
  int64_t bytes_of;
  void run(const Run& r, int, int) const override {
    const Plan& plan = *r.plan;
    const Value& v = plan.values[to];
    std::memset(r.at<char>(to) - v.offset, int(*r.at<int32_t>(code)), size_t(bytes_of));
  }
};

}  // namespace

std::unique_ptr<Step> copy_step(const Plan& plan, int from, int64_t from_offset, std::vector<int64_t> from_strides,
                                int to, int64_t to_offset, std::vector<int64_t> to_strides, std::vector<int64_t> dims) {
  auto step = std::make_unique<CopyStep>();
  step->from = from;
  step->to = to;
  step->from_offset = from_offset;
  step->to_offset = to_offset;
  step->size = dtype_size(plan.values[to].dtype);
  int64_t count = 1;
  for (int64_t d : dims) count *= d;
  // join neighbouring axes that lie together on both sides, drop those of size 1
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims[i] == 1) continue;
    if (!step->dims.empty() && step->from_strides.back() == from_strides[i] * dims[i] &&
        step->to_strides.back() == to_strides[i] * dims[i]) {
      step->dims.back() *= dims[i];
      step->from_strides.back() = from_strides[i];
      step->to_strides.back() = to_strides[i];
    } else {
      step->dims.push_back(dims[i]);
      step->from_strides.push_back(from_strides[i]);
      step->to_strides.push_back(to_strides[i]);
    }
  }
  // the first axis is only a loop: give it one of size 1 where the run is all there is
  if (step->dims.size() < 2) {
    step->dims.insert(step->dims.begin(), 1);
    step->from_strides.insert(step->from_strides.begin(), 0);
    step->to_strides.insert(step->to_strides.begin(), 0);
  }
  if (step->dims.size() == 1) {
    step->dims.push_back(1);
    step->from_strides.push_back(1);
    step->to_strides.push_back(1);
  }
  if (count == 0) step->dims.assign(2, 0);
  step->ops = "copy";
  step->kernel = "copy";
  step->bytes = 2 * count * step->size;
  step->tasks = plan.threads > 1 && step->bytes > 100000
                    ? int(std::max<int64_t>(1, std::min<int64_t>(step->dims[0], plan.threads * 2)))
                    : 1;
  step->reads = {from};
  step->writes = {to};
  return step;
}

std::unique_ptr<Step> halo_step(const Plan& plan, int root) {
  const Value& v = plan.values[root];
  auto step = std::make_unique<FillStep>();
  step->to = root;
  step->root_offset = v.offset;
  step->size = dtype_size(v.dtype);
  set_pattern(*step, v.dtype, double(v.fill));
  std::vector<int64_t> padded = v.dims;
  for (size_t i = 0; i < padded.size(); ++i) padded[i] += v.halo_begin[i] + v.halo_end[i];
  // everything outside of the inner box, run by run along the memory; behind the last axis with a halo all is inside
  int deepest = int(padded.size()) - 1;
  while (deepest > 0 && v.halo_begin[size_t(deepest)] == 0 && v.halo_end[size_t(deepest)] == 0) --deepest;
  const int last = int(padded.size()) - 1;
  std::vector<int64_t> stride(padded.size(), 1);
  for (int i = last - 1; i >= 0; --i) stride[size_t(i)] = stride[size_t(i) + 1] * padded[size_t(i) + 1];
  auto emit = [&](int64_t first, int64_t n) {
    if (n <= 0) return;
    if (!step->ranges.empty() && step->ranges.back().first + step->ranges.back().second == first)
      step->ranges.back().second += n;
    else
      step->ranges.push_back({first, n});
  };
  auto walk = [&](auto&& self, int axis, int64_t at) -> void {
    const size_t a = size_t(axis);
    const int64_t begin = v.halo_begin[a], n = v.dims[a], end = v.halo_end[a];
    emit(at, begin * stride[a]);
    if (axis < deepest)
      for (int64_t i = 0; i < n; ++i) self(self, axis + 1, at + (begin + i) * stride[a]);
    emit(at + (begin + n) * stride[a], end * stride[a]);
  };
  walk(walk, 0, 0);
  step->ops = "padding";
  step->kernel = "fill";
  step->writes = {root};
  for (const auto& range : step->ranges) step->bytes += range.second * step->size;
  return step;
}

std::unique_ptr<Step> fill_step(const Plan& plan, int value, double fill) {
  const Value& v = plan.values[value];
  auto step = std::make_unique<FillStep>();
  step->to = value;
  step->size = dtype_size(v.dtype);
  set_pattern(*step, v.dtype, fill);
  // run by run: a value may have strides of its own
  int64_t run = 1;
  int axis = v.rank() - 1;
  for (; axis >= 0 && (v.strides[size_t(axis)] == run || v.dims[size_t(axis)] == 1); --axis) run *= v.dims[size_t(axis)];
  auto walk = [&](auto&& self, int a, int64_t at) -> void {
    if (a > axis) {
      step->ranges.push_back({at, run});
      return;
    }
    for (int64_t i = 0; i < v.dims[size_t(a)]; ++i) self(self, a + 1, at + i * v.strides[size_t(a)]);
  };
  if (v.count() > 0) walk(walk, 0, 0);
  step->ops = "fill";
  step->kernel = "fill";
  step->bytes = v.count() * step->size;
  step->writes = {value};
  return step;
}

int padded_with_code(Builder& b, int value, const std::vector<int64_t>& begin, const std::vector<int64_t>& end,
                     int code) {
  Plan& plan = b.plan;
  const int copy = padded_copy(plan, value, begin, end, 0);
  plan.values[copy].halo_begin.clear();  // filled here, not by the builder
  plan.values[copy].halo_end.clear();
  auto fill = std::make_unique<CodeHaloStep>();
  fill->to = copy;
  fill->code = code;
  fill->bytes_of = plan.values[copy].allocated;
  fill->ops = "padding";
  fill->kernel = "fill";
  fill->reads = {code};
  fill->writes = {copy};
  b.add(std::move(fill));
  const Value &from = plan.values[value], &to = plan.values[copy];
  b.add(copy_step(plan, value, 0, from.strides, copy, 0, to.strides, from.dims));
  return copy;
}

void build_reshape(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  const Value &in = plan.values[op.in[0]], &out = plan.values[op.out[0]];
  if (out.root == in.root && out.offset == in.offset) return;  // the same memory
  require(in.dense() && out.dense(), "a reshape between places that are not dense");
  b.add(copy_step(plan, op.in[0], 0, {1}, op.out[0], 0, {1}, {in.count()}));
}

void build_movement(Builder& b, int number) {
  Plan& plan = b.plan;
  if (swaps_for_attention(plan, number)) return;
  const OpNode& op = plan.ops[number];
  const Value &in = plan.values[op.in[0]], &out = plan.values[op.out[0]];
  std::vector<int64_t> strides(out.dims.size()), dims = out.dims, to = out.strides;
  int64_t offset = 0;
  if (op.kind == "transpose") {
    const auto& perm = op.ints("perm");
    for (size_t i = 0; i < perm.size(); ++i) strides[i] = in.strides[size_t(perm[i])];
  } else if (op.kind == "slice") {
    const auto &starts = op.ints("starts"), &steps = op.ints("steps");
    for (size_t i = 0; i < dims.size(); ++i) {
      strides[i] = in.strides[i] * steps[i];
      offset += starts[i] * in.strides[i];
    }
  } else if (op.kind == "expand") {
    const size_t shift = dims.size() - in.dims.size();
    for (size_t i = 0; i < in.dims.size(); ++i) strides[shift + i] = in.dims[i] == 1 ? 0 : in.strides[i];
  } else {  // upsample: every axis becomes two, the second standing still
    const auto& repeats = op.ints("repeats");
    dims.clear();
    strides.clear();
    to.clear();
    for (size_t i = 0; i < in.dims.size(); ++i) {
      dims.insert(dims.end(), {in.dims[i], repeats[i]});
      strides.insert(strides.end(), {in.strides[i], 0});
      to.insert(to.end(), {out.strides[i] * repeats[i], out.strides[i]});
    }
  }
  auto step = copy_step(plan, op.in[0], offset, strides, op.out[0], 0, to, dims);
  step->ops = op.kind;
  step->site = op.site;
  b.add(std::move(step));
}

void build_concat(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  const int axis = int(op.integer("axis"));
  int64_t at = 0;
  for (int part : op.in) {
    const Value &in = plan.values[part], &out = plan.values[op.out[0]];
    const int64_t offset = at * out.strides[size_t(axis)];
    at += in.dims[size_t(axis)];
    if (in.root == out.root && in.offset == out.offset + offset) continue;  // written in place
    auto step = copy_step(plan, part, 0, in.strides, op.out[0], offset, out.strides, in.dims);
    step->ops = op.kind;
    step->site = op.site;
    b.add(std::move(step));
  }
}

namespace {

// The result filled with the op's value, and the operand laid into it.
void fill_and_place(Builder& b, const OpNode& op, int64_t offset, const std::vector<int64_t>& strides) {
  Plan& plan = b.plan;
  const Value& in = plan.values[op.in[0]];
  b.add(fill_step(plan, op.out[0], op.attrs.at("value").kind == 0 ? double(op.integer("value")) : op.real("value")));
  auto step = copy_step(plan, op.in[0], 0, in.strides, op.out[0], offset, strides, in.dims);
  step->ops = op.kind;
  step->site = op.site;
  b.add(std::move(step));
}

}  // namespace

void build_pad(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  const Value &in = plan.values[op.in[0]], &out = plan.values[op.out[0]];
  const auto& pads = op.ints("pads");
  int64_t offset = 0;
  for (size_t i = 0; i < in.dims.size(); ++i) offset += pads[i] * out.strides[i];
  fill_and_place(b, op, offset, out.strides);
}

void build_stuff(Builder& b, int number) {
  const OpNode& op = b.plan.ops[number];
  std::vector<int64_t> to = b.plan.values[op.out[0]].strides;
  const auto& factors = op.ints("factors");
  for (size_t i = 0; i < to.size(); ++i) to[i] *= factors[i];
  fill_and_place(b, op, 0, to);
}

namespace {

struct GatherStep : Step {
  int x, index, y;
  int64_t outer, size, inner, picks;  // x [outer, size, inner bytes]
  void run(const Run& r, int task, int) const override {
    const int64_t* at = r.at<int64_t>(index);
    const int64_t all = outer * picks, from = all * task / tasks, to = all * (task + 1) / tasks;
    for (int64_t i = from; i < to; ++i) {
      int64_t pick = at[i % picks];
      if (pick < 0) pick += size;
      if (pick < 0 || pick >= size) {
        r.report("an index is out of range");
        return;
      }
      std::memcpy(r.at<char>(y) + i * inner, r.at<char>(x) + ((i / picks) * size + pick) * inner, size_t(inner));
    }
  }
};

struct GatherNdStep : Step {
  int x, y;
  std::vector<int> index;
  std::vector<std::vector<int64_t>> strides;  // of the indices over the leading axes
  std::vector<int64_t> lead, sizes, x_strides;
  int64_t inner, count;
  void run(const Run& r, int, int) const override {
    std::vector<int64_t> place(lead.size(), 0);
    for (int64_t i = 0; i < count; ++i) {
      int64_t at = 0;
      for (size_t k = 0; k < index.size(); ++k) {
        int64_t offset = 0;
        for (size_t a = 0; a < lead.size(); ++a) offset += place[a] * strides[k][a];
        int64_t pick = r.at<int64_t>(index[k])[offset];
        if (pick < 0) pick += sizes[k];
        if (pick < 0 || pick >= sizes[k]) {
          r.report("an index is out of range");
          return;
        }
        at += pick * x_strides[k];
      }
      std::memcpy(r.at<char>(y) + i * inner, r.at<char>(x) + at, size_t(inner));
      for (int a = int(lead.size()) - 1; a >= 0; --a) {
        if (++place[size_t(a)] < lead[size_t(a)]) break;
        place[size_t(a)] = 0;
      }
    }
  }
};

}  // namespace

void build_gather(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  const Value &in = plan.values[op.in[0]], &at = plan.values[op.in[1]], &out = plan.values[op.out[0]];
  require(in.dense() && at.dense() && out.dense(), "a gather between places that are not dense");
  auto step = std::make_unique<GatherStep>();
  const size_t axis = size_t(op.integer("axis"));
  step->outer = 1;
  step->inner = dtype_size(in.dtype);
  for (size_t i = 0; i < in.dims.size(); ++i) {
    if (i < axis) step->outer *= in.dims[i];
    if (i > axis) step->inner *= in.dims[i];
  }
  step->size = in.dims[axis];
  step->picks = at.count();
  step->x = op.in[0];
  step->index = op.in[1];
  step->y = op.out[0];
  step->ops = op.kind;
  step->site = op.site;
  step->kernel = "gather";
  step->bytes = 2 * out.count() * dtype_size(out.dtype);
  step->reads = {op.in[0], op.in[1]};
  step->writes = {op.out[0]};
  b.add(std::move(step));
}

void build_gather_nd(Builder& b, int number) {
  Plan& plan = b.plan;
  const OpNode& op = plan.ops[number];
  const Value &in = plan.values[op.in[0]], &out = plan.values[op.out[0]];
  require(in.dense() && out.dense(), "a gather between places that are not dense");
  auto step = std::make_unique<GatherNdStep>();
  step->x = op.in[0];
  step->y = op.out[0];
  const size_t picked = op.in.size() - 1, rest = in.dims.size() - picked;
  step->lead.assign(out.dims.begin(), out.dims.end() - int64_t(rest));
  step->inner = dtype_size(in.dtype);
  for (size_t i = picked; i < in.dims.size(); ++i) step->inner *= in.dims[i];
  step->count = 1;
  for (int64_t d : step->lead) step->count *= d;
  int64_t stride = step->inner;
  step->x_strides.resize(picked);
  for (int i = int(picked) - 1; i >= 0; --i) {
    step->x_strides[size_t(i)] = stride;
    stride *= in.dims[size_t(i)];
  }
  step->reads = {op.in[0]};
  for (size_t k = 0; k < picked; ++k) {
    const int number_of = op.in[k + 1];
    const Value& v = plan.values[number_of];
    require(v.dense(), "an index that is not dense");
    step->index.push_back(number_of);
    step->reads.push_back(number_of);
    step->sizes.push_back(in.dims[k]);
    std::vector<int64_t> s(step->lead.size(), 0);
    const size_t shift = step->lead.size() - v.dims.size();
    for (size_t i = 0; i < v.dims.size(); ++i) s[shift + i] = v.dims[i] == 1 ? 0 : v.strides[i];
    step->strides.push_back(s);
  }
  step->ops = op.kind;
  step->site = op.site;
  step->kernel = "gather";
  step->bytes = 2 * out.count() * dtype_size(out.dtype);
  step->writes = {op.out[0]};
  b.add(std::move(step));
}

}  // namespace pw
