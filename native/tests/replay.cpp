// Replays recorded programs (tests/native/recording.py) over the C surface: for builds with sanitizers.
//
// usage: replay FILE [THREADS...]
//
// Every program runs on every instruction set of this machine, with pools of 1, 2 and 4 threads; then one plan from
// several callers at once, while others plan the same model anew and throw their plans away. Results that the recording
// knows exactly must be equal bit for bit; the others, bit for bit equal to the first run on the same instruction set.
// Buffers are of exactly the sizes that the surface promises, so that a sanitizer sees every step beyond them.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "pennyweight.h"

namespace {

[[noreturn]] void stop(const std::string& what) { throw std::runtime_error(what); }
void require(bool fine, const std::string& what) {
  if (!fine) stop(what + ": " + pw_last_error());
}

using Bytes = std::vector<char>;

class Reader {
 public:
  explicit Reader(const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) stop(std::string("cannot open ") + path);
    data_.assign(std::istreambuf_iterator<char>(file), {});
  }
  int64_t number() {
    int64_t v;
    std::memcpy(&v, take(8), 8);
    return v;
  }
  std::string text() {
    const size_t n = size_t(number());
    return {take(n), n};
  }
  Bytes bytes() {
    const size_t n = size_t(number());
    const char* from = take(n);
    return {from, from + n};
  }
  std::vector<int64_t> numbers() {
    std::vector<int64_t> v(static_cast<size_t>(number()));
    for (int64_t& i : v) i = number();
    return v;
  }

 private:
  const char* take(size_t n) {
    if (n > data_.size() - at_) stop("the recording ends early");
    at_ += n;
    return data_.data() + at_ - n;
  }
  Bytes data_;
  size_t at_ = 0;
};

struct Tensor {
  int dtype;
  std::vector<int64_t> dims;
  Bytes data;
};

struct Recording {
  std::string name;
  bool exact;
  std::vector<Tensor> constants;
  Bytes words, text, reals;  // of pw_plan_make
  std::vector<Bytes> inputs, outputs;
};

Recording read_recording(Reader& r) {
  Recording out;
  out.name = r.text();
  out.exact = r.number() != 0;
  for (int64_t n = r.number(); n > 0; --n) {
    Tensor t;
    t.dtype = int(r.number());
    t.dims = r.numbers();
    t.data = r.bytes();
    out.constants.push_back(std::move(t));
  }
  out.words = r.bytes();
  out.text = r.bytes();
  out.reals = r.bytes();
  for (int64_t n = r.number(); n > 0; --n) out.inputs.push_back(r.bytes());
  for (int64_t n = r.number(); n > 0; --n) out.outputs.push_back(r.bytes());
  return out;
}

class Model {
 public:
  explicit Model(const Recording& r) : handle(pw_model_create()) {
    for (const Tensor& t : r.constants)
      require(pw_model_constant(handle, t.dtype, int(t.dims.size()), t.dims.data(), t.data.data()) >= 0, r.name);
  }
  ~Model() { pw_model_free(handle); }
  Model(const Model&) = delete;
  pw_model* handle;
};

class Plan {
 public:
  Plan(const Recording& r, const Model& model, int threads, int isa) : recording_(r) {
    const pw_options options{threads, isa, 0};
    handle_ = pw_plan_begin(model.handle, &options);
    require(handle_ != nullptr, r.name);
    require(pw_plan_make(handle_, reinterpret_cast<const int64_t*>(r.words.data()), int64_t(r.words.size() / 8),
                         r.text.data(), int64_t(r.text.size()), reinterpret_cast<const double*>(r.reals.data()),
                         int64_t(r.reals.size() / 8)) >= 0, r.name);
    require(pw_plan_finish(handle_) >= 0, r.name);
  }
  ~Plan() { pw_plan_free(handle_); }
  Plan(const Plan&) = delete;

  std::vector<Bytes> run(bool profiled = false) const {
    std::vector<Bytes> results;
    std::vector<const void*> in;
    std::vector<void*> out;
    for (const Bytes& b : recording_.outputs) results.emplace_back(b.size());
    for (const Bytes& b : recording_.inputs) in.push_back(b.data());
    for (Bytes& b : results) out.push_back(b.data());
    std::vector<int64_t> ns(static_cast<size_t>(pw_plan_steps(handle_)) + 1);
    const int code = profiled ? pw_plan_profile(handle_, in.data(), out.data(), ns.data())
                              : pw_plan_run(handle_, in.data(), out.data());
    require(code >= 0, recording_.name);
    return results;
  }

 private:
  const Recording& recording_;
  pw_plan* handle_;
};

std::atomic<int> wrong{0};

