// A loop of multiply-adds on registers, written out: compilers move accumulators of intrinsics through memory.
#pragma once

#include <cstdint>

#define PW_EACH_8(R) R(0) R(1) R(2) R(3) R(4) R(5) R(6) R(7)
#define PW_EACH_12(R) PW_EACH_8(R) R(8) R(9) R(10) R(11)
#define PW_EACH_16(R) PW_EACH_12(R) R(12) R(13) R(14) R(15)
#define PW_CLOBBERS_12                                                                                               \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"
#define PW_CLOBBERS_16 PW_CLOBBERS_12, "xmm12", "xmm13", "xmm14", "xmm15"
// `first` clears the accumulators, `body` is one round; %0 counts down, %1 and %2 are the operands.
#define PW_PEAK_LOOP(first, body, repeats, constraint, x, w, ...)                                                    \
  do {                                                                                                               \
    int64_t left = (repeats);                                                                                        \
    __asm__ volatile(first ".p2align 4\n1:\n\t" body "dec %0\n\tjnz 1b"                                              \
                     : "+r"(left)                                                                                    \
                     : constraint(x), constraint(w)                                                                  \
                     : "cc", __VA_ARGS__);                                                                           \
  } while (0)
