// The exported functions: choice of instruction set, last checks, call.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "ops.h"

#ifdef QUAMBA_HAS_DOTPROD
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace quamba {

extern const Kernels kernels_portable, kernels_avx2, kernels_avxvnni, kernels_avx512, kernels_dotprod;

namespace {

struct Variant {
    const char *name;
    const Kernels *kernels;
    bool (*runs)();
};

// Best first.
const Variant variants[] = {
#ifdef QUAMBA_HAS_AVX512
    {"avx512", &kernels_avx512,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
     }},
#endif
#ifdef QUAMBA_HAS_AVXVNNI
    {"avxvnni", &kernels_avxvnni, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni"); }},
#endif
#ifdef QUAMBA_HAS_AVX2
    {"avx2", &kernels_avx2, [] { return __builtin_cpu_supports("avx2") != 0; }},
#endif
#ifdef QUAMBA_HAS_DOTPROD
    {"dotprod", &kernels_dotprod, [] { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }},
#endif
    {"portable", &kernels_portable, [] { return true; }},
};

const Variant *find(const char *name) {
    for (const Variant &v : variants)
        if ((!name || !*name || std::strcmp(name, v.name) == 0) && v.runs()) return &v;
    return nullptr;
}

std::atomic<const Variant *> chosen{nullptr};

const Variant &active() {
    const Variant *v = chosen.load(std::memory_order_acquire);
    if (!v) chosen.store(v = find(nullptr), std::memory_order_release);
    return *v;
}

bool valid(const quamba_linear_args &a) {
    if (a.rows < 0 || a.outputs < 0 || a.inputs < 0 || a.inputs > QUAMBA_MAX_INPUTS || a.threads < 1) return false;
    if (a.group != 0 && a.group != 32 && a.group != 64 && a.group != 128) return false;
    if (a.group && !a.group_scale) return false;
    if (!a.weight || (a.acc != nullptr) + (a.y != nullptr) + (a.codes != nullptr) != 1) return false;
    return true;
}

bool valid(const quamba_conv_args &a) {
    if (a.batch < 0 || a.length < 0 || a.channels < 0 || a.taps < 1 || a.taps > QUAMBA_MAX_TAPS) return false;
    if (!a.x || !a.weight || a.threads < 1 || (a.y != nullptr) == (a.codes != nullptr)) return false;
    return (!a.is_int8 || (a.x_scale && a.weight_scale)) && (!a.codes || a.inv);
}

bool valid(const quamba_scan_args &a) {
    if (a.batch < 0 || a.length < 0 || a.channels < 0 || a.states < 1 || a.states > QUAMBA_MAX_STATE) return false;
    if (!a.u || !a.z || !a.dt || !a.A || !a.B || !a.C || !a.D || !a.dt_bias || !a.y || a.threads < 1) return false;
    return (!a.u_is_int8 || a.u_scale) && (!a.z_is_int8 || a.z_scale);
}

bool valid(const quamba_ssd_args &a) {
    if (a.batch < 0 || a.length < 0 || a.heads < 1 || a.width < 0 || a.groups < 1 || a.heads % a.groups) return false;
    if (a.states < 1 || a.states > QUAMBA_MAX_STATE || a.threads < 1) return false;
    if (!a.x || !a.dt || !a.A || !a.B || !a.C || !a.D || !a.dt_bias || !a.y) return false;
    return (!a.x_is_int8 || a.x_scale) && (!a.B_is_int8 || a.B_scale) && (!a.C_is_int8 || a.C_scale);
}

bool valid(const quamba_gated_norm_args &a) {
    if (a.rows < 0 || a.width < 1 || a.groups < 1 || a.width % a.groups || a.threads < 1) return false;
    return a.x && a.z && a.y && (!a.z_is_int8 || a.z_scale);
}

bool valid(const quamba_rows_args &a) {
    if (a.rows < 0 || a.width < 0 || a.threads < 1 || !a.x) return false;
    return (a.y != nullptr) != (a.codes != nullptr);
}

bool valid(const quamba_elementwise_args &a) {
    for (int64_t size : a.size)
        if (size < 0) return false;
    for (int64_t kind : {a.a_kind, a.b_kind, a.y_kind})
        if (kind < QUAMBA_INT8 || kind > QUAMBA_BFLOAT16) return false;
    return a.op >= QUAMBA_COPY && a.op <= QUAMBA_MULTIPLY && a.a && a.y && (a.b || a.op == QUAMBA_COPY) && a.threads >= 1;
}

bool valid(const quamba_embedding_args &a) {
    if (a.rows < 0 || a.entries < 0 || a.width < 1 || a.threads < 1 || !a.ids || !a.table || !a.y) return false;
    if (a.group != 0 && a.group != 32 && a.group != 64 && a.group != 128) return false;
    if (a.kind < QUAMBA_INT8 || a.kind > QUAMBA_BFLOAT16 || (a.group && (a.kind != QUAMBA_INT8 || !a.group_scale))) return false;
    return a.kind != QUAMBA_INT8 || a.scale;
}

bool has_epilogue(const quamba_linear_args &a) { return a.weight_scale && (!a.codes || a.inv); }

bool rounds(const quamba_rows_args &a) { return !a.codes || (a.inv != nullptr) != (a.scale != nullptr); }

template <typename Args>
int run(int (*Kernels::*op)(const Args &), const Args *args) {
    if (!args || !valid(*args)) return QUAMBA_BAD_ARGUMENT;
    return (active().kernels->*op)(*args);
}

}  // namespace
}  // namespace quamba

