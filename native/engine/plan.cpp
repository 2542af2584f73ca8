#include "engine/plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <system_error>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pw {

void fail(const std::string& what) { throw Error(what); }

int64_t dtype_size(int dtype) {
  switch (dtype) {
    case PW_F32: case PW_I32: return 4;
    case PW_F16: case PW_BF16: case PW_I16: return 2;
    case PW_I64: return 8;
    default: return 1;
  }
}

std::string dims_text(const std::vector<int64_t>& dims) {
  std::string out = "[";
  for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

namespace {
constexpr int64_t kPage = int64_t(2) << 20;
constexpr int64_t kFew = 4 * kPage;  // what small pages serve as well: the processor keeps the places of so many
thread_local Slab* slab_now = nullptr;
thread_local Pool* helpers_now = nullptr;
}  // namespace

Helpers::Helpers(Pool& pool) : pool_(pool.acquire() ? &pool : nullptr) { helpers_now = pool_; }

Helpers::~Helpers() {
  helpers_now = nullptr;
  if (pool_) pool_->release();
}

void Helpers::run(int parts, Pool::Function fn, void* context) {
  if (helpers_now && parts > 1) return helpers_now->parallel(parts, fn, context);
  for (int i = 0; i < parts; ++i) fn(context, i, 0);
}

Slab::Scope::Scope(Slab& slab, int64_t expected) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // (which watch what is allocated by itself)
  slab.expected_ = expected;
  slab_now = &slab;
#endif
}

Slab::Scope::~Scope() { slab_now = nullptr; }

bool Slab::take(int64_t bytes, Buffer& into) {
  Slab* s = slab_now;
  if (!s || bytes >= kPage || s->expected_ < kPage / 2) return false;
  const int64_t size = (bytes + 63) / 64 * 64;
  s->settle();
  if (!s->block_ || s->used_ + size > s->block_->bytes_) {
    slab_now = nullptr;
    const int64_t all = std::clamp(s->expected_ * 9 / 8, kPage, 8 * kPage) / kPage * kPage - kSlack;
    s->block_ = std::make_shared<Buffer>(all, s->expected_ > kFew ? Pages::large : Pages::small);
    s->used_ = 0;
    slab_now = s;
  }
  into.data_ = s->block_->as<char>() + s->used_;
  into.part_of_ = s->block_;
  s->used_ += size;
  return true;
}

namespace {

// Have the system give the pages of fresh memory. (It gives them all at one's asking too, but lets nobody else in the
// process have any memory meanwhile.)
void touch(char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 4096) const_cast<volatile char*>(from)[at] = 0;
}

}  // namespace

void Slab::fetch(int64_t expected, const Buffer& other) {
  block_ = std::make_shared<Buffer>(expected * 9 / 8, Pages::small);
  used_ = 0;
  char *mine = block_->as<char>(), *its = other.as<char>();
  const int64_t my_bytes = block_->bytes(), its_bytes = other.bytes();
  try {
    fetcher_ = aside([=] {
      touch(mine, my_bytes);
      touch(its, its_bytes);
    });
  } catch (const std::system_error&) {  // no thread: they come when they are wanted
  }
}

void Slab::settle() {
  std::lock_guard<std::mutex> lock(fetching_);
  if (fetcher_.joinable()) fetcher_.join();
}

Slab::~Slab() { settle(); }

void Model::expect(int64_t bytes) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  if (bytes < kPage / 2 || bytes > kFew) return;
  Buffer run(kPage, Pages::small);  // most networks of that size take no more
  slab_.fetch(bytes, run);
  give_back(std::move(run));
#endif
}

void Model::mapped(const void* start, int64_t bytes) {
  mapped_ = static_cast<const char*>(start);
  mapped_end_ = mapped_ + bytes;
}

void Model::let_go(const Constant& c) const {
#if defined(__linux__)
  const auto whole = [](const void* p, uintptr_t add) { return (reinterpret_cast<uintptr_t>(p) + add) & ~uintptr_t(4095); };
  const char *begin = static_cast<const char*>(c.data), *end = begin + c.count() * dtype_size(c.dtype);
  if (begin < mapped_ || end > mapped_end_) return;
  const uintptr_t first = whole(begin, 4095), last = whole(end, 0);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#endif
}

