// The table that each instruction set fills; api.cpp calls through it.
#pragma once

#include "quamba_cpu.h"

namespace quamba {

struct Kernels {
    int (*linear)(const quamba_linear_args &);
    int (*epilogue)(const quamba_linear_args &);
    int (*float_linear)(const quamba_linear_args &);
    int (*expand)(const quamba_linear_args &);
    int (*conv)(const quamba_conv_args &);
    int (*scan)(const quamba_scan_args &);
    int (*ssd)(const quamba_ssd_args &);
    int (*quantize)(const quamba_rows_args &);
    int (*rms_norm)(const quamba_rows_args &);
    int (*gated_norm)(const quamba_gated_norm_args &);
    int (*hadamard)(const quamba_rows_args &);
    int (*dense)(const quamba_linear_args &);
    int (*elementwise)(const quamba_elementwise_args &);
    int (*embedding)(const quamba_embedding_args &);
    void (*exp2)(const float *x, float *y, int64_t n);
    void (*exp)(const float *x, float *y, int64_t n);
    void (*softplus)(const float *x, float *y, int64_t n);
    void (*silu)(const float *x, float *y, int64_t n);
};

// Memory of the calling thread, 64-byte aligned, at least `bytes` long, valid until its next call; null when there is none.
// It only ever grows, so that steady use allocates nothing.
void *scratch(int64_t bytes);

// Sources are compiled once for each instruction set, with QUAMBA_ISA naming the namespace. Whatever else they define is in
// an anonymous namespace: an inline function shared between variants could be linked in its AVX2 form everywhere.
#ifdef QUAMBA_ISA
namespace QUAMBA_ISA {
int linear(const quamba_linear_args &);
int epilogue(const quamba_linear_args &);
int float_linear(const quamba_linear_args &);
int expand(const quamba_linear_args &);
int conv(const quamba_conv_args &);
int scan(const quamba_scan_args &);
int ssd(const quamba_ssd_args &);
int quantize(const quamba_rows_args &);
int rms_norm(const quamba_rows_args &);
int gated_norm(const quamba_gated_norm_args &);
int hadamard(const quamba_rows_args &);
int dense(const quamba_linear_args &);
int elementwise(const quamba_elementwise_args &);
int embedding(const quamba_embedding_args &);
void exp2_array(const float *x, float *y, int64_t n);
void exp_array(const float *x, float *y, int64_t n);
void softplus_array(const float *x, float *y, int64_t n);
void silu_array(const float *x, float *y, int64_t n);
}  // namespace QUAMBA_ISA
#endif

}  // namespace quamba
