// What stands between the large ops: copies, sums and products of a few tensors, and rows of a table.
#include "half.h"
#include "int4.h"
#include "ops.h"
#include "parallel.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t GRAIN = 1 << 14;  // elements that are worth a thread
constexpr int INNER = QUAMBA_AXES - 1;

struct Operand {
    const void *p;
    int64_t kind, at, stride;

    F16 read(int64_t i, int64_t lanes) const {
        if (stride == 1) return load_kind(p, kind, at + i, lanes);
        float some[LANES] = {};
        for (int64_t j = 0; j < (stride ? lanes : 1); ++j) {
            float one[LANES];
            store(one, load_kind(p, kind, at + (i + j) * stride, 1));
            some[j] = one[0];
        }
        return stride ? load(some) : splat(some[0]);
    }
};

void line(const quamba_elementwise_args &a, int64_t a_at, int64_t b_at, int64_t y_at) {
    const Operand left = {a.a, a.a_kind, a_at, a.a_stride[INNER]}, right = {a.b, a.b_kind, b_at, a.b_stride[INNER]};
    const int64_t step = a.y_stride[INNER];
    by_lanes(a.size[INNER], [&](int64_t i, int64_t lanes) {
        F16 y = left.read(i, lanes);
        if (a.op == QUAMBA_ADD) y = y + right.read(i, lanes);
        if (a.op == QUAMBA_MULTIPLY) y = y * right.read(i, lanes);
        if (a.y_kind == QUAMBA_FLOAT32 && step == 1) return store(static_cast<float *>(a.y) + y_at + i, y, lanes);
        float all[LANES];
        store(all, y);
        for (int64_t j = 0; j < lanes; ++j) store_one(a.y, a.y_kind, y_at + (i + j) * step, all[j]);
    });
}

void row(const quamba_embedding_args &a, const Int4 &int4, int64_t m, int8_t *codes) {
    const int64_t id = a.ids[m];
    if (a.kind != QUAMBA_INT8) {
        const int64_t bytes = a.width * (a.kind == QUAMBA_FLOAT32 ? 4 : 2);
        std::memcpy(static_cast<char *>(a.y) + m * bytes, static_cast<const char *>(a.table) + id * bytes,
                    static_cast<size_t>(bytes));
        return;
    }
    const bool by_group = a.group && a.group_scale_is_float;
    if (a.group) expand_row(int4, id, by_group, codes);
    const int8_t *q = a.group ? codes : static_cast<const int8_t *>(a.table) + id * a.width;
    const int64_t run = by_group ? a.group : a.width;
    float *y = static_cast<float *>(a.y) + m * a.width;
    for (int64_t k0 = 0, g = 0; k0 < a.width; k0 += run, ++g)
        by_lanes(a.width - k0 < run ? a.width - k0 : run, [&](int64_t i, int64_t lanes) QUAMBA_BODY {
            F16 v = load_integers(q + k0 + i, lanes);
            if (by_group) v = v * splat(static_cast<const float *>(a.group_scale)[id * int4.groups + g]);
            store(y + k0 + i, v * splat(a.scale[id]), lanes);
        });
}

}  // namespace

int elementwise(const quamba_elementwise_args &a) {
    const int64_t lines = a.size[0] * a.size[1] * a.size[2];
    const int64_t threads = worthwhile(a.threads, lines * a.size[INNER], GRAIN);
    return parallel_for(lines, threads, [&](int64_t begin, int64_t end) -> int {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t at[INNER] = {i / (a.size[1] * a.size[2]), i / a.size[2] % a.size[1], i % a.size[2]};
            int64_t left = 0, right = 0, out = 0;
            for (int d = 0; d < INNER; ++d)
                left += at[d] * a.a_stride[d], right += at[d] * a.b_stride[d], out += at[d] * a.y_stride[d];
            line(a, left, right, out);
        }
        return QUAMBA_OK;
    });
}

int embedding(const quamba_embedding_args &a) {
    for (int64_t m = 0; m < a.rows; ++m)
        if (a.ids[m] < 0 || a.ids[m] >= a.entries) return QUAMBA_NO_SUCH_ENTRY;
    quamba_linear_args packed = {};
    packed.weight = a.table, packed.group = a.group, packed.inputs = a.width;
    packed.group_scale = a.group_scale, packed.group_scale_is_float = a.group_scale_is_float;
    const Int4 int4(packed);
    return parallel_for(a.rows, worthwhile(a.threads, a.rows * a.width, GRAIN), [&](int64_t begin, int64_t end) -> int {
        auto *codes = static_cast<int8_t *>(scratch(a.width + 128));
        if (!codes) return QUAMBA_OUT_OF_MEMORY;
        for (int64_t m = begin; m < end; ++m) row(a, int4, m, codes);
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
