"""Triton kernels for NVIDIA (sm_80 and later) and AMD CDNA. Contracts stand in `quamba_kernels/__init__.py`.

`OPS` says which ops are here; triton is imported when the first of them is asked for. Every op checks shapes, dtypes and
devices before it launches: ValueError or TypeError naming the tensor. Calls that autograd has to see go to the
reference, as do sizes that the kernels don't take.

With TRITON_INTERPRET=1 in the environment before triton is imported, the kernels run in Triton's interpreter, also on
tensors in main memory: slowly, for tests.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OPS = {
    "causal_conv1d": "convolution",
    "embedding": "lookup",
    "gate": "rows",
    "gated_rms_norm": "rows",
    "hadamard": "rotation",
    "hadamard_per_token": "rotation",
    "int8_matmul": "products",
    "linear": "products",
    "quantize": "rows",
    "quantize_per_token": "rows",
    "rms_norm": "rows",
    "rms_norm_per_token": "rows",
    "selective_scan": "recurrence",
    "ssd_scan": "duality",
    "w4_linear": "products",
    "w4a8_linear": "products",
    "w8_linear": "products",
    "w8a8_linear": "products",
}
"""The module of every op."""

__all__ = ["OPS", "available", "interpreting", "record", "version", "why_not", *OPS]


def __getattr__(name: str) -> Callable:
    if name in OPS:
        return getattr(importlib.import_module(f"{__name__}.{OPS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _problem() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as e:
        return f"triton can't be imported ({e}): pip install triton"
    if torch.cuda.is_available() and not torch.version.hip and (found := torch.cuda.get_device_capability()) < (8, 0):
        return f"the Triton kernels need a GPU of compute capability 8.0 or more, this one has {found[0]}.{found[1]}"
    return ""


def available() -> bool:
    """Whether triton is installed, and the GPU, if there is one, new enough. Never raises."""
    return not _problem()


def why_not() -> str:
    """Why `available()` is False, and what to do; empty when it is True."""
    return _problem()


def version() -> str:
    import triton

    return triton.__version__


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter, which takes tensors in main memory."""
    if not available():
        return False
    from triton import knobs

    return knobs.runtime.interpret


def record(function: Callable[[], Tensor], inputs: Sequence[Tensor], moving: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """As `quamba_kernels.record`; the recording is a CUDA graph."""
    from quamba_kernels.triton import recording

    return recording.record(function, inputs, moving)
