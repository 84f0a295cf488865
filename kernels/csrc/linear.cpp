// int8 x int8 linear on the stored row-major layout.
//
// A task is up to ROWS rows of x times a panel of weight rows: x is widened to int16 once per task, the weight on the fly.
// Inside, tiles of up to MR x NR outputs keep their sums in registers. An int4 weight is expanded NR rows at a time, just
// before their first use; a panel that meets several chunks of x is kept.
#include "int4_row.h"
#include "integer.h"
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t MR = 3, NR = 4;
constexpr int64_t ROWS = 12;              // rows of x per task: 12 x 768 int16 stay in the first-level cache
constexpr int64_t PANEL_BYTES = 192 << 10;  // of weight per task: stays in the second-level cache
constexpr int64_t PANEL = 256;            // weight rows per task, at most
constexpr int64_t AHEAD = 8;              // weight rows to prefetch ahead
constexpr int64_t GRAIN = 1 << 17;        // products that are worth a thread

// x: rows of `stride` int16 with zeros after `inputs`. sums[m * PANEL + n], m < M, n < NR; weight rows n >= count repeat
// row count - 1 and their sums are garbage that the caller overwrites or ignores.
template <int M>
inline void tile(const int16_t *x, int64_t stride, const int8_t *weight, int64_t inputs, int64_t count, int32_t *sums) {
    const int8_t *w[NR];
    for (int64_t n = 0; n < NR; ++n) w[n] = weight + (n < count ? n : count - 1) * inputs;
    Wide acc[M][NR];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NR; ++n) acc[m][n] = zero();
    const int64_t whole = inputs / STEP * STEP;
    for (int64_t k = 0; k < whole; k += STEP) {
        if (M == 1 && k % 64 == 0)  // weights come from far away, and the rows are too short for the hardware to guess
            for (int n = 0; n < NR; ++n) __builtin_prefetch(w[n] + k + AHEAD * inputs);
        for (int n = 0; n < NR; ++n) {
            const Wide b = widen(w[n] + k);
            for (int m = 0; m < M; ++m) {
                acc[m][n] = multiply_add(acc[m][n], load_wide(x + m * stride + k), b);
                if (M > 1) keep(acc[m][n]);  // in this order, or the compiler runs out of registers
            }
        }
    }
    if (whole < inputs)
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) {
            int8_t tail[STEP] = {};
            std::memcpy(tail, w[n] + whole, static_cast<size_t>(inputs - whole));
            const Wide b = widen(tail);
            for (int m = 0; m < M; ++m) acc[m][n] = multiply_add(acc[m][n], load_wide(x + m * stride + whole), b);
        }
    for (int m = 0; m < M; ++m) store_sums(sums + m * PANEL, acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

void widen_rows(const int8_t *x, int64_t rows, int64_t inputs, int64_t stride, int16_t *out) {
    for (int64_t m = 0; m < rows; ++m) {
        const int8_t *__restrict__ from = x + m * inputs;
        int16_t *__restrict__ to = out + m * stride;
        for (int64_t k = 0; k < inputs; ++k) to[k] = from[k];
        for (int64_t k = inputs; k < stride; ++k) to[k] = 0;
    }
}

// Row m, outputs n0 .. n0 + count of whichever result was asked for.
void finish(const quamba_linear_args &a, const int32_t *sums, int64_t m, int64_t n0, int64_t count) {
    const int64_t at = m * a.outputs + n0;
    if (a.acc) {
        std::memcpy(a.acc + at, sums, static_cast<size_t>(count) * sizeof(int32_t));
        return;
    }
    const F16 x_scale = splat(a.x_scale[m * a.x_scale_stride]);
    by_lanes(count, [&](int64_t n, int64_t lanes) QUAMBA_BODY {
        F16 y = load_integers(sums + n, lanes) * load(a.weight_scale + n0 + n, lanes) * x_scale;
        if (a.bias) y = y + load(a.bias + n0 + n, lanes);
        if (a.codes)
            store_codes(a.codes + at + n, y, load_vector(a.inv, a.inv_stride, n0 + n, lanes), lanes);
        else
            store(a.y + at + n, y, lanes);
    });
}

}  // namespace

int linear(const quamba_linear_args &a) {
    const Int4 int4(a);
    const int64_t width = a.group ? int4.groups * a.group : a.inputs;  // of a weight row, with its padding
    const int64_t stride = (width + STEP - 1) / STEP * STEP;
    int64_t panel = PANEL_BYTES / (width + 1) / NR * NR;
    panel = panel < NR ? NR : panel > PANEL ? PANEL : panel;
    const int64_t panels = (a.outputs + panel - 1) / panel, chunks = (a.rows + ROWS - 1) / ROWS;
    const int64_t threads = worthwhile(a.threads, a.rows * a.outputs * a.inputs, GRAIN);
    const bool once = chunks == 1, alone = INT4_ROW && a.group && a.rows == 1;
    const int64_t expanded_bytes = !a.group ? 0 : (once ? NR : panel) * width;

    return parallel_for(panels * chunks, threads, [&](int64_t begin, int64_t end) -> int {
        const int64_t x_bytes = ROWS * stride * static_cast<int64_t>(sizeof(int16_t));
        auto *x = static_cast<int16_t *>(scratch(x_bytes + expanded_bytes));
        if (!x && stride > 0) return QUAMBA_OUT_OF_MEMORY;
        auto *expanded = reinterpret_cast<int8_t *>(x) + x_bytes;
        alignas(64) int32_t sums[ROWS * PANEL];
        int64_t widened = -1, kept = -1;  // the chunk that x holds, the panel that `expanded` does
        for (int64_t task = begin; task < end; ++task) {
            const int64_t chunk = task % chunks, m0 = chunk * ROWS, n0 = task / chunks * panel;
            const int64_t rows = a.rows - m0 < ROWS ? a.rows - m0 : ROWS;
            const int64_t outputs = a.outputs - n0 < panel ? a.outputs - n0 : panel;
            if (alone)
                int4_row_x(int4, static_cast<const int8_t *>(a.x), a.inputs, x);
            else if (chunk != widened)
                widen_rows(static_cast<const int8_t *>(a.x) + m0 * a.inputs, rows, a.inputs, stride, x);
            widened = chunk;
            for (int64_t n = 0; n < outputs; n += NR) {
                const int8_t *w = static_cast<const int8_t *>(a.weight) + (n0 + n) * width;
                if (alone) {
                    int4_row(int4, x, n0 + n, outputs - n, sums + n);
                    continue;
                }
                if (a.group) {
                    int8_t *to = expanded + (once ? 0 : n * width);
                    if (n0 != kept)
                        for (int64_t i = 0; i < NR && n + i < outputs; ++i) expand_row(int4, n0 + n + i, false, to + i * width);
                    w = to;
                }
                for (int64_t m = 0; m < rows; m += MR) {
                    const int16_t *xm = x + m * stride;
                    int32_t *s = sums + m * PANEL + n;
                    if (rows - m >= 3)
                        tile<3>(xm, stride, w, width, outputs - n, s);
                    else if (rows - m == 2)
                        tile<2>(xm, stride, w, width, outputs - n, s);
                    else
                        tile<1>(xm, stride, w, width, outputs - n, s);
                }
            }
            kept = n0;
            for (int64_t m = 0; m < rows; ++m) finish(a, sums + m * PANEL, m0 + m, n0, outputs);
        }
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
