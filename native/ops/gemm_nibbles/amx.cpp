// Packed weights of 4 bits: many rows on tiles.
#if defined(__AMX_INT8__)
#include "core/kernels.h"

namespace pw::avx512 {
void nibbles_by(const GemmNibblesArgs&, GemmGroupedFn);
}

namespace pw::amx {

void gemm_grouped(const GemmGroupedArgs&);
void gemm_nibbles(const GemmNibblesArgs& g) { avx512::nibbles_by(g, gemm_grouped); }

}  // namespace pw::amx

#endif  // __AMX_INT8__
