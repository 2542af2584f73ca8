// From ops to steps: one builder per op, found in a table; a builder may take in the ops that follow.
#pragma once

#include <functional>
#include <map>
#include <set>

#include "engine/plan.h"

namespace pw {

// Softmax attention in floats, found at its first product; built at its last.
struct RealAttention {
  int first = -1, factor = -1;  // ops
  std::vector<int> masks;       // values
  std::string ops;              // for reports
};

class Builder {
 public:
  explicit Builder(Plan& plan) : plan(plan) {}
  Plan& plan;
  std::set<int> done;  // ops that another step has taken in
  int now = -1;        // the op whose place in the order steps have reached
  // Ops that are built where a later one stands (its number first), so that their step can take that in.
  std::map<int, int> put_off;
  std::map<int, int> widened;  // f32 values that stand for a bf16 value, not made until a step reads them as f32
  // By last product.
  std::map<int, RealAttention> attentions;

  // Add a step; reads and writes must be set. Padding around results is filled first.
  void add(std::unique_ptr<Step> step);
  // The only reader of the op's first result, if it is of one of these kinds and comes after; else -1.
  int follower(int op, std::initializer_list<const char*> kinds) const;
  // A value that convolutions may read with this padding and at will beyond its end: itself or a padded copy.
  int readable(int value, const std::vector<int64_t>& begin, const std::vector<int64_t>& end, int64_t fill);

 private:
  std::set<int> filled_;
};

// Whether an op swaps the two middle axes of four, as attention's operands and results are: [batch, tokens, heads, width].
bool swaps_heads(const Plan& plan, int op);
// Whether it does so for attention alone, which then reads the op's operand itself; the op makes no step.
bool swaps_for_attention(const Plan& plan, int op);

using BuildFn = void (*)(Builder&, int op);
// What a step says of itself where it reads and writes the tensors of its op.
void describe(Step& s, const Plan& plan, const OpNode& op, const char* kernel);

void build_conv(Builder&, int op);
void build_linear(Builder&, int op);
void build_linear_grouped(Builder&, int op);
void build_unpack(Builder&, int op);
void build_matmul(Builder&, int op);
void build_attention(Builder&, int op);
void build_past_attention(Builder&, int op);  // past_attention_q too
void build_conv_f32(Builder&, int op);
void build_linear_f32(Builder&, int op);    // linear_w too
void build_matmul_f32(Builder&, int op);
void build_decode(Builder&, int op);
void build_decode_levels(Builder&, int op);
void build_embedding(Builder&, int op);
void build_shift(Builder&, int op);         // requant_shift, requant_add_shift
void build_epilogue(Builder&, int op);      // requant, requant_add, rescale
void build_quantize(Builder&, int op);
void build_dequantize(Builder&, int op);
void build_dynamic_quantize(Builder&, int op);
void build_add_q(Builder&, int op);
void build_mul_q(Builder&, int op);
void build_affine_q(Builder&, int op);
void build_table(Builder&, int op);
void build_unary(Builder&, int op);
void build_binary(Builder&, int op);
void build_where(Builder&, int op);
void build_cast(Builder&, int op);
void build_iota(Builder&, int op);
void build_full(Builder&, int op);
void build_reduce(Builder&, int op);
void build_argmax(Builder&, int op);
void build_softmax(Builder&, int op);
void build_norm(Builder&, int op);
void build_rotary(Builder&, int op);
void build_hadamard(Builder&, int op);
void build_max_pool(Builder&, int op);
void build_sum_pool(Builder&, int op);
void build_sum_q(Builder&, int op);
void build_avg_pool(Builder&, int op);
void build_reshape(Builder&, int op);
void build_movement(Builder&, int op);      // transpose, slice, expand, upsample
void build_concat(Builder&, int op);
void build_pad(Builder&, int op);
void build_stuff(Builder&, int op);
void build_gather(Builder&, int op);
void build_gather_nd(Builder&, int op);
void build_sign(Builder&, int op);
void build_conv_binary(Builder&, int op);
void build_linear_binary(Builder&, int op);
void build_lstm(Builder&, int op);
void build_gru(Builder&, int op);

// Copy of `dims` elements between places with their own strides (in elements).
std::unique_ptr<Step> copy_step(const Plan& plan, int from, int64_t from_offset, std::vector<int64_t> from_strides,
                                int to, int64_t to_offset, std::vector<int64_t> to_strides, std::vector<int64_t> dims);
// Writes `fill` around a value that has padding.
std::unique_ptr<Step> halo_step(const Plan& plan, int root);
// Writes `fill` everywhere in a value.
std::unique_ptr<Step> fill_step(const Plan& plan, int value, double fill);
// Between f32 and bf16.
std::unique_ptr<Step> convert_step(const Plan& plan, int from, int to, const std::string& site);
// Whether an op is a cast between f32 and bf16.
bool converts_bf16(const Plan& plan, const OpNode& op);

}  // namespace pw
