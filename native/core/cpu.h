// Instruction sets of this machine, weakest first.
#pragma once

namespace pw {

// kAvx512: AVX-512 F, BW, DQ, VL and VNNI (Cascade Lake). kAvx512Vbmi: permutes and population counts of bytes and
// lanes too (Ice Lake, Zen 4). Each has all that the ones before it have.
enum Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vbmi = 3, kAvx512Bf16 = 4, kAmx = 5, kIsaCount = 6 };

const char* isa_name(int isa);
bool isa_supported(int isa);
// The strongest supported one, or what PENNYWEIGHT_ISA names; -1 if that is unknown or unsupported.
int isa_default();

}  // namespace pw
