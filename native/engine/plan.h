// A program made concrete: values with places in memory, and steps.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/kernels.h"
#include "core/threads.h"
#include "pennyweight.h"

namespace pw {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] void fail(const std::string& what);
inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

int64_t dtype_size(int dtype);  // bytes; PW_U4 counts packed bytes
std::string dims_text(const std::vector<int64_t>& dims);

// Large pages are fast to read and one fault each, but a system that must make one first takes milliseconds for it.
enum class Pages { large, small };

// Memory that kernels may read a little beyond: aligned to 64 bytes, large blocks on large pages if not told otherwise.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes, Pages pages = Pages::large);
  ~Buffer();
  Buffer(Buffer&& o) noexcept : data_(o.data_), bytes_(o.bytes_), part_of_(std::move(o.part_of_)) { o.data_ = nullptr; }
  Buffer& operator=(Buffer&& o) noexcept;
  template <class T>
  T* as() const { return static_cast<T*>(data_); }
  int64_t bytes() const { return bytes_; }

 private:
  friend class Slab;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  std::shared_ptr<Buffer> part_of_;
};
constexpr int64_t kSlack = 4096;  // what a kernel may read beyond a tensor

// Many small buffers in a few blocks: a page taken from the system costs a microsecond or more, whatever its size.
class Slab {
 public:
  // While it lives, small buffers that this thread makes are parts of the slab; `expected` bytes of them in all.
  class Scope {
   public:
    Scope(Slab& slab, int64_t expected);
    ~Scope();
  };
  static bool take(int64_t bytes, Buffer& into);
  // Make a block for `expected` bytes now, and let a thread take its pages, and those of `other`, from the system: by the
  // time they are wanted they are there. `other` must not be used, nor go, before `settle`.
  void fetch(int64_t expected, const Buffer& other);
  void settle();  // waits for that thread
  Slab() = default;
  Slab(const Slab&) = delete;
  ~Slab();

 private:
  std::shared_ptr<Buffer> block_;
  int64_t used_ = 0, expected_ = 0;
  std::mutex fetching_;
  std::thread fetcher_;
};

struct Constant {
  int dtype = 0;
  std::vector<int64_t> dims;
  const void* data = nullptr;
  int64_t count() const;
};

// Weights in the form that kernels read, kept once per model and layout.
struct Packed {
  Buffer codes;            // or floats
  std::vector<int32_t> colsum;
  int64_t block = 0;       // elements from one block of 16 columns to the next
  int64_t rest = 0;        // bytes from a block to its Rest, where weights are split in two
  int scale_bytes = 0;     // of scales that lie among the codes
  int mantissa = 0, sign = 0;  // of small floats, see GemmCodesArgs; their levels are `factor` times the decoded ones
  float factor = 1;
};

class Model {
 public:
  std::vector<Constant> constants;
  // The packed form called `key` of a constant, made by `make` where it does not exist yet.
  template <class Make>
  std::shared_ptr<const Packed> packed(const std::string& key, Make make) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& slot = cache_[key];
    if (!slot) {
      if (small_ < 0) small_ = small_bytes();
      Slab::Scope scope(slab_, small_);
      slot = std::make_shared<Packed>(make());
      bytes_ += slot->codes.bytes();
    }
    return slot;
  }
  int64_t packed_bytes() const { return bytes_; }
  // Constants of about this many bytes will be given and packed, and run: memory for that will be wanted soon. Called
  // once, before all else.
  void expect(int64_t bytes);
  void mapped(const void* start, int64_t bytes);
  // Its packed form is what will be read: of a mapped file's memory, lets the system have it back.
  void let_go(const Constant& c) const;
  // Memory for a run of any plan: the smallest idle block that is large enough, else a new one in place of an idle one,
  // so that there are never more blocks than there were runs at once.
  Buffer borrow(int64_t bytes);
  void give_back(Buffer buffer);

 private:
  std::mutex mutex_, idle_mutex_;
  std::vector<Buffer> idle_;
  std::map<std::string, std::shared_ptr<Packed>> cache_;
  Slab slab_;
  int64_t small_ = -1;
  const char *mapped_ = nullptr, *mapped_end_ = nullptr;
  int64_t small_bytes() const;
  std::atomic<int64_t> bytes_{0};
};

struct Attribute {
  int kind = 0;
  std::vector<int64_t> ints;
  std::vector<double> floats;
  std::string text;
};

struct OpNode {
  std::string kind, site;
  std::vector<int> in, out;
  std::map<std::string, Attribute> attrs;

