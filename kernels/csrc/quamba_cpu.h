/* C ABI of the CPU kernels.
 *
 * Every operation takes one pointer to a structure of 8-byte fields (pointers and int64) and returns a status. A structure
 * holds all that a call needs, so a list of them is a recording that can be run again. The caller keeps the tensors
 * alive, and has checked shapes and dtypes: a kernel sees only pointers and sizes.
 *
 * Sizes, strides: int64, in elements; the last axis always has stride 1. "batch_stride" and "token_stride" belong to
 * [batch, length, channels] tensors. A vector of one value per channel comes with a stride of 0 (one value for all) or 1.
 * Optional pointers may be null. Pointers need no alignment beyond that of their type.
 * threads: at least 1; results never depend on it.
 *
 * Rounding to int8: rint(clamp(real * inv, -128, 127)), half to even.
 */
#ifndef QUAMBA_CPU_H
#define QUAMBA_CPU_H

#include <stdint.h>

#if defined(__GNUC__)
#define QUAMBA_API __attribute__((visibility("default")))
#else
#define QUAMBA_API
#endif

#define QUAMBA_CPU_ABI 6

enum quamba_status { QUAMBA_OK = 0, QUAMBA_BAD_ARGUMENT = 1, QUAMBA_OUT_OF_MEMORY = 2, QUAMBA_NO_SUCH_ENTRY = 3 };
enum quamba_kind { QUAMBA_INT8 = 0, QUAMBA_FLOAT32 = 1, QUAMBA_FLOAT16 = 2, QUAMBA_BFLOAT16 = 3 };

enum { QUAMBA_MAX_INPUTS = (1 << 17) - 1 }; /* 2^17 products of -128 * -128 overflow int32 */
enum { QUAMBA_MAX_STATE = 256 };
enum { QUAMBA_MAX_TAPS = 64 };

/* acc[m, n] = sum_k x[m, k] * weight[n, k]; exactly one of acc, y, codes is set (int8_epilogue: acc and one of the others).
 * y = (acc * weight_scale[n]) * x_scale[m] + bias[n]; codes = y rounded with inv.
 *
 * int8_linear: x is int8, acc exact. float_linear: x is float32, summed in float32, without x_scale and acc.
 * group > 0: the weight is int4, packed by groups of 32, 64 or 128 inputs: byte j of a group holds code j in its low half
 * and code j + group / 2 in its high half, and the codes are multiplied by their group's scale: int8, at
 * most 15 in magnitude, or float32. For int8_linear a product with a float scale is rounded to int8.
 *
 * float_linear with weight_kind other than QUAMBA_INT8: float weights, without group, scales and codes. */
typedef struct {
    const void *x;      /* [rows, inputs] */
    const void *weight; /* int8 [outputs, inputs], or packed [outputs, ceil(inputs / group) * group / 2] */
    int64_t weight_kind;
    int64_t group;
    const void *group_scale; /* [outputs, ceil(inputs / group)] */
    int64_t group_scale_is_float;
    const float *x_scale; /* 1 or [rows] */
    int64_t x_scale_stride;
    const float *weight_scale; /* [outputs] */
    const float *bias;         /* [outputs], optional */
    const float *inv;          /* 1 or [outputs] */
    int64_t inv_stride;
    int32_t *acc;  /* [rows, outputs] */
    float *y;      /* [rows, outputs] */
    int8_t *codes; /* [rows, outputs] */
    int64_t rows, outputs, inputs, threads;
} quamba_linear_args;

/* Depthwise causal convolution, then SiLU. x and weight are both float32 or both int8; exactly one of y, codes is set. */
typedef struct {
    const void *x; /* [batch, length, channels] */
    int64_t x_batch_stride, x_token_stride;
    const void *weight; /* [channels, taps], oldest tap first */
    int64_t is_int8;
    const float *x_scale; /* int8 only */
    int64_t x_scale_stride;
    const float *weight_scale; /* [channels], int8 only */
    const float *bias;         /* [channels], optional */
    const float *inv;
    int64_t inv_stride;
    void *state;         /* [batch, channels, taps - 1] in x's type, optional: read, then overwritten */
    const uint8_t *mask; /* [batch, length], optional: 0 = token enters and leaves as 0 */
    float *y;            /* [batch, length, channels] */
    int8_t *codes;       /* [batch, length, channels] */
    int64_t batch, length, channels, taps, threads;
} quamba_conv_args;

