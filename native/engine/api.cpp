// The C surface: every call is checked, no exception crosses it.
#include <cstring>
#include <string>

#include "engine/guard.h"
#include "engine/plan.h"

using namespace pw;

struct pw_model {
  Model model;
};
struct pw_plan {
  Plan plan;
  bool finished = false;
};

thread_local std::string pw::last_error;

namespace {

std::vector<int64_t> checked_dims(int rank, const int64_t* dims) {
  require(rank >= 0 && rank <= 8, "a rank beyond 8");
  int64_t count = 1;
  for (int i = 0; i < rank; ++i) {
    require(dims[i] >= 0, "a negative size");
    require(dims[i] == 0 || count <= (int64_t(1) << 40) / dims[i], "a tensor too large");
    count *= dims[i];
  }
  return {dims, dims + rank};
}

}  // namespace

extern "C" {

int pw_abi_version(void) { return PW_ABI; }
const char* pw_last_error(void) { return last_error.c_str(); }
int pw_isa_count(void) { return kIsaCount; }
const char* pw_isa_name(int isa) { return isa_name(isa); }
int pw_isa_supported(int isa) { return isa_supported(isa); }
int pw_isa_default(void) { return isa_default(); }

int pw_kernel_count(void) {
  int count;
  kernel_rows(&count);
  return count;
}

int pw_kernel_get(int row, pw_kernel_row* out) {
  int count;
  const KernelRow* rows = kernel_rows(&count);
  if (row < 0 || row >= count) return -1;
  *out = {rows[row].op_name, rows[row].isa, rows[row].symbol};
  return 0;
}

pw_model* pw_model_create(void) { return new pw_model; }
int pw_model_expect(pw_model* m, int64_t bytes) {
  return guarded([&] {
    m->model.expect(bytes);
    return 0;
  });
}
void pw_model_free(pw_model* m) { delete m; }
int64_t pw_model_packed_bytes(const pw_model* m) { return m->model.packed_bytes(); }

void pw_model_mapped(pw_model* m, const void* start, int64_t bytes) { m->model.mapped(start, bytes); }

int pw_model_constant(pw_model* m, int dtype, int rank, const int64_t* dims, const void* data) {
  return guarded([&] {
    require(dtype >= 0 && dtype <= PW_I16, "unknown dtype");
    m->model.constants.push_back({dtype, checked_dims(rank, dims), data});
    return int(m->model.constants.size()) - 1;
  });
}

pw_plan* pw_plan_begin(pw_model* m, const pw_options* options) {
  pw_plan* p = nullptr;
  guarded([&] {
    const int isa = options && options->isa >= 0 ? options->isa : isa_default();
    if (isa < 0) fail("PENNYWEIGHT_ISA names an instruction set that is unknown or not supported here");
    if (!isa_supported(isa)) fail("this machine does not support the instruction set asked for");
    p = new pw_plan;
    p->plan.model = &m->model;
    p->plan.kernels = &kernels_for(isa);
    int threads = options ? options->threads : 0;
    if (threads <= 0) threads = int(std::thread::hardware_concurrency());
    p->plan.threads = threads < 1 ? 1 : threads > 256 ? 256 : threads;
    return 0;
  });
  return p;
}

void pw_plan_free(pw_plan* p) { delete p; }

int pw_plan_value(pw_plan* p, int kind, int index, int dtype, int rank, const int64_t* dims) {
  return guarded([&] {
    require(!p->finished, "the plan is finished");
    require(dtype >= 0 && dtype <= PW_I16, "unknown dtype");
    Plan& plan = p->plan;
    Value v;
    v.dtype = dtype;
    v.dims = checked_dims(rank, dims);
    v.kind = kind;
    v.index = index;
    const int number = int(plan.values.size());
    if (kind == PW_CONSTANT) {
      require(index >= 0 && index < int(plan.model->constants.size()), "unknown constant");
      const Constant& c = plan.model->constants[index];
      require(c.dtype == dtype && c.dims == v.dims, "a constant of another type");
    } else if (kind == PW_INPUT) {
      require(index == int(plan.inputs.size()), "inputs must come in order");
      plan.inputs.push_back(number);
    } else {
      require(kind == PW_TEMPORARY, "unknown kind of value");
    }
    plan.values.push_back(std::move(v));
    return number;
  });
}

int pw_plan_op(pw_plan* p, const char* op, const char* site, int n_in, const int* in, int n_out, const int* out,
               int n_attr, const pw_attr* attrs) {
  return guarded([&] {
    require(!p->finished, "the plan is finished");
    Plan& plan = p->plan;
    OpNode node;
    node.kind = op;
    node.site = site ? site : "";
    const int number = int(plan.ops.size());
    for (int i = 0; i < n_in; ++i) {
      require(in[i] >= -1 && in[i] < int(plan.values.size()), "unknown operand");
      node.in.push_back(in[i]);
      if (in[i] >= 0) plan.values[in[i]].readers.push_back(number);
    }
    for (int i = 0; i < n_out; ++i) {
      require(out[i] >= 0 && out[i] < int(plan.values.size()), "unknown result");
      Value& v = plan.values[out[i]];
      require(v.kind == PW_TEMPORARY && v.producer < 0, "a result that exists already");
      v.producer = number;
      node.out.push_back(out[i]);
    }
    for (int i = 0; i < n_attr; ++i) {
      Attribute a;
      a.kind = attrs[i].kind;
      if (a.kind == 0) a.ints.assign(attrs[i].ints, attrs[i].ints + attrs[i].count);
      if (a.kind == 1) a.floats.assign(attrs[i].floats, attrs[i].floats + attrs[i].count);
      if (a.kind == 2) a.text = attrs[i].text;
      node.attrs[attrs[i].name] = std::move(a);
    }
    plan.ops.push_back(std::move(node));
    return 0;
  });
}

int pw_plan_output(pw_plan* p, int value, int index) {
  return guarded([&] {
    Plan& plan = p->plan;
    require(value >= 0 && value < int(plan.values.size()), "unknown output");
    require(index == int(plan.outputs.size()), "outputs must come in order");
    plan.outputs.push_back(value);
    return 0;
  });
}

int pw_plan_finish(pw_plan* p) {
  return guarded([&] {
    require(!p->finished, "the plan is finished");
    p->plan.pool = &Pool::shared(p->plan.threads);
    assign_places(p->plan);
    {
      const Helpers helpers(*p->plan.pool);
      build_steps(p->plan);
    }
    plan_memory(p->plan);
    p->finished = true;
    return 0;
  });
}

int pw_plan_run(pw_plan* p, const void* const* inputs, void* const* outputs) {
  return guarded([&] {
    require(p->finished, "the plan is not finished");
    run_plan(p->plan, inputs, outputs, nullptr);
    return 0;
  });
}

int pw_plan_profile(pw_plan* p, const void* const* inputs, void* const* outputs, int64_t* ns) {
  return guarded([&] {
    require(p->finished, "the plan is not finished");
    run_plan(p->plan, inputs, outputs, ns);
    return 0;
  });
}

int pw_plan_steps(const pw_plan* p) { return int(p->plan.steps.size()); }

int pw_plan_step(const pw_plan* p, int step, pw_step_info* out) {
  if (step < 0 || step >= int(p->plan.steps.size())) return -1;
  const Step& s = *p->plan.steps[step];
  *out = {s.ops.c_str(), s.site.c_str(), s.kernel, s.macs, s.bytes, s.tasks};
  return 0;
}

double pw_measure_macs(int isa, int kind, int threads, double seconds) {
  double found = -1;
  guarded([&] {
    require(isa_supported(isa), "this machine does not support the instruction set asked for");
    require(threads >= 1 && threads <= 256, "a number of threads out of range");
    found = measure_macs(isa, kind, threads, seconds);
    return 0;
  });
  return found;
}

double pw_measure_reads(int isa, int64_t bytes, int threads, double seconds) {
  double found = -1;
  guarded([&] {
    require(isa_supported(isa), "this machine does not support the instruction set asked for");
    require(threads >= 1 && threads <= 256, "a number of threads out of range");
    found = measure_reads(isa, bytes, threads, seconds);
    return 0;
  });
  return found;
}

int64_t pw_plan_arena_bytes(const pw_plan* p) {
  return p->plan.arena_bytes + p->plan.threads * p->plan.scratch_bytes;
}

}  // extern "C"
