// Runs the kernels on fixed inputs and prints a checksum of all results for each variant: they must be the same on every
// instruction set and machine. Integer products are compared with plain sums too. Fails when variants differ, or from an
// expected checksum given as argument.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "quamba_cpu.h"

namespace {

uint64_t seed, checksum;

uint32_t random_bits() {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(seed >> 33);
}

std::vector<int8_t> codes(int64_t n) {
    std::vector<int8_t> r(static_cast<size_t>(n));
    for (auto &c : r) c = static_cast<int8_t>(random_bits() % 8 ? random_bits() & 255 : 128);
    return r;
}

std::vector<float> floats(int64_t n, float low, float high) {
    std::vector<float> r(static_cast<size_t>(n));
    for (auto &f : r) f = low + (high - low) * static_cast<float>(random_bits() >> 7) / 16777216.0f;
    return r;
}

template <typename T>
void mix(const std::vector<T> &v) {
    const auto *bytes = reinterpret_cast<const unsigned char *>(v.data());
    for (size_t i = 0; i < v.size() * sizeof(T); ++i) checksum = (checksum ^ bytes[i]) * 1099511628211u;
}

void must(bool right, const char *what) {
    if (right) return;
    std::printf("WRONG: %s\n", what);
    std::exit(1);
}

// The sums of integer int4 products against plain ones.
void check_int4(quamba_linear_args a, std::vector<int32_t> &acc) {
    const int64_t groups = (a.inputs + a.group - 1) / a.group, half = a.group / 2;
    const auto *x = static_cast<const int8_t *>(a.x), *scale = static_cast<const int8_t *>(a.group_scale);
    const auto *packed = static_cast<const uint8_t *>(a.weight);
    a.acc = acc.data(), a.y = nullptr;
    must(quamba_int8_linear(&a) == QUAMBA_OK, "int4 linear");
    for (int64_t m = 0; m < a.rows; ++m)
        for (int64_t n = 0; n < a.outputs; ++n) {
            int32_t sum = 0;
            for (int64_t k = 0; k < a.inputs; ++k) {
                const int64_t g = k / a.group, i = k % a.group;
                const int byte = packed[(n * groups + g) * half + i % half], code = i < half ? byte & 15 : byte >> 4;
                sum += x[m * a.inputs + k] * scale[n * groups + g] * (code < 8 ? code : code - 16);
            }
            must(acc[static_cast<size_t>(m * a.outputs + n)] == sum, "a sum of int4 products");
        }
}

void linears(int64_t rows, int64_t inputs, int64_t outputs) {
    const auto x = codes(rows * inputs), w = codes(outputs * inputs);
    const auto scale = floats(outputs, 0.0f, 0.01f), x_scale = floats(rows, 0.0f, 0.1f), inv = floats(outputs, 0.0f, 30.0f);
    const auto real = floats(rows * inputs, -2.0f, 2.0f), real_weight = floats(outputs * inputs, -1.0f, 1.0f);
    std::vector<int32_t> acc(static_cast<size_t>(rows * outputs));
    std::vector<float> y(acc.size());
    std::vector<int8_t> rounded(acc.size());
    quamba_linear_args a = {};
    a.rows = rows, a.inputs = inputs, a.outputs = outputs, a.threads = 2;
    a.x = x.data(), a.weight = w.data(), a.acc = acc.data();
    must(quamba_int8_linear(&a) == QUAMBA_OK, "int8_linear");
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < outputs; ++n) {
            int32_t sum = 0;
            for (int64_t k = 0; k < inputs; ++k) sum += x[m * inputs + k] * w[n * inputs + k];
            must(acc[m * outputs + n] == sum, "a sum of int8 products");
        }
    mix(acc);
    a.acc = nullptr, a.weight_scale = scale.data(), a.x_scale = x_scale.data(), a.x_scale_stride = 1;
    a.codes = rounded.data(), a.inv = inv.data(), a.inv_stride = 1;
    must(quamba_int8_linear(&a) == QUAMBA_OK, "int8_linear");
    mix(rounded);
    a.acc = acc.data();
    std::vector<int8_t> again(rounded.size());
    a.codes = again.data();
    must(quamba_int8_epilogue(&a) == QUAMBA_OK && again == rounded, "int8_epilogue");
    a.acc = nullptr, a.codes = nullptr, a.y = y.data();
    for (int64_t group : {0, 32, 64, 128}) {
        const int64_t groups = group ? (inputs + group - 1) / group : 1;
        const auto packed = codes(outputs * groups * group / 2);
        auto multipliers = codes(outputs * groups);
        for (auto &m : multipliers) m = static_cast<int8_t>(m % 16);
        const auto group_scale = floats(outputs * groups, -20.0f, 20.0f);
        a.group = group;
        if (group) a.weight = packed.data();
        for (int is_float = 0; is_float <= (group > 0); ++is_float) {
            a.group_scale_is_float = is_float;
            a.group_scale = is_float ? static_cast<const void *>(group_scale.data()) : multipliers.data();
            a.x = x.data();
            must(quamba_int8_linear(&a) == QUAMBA_OK, "int4 linear");
            mix(y);
            if (group && !is_float) check_int4(a, acc);
            a.x = real.data();
            must(quamba_float_linear(&a) == QUAMBA_OK, "float_linear");
            mix(y);
        }
    }
    a.group = 0, a.weight_scale = nullptr, a.weight = real_weight.data(), a.weight_kind = QUAMBA_FLOAT32;
    must(quamba_float_linear(&a) == QUAMBA_OK, "float_linear with float weights");
    mix(y);
}

