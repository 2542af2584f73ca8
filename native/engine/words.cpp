// Many calls in one: what Python would say in hundreds of calls, written down as words.
#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "core/crc32.h"
#include "engine/guard.h"
#include "engine/plan.h"

namespace {

// Words read in order; every step is checked.
class Words {
 public:
  Words(const int64_t* words, int64_t count) : words_(words), count_(count) {}
  bool more() const { return at_ < count_; }
  int64_t next() {
    pw::require(at_ < count_, "the words of a plan end early");
    return words_[at_++];
  }
  int number() {
    const int64_t v = next();
    pw::require(v >= INT32_MIN && v <= INT32_MAX, "a number of a plan is out of range");
    return int(v);
  }
  const int64_t* run(int64_t n) {
    pw::require(n >= 0 && n <= count_ - at_, "the words of a plan end early");
    at_ += n;
    return words_ + at_ - n;
  }
  std::vector<int> list() {
    std::vector<int> v(size_t(checked(next())));
    for (int& i : v) i = number();
    return v;
  }
  int64_t checked(int64_t n) {
    pw::require(n >= 0 && n <= count_ - at_, "the words of a plan end early");
    return n;
  }

 private:
  const int64_t* words_;
  int64_t count_, at_ = 0;
};

void accept(int code) {
  if (code < 0) pw::fail(pw_last_error());
}

void op(pw_plan* p, Words& w, const char* text, int64_t n_text, const double* reals, int64_t n_reals) {
  auto name = [&] {
    const int64_t at = w.next();
    pw::require(at >= 0 && at < n_text, "a text of a plan is out of range");
    return text + at;
  };
  const char *kind = name(), *site = name();
  const std::vector<int> in = w.list(), out = w.list();
  std::vector<pw_attr> attrs(size_t(w.checked(w.next())));
  std::vector<std::vector<double>> kept;
  for (pw_attr& a : attrs) {
    a = {name(), w.number(), w.number(), nullptr, nullptr, nullptr};
    if (a.kind == 0) a.ints = w.run(a.count);
    if (a.kind == 2) a.text = name();
    if (a.kind != 1) continue;
    kept.emplace_back();
    for (int64_t i = w.checked(a.count); i > 0; --i) {
      const int64_t at = w.next();
      pw::require(at >= 0 && at < n_reals, "a real of a plan is out of range");
      kept.back().push_back(reals[at]);
    }
    a.floats = kept.back().data();
  }
  accept(pw_plan_op(p, kind, site, int(in.size()), in.data(), int(out.size()), out.data(), int(attrs.size()), attrs.data()));
}

}  // namespace

extern "C" {

int pw_plan_make(pw_plan* p, const int64_t* words, int64_t n_words, const char* text, int64_t n_text,
                 const double* reals, int64_t n_reals) {
  return pw::guarded([&] {
    pw::require(n_text == 0 || text[n_text - 1] == 0, "the texts of a plan do not end");
    Words w(words, n_words);
    while (w.more()) {
      const int tag = w.number();
      pw::require(tag >= 0 && tag <= 2, "an unknown word in a plan");
      if (tag == 1) {
        op(p, w, text, n_text, reals, n_reals);
        continue;
      }
      const int first = w.number(), second = w.number();
      if (tag == 2) {
        accept(pw_plan_output(p, first, second));
        continue;
      }
      const int dtype = w.number(), rank = w.number();
      accept(pw_plan_value(p, first, second, dtype, rank, w.run(rank)));
    }
    return 0;
  });
}

int pw_model_constants(pw_model* m, int count, const int64_t* words, int64_t n_words, const void* const* data) {
  return pw::guarded([&] {
    Words w(words, n_words);
    for (int i = 0; i < count; ++i) {
      const int dtype = w.number(), rank = w.number();
      accept(pw_model_constant(m, dtype, rank, w.run(rank), data[i]));
    }
    pw::require(!w.more(), "more words than constants");
    return 0;
  });
}

uint32_t pw_crc32(uint32_t crc, const void* data, int64_t size) { return pw::crc32(crc, data, size); }

namespace {
struct Sum {
  uint32_t crc = 0;
  std::thread thread;  // none where the system gave none
};
}  // namespace

void* pw_crc32_begin(uint32_t crc, const void* data, int64_t size) {
  auto* sum = new Sum;
  try {
    sum->thread = pw::aside([=] { sum->crc = pw::crc32(crc, data, size); });
  } catch (const std::system_error&) {
    sum->crc = pw::crc32(crc, data, size);
  }
  return sum;
}

uint32_t pw_crc32_end(void* job) {
  const std::unique_ptr<Sum> sum(static_cast<Sum*>(job));
  if (sum->thread.joinable()) sum->thread.join();
  return sum->crc;
}

}  // extern "C"
