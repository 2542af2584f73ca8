/* libpennyweight: plan and run programs of docs/numerics.md. Plain C, no torch, no Python.
 *
 * A model holds constants. A plan is made from a model for concrete sizes: values, then ops, then finish. A finished
 * plan is immutable and may be run from many threads at once. Functions that can fail return a negative number or
 * NULL; pw_last_error() then says why, on the same thread.
 */
#ifndef PENNYWEIGHT_H
#define PENNYWEIGHT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PW_API __attribute__((visibility("default")))
#define PW_ABI 5

typedef struct pw_model pw_model;
typedef struct pw_plan pw_plan;

enum pw_dtype { PW_F32 = 0, PW_F16 = 1, PW_BF16 = 2, PW_U8 = 3, PW_I8 = 4, PW_U4 = 5, PW_I32 = 6, PW_I64 = 7, PW_BOOL = 8, PW_I16 = 9 };
enum pw_kind { PW_TEMPORARY = 0, PW_INPUT = 1, PW_OUTPUT = 2, PW_CONSTANT = 3 };

PW_API int pw_abi_version(void);
PW_API const char* pw_last_error(void);

/* Instruction sets, weakest first. `PENNYWEIGHT_ISA` names the one to use; otherwise the strongest supported. */
PW_API int pw_isa_count(void);
PW_API const char* pw_isa_name(int isa);
PW_API int pw_isa_supported(int isa);
PW_API int pw_isa_default(void); /* -1 if PENNYWEIGHT_ISA names an unknown or unsupported one */

/* The kernel table: one row per kernel. */
typedef struct {
  const char* op;
  int isa;
  const char* symbol;
} pw_kernel_row;
PW_API int pw_kernel_count(void);
PW_API int pw_kernel_get(int row, pw_kernel_row* out);

/* Constants are not copied: the caller keeps them alive and unchanged as long as the model. */
PW_API pw_model* pw_model_create(void);
/* Constants of about this many bytes will be given, packed and run. If they are few, a thread takes memory for it all from
 * the system meanwhile. To be called once at most, right after the model is created. */
PW_API int pw_model_expect(pw_model*, int64_t bytes);
PW_API void pw_model_free(pw_model*);
PW_API int pw_model_constant(pw_model*, int dtype, int rank, const int64_t* dims, const void* data);

/* All constants of a model at once: per constant its dtype, its rank and its dimensions, one behind the other. They
 * are numbered in this order, behind those that the model has. */
PW_API int pw_model_constants(pw_model*, int count, const int64_t* words, int64_t n_words, const void* const* data);

/* Constants between these addresses lie in a file that is mapped for reading: once packed, their pages may be given back
 * to the system, which reads them again where they are wanted. */
PW_API void pw_model_mapped(pw_model*, const void* start, int64_t bytes);

typedef struct {
  const char* name;
  int kind; /* 0: integers, 1: floats, 2: text */
  int count;
  const int64_t* ints;
  const double* floats;
  const char* text;
} pw_attr;

typedef struct {
  int threads; /* 0: one per core */
  int isa;     /* -1: the default */
  int flags;   /* PW_KEEP_STEPS ... reserved, 0 */
} pw_options;

PW_API pw_plan* pw_plan_begin(pw_model*, const pw_options*);
/* Returns the value's number. `index` is the position among inputs or outputs, or the constant's number. */
PW_API int pw_plan_value(pw_plan*, int kind, int index, int dtype, int rank, const int64_t* dims);
/* `site` is text for reports. Absent optional operands are -1. */
PW_API int pw_plan_op(pw_plan*, const char* op, const char* site, int n_in, const int* in, int n_out, const int* out,
                      int n_attr, const pw_attr* attrs);
PW_API int pw_plan_output(pw_plan*, int value, int index);
/* Many of the above at once, one behind the other in `words`: 0, kind, index, dtype, rank, dims... for a value; 1, op,
 * site, n_in, in..., n_out, out..., n_attr, and per attribute name, kind and count, followed by integers, by positions
 * in `reals`, or by one text; 2, value, index for an output. Texts are positions in `text`, each ended by a zero. */
PW_API int pw_plan_make(pw_plan*, const int64_t* words, int64_t n_words, const char* text, int64_t n_text,
                        const double* reals, int64_t n_reals);
PW_API int pw_plan_finish(pw_plan*);
PW_API void pw_plan_free(pw_plan*);

/* Buffers are dense and row-major, of the sizes that the plan was made for. */
PW_API int pw_plan_run(pw_plan*, const void* const* inputs, void* const* outputs);

typedef struct {
  const char* op;     /* ops that the step does, joined by '+' */
  const char* site;   /* of its main op */
  const char* kernel; /* symbol of the kernel that runs */
  int64_t macs;       /* multiply-adds */
  int64_t bytes;      /* of all tensors read and written, each once */
  int tasks;          /* how many pieces threads share */
} pw_step_info;
PW_API int pw_plan_steps(const pw_plan*);
PW_API int pw_plan_step(const pw_plan*, int step, pw_step_info* out);
/* As pw_plan_run; ns[0 .. steps - 1]: nanoseconds of each step, ns[steps]: of the run around them (memory and threads
 * borrowed and given back). */
PW_API int pw_plan_profile(pw_plan*, const void* const* inputs, void* const* outputs, int64_t* ns);
PW_API int64_t pw_plan_arena_bytes(const pw_plan*);
PW_API int64_t pw_model_packed_bytes(const pw_model*);

/* What this machine can do, on registers alone and from memory: for rooflines. Both run for about `seconds`, on that many
 * threads, and return the best rate of many short parts; negative where the instruction set is not supported.
 * Multiply-adds a second with the instructions that the int8 (kind 0), float32 (1), bf16 (2) or bit (3) products of an
 * instruction set are made of; bytes a second read, by each thread from a buffer of `bytes` of its own. */
PW_API double pw_measure_macs(int isa, int kind, int threads, double seconds);
PW_API double pw_measure_reads(int isa, int64_t bytes, int threads, double seconds);

/* CRC-32 (IEEE 802.3, as in zlib) of what came before, given by its CRC (0 for nothing), and `size` bytes more. */
PW_API uint32_t pw_crc32(uint32_t crc, const void* data, int64_t size);
/* The same by a thread of its own, that the caller may go on: the data stay where they are until `end`, which waits for
 * it and must be called once. */
PW_API void* pw_crc32_begin(uint32_t crc, const void* data, int64_t size);
PW_API uint32_t pw_crc32_end(void* job);

/* Rounding in training: x [rows, cols] of PW_F32 or PW_BF16, one scale (positive) and zero point (or NULL) per row.
 * y = (clamp(rint(x * r) + z, lo, hi) - z) * s, r = 1 / s. */
PW_API int pw_fake_quantize(int dtype, const void* x, void* y, int64_t rows, int64_t cols, const float* scale,
                            const float* zero, float lo, float hi, int threads);
/* Its pseudo-gradient: gx = g * (1 + delta * sign(g) * (x * r - rint(x * r))) where the unrounded code is inside of the
 * bounds, to 1e-4, else 0. sums [rows, 3]: of g * (rint(x * r) - x * r) inside, of g below, of g above. */
PW_API int pw_fake_gradient(int dtype, const void* x, const void* g, void* gx, int64_t rows, int64_t cols,
                            const float* scale, const float* zero, float lo, float hi, float delta, double* sums,
                            int threads);

#ifdef __cplusplus
}
#endif
#endif
