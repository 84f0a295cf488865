// int4 weights to int8 codes in memory.
#include "int4.h"
#include "ops.h"
#include "parallel.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t GRAIN = 1 << 16;  // weights that are worth a thread

}  // namespace

int expand(const quamba_linear_args &a) {
    const Int4 w(a);
    const int64_t width = w.groups * a.group;
    const int64_t threads = worthwhile(a.threads, a.outputs * a.inputs, GRAIN);
    return parallel_for(a.outputs, threads, [&](int64_t begin, int64_t end) -> int {
        auto *padded = static_cast<int8_t *>(scratch(width));
        if (!padded && width > 0) return QUAMBA_OUT_OF_MEMORY;
        for (int64_t n = begin; n < end; ++n) {
            int8_t *out = a.codes + n * a.inputs;
            expand_row(w, n, false, width == a.inputs ? out : padded);
            if (width > a.inputs) std::memcpy(out, padded, static_cast<size_t>(a.inputs));
        }
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
