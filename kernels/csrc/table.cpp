// One instruction set's kernels.
#include "ops.h"

#define QUAMBA_JOIN_(a, b) a##b
#define QUAMBA_JOIN(a, b) QUAMBA_JOIN_(a, b)

namespace quamba {

extern const Kernels QUAMBA_JOIN(kernels_, QUAMBA_ISA);
const Kernels QUAMBA_JOIN(kernels_, QUAMBA_ISA) = {
    QUAMBA_ISA::linear,         QUAMBA_ISA::epilogue,   QUAMBA_ISA::float_linear, QUAMBA_ISA::expand,
    QUAMBA_ISA::conv,           QUAMBA_ISA::scan,       QUAMBA_ISA::ssd,          QUAMBA_ISA::quantize,
    QUAMBA_ISA::rms_norm,       QUAMBA_ISA::gated_norm, QUAMBA_ISA::hadamard,     QUAMBA_ISA::dense,
    QUAMBA_ISA::elementwise,    QUAMBA_ISA::embedding,  QUAMBA_ISA::exp2_array,   QUAMBA_ISA::exp_array,
    QUAMBA_ISA::softplus_array, QUAMBA_ISA::silu_array,
};

}  // namespace quamba
