"""C++ kernels for CPUs, called through ctypes; loaded on first use. Contracts stand in `quamba_kernels/__init__.py`.

Every op checks shapes, dtypes and devices before it calls C: ValueError or TypeError naming the tensor. Calls that
autograd has to see go to the reference, as do sizes that the library doesn't take. `linear`, `embedding`, packing and
unpacking are torch's, and so are the products of weight-only linears over many rows.
"""

from quamba_kernels.cpu.conv import causal_conv1d
from quamba_kernels.cpu.library import available, force_variant, instruction_set, threads, variants, why_not
from quamba_kernels.cpu.linear import expand_int4, int8_matmul, w4_linear, w4a8_linear, w8_linear, w8a8_linear
from quamba_kernels.cpu.rows import gated_rms_norm, hadamard, quantize, quantize_per_token, rms_norm
from quamba_kernels.cpu.scan import selective_scan
from quamba_kernels.cpu.ssd import ssd_scan

__all__ = [
    "available",
    "causal_conv1d",
    "expand_int4",
    "force_variant",
    "gated_rms_norm",
    "hadamard",
    "instruction_set",
    "int8_matmul",
    "quantize",
    "quantize_per_token",
    "rms_norm",
    "selective_scan",
    "ssd_scan",
    "threads",
    "variants",
    "w4_linear",
    "w4a8_linear",
    "w8_linear",
    "w8a8_linear",
    "why_not",
]
