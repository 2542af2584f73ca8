// Instruction sets of this machine, weakest first.
#pragma once

namespace pw {

enum Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kIsaCount = 5 };

const char* isa_name(int isa);
bool isa_supported(int isa);
// vpopcntd and vpopcntw: not all processors of kAvx512 have it.
bool has_lane_popcount();
// The strongest supported one, or what PENNYWEIGHT_ISA names; -1 if that is unknown or unsupported.
int isa_default();

}  // namespace pw
