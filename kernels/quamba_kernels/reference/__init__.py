"""The definition of right: every op in plain torch, on any device. Contracts stand in `quamba_kernels/__init__.py`."""

from quamba_kernels.reference.conv import causal_conv1d
from quamba_kernels.reference.embedding import embedding
from quamba_kernels.reference.hadamard import hadamard, hadamard_per_token
from quamba_kernels.reference.int4 import expand_int4, pack_int4, unpack_int4, w4_linear, w4a8_linear
from quamba_kernels.reference.linear import int8_matmul, linear, w8_linear, w8a8_linear
from quamba_kernels.reference.norm import gate, gated_rms_norm, rms_norm, rms_norm_per_token
from quamba_kernels.reference.rounding import quantize, quantize_per_token
from quamba_kernels.reference.scan import selective_scan
from quamba_kernels.reference.ssd import ssd_scan

__all__ = [
    "causal_conv1d",
    "embedding",
    "expand_int4",
    "gate",
    "gated_rms_norm",
    "hadamard",
    "hadamard_per_token",
    "int8_matmul",
    "linear",
    "pack_int4",
    "quantize",
    "quantize_per_token",
    "rms_norm",
    "rms_norm_per_token",
    "selective_scan",
    "ssd_scan",
    "unpack_int4",
    "w4_linear",
    "w4a8_linear",
    "w8_linear",
    "w8a8_linear",
]