int64_t Model::small_bytes() const {
  int64_t sum = 0;
  for (const Constant& c : constants) {
    const int64_t bytes = c.count() * dtype_size(c.dtype);
    if (bytes < kPage) sum += bytes;
  }
  return sum;
}

Buffer::Buffer(int64_t bytes, Pages pages) : bytes_(bytes) {
  if (Slab::take(bytes, *this)) return;
  const int64_t size = bytes + kSlack;
  const int64_t align = pages == Pages::large && bytes >= kPage / 2 ? kPage : 64;
  if (posix_memalign(&data_, size_t(align), size_t(size))) fail("out of memory: " + std::to_string(bytes) + " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // whole pages alone: the last one, begun, would be taken whole
  if (align == kPage && size >= kPage) madvise(data_, size_t(size / kPage * kPage), MADV_HUGEPAGE);
#endif
}

Buffer::~Buffer() {
  if (!part_of_) std::free(data_);
}

Buffer& Buffer::operator=(Buffer&& o) noexcept {
  std::swap(data_, o.data_);
  std::swap(bytes_, o.bytes_);
  std::swap(part_of_, o.part_of_);
  return *this;
}

int64_t Constant::count() const {
  int64_t n = 1;
  for (int64_t d : dims) n *= d;
  return n;
}

int64_t Value::count() const {
  int64_t n = 1;
  for (int64_t d : dims) n *= d;
  return n;
}

bool Value::dense() const {
  int64_t stride = 1;
  for (int i = rank() - 1; i >= 0; --i) {
    if (dims[i] != 1 && strides[i] != stride) return false;
    stride *= dims[i];
  }
  return true;
}

static const Attribute& attribute(const OpNode& op, const char* name) {
  const auto it = op.attrs.find(name);
  if (it == op.attrs.end()) fail("op " + op.kind + " lacks attribute " + name);
  return it->second;
}

int64_t OpNode::integer(const char* name) const {
  const Attribute& a = attribute(*this, name);
  if (a.kind != 0 || a.ints.empty()) fail("attribute " + std::string(name) + " of " + kind + " is no integer");
  return a.ints[0];
}

float OpNode::real(const char* name) const {
  const Attribute& a = attribute(*this, name);
  if (a.kind == 0 && !a.ints.empty()) return float(a.ints[0]);
  if (a.kind != 1 || a.floats.empty()) fail("attribute " + std::string(name) + " of " + kind + " is no number");
  return float(a.floats[0]);
}

const std::string& OpNode::text(const char* name) const { return attribute(*this, name).text; }
const std::vector<int64_t>& OpNode::ints(const char* name) const { return attribute(*this, name).ints; }

const Constant& Plan::constant(int value) const {
  const Value& v = values[value];
  if (v.kind != PW_CONSTANT) fail("an operand must be a constant");
  return model->constants[v.index];
}

int Plan::sole_reader(int value) const {
  const Value& v = values[value];
  if (v.kind != PW_TEMPORARY || v.readers.size() != 1) return -1;
  for (int out : outputs)
    if (out == value) return -1;
  return v.readers[0];
}

std::vector<float> columns_f32(const Plan& plan, int value, int64_t n, float fill) {
  const Constant& c = plan.constant(value);
  require(c.dtype == PW_F32, "a per-column constant is not f32");
  require(c.count() == n || c.count() == 1, "a per-column constant does not fit");
  std::vector<float> out((n + 63) / 64 * 64, fill);
  const float* data = static_cast<const float*>(c.data);
  for (int64_t i = 0; i < n; ++i) out[i] = data[c.count() == 1 ? 0 : i];
  return out;
}

void* Run::place(int value) const {
  const Value& v = plan->values[value];
  const Value& root = plan->values[v.root];
  char* base;
  switch (root.kind) {
    case PW_INPUT: base = static_cast<char*>(const_cast<void*>(inputs[root.index])); break;
    case PW_OUTPUT: base = static_cast<char*>(outputs[root.index]); break;
    case PW_CONSTANT: base = static_cast<char*>(const_cast<void*>(plan->model->constants[root.index].data)); break;
    default: base = arena + root.arena;
  }
  return base + v.offset * dtype_size(v.dtype);
}

char* Run::scratch(int thread) const { return arena + plan->arena_bytes + thread * plan->scratch_bytes; }

}  // namespace pw