/* Mamba1's selective scan with softplus(dt + dt_bias) and the gate y * silu(z). */
typedef struct {
    const void *u; /* [batch, length, channels], float32 or int8 */
    int64_t u_batch_stride, u_token_stride, u_is_int8;
    const float *u_scale; /* int8 only */
    int64_t u_scale_stride;
    const void *z; /* as u */
    int64_t z_batch_stride, z_token_stride, z_is_int8;
    const float *z_scale;
    int64_t z_scale_stride;
    const float *dt; /* [batch, length, channels] */
    int64_t dt_batch_stride, dt_token_stride;
    const float *A; /* [channels, states] */
    const float *B; /* [batch, length, states] */
    int64_t B_batch_stride, B_token_stride;
    const float *C; /* [batch, length, states] */
    int64_t C_batch_stride, C_token_stride;
    const float *D;       /* [channels] */
    const float *dt_bias; /* [channels] */
    float *state;         /* [batch, channels, states], optional: read, then overwritten */
    const uint8_t *mask;  /* [batch, length], optional: 0 = u and dt are 0 */
    float *y;             /* [batch, length, channels] */
    int64_t batch, length, channels, states, threads;
} quamba_scan_args;

/* Mamba2's scan with softplus(dt + dt_bias), limited to dt_min .. dt_max, without its gate. */
typedef struct {
    const void *x; /* [batch, length, heads * width], float32 or int8 */
    int64_t x_batch_stride, x_token_stride, x_is_int8;
    const float *x_scale; /* int8 only: 1 or [heads * width] */
    int64_t x_scale_stride;
    const void *B; /* [batch, length, groups * states], as x */
    int64_t B_batch_stride, B_token_stride, B_is_int8;
    const float *B_scale;
    int64_t B_scale_stride;
    const void *C; /* as B */
    int64_t C_batch_stride, C_token_stride, C_is_int8;
    const float *C_scale;
    int64_t C_scale_stride;
    const float *dt; /* [batch, length, heads] */
    int64_t dt_batch_stride, dt_token_stride;
    const float *A; /* [heads] */
    const float *D; /* [heads], or [heads * width] */
    int64_t D_per_channel;
    const float *dt_bias; /* [heads] */
    double dt_min, dt_max;
    float *state;        /* [batch, heads, width, states], optional: read, then overwritten */
    const uint8_t *mask; /* [batch, length], optional: 0 = x and dt are 0 */
    float *y;            /* [batch, length, heads * width] */
    int64_t batch, length, heads, width, groups, states, threads;
} quamba_ssd_args;

/* Mamba2's norm of x with the gate silu(z), over `groups` equal runs of channels; without weight only x * silu(z). */
typedef struct {
    const float *x; /* [rows, width] */
    int64_t x_row_stride;
    const void *z; /* [rows, width], float32 or int8 */
    int64_t z_row_stride, z_is_int8;
    const float *z_scale; /* int8 only */
    int64_t z_scale_stride;
    const float *weight; /* [width], optional */
    float *y;            /* [rows, width] */
    double eps;
    int64_t groups, norm_before_gate, rows, width, threads;
} quamba_gated_norm_args;

/* Rows of floats: quantization, norm and Hadamard transform. Exactly one of y, codes is set. Codes are rounded with inv, or
 * with a scale that is found for each row and written to `scale`. */
