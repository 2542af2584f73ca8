#include "core/cpu.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pw {
namespace {

const char* const kNames[kIsaCount] = {"scalar", "avx2", "avx512vnni", "avx512vbmi", "avx512bf16", "amx"};

#if defined(__x86_64__)
unsigned long long xgetbv0() {
  unsigned lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<unsigned long long>(hi) << 32) | lo;
}

// The kernel grants the large tile state only on request (Linux, arch_prctl ARCH_REQ_XCOMP_PERM, feature 18).
bool request_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

struct Features {
  bool isa[kIsaCount] = {true};
  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
    if (!osxsave) return;
    const unsigned long long state = xgetbv0();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    isa[kAvx2] = (b & (1u << 5)) && fma && f16c && (state & 6) == 6;
    const bool f = b & (1u << 16), dq = b & (1u << 17), bw = b & (1u << 30), vl = b & (1u << 31);
    const bool vbmi = c & (1u << 1), vnni = c & (1u << 11), bitalg = c & (1u << 12), popcount = c & (1u << 14);
    isa[kAvx512] = isa[kAvx2] && f && dq && bw && vl && vnni && (state & 0xe6) == 0xe6;
    isa[kAvx512Vbmi] = isa[kAvx512] && vbmi && bitalg && popcount;
    const bool tile = d & (1u << 24), int8 = d & (1u << 25), tile_bf16 = d & (1u << 22);
    isa[kAvx512Bf16] = isa[kAvx512Vbmi] && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
    isa[kAmx] = isa[kAvx512Bf16] && tile && int8 && tile_bf16 && (state & 0x60000) == 0x60000 && request_tiles();
  }
};
#else
struct Features {
  bool isa[kIsaCount] = {true};
};
#endif

const Features& features() {
  static const Features f;
  return f;
}

}  // namespace

const char* isa_name(int isa) { return isa >= 0 && isa < kIsaCount ? kNames[isa] : nullptr; }

bool isa_supported(int isa) {
#if !defined(PW_HAVE_AMX)
  if (isa == kAmx) return false;
#endif
#if !defined(PW_HAVE_BF16)
  if (isa == kAvx512Bf16) return false;
#endif
  return isa >= 0 && isa < kIsaCount && features().isa[isa];
}

int isa_default() {
  if (const char* forced = std::getenv("PENNYWEIGHT_ISA"); forced && *forced) {
    for (int i = 0; i < kIsaCount; ++i)
      if (!std::strcmp(forced, kNames[i])) return isa_supported(i) ? i : -1;
    return -1;
  }
  for (int i = kIsaCount - 1; i > 0; --i)
    if (isa_supported(i)) return i;
  return kScalar;
}

}  // namespace pw
