// int8 x int8 linear on the stored row-major layout.
//
// Few rows of x: products along the rows, the weight read once, from far away; for more than one, int4 is expanded NR rows at
// a time, just before their use. More rows: a task is a chunk of x times a panel of the weight, which a thread packs at its
// first chunk.
#include "int4_panel.h"
#include "int4_row.h"
#include "ops.h"
#include "panel.h"
#include "parallel.h"

namespace quamba::QUAMBA_ISA {
namespace {

// Rows of x up to which packing doesn't pay (measured with AVX2 and SSE2), unless they outgrow the second-level cache.
constexpr int64_t FEW = sizeof(Code) == 2 && ACROSS == 8 ? 96 : 16, FEW_BYTES = 192 << 10, ALWAYS_FEW = 16;
constexpr int64_t INT4_FEW = 16;            // the same for int4 strips
constexpr int64_t ROWS = 24;                // rows of x per task, when packed
constexpr int64_t PANEL_BYTES = 256 << 10;  // of packed weight: stays in the second-level cache
constexpr int64_t PANEL = 256;              // weight rows per task, at most
constexpr int64_t FEW_PANEL = 64;           // for few rows of x: no more than keeps the threads equally busy
constexpr int64_t AHEAD = 4096;             // bytes of weight to prefetch ahead
constexpr int64_t GRAIN = 1 << 17;          // products that are worth a thread
constexpr int64_t EPILOGUE_GRAIN = 1 << 14; // results that are
static_assert(ROWS % MP == 0 && ALWAYS_FEW <= FEW && PANEL % STRIP == 0 && FEW_PANEL % NR == 0 && STEP % PIECE == 0);

// Of a weight row, with its padding; of a row of x as the products want it; of memory, in whole lines of the cache.
inline int64_t padded(const quamba_linear_args &a) { return a.group ? (a.inputs + a.group - 1) / a.group * a.group : a.inputs; }
inline int64_t codes_stride(int64_t width) { return (width + STEP - 1) / STEP * STEP; }
inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline int64_t workers(const quamba_linear_args &a) { return worthwhile(a.threads, a.rows * a.outputs * a.inputs, GRAIN); }

// sums[m * FEW_PANEL + n], m < M, n < NR; x: rows of `stride` codes with zeros after `inputs`. Weight rows n >= count repeat row
// count - 1 and their sums are garbage that the caller overwrites or ignores.
template <int M>
inline void along(const Code *x, int64_t stride, const int8_t *weight, int64_t inputs, int64_t count, bool first, int32_t *sums) {
    const int8_t *w[NR];
    for (int64_t n = 0; n < NR; ++n) w[n] = weight + (n < count ? n : count - 1) * inputs;
    Wide acc[M][NR];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NR; ++n) acc[m][n] = zero();
    const int64_t whole = inputs / STEP * STEP;
    for (int64_t k = 0; k < whole; k += STEP) {
        if (first && k % 64 == 0)  // the rows are too short for the hardware to guess
            for (int n = 0; n < NR; ++n) __builtin_prefetch(w[n] + k + AHEAD);
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
    for (int m = 0; m < M; ++m) store_sums(sums + m * FEW_PANEL, acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

// The same for one row of x, weight row by weight row: memory is read in its order.
inline void one(const Code *x, const int8_t *weight, int64_t inputs, int64_t count, int32_t *sums) {
    constexpr int CHAINS = 4;  // sums side by side: an addition waits for the one before
    Wide total[NR];
    for (int64_t n = 0; n < NR; ++n) {
        const int8_t *w = weight + (n < count ? n : count - 1) * inputs;
        Wide acc[CHAINS];
        for (int i = 0; i < CHAINS; ++i) acc[i] = zero();
        int64_t k = 0;
        for (; k + CHAINS * STEP <= inputs; k += CHAINS * STEP) {
            for (int64_t i = 0; i < CHAINS * STEP; i += 64) __builtin_prefetch(w + k + i + AHEAD);
            for (int i = 0; i < CHAINS; ++i) acc[i] = multiply_add(acc[i], load_wide(x + k + i * STEP), widen(w + k + i * STEP));
        }
        for (; k + STEP <= inputs; k += STEP) acc[0] = multiply_add(acc[0], load_wide(x + k), widen(w + k));
        if (k < inputs) {
            int8_t tail[STEP] = {};
            std::memcpy(tail, w + k, static_cast<size_t>(inputs - k));
            acc[1] = multiply_add(acc[1], load_wide(x + k), widen(tail));
        }
        total[n] = plus(plus(acc[0], acc[1]), plus(acc[2], acc[3]));
    }
    store_sums(sums, total[0], total[1], total[2], total[3]);
}

// Rows of x with their zeros, and their sums where the products need them.
void load_rows(const int8_t *x, int64_t rows, int64_t inputs, int64_t stride, Code *out, int32_t *x_sums) {
    for (int64_t m = 0; m < rows; ++m) {
        const int8_t *__restrict__ from = x + m * inputs;
        Code *__restrict__ to = out + m * stride;
        for (int64_t k = 0; k < inputs; ++k) to[k] = from[k];
        for (int64_t k = inputs; k < stride; ++k) to[k] = 0;
        int32_t sum = 0;
        if (OFFSET)
            for (int64_t k = 0; k < inputs; ++k) sum += from[k];
        x_sums[m] = sum;
    }
}

// Sums of row m, outputs n0 .. n0 + count, to floats or codes.
QUAMBA_INLINE void scaled(const quamba_linear_args &a, const int32_t *sums, int64_t m, int64_t n0, int64_t count) {
    const int64_t at = m * a.outputs + n0;
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

// The same, or the sums themselves; they have 128 times the sum of x too much where weights are unsigned.
QUAMBA_INLINE void finish(const quamba_linear_args &a, int32_t *sums, int32_t x_sum, int64_t m, int64_t n0, int64_t count) {
    if (OFFSET) {
        const uint32_t extra = static_cast<uint32_t>(OFFSET) * static_cast<uint32_t>(x_sum);
        for (int64_t n = 0; n < count; ++n) sums[n] = static_cast<int32_t>(static_cast<uint32_t>(sums[n]) - extra);
    }
    if (a.acc)
        std::memcpy(a.acc + m * a.outputs + n0, sums, static_cast<size_t>(count) * sizeof(int32_t));
    else
        scaled(a, sums, m, n0, count);
}

// Weight rows n0 .. n0 + count, count <= FEW_PANEL, times all rows of x.
void few_panel(const quamba_linear_args &a, const Int4 &int4, const Code *x, int64_t stride, int64_t width, int64_t n0,
               int64_t count, int8_t *expanded, int32_t *sums) {
    for (int64_t n = 0; n < count; n += NR) {
        if (INT4_ROW && a.group && a.rows == 1) {
            int4_row(int4, x, n0 + n, count - n, sums + n);
            continue;
        }
        const int8_t *w = static_cast<const int8_t *>(a.weight) + (n0 + n) * width;
        if (a.group) {
            for (int64_t i = 0; i < NR && n + i < count; ++i) expand_row(int4, n0 + n + i, false, expanded + i * width);
            w = expanded;
        }
        for (int64_t m = 0, M; m < a.rows; m += M) {
            const Code *xm = x + m * stride;
            int32_t *s = sums + m * FEW_PANEL + n;
            const bool first = m == 0 && !a.group;
            M = a.rows - m >= MR ? MR : a.rows - m >= 2 ? 2 : 1;
            M == MR  ? along<MR>(xm, stride, w, width, count - n, first, s)
            : M == 2 ? along<2>(xm, stride, w, width, count - n, first, s)
                     : one(xm, w, width, count - n, s);
        }
    }
}

int few(const quamba_linear_args &a) {
    const Int4 int4(a);
    const int64_t width = padded(a), stride = codes_stride(width), panels = (a.outputs + FEW_PANEL - 1) / FEW_PANEL;
    const int64_t x_bytes = whole_lines(a.rows * stride * static_cast<int64_t>(sizeof(Code)));
    return parallel_for(panels, workers(a), [&](int64_t begin, int64_t end) -> int {
        auto *room = static_cast<char *>(scratch(x_bytes + (a.group ? NR * width : 1)));
        if (!room) return QUAMBA_OUT_OF_MEMORY;
        auto *x = reinterpret_cast<Code *>(room);
        alignas(64) int32_t sums[FEW * FEW_PANEL];
        int32_t x_sums[FEW];
        load_rows(static_cast<const int8_t *>(a.x), a.rows, a.inputs, stride, x, x_sums);
        if (INT4_ROW && a.group && a.rows == 1) int4_row_x(int4, static_cast<const int8_t *>(a.x), a.inputs, x);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t n0 = task * FEW_PANEL, count = a.outputs - n0 < FEW_PANEL ? a.outputs - n0 : FEW_PANEL;
            few_panel(a, int4, x, stride, width, n0, count, reinterpret_cast<int8_t *>(room + x_bytes), sums);
            for (int64_t m = 0; m < a.rows; ++m) finish(a, sums + m * FEW_PANEL, x_sums[m], m, n0, count);
        }
        return QUAMBA_OK;
    });
}

// Packed weights for many rows: as int8,
struct Int8Strips {
    const quamba_linear_args &a;
    const Int4 int4 = Int4(a);
    const int64_t width = padded(a), stride = codes_stride(width), x_bytes = stride * static_cast<int64_t>(sizeof(Code));
    const int64_t bytes = strip_bytes(width), room = a.group ? STRIP * width : 0;

    void load(const int8_t *x, int64_t rows, void *out, int32_t *x_sums) const {
        load_rows(x, rows, a.inputs, stride, static_cast<Code *>(out), x_sums);
    }
    void pack(int64_t n0, int64_t count, int8_t *expanded, char *strip) const {
        const int8_t *w = static_cast<const int8_t *>(a.weight) + n0 * width;
        if (a.group) {
            for (int64_t n = 0; n < count; ++n) expand_row(int4, n0 + n, false, expanded + n * width);
            w = expanded;
        }
        ::pack(w, width, count, strip);
    }
    template <int M>
    void tile(const char *x, const char *strip, int32_t *sums) const {
        across<M>(reinterpret_cast<const Code *>(x), stride, strip, width, sums, PANEL);
    }
};

// or as int4 with integer scales, where the instruction set gains by it.
struct Int4Strips {
    const quamba_linear_args &a;
    const Int4 int4 = Int4(a);
    const int64_t width = padded(a), x_bytes = width;
    const int64_t bytes = int4_strip_bytes(int4.groups, a.group), room = STRIP * width;

    void load(const int8_t *x, int64_t rows, void *out, int32_t *) const {
        int4_panel_x(x, rows, a.inputs, width, static_cast<uint8_t *>(out));
    }
    void pack(int64_t n0, int64_t count, int8_t *codes, char *strip) const { pack_int4(int4, n0, count, codes, strip); }
    template <int M>
    void tile(const char *x, const char *strip, int32_t *sums) const {
        across_int4<M>(reinterpret_cast<const uint8_t *>(x), width, strip, int4.groups, a.group, sums, PANEL);
    }
};

template <typename Strips>
int many(const quamba_linear_args &a, const Strips &s) {
    int64_t panel = PANEL_BYTES / (s.bytes + 1) * STRIP;
    panel = panel < STRIP ? STRIP : panel > PANEL ? PANEL : panel;
    const int64_t panels = (a.outputs + panel - 1) / panel, chunks = (a.rows + ROWS - 1) / ROWS;
    const int64_t panel_bytes = panel / STRIP * whole_lines(s.bytes), x_bytes = whole_lines(ROWS * s.x_bytes);
    return parallel_for(panels * chunks, workers(a), [&](int64_t begin, int64_t end) -> int {
        auto *strips = static_cast<char *>(scratch(panel_bytes + x_bytes + s.room + 1));
        if (!strips) return QUAMBA_OUT_OF_MEMORY;
        char *x = strips + panel_bytes;
        auto *room = reinterpret_cast<int8_t *>(x + x_bytes);
        alignas(64) int32_t sums[ROWS * PANEL];
        int32_t x_sums[ROWS] = {};
        int64_t loaded = -1, kept = -1;  // the chunk that x holds, the panel that `strips` does
        for (int64_t task = begin; task < end; ++task) {
            const int64_t chunk = task % chunks, m0 = chunk * ROWS, n0 = task / chunks * panel;
            const int64_t rows = a.rows - m0 < ROWS ? a.rows - m0 : ROWS;
            const int64_t count = a.outputs - n0 < panel ? a.outputs - n0 : panel;
            if (chunk != loaded) s.load(static_cast<const int8_t *>(a.x) + m0 * a.inputs, rows, x, x_sums);
            loaded = chunk;
            for (int64_t n = 0; n0 != kept && n < count; n += STRIP)
                s.pack(n0 + n, count - n < STRIP ? count - n : STRIP, room, strips + n / STRIP * s.bytes);
            kept = n0;
            for (int64_t m = 0, M; m < rows; m += M) {
                M = rows - m >= MP ? MP : rows - m >= MP / 2 ? MP / 2 : 1;
                const char *xm = x + m * s.x_bytes, *strip = strips;
                for (int64_t n = 0; n < count; n += STRIP, strip += s.bytes) {
                    int32_t *to = sums + m * PANEL + n;
                    M == MP       ? s.template tile<MP>(xm, strip, to)
                    : M == MP / 2 ? s.template tile<MP / 2>(xm, strip, to)
                                  : s.template tile<1>(xm, strip, to);
                }
            }
            for (int64_t m = 0; m < rows; ++m) finish(a, sums + m * PANEL, x_sums[m], m0 + m, n0, count);
        }
        return QUAMBA_OK;
    });
}

}  // namespace

int linear(const quamba_linear_args &a) {
    const bool int4_strips = INT4_PANEL && a.group && !a.group_scale_is_float;
    const bool large = a.rows * codes_stride(padded(a)) * static_cast<int64_t>(sizeof(Code)) > FEW_BYTES;
    if (a.rows <= (int4_strips ? INT4_FEW : large ? ALWAYS_FEW : FEW)) return few(a);
    return int4_strips ? many(a, Int4Strips{a}) : many(a, Int8Strips{a});
}

int epilogue(const quamba_linear_args &a) {
    const int64_t threads = worthwhile(a.threads, a.rows * a.outputs, EPILOGUE_GRAIN);
    return parallel_for(a.rows, threads, [&](int64_t begin, int64_t end) -> int {
        for (int64_t m = begin; m < end; ++m) scaled(a, a.acc + m * a.outputs, m, 0, a.outputs);
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
