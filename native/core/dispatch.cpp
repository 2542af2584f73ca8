// The kernel table, and the choice of a kernel per operation.
#include <cstring>

#include "core/kernels.h"

namespace pw {

// Declarations of every kernel in the table; the type comes from its slot.
template <Op op>
struct Slot;
#define PW_OP(name, type)    \
  template <>                \
  struct Slot<k_##name> {    \
    using Function = type;   \
  };
#include "core/ops.inc"
#undef PW_OP

#define PW_DECLARE(ns)                                    \
  namespace ns {                                          \
  void gemm(const GemmArgs&);                             \
  void gemm_wide(const GemmArgs&);                        \
  void epilogue(const EpilogueArgs&);                     \
  void depthwise(const DepthwiseArgs&);                   \
  void quantize(const QuantizeArgs&);                     \
  void dequantize(const DequantizeArgs&);                 \
  void add(const AddArgs&);                               \
  void mul(const MulArgs&);                               \
  void shift(const ShiftArgs&);                           \
  void table(const TableArgs&);                           \
  void table_f32(const TableF32Args&);                    \
  void affine(const AffineArgs&);                         \
  void minmax(const MinMaxArgs&);                         \
  void max_pool_u8(const PoolArgs&);                      \
  void max_pool_f32(const PoolArgs&);                     \
  void sum_pool(const PoolArgs&);                         \
  void mean_pool(const PoolArgs&);                        \
  void softmax(const SoftmaxArgs&);                       \
  void dots(const DotsArgs&);                             \
  void mix(const MixArgs&);                               \
  void probabilities(const ProbabilitiesArgs&);           \
  void layer_norm(const LayerNormArgs&);                  \
  void rms_norm(const LayerNormArgs&);                    \
  void rotary(const RotaryArgs&);                         \
  void hadamard(const HadamardArgs&);                     \
  void exp(const UnaryArgs&);                             \
  void sigmoid(const UnaryArgs&);                         \
  void tanh(const UnaryArgs&);                            \
  void erf(const UnaryArgs&);                             \
  void gelu(const UnaryArgs&);                            \
  void gelu_tanh(const UnaryArgs&);                       \
  void silu(const UnaryArgs&);                            \
  void hardswish(const UnaryArgs&);                       \
  void clip(const UnaryArgs&);                            \
  void scale(const UnaryArgs&);                           \
  void add_f32(const BinaryArgs&);                        \
  void mul_f32(const BinaryArgs&);                        \
  void lstm(const LstmArgs&);                             \
  void gru(const GruArgs&);                               \
  void gemm_f32(const GemmF32Args&);                      \
  void depthwise_f32(const DepthwiseF32Args&);            \
  void depthwise_bf16(const DepthwiseF32Args&);           \
  void gemm_bf16(const GemmBf16Args&);                    \
  void to_bf16(const ConvertArgs&);                       \
  void widen_bf16(const ConvertArgs&);                    \
  void max_pool_bf16(const PoolArgs&);                    \
  void decode(const DecodeArgs&);                         \
  void gemm_codes(const GemmCodesArgs&);                  \
  void gemm_grouped(const GemmGroupedArgs&);              \
  void gemm_bits(const GemmBitsArgs&);                    \
  void gemm_nibbles(const GemmNibblesArgs&);              \
  void pack(const PackArgs&);                             \
  void interleave(const InterleaveArgs&);                 \
  void bit_gemm(const BitGemmArgs&);                      \
  void sign_f32(const SignArgs&);                         \
  void sign_u8(const SignArgs&);                          \
  void sign_i32(const SignArgs&);                         \
  void fake_quantize(const FakeArgs&);                    \
  void fake_gradient(const FakeArgs&);                    \
  int64_t peak_i8(int64_t);                               \
  int64_t peak_f32(int64_t);                              \
  int64_t peak_bf16(int64_t);                             \
  int64_t peak_bits(int64_t);                             \
  void read(const void*, int64_t);                        \
  }
PW_DECLARE(scalar)
PW_DECLARE(avx2)
PW_DECLARE(avx512)
PW_DECLARE(avx512vbmi)
PW_DECLARE(avx512bf16)
PW_DECLARE(amx)
#undef PW_DECLARE

namespace {

#define PW_KERNEL(op, isa, symbol) {k_##op, #op, isa, #symbol, reinterpret_cast<void*>(static_cast<Slot<k_##op>::Function>(symbol))},
const KernelRow kRows[] = {
#include "kernels.inc"
};
#undef PW_KERNEL
constexpr int kRowCount = int(sizeof(kRows) / sizeof(kRows[0]));

struct Tables {
  Kernels of[kIsaCount];
  Tables() {
    for (int isa = 0; isa < kIsaCount; ++isa) {
      Kernels& k = of[isa];
      k.isa = isa;
      for (const KernelRow& row : kRows)
        if (row.isa <= isa && (!k.row[row.op] || k.row[row.op]->isa < row.isa)) k.row[row.op] = &row;
#define PW_OP(name, type) k.name = reinterpret_cast<type>(k.row[k_##name]->fn);
#include "core/ops.inc"
#undef PW_OP
    }
  }
};

}  // namespace

const KernelRow* kernel_rows(int* count) {
  *count = kRowCount;
  return kRows;
}

const Kernels& kernels_for(int isa) {
  static const Tables tables;
  return tables.of[isa];
}

}  // namespace pw
