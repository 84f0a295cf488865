"""C++ kernels for CPUs, called through ctypes; loaded on first use. Contracts stand in `quamba_kernels/__init__.py`.

Every op checks shapes, dtypes and devices before it calls C: ValueError or TypeError naming the tensor. Calls that
autograd has to see go to the reference, as do sizes that the library doesn't take. `linear`, `w8_linear` and
`embedding` are torch's.
"""

from quamba_kernels.cpu.conv import causal_conv1d
from quamba_kernels.cpu.library import available, force_variant, instruction_set, threads, variants, why_not
from quamba_kernels.cpu.linear import int8_matmul, w4a8_linear, w8a8_linear
from quamba_kernels.cpu.rows import hadamard, quantize, quantize_per_token, rms_norm
from quamba_kernels.cpu.scan import selective_scan
from quamba_kernels.cpu.ssd import ssd_scan

__all__ = [
    "available",
    "causal_conv1d",
    "force_variant",
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
    "w4a8_linear",
    "w8a8_linear",
    "why_not",
]