void scans(int64_t length) {
    const int64_t C = 70, N = 16, K = 4;
    const auto u = codes(length * C), z = codes(length * C), w = codes(C * K);
    const auto scale = floats(C, 0.0f, 0.05f), dt = floats(length * C, -6.0f, 4.0f), A = floats(C * N, -16.0f, 0.0f);
    const auto B = floats(length * N, -1.0f, 1.0f), c = floats(length * N, -1.0f, 1.0f), D = floats(C, -1.0f, 1.0f);
    auto state = floats(C * N, -1.0f, 1.0f);
    auto columns = codes(C * (K - 1));
    std::vector<float> y(static_cast<size_t>(length * C));

    quamba_conv_args v = {};
    v.x = u.data(), v.x_batch_stride = length * C, v.x_token_stride = C, v.weight = w.data(), v.is_int8 = 1;
    v.x_scale = scale.data(), v.x_scale_stride = 1, v.weight_scale = scale.data(), v.bias = D.data();
    v.state = columns.data(), v.y = y.data(), v.batch = 1, v.length = length, v.channels = C, v.taps = K, v.threads = 2;
    must(quamba_causal_conv1d(&v) == QUAMBA_OK, "conv");
    mix(y), mix(columns);

    quamba_scan_args s = {};
    s.u = u.data(), s.u_batch_stride = length * C, s.u_token_stride = C, s.u_is_int8 = 1, s.u_scale = scale.data();
    s.u_scale_stride = 1, s.z = z.data(), s.z_batch_stride = length * C, s.z_token_stride = C, s.z_is_int8 = 1;
    s.z_scale = scale.data(), s.dt = dt.data(), s.dt_batch_stride = length * C, s.dt_token_stride = C, s.A = A.data();
    s.B = B.data(), s.B_batch_stride = length * N, s.B_token_stride = N, s.C = c.data(), s.C_batch_stride = length * N;
    s.C_token_stride = N, s.D = D.data(), s.dt_bias = D.data(), s.state = state.data(), s.y = y.data();
    s.batch = 1, s.length = length, s.channels = C, s.states = N, s.threads = 2;
    must(quamba_selective_scan(&s) == QUAMBA_OK, "scan");
    mix(y), mix(state);

    quamba_ssd_args d = {};
    d.x = u.data(), d.x_batch_stride = length * C, d.x_token_stride = C, d.x_is_int8 = 1, d.x_scale = scale.data();
    d.B = B.data(), d.B_batch_stride = length * N, d.B_token_stride = N, d.C = c.data(), d.C_batch_stride = length * N;
    d.C_token_stride = N, d.dt = dt.data(), d.dt_batch_stride = length * C, d.dt_token_stride = C, d.A = A.data();
    d.D = D.data(), d.dt_bias = D.data(), d.dt_max = 3.0, d.state = state.data(), d.y = y.data(), d.batch = 1;
    d.length = length, d.heads = 2, d.width = C / 2, d.groups = 1, d.states = N, d.threads = 2;
    must(quamba_ssd_scan(&d) == QUAMBA_OK, "ssd");
    mix(y), mix(state);
}

