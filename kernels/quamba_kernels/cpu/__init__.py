"""C++ kernels for CPUs, called through ctypes; loaded on first use. Contracts stand in `quamba_kernels/__init__.py`.

Every op checks shapes, dtypes and devices before it calls C: ValueError or TypeError naming the tensor. Calls that
autograd has to see go to the reference, as do sizes that the library doesn't take. Packing and unpacking are
torch's, and so are the products of float and of weight-only linears over many rows, and on machines with VNNI those of
integer ones, if torch passes a self-test.
"""

from quamba_kernels.cpu.conv import causal_conv1d
from quamba_kernels.cpu.embedding import embedding
from quamba_kernels.cpu.library import available, force_variant, instruction_set, threads, variants, why_not
from quamba_kernels.cpu.linear import expand_int4, int8_matmul, linear, w4_linear, w4a8_linear, w8_linear, w8a8_linear
from quamba_kernels.cpu.recording import Recording, record
from quamba_kernels.cpu.rows import (
    gate,
    gated_rms_norm,
    hadamard,
    hadamard_per_token,
    quantize,
    quantize_per_token,
    rms_norm,
    rms_norm_per_token,
)
from quamba_kernels.cpu.scan import selective_scan
from quamba_kernels.cpu.ssd import ssd_scan

__all__ = [
    "Recording",
    "available",
    "causal_conv1d",
    "embedding",
    "expand_int4",
    "force_variant",
    "gate",
    "gated_rms_norm",
    "hadamard",
    "hadamard_per_token",
    "instruction_set",
    "int8_matmul",
    "linear",
    "quantize",
    "quantize_per_token",
    "record",
    "rms_norm",
    "rms_norm_per_token",
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