  int input(size_t i) const { return i < in.size() ? in[i] : -1; }
  int64_t integer(const char* name) const;
  float real(const char* name) const;
  bool flag(const char* name) const { return integer(name) != 0; }
  const std::string& text(const char* name) const;
  const std::vector<int64_t>& ints(const char* name) const;
};

struct Value {
  int dtype = 0;
  std::vector<int64_t> dims;
  int kind = PW_TEMPORARY;
  int index = -1;             // among inputs, outputs or constants
  int producer = -1;          // op
  std::vector<int> readers;   // ops, once per operand
  // place: `root` owns the memory; element [i, j, ...] is at offset + i * strides[0] + ...
  int root = -1;
  int64_t offset = 0;         // elements
  std::vector<int64_t> strides;
  // of a root
  int64_t allocated = 0;      // elements
  std::vector<int64_t> halo_begin, halo_end;  // per axis, empty: none
  int64_t fill = 0;           // value of the halo (a code, or zero)
  int64_t arena = -1;         // bytes
  int first = -1, last = -1;  // steps between which it lives

  int64_t count() const;
  int rank() const { return int(dims.size()); }
  bool dense() const;
};

struct Plan;

// One run's memory.
struct Run {
  const Plan* plan = nullptr;
  char* arena = nullptr;
  const void* const* inputs = nullptr;
  void* const* outputs = nullptr;
  mutable std::atomic<const char*> error{nullptr};

  // A step that cannot go on says so; the run then fails with this text (a literal).
  void report(const char* what) const { error.store(what, std::memory_order_relaxed); }
  char* scratch(int thread) const;
  void* place(int value) const;
  template <class T>
  T* at(int value) const { return static_cast<T*>(place(value)); }
};

struct Step {
  virtual ~Step() = default;
  virtual void run(const Run& r, int task, int thread) const = 0;
  // Called once before the tasks start.
  virtual void begin(const Run& r) const {}
  std::string ops, site;
  const char* kernel = "";
  int64_t macs = 0, bytes = 0;
  int tasks = 1;
  int64_t scratch = 0;             // bytes per thread
  std::vector<int> reads, writes;  // values
  int over = -1;                   // a value in whose place the first result may lie: read element by element, before
};

struct Plan {
  Model* model = nullptr;
  const Kernels* kernels = nullptr;
  int threads = 1;
  std::deque<Value> values;  // builders hold references while they add copies
  std::vector<OpNode> ops;
  std::vector<int> outputs, inputs;
  std::vector<std::unique_ptr<Step>> steps;
  int64_t arena_bytes = 0, scratch_bytes = 0;
  Pool* pool = nullptr;

  const Constant& constant(int value) const;
  bool is_constant(int value) const { return values[value].kind == PW_CONSTANT; }
  // The only op that reads a value, if the value is no output; else -1.
  int sole_reader(int value) const;
  int k_align() const { return kernels->isa == kAmx ? 64 : 4; }
  bool splits() const { return kernels->isa == kAvx2; }  // weights in two parts, where that pays (Rest)
};

// While it lives, the pool's threads help the one that is making a plan, if nobody else has them.
class Helpers {
 public:
  explicit Helpers(Pool& pool);
  ~Helpers();
  // Calls work(i) for i in [0, parts), in any order, by this thread and its helpers.
  template <class F>
  static void share(int64_t parts, const F& work) {
    struct Job {
      const F& work;
      std::atomic<bool> failed{false};
    } job{work};
    run(int(parts), [](void* context, int i, int) {
      Job& mine = *static_cast<Job*>(context);
      try {
        mine.work(int64_t(i));
      } catch (const std::exception&) {  // it would end the process, on another thread
        mine.failed = true;
      }
    }, &job);
    if (job.failed) fail("out of memory");
  }

 private:
  static void run(int parts, Pool::Function fn, void* context);
  Pool* pool_;
};

void assign_places(Plan& plan);   // layout.cpp: halos, aliases, strides
void build_steps(Plan& plan);     // build.cpp
void plan_memory(Plan& plan);     // memory.cpp
// measure.cpp: multiply-adds (0: int8, 1: float32, 2: bf16) and bytes read per second
double measure_macs(int isa, int kind, int threads, double seconds);
double measure_reads(int isa, int64_t bytes, int threads, double seconds);
void run_plan(Plan& plan, const void* const* inputs, void* const* outputs, int64_t* ns);

// Padded copy of a per-column constant of one element or `n`.
std::vector<float> columns_f32(const Plan& plan, int value, int64_t n, float fill = 0);

}  // namespace pw
