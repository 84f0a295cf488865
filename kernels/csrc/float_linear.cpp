// Weight-only linear for a few rows of float x: each weight is read once, as a code, and multiplied on 16 lanes.
//
// A task is a block of weight rows. int4 rows are expanded to int8 first, times their multipliers; a float scale instead
// multiplies the sum over its group. int8 weights with few inputs are turned instead, so that the lanes are outputs: fast
// for any number of rows. Either way a row's sums don't depend on the other rows.
#include "int4.h"
#include "ops.h"
#include "parallel.h"
#include "simd.h"
#include "transpose.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t BLOCK = 16;        // weight rows a task
constexpr int64_t AHEAD = 8;         // weight rows to prefetch ahead
constexpr int64_t FEW_INPUTS = 512;  // up to here a block of turned weights stays in the cache
constexpr int64_t GRAIN = 1 << 16;   // products that are worth a thread

// Weight rows n0 .. n0 + count of a task: codes `width` apart, and float group scales, or null for sums without them.
struct Codes {
    const int8_t *row;
    int64_t width, count;
    const float *scale;
    int64_t groups, run;  // a scale for every `run` inputs

    const int8_t *at(int64_t n) const { return row + (n < count ? n : count - 1) * width; }
};

// sums[m * BLOCK + n] for M rows of x and N of the weight; those from `count` on repeat the last.
template <int M, int N>
inline void tile(const float *x, int64_t inputs, const Codes &codes, int64_t n0, float *sums) {
    const int8_t *w[N];
    for (int n = 0; n < N; ++n) w[n] = codes.at(n0 + n);
    F16 total[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) total[m][n] = splat(0.0f);
    for (int64_t k0 = 0, g = 0; k0 < inputs; k0 += codes.run, ++g) {
        F16 acc[M][N];
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) acc[m][n] = splat(0.0f);
        by_lanes(inputs - k0 < codes.run ? inputs - k0 : codes.run, [&](int64_t i, int64_t lanes) QUAMBA_BODY {
            const int64_t k = k0 + i;
            F16 v[M];
            for (int m = 0; m < M; ++m) v[m] = load(x + m * inputs + k, lanes);
            for (int n = 0; n < N; ++n) {
                if (M == 1 && k % 64 == 0) __builtin_prefetch(w[n] + k + AHEAD * codes.width);
                const F16 b = load_integers(w[n] + k, lanes);
                for (int m = 0; m < M; ++m) acc[m][n] = acc[m][n] + v[m] * b;
            }
        });
        for (int n = 0; n < N; ++n) {
            const int64_t row = n0 + n < codes.count ? n0 + n : codes.count - 1;
            for (int m = 0; m < M; ++m)
                total[m][n] = !codes.scale ? acc[m][n]
                                           : total[m][n] + acc[m][n] * splat(codes.scale[row * codes.groups + g]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sums[m * BLOCK + n] = sum(total[m][n]);
}

template <int M, int N>
void rows(const float *x, int64_t inputs, const Codes &codes, float *sums) {
    for (int64_t n = 0; n < codes.count; n += N) tile<M, N>(x, inputs, codes, n, sums + n);
}

// `count` weight rows to 16 lanes, those from `count` on zero.
void turn(const int8_t *weight, int64_t inputs, int64_t count, float *turned) {
    const int64_t whole = count == LANES ? inputs / LANES * LANES : 0;
    alignas(16) int8_t tile[LANES * LANES];
    for (int64_t k0 = 0; k0 < whole; k0 += LANES) {
        transpose16(weight + k0, inputs, tile);
        for (int64_t k = 0; k < LANES; ++k) store(turned + (k0 + k) * LANES, load_integers(tile + k * LANES, LANES));
    }
    for (int64_t k = whole; k < inputs; ++k)
        for (int64_t n = 0; n < LANES; ++n) turned[k * LANES + n] = n < count ? weight[n * inputs + k] : 0.0f;
}

template <int M>
inline void tile_of_turned(const float *x, int64_t inputs, const float *turned, float *sums) {
    F16 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = splat(0.0f);
    for (int64_t k = 0; k < inputs; ++k) {
        const F16 w = load(turned + k * LANES);
        for (int m = 0; m < M; ++m) acc[m] = acc[m] + splat(x[m * inputs + k]) * w;
    }
    for (int m = 0; m < M; ++m) store(sums + m * BLOCK, acc[m]);
}

// M rows of results from `m` on.
void finish(const quamba_linear_args &a, const float *sums, int64_t M, int64_t m, int64_t n0, int64_t count) {
    for (int64_t i = 0; i < M; ++i) {
        const int64_t at = (m + i) * a.outputs + n0;
        F16 y = load(sums + i * BLOCK, count) * load(a.weight_scale + n0, count);
        if (a.bias) y = y + load(a.bias + n0, count);
        if (a.codes)
            store_codes(a.codes + at, y, load_vector(a.inv, a.inv_stride, n0, count), count);
        else
            store(a.y + at, y, count);
    }
}

}  // namespace

int float_linear(const quamba_linear_args &a) {
    const auto *x = static_cast<const float *>(a.x);
    const Int4 int4(a);
    const int64_t width = a.group ? int4.groups * a.group : a.inputs;
    const bool by_group = a.group && a.group_scale_is_float, few = !a.group && a.inputs <= FEW_INPUTS;
    const int64_t threads = worthwhile(a.threads, a.rows * a.outputs * a.inputs, GRAIN);
    return parallel_for((a.outputs + BLOCK - 1) / BLOCK, threads, [&](int64_t begin, int64_t end) -> int {
        auto *work = scratch(a.group ? BLOCK * width : few ? BLOCK * a.inputs * int64_t{sizeof(float)} : 1);
        if (!work) return QUAMBA_OUT_OF_MEMORY;
        auto *expanded = static_cast<int8_t *>(work);
        auto *turned = static_cast<float *>(work);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t n0 = task * BLOCK, count = a.outputs - n0 < BLOCK ? a.outputs - n0 : BLOCK;
            Codes codes = {static_cast<const int8_t *>(a.weight) + n0 * width, width, count, nullptr, int4.groups, a.inputs};
            if (a.group) {
                for (int64_t n = 0; n < count; ++n) expand_row(int4, n0 + n, by_group, expanded + n * width);
                codes.row = expanded;
            }
            if (by_group) {
                codes.scale = static_cast<const float *>(a.group_scale) + n0 * int4.groups;
                codes.run = a.group;
            }
            if (few) turn(codes.row, a.inputs, count, turned);
            for (int64_t m = 0, M; m < a.rows; m += M) {
                alignas(64) float sums[4 * BLOCK];
                const float *xm = x + m * a.inputs;
                M = a.rows - m >= 4 ? 4 : a.rows - m >= 2 ? 2 : 1;
                if (few)
                    M == 4 ? tile_of_turned<4>(xm, a.inputs, turned, sums)
                    : M == 2 ? tile_of_turned<2>(xm, a.inputs, turned, sums)
                             : tile_of_turned<1>(xm, a.inputs, turned, sums);
                else if (M == 4)
                    rows<4, 1>(xm, a.inputs, codes, sums);
                else if (M == 2)
                    rows<2, 2>(xm, a.inputs, codes, sums);
                else
                    rows<1, 4>(xm, a.inputs, codes, sums);
                finish(a, sums, M, m, n0, count);
            }
        }
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