void rows(int64_t count, int64_t width) {
    const auto x = floats(count * width, -9.0f, 9.0f), weight = floats(width, 0.0f, 2.0f), signs = floats(9, -1.0f, 1.0f);
    std::vector<float> y(x.size()), scale(static_cast<size_t>(count));
    std::vector<int8_t> rounded(x.size());
    quamba_rows_args a = {};
    a.x = x.data(), a.codes = rounded.data(), a.scale = scale.data(), a.rows = count, a.width = width, a.threads = 1;
    must(quamba_quantize(&a) == QUAMBA_OK, "quantize");
    mix(rounded), mix(scale);
    a.weight = weight.data(), a.eps = 1e-5;
    must(quamba_rms_norm(&a) == QUAMBA_OK, "rms_norm to codes");
    mix(rounded), mix(scale);
    a.codes = nullptr, a.scale = nullptr, a.y = y.data();
    must(quamba_rms_norm(&a) == QUAMBA_OK, "rms_norm");
    mix(y);
    a.blocks = 1, a.order = 3, a.weight = signs.data();
    if (width % 3 == 0 && (width / 3 & (width / 3 - 1)) == 0) {
        must(quamba_hadamard(&a) == QUAMBA_OK, "hadamard");
        mix(y);
    }
    quamba_gated_norm_args g = {};
    g.x = x.data(), g.x_row_stride = width, g.z = x.data(), g.z_row_stride = width, g.weight = weight.data(), g.y = y.data();
    g.eps = 1e-5, g.groups = 1, g.rows = count, g.width = width, g.threads = 1;
    must(quamba_gated_rms_norm(&g) == QUAMBA_OK, "gated_rms_norm");
    mix(y);
    for (const char *name : {"exp2", "exp", "softplus", "silu"}) {
        must(quamba_elementary(name, x.data(), y.data(), count * width) == QUAMBA_OK, name);
        mix(y);
    }
}

}  // namespace

int main(int argc, char **argv) {
    std::string names = quamba_cpu_variants(), expected = argc > 1 ? argv[1] : "";
    bool same = true;
    for (size_t at = 0; at < names.size();) {
        const std::string name = names.substr(at, names.find(' ', at) - at);
        at += name.size() + 1;
        must(quamba_cpu_set_isa(name.c_str()) == QUAMBA_OK, "set_isa");
        seed = 1, checksum = 14695981039346656037u;
        for (int64_t m : {1, 2, 7, 20, 61})
            for (int64_t k : {1, 33, 200, 768}) linears(m, k, 37);
        linears(1, QUAMBA_MAX_INPUTS, 5), linears(70, 5000, 3);
        scans(1), scans(50);
        for (int64_t width : {1, 24, 100, 1536}) rows(3, width);
        char text[32];
        std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(checksum));
        std::printf("%-10s %s\n", name.c_str(), text);
        if (expected.empty()) expected = text;
        same = same && expected == text;
    }
    if (!same) std::printf("WRONG: the variants differ\n");
    return same ? 0 : 1;
}