using namespace quamba;

int quamba_cpu_abi(void) { return QUAMBA_CPU_ABI; }

int quamba_cpu_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

const char *quamba_cpu_variants(void) {
    static const struct Names {
        char text[128] = "";
        Names() {
            for (const Variant &v : variants)
                if (v.runs()) {
                    if (*text) std::strcat(text, " ");
                    std::strcat(text, v.name);
                }
        }
    } names;
    return names.text;
}

const char *quamba_cpu_isa(void) { return active().name; }

int quamba_cpu_set_isa(const char *name) {
    const Variant *v = find(name);
    if (!v) return QUAMBA_BAD_ARGUMENT;
    chosen.store(v, std::memory_order_release);
    return QUAMBA_OK;
}

int quamba_int8_linear(const quamba_linear_args *args) {
    if (args && (!args->x || (!args->acc && (!args->x_scale || !has_epilogue(*args))))) return QUAMBA_BAD_ARGUMENT;
    return run(&Kernels::linear, args);
}

int quamba_int8_epilogue(const quamba_linear_args *args) {
    if (!args || !args->acc || !args->x_scale || !has_epilogue(*args) || (args->y != nullptr) == (args->codes != nullptr))
        return QUAMBA_BAD_ARGUMENT;
    if (args->rows < 0 || args->outputs < 0 || args->threads < 1) return QUAMBA_BAD_ARGUMENT;
    return active().kernels->epilogue(*args);
}

int quamba_float_linear(const quamba_linear_args *args) {
    if (args && (!args->x || args->acc)) return QUAMBA_BAD_ARGUMENT;
    if (!args || args->weight_kind == QUAMBA_INT8)
        return args && !has_epilogue(*args) ? QUAMBA_BAD_ARGUMENT : run(&Kernels::float_linear, args);
    if (args->group || args->codes || args->weight_kind > QUAMBA_BFLOAT16) return QUAMBA_BAD_ARGUMENT;
    return run(&Kernels::dense, args);
}

int quamba_expand_int4(const quamba_linear_args *args) {
    if (args && (!args->group || !args->codes)) return QUAMBA_BAD_ARGUMENT;
    return run(&Kernels::expand, args);
}

int quamba_causal_conv1d(const quamba_conv_args *args) { return run(&Kernels::conv, args); }

int quamba_selective_scan(const quamba_scan_args *args) { return run(&Kernels::scan, args); }

int quamba_ssd_scan(const quamba_ssd_args *args) { return run(&Kernels::ssd, args); }

int quamba_quantize(const quamba_rows_args *args) {
    if (args && (!args->codes || !rounds(*args))) return QUAMBA_BAD_ARGUMENT;
    return run(&Kernels::quantize, args);
}

int quamba_rms_norm(const quamba_rows_args *args) {
    if (args && (!args->weight || !rounds(*args))) return QUAMBA_BAD_ARGUMENT;
    return run(&Kernels::rms_norm, args);
}

int quamba_gated_rms_norm(const quamba_gated_norm_args *args) { return run(&Kernels::gated_norm, args); }

int quamba_hadamard(const quamba_rows_args *args) {
    if (!args || args->blocks < 1 || args->width < 1 || args->width % args->blocks) return QUAMBA_BAD_ARGUMENT;
    const int64_t n = args->width / args->blocks, order = args->weight ? args->order : 1;
    if (order < 1 || n % order || ((n / order) & (n / order - 1)) || !rounds(*args))
        return QUAMBA_BAD_ARGUMENT;
    return run(&Kernels::hadamard, args);
}

int quamba_elementwise(const quamba_elementwise_args *args) { return run(&Kernels::elementwise, args); }

int quamba_embedding(const quamba_embedding_args *args) { return run(&Kernels::embedding, args); }

int quamba_replay(const quamba_launch *launches, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (const int status = launches[i].op(launches[i].args)) return status;
    return QUAMBA_OK;
}

int quamba_elementary(const char *name, const float *x, float *y, int64_t n) {
    if (!name || !x || !y || n < 0) return QUAMBA_BAD_ARGUMENT;
    const Kernels &k = *active().kernels;
    if (std::strcmp(name, "exp2") == 0)
        k.exp2(x, y, n);
    else if (std::strcmp(name, "exp") == 0)
        k.exp(x, y, n);
    else if (std::strcmp(name, "softplus") == 0)
        k.softplus(x, y, n);
    else if (std::strcmp(name, "silu") == 0)
        k.silu(x, y, n);
    else
        return QUAMBA_BAD_ARGUMENT;
    return QUAMBA_OK;
}