void compare(const Recording& r, const std::vector<Bytes>& got, const std::vector<Bytes>& want, const std::string& how) {
  for (size_t i = 0; i < want.size(); ++i)
    if (got[i] != want[i]) {
      ++wrong;
      std::fprintf(stderr, "%s: output %zu differs (%s)\n", r.name.c_str(), i, how.c_str());
    }
}

void replay(const Recording& r, const std::vector<int>& pools, int callers, int rounds) {
  for (int isa = 0; isa < pw_isa_count(); ++isa) {
    if (!pw_isa_supported(isa)) continue;
    const Model model(r);
    const std::vector<Bytes> want = r.exact ? r.outputs : Plan(r, model, 1, isa).run();
    for (int threads : pools) {
      const std::string how = std::string(pw_isa_name(isa)) + ", " + std::to_string(threads) + " threads";
      const Plan plan(r, model, threads, isa);
      compare(r, plan.run(), want, how);
      compare(r, plan.run(true), want, how + ", profiled");
    }
    const int threads = pools.back();
    const std::string how = std::string(pw_isa_name(isa)) + ", " + std::to_string(callers) + " callers at once";
    const Model fresh(r);  // nothing is packed yet: the callers plan at the same time
    const Plan shared(r, model, threads, isa);
    std::vector<std::thread> crowd;
    for (int caller = 0; caller < callers; ++caller)
      crowd.emplace_back([&, caller] {
        try {
          for (int round = 0; round < rounds; ++round) {
            compare(r, shared.run(caller == 1), want, how);
            if (caller % 2 == 0) compare(r, Plan(r, fresh, caller + 1, isa).run(), want, how + ", own plan");
          }
        } catch (const std::exception& e) {
          ++wrong;
          std::fprintf(stderr, "%s\n", e.what());
        }
      });
    for (std::thread& t : crowd) t.join();
  }
}

// Rounding in training from several callers: the same rows of both dtypes, forward and back.
void fake(int callers) {
  const int64_t rows = 37, cols = 4001;
  std::vector<float> x(static_cast<size_t>(rows * cols)), g(x.size()), scale(rows), zero(rows);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(int(i * 7919 % 4001) - 2000) / 500, g[i] = float(i % 13) - 6;
  for (int64_t i = 0; i < rows; ++i) scale[size_t(i)] = 0.01f + 0.001f * float(i), zero[size_t(i)] = float(i % 5);
  auto both = [&](int threads) {
    std::vector<char> out(x.size() * 8 + size_t(rows) * 3 * sizeof(double));
    float* y = reinterpret_cast<float*>(out.data());
    double* sums = reinterpret_cast<double*>(out.data() + x.size() * 8);
    for (int dtype : {PW_BF16, PW_F32}) {  // read as bf16, the floats are half as many numbers again, all finite
      require(pw_fake_quantize(dtype, x.data(), y, rows, cols, scale.data(), zero.data(), -128, 127, threads) >= 0, "fake");
      require(pw_fake_gradient(dtype, x.data(), g.data(), y + x.size(), rows, cols, scale.data(), zero.data(), -128, 127,
                               0.1f, sums, threads) >= 0, "fake gradient");
    }
    return out;
  };
  const std::vector<char> want = both(1);
  std::vector<std::thread> crowd;
  for (int caller = 0; caller < callers; ++caller)
    crowd.emplace_back([&, caller] {
      if (both(1 + caller % 3) != want) ++wrong, std::fprintf(stderr, "fake quantization differs, caller %d\n", caller);
    });
  for (std::thread& t : crowd) t.join();
}

// Checksums by threads of their own, several at a time.
void sums() {
  std::vector<char> data(3 << 20);
  for (size_t i = 0; i < data.size(); ++i) data[i] = char(i * 2654435761u >> 13);
  std::vector<void*> jobs;
  for (int i = 0; i < 4; ++i) jobs.push_back(pw_crc32_begin(uint32_t(i), data.data() + i, int64_t(data.size()) - i));
  for (int i = 0; i < 4; ++i)
    if (pw_crc32_end(jobs[size_t(i)]) != pw_crc32(uint32_t(i), data.data() + i, int64_t(data.size()) - i))
      ++wrong, std::fprintf(stderr, "checksum %d differs\n", i);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc < 2) stop("usage: replay FILE [THREADS...]");
    std::vector<int> pools;
    for (int i = 2; i < argc; ++i) pools.push_back(std::atoi(argv[i]));
    if (pools.empty()) pools = {1, 2, 4};
    fake(4);
    sums();
    Reader reader(argv[1]);
    const int64_t count = reader.number();
    for (int64_t i = 0; i < count; ++i) {
      const Recording r = read_recording(reader);
      std::fprintf(stderr, "%s\n", r.name.c_str());  // whose finding follows
      replay(r, pools, 4, 2);
    }
    std::printf("%lld programs replayed, %d results wrong\n", static_cast<long long>(count), wrong.load());
    return wrong ? 1 : 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  }
}