typedef struct {
    const float *x;      /* [rows, width] */
    const float *weight; /* [width]: rms_norm; [order, order] of +-1: hadamard, optional; else unused */
    const float *inv;    /* 1 or [width] */
    int64_t inv_stride;
    float *y;       /* [rows, width] */
    int8_t *codes;  /* [rows, width] */
    float *scale;   /* [rows]: codes without inv */
    double eps;     /* rms_norm */
    int64_t blocks; /* hadamard: the width is cut into so many equal, independent transforms */
    int64_t order;  /* hadamard: order of the outer matrix, 1 without */
    int64_t rows, width, threads;
} quamba_rows_args;

/* y = a, a + b or a * b, computed in float32, for tensors of any kind and strides (0 repeats a value). */
enum { QUAMBA_AXES = 4 };
enum quamba_elementwise_op { QUAMBA_COPY = 0, QUAMBA_ADD = 1, QUAMBA_MULTIPLY = 2 };
typedef struct {
    const void *a;
    const void *b; /* not for a copy */
    void *y;
    int64_t op, a_kind, b_kind, y_kind;
    int64_t size[QUAMBA_AXES], a_stride[QUAMBA_AXES], b_stride[QUAMBA_AXES], y_stride[QUAMBA_AXES];
    int64_t threads;
} quamba_elementwise_args;

/* Rows of a table: floats as they are; int8 and int4 (group > 0, packed as in quamba_linear_args) as float32 reals. */
typedef struct {
    const int64_t *ids; /* [rows], each below entries, or the call fails with QUAMBA_NO_SUCH_ENTRY */
    const void *table;
    int64_t kind;
    const float *scale; /* [entries], int8 and int4 only */
    int64_t group;
    const void *group_scale; /* [entries, ceil(width / group)] */
    int64_t group_scale_is_float;
    void *y; /* [rows, width] */
    int64_t rows, entries, width, threads;
} quamba_embedding_args;

/* One call of a recording: an op below and its structure. */
typedef struct {
    int (*op)(const void *args);
    const void *args;
} quamba_launch;

#ifdef __cplusplus
extern "C" {
#endif

QUAMBA_API int quamba_cpu_abi(void);
QUAMBA_API int quamba_cpu_openmp(void); /* 1 when built with OpenMP */

/* Variants: names separated by spaces, best first, of those this machine can run; the one in use; a choice (null or ""
 * for the best), which fails with QUAMBA_BAD_ARGUMENT for a name that isn't in the list. */
QUAMBA_API const char *quamba_cpu_variants(void);
QUAMBA_API const char *quamba_cpu_isa(void);
QUAMBA_API int quamba_cpu_set_isa(const char *name);

QUAMBA_API int quamba_int8_linear(const quamba_linear_args *args);
QUAMBA_API int quamba_int8_epilogue(const quamba_linear_args *args); /* int8_linear's y or codes from its acc */
QUAMBA_API int quamba_float_linear(const quamba_linear_args *args);
QUAMBA_API int quamba_expand_int4(const quamba_linear_args *args); /* the weight as int8_linear has it, to codes */
QUAMBA_API int quamba_causal_conv1d(const quamba_conv_args *args);
QUAMBA_API int quamba_selective_scan(const quamba_scan_args *args);
QUAMBA_API int quamba_ssd_scan(const quamba_ssd_args *args);
QUAMBA_API int quamba_quantize(const quamba_rows_args *args);
QUAMBA_API int quamba_rms_norm(const quamba_rows_args *args);
QUAMBA_API int quamba_gated_rms_norm(const quamba_gated_norm_args *args);
QUAMBA_API int quamba_hadamard(const quamba_rows_args *args);
QUAMBA_API int quamba_elementwise(const quamba_elementwise_args *args);
QUAMBA_API int quamba_embedding(const quamba_embedding_args *args);

/* Make the calls one after the other, up to the first that fails; its status. */
QUAMBA_API int quamba_replay(const quamba_launch *launches, int64_t count);

/* The elementary functions of the kernels, for tests: "exp2", "exp", "softplus" or "silu" of n floats. */
QUAMBA_API int quamba_elementary(const char *name, const float *x, float *y, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
