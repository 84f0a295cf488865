"""Kernels for quantized state space models: the contract of every op, and the one place that picks a backend.

Letters: B batch, L tokens, C channels, M rows (B*L), K inputs, N outputs; in scans I is d_inner, N is d_state, and
Mamba2 has H heads of P channels (I = H*P) in G groups.
Layouts: activations are token-major `[..., channels]`; weights `[out, in]` row-major.

Numbers (all backends): integers are symmetric int8. `scale` turns a code into a real (`real = code * scale`); `inv` turns
a real into a code: `code = rint(clamp(real * inv, -128, 127))`, half to even, always saturating. A scale or inv is float32,
either a 0-d tensor or a vector over the last axis. An op given `inv` returns int8 codes; without it, a float tensor.

int4 weights: `weight[n, k] = weight_scale[n] * group_scale[n, k // group] * q[n, k]`, q in [-8, 7] and group 32, 64 or 128.
group_scale `[N, groups]` is either int8, a multiplier of at most 15 in magnitude (with larger ones integer products are
undefined), so that `group_scale * q` is an int8 code itself, or float16. q is stored as two's complement in `packed`, uint8
`[N, groups * group / 2]`: byte j of a group has element j in its low half, element j + group/2 in its high half; the last
group is padded with zeros. The group size follows from the shapes: `2 * packed.shape[1] / groups`. Shapes that don't fit
are a ValueError.

States of the scans: `state` is the start, overwritten in place with the end; zeros, and discarded, when None. It is float32;
or float16, saturated at 65504; or int8 codes with `state_scale`, float32 of state's shape without its last axis, the N
entries of a row: read with the codes and rewritten with them, `scale = absmax/127`, `inv = 127/max(absmax, 1e-10)`. The
recurrence runs in float32 whatever they are, and a row is rounded once a call, at its end. A call without tokens changes
nothing. A state_scale without int8 codes, or these without it, is a ValueError.

Backends agree in three classes: int32 accumulators and gathers bit for bit; int8 codes rounded from floats at most 1
apart, in at most 0.1 % of elements; floats within the tolerance named beside the op.

Backends: `reference/` (torch, any device, the definition of right), `cpu/` (C++, optional) and `triton/` (CUDA and ROCm
devices, optional). An op that a backend lacks falls through to the reference.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quamba_kernels import reference

__all__ = [
    "backend",
    "backend_name",
    "causal_conv1d",
    "describe",
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
    "record",
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

BACKENDS = ("auto", "reference", "cpu", "triton")
_forced = "auto"


def _cpu_backend() -> ModuleType | None:
    from quamba_kernels import cpu

    return cpu if cpu.available() else None


def _triton_backend() -> ModuleType | None:
    from quamba_kernels import triton

    return triton if triton.available() else None


def _pick(device_type: str, forced: str) -> ModuleType:
    if device_type == "cuda" and forced in ("auto", "triton"):  # torch calls ROCm devices so, too
        return _triton_backend() or reference
    if device_type == "cpu" and forced == "triton":
        if (backend := _triton_backend()) is None or not backend.interpreting():
            raise RuntimeError(
                "the triton backend takes tensors in main memory only in its interpreter: move them to a GPU, "
                "or set TRITON_INTERPRET=1 before Python starts"
            )
        return backend
    if device_type == "cpu" and forced != "reference":
        return _cpu_backend() or reference
    return reference


@functools.cache
def _resolve(name: str, device_type: str, forced: str) -> Callable:
    backend = _pick(device_type, forced)
    return getattr(backend if name in backend.__all__ else reference, name)


def _op(name: str, device: torch.device) -> Callable:
    return _resolve(name, device.type, _forced)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the enclosed calls on one backend: `auto` (by device), `reference`, `cpu` or `triton`.

    Tensors on devices that it doesn't serve go to the reference; those in main memory that `triton` doesn't serve are a
    RuntimeError. Raises ValueError for an unknown name, RuntimeError when the compiled library, or triton, is asked for
    and can't be loaded.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "cpu" and _cpu_backend() is None:
        from quamba_kernels import cpu

        raise RuntimeError(f"the cpu backend is not available: {cpu.why_not()}")
    if name == "triton" and _triton_backend() is None:
        from quamba_kernels import triton

        raise RuntimeError(f"the triton backend is not available: {triton.why_not()}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend_name(device: torch.device | str = "cpu") -> str:
    """Name of the backend that ops on `device` run on now: `reference` or `cpu`."""
    return _pick(torch.device(device).type, _forced).__name__.rsplit(".", 1)[-1]


def describe(device: torch.device | str = "cpu") -> str:
    """One line for people: which backend runs on `device`, and why not a faster one."""
    from quamba_kernels import cpu, triton

    device = torch.device(device)
    name = backend_name(device)
    if name == "triton":
        return f"Triton kernels ({'interpreter, ' if triton.interpreting() else ''}triton {triton.version()})"
    if name == "cpu":
        count = cpu.threads()
        return f"C++ kernels ({cpu.instruction_set()}, {count} thread{'s' if count > 1 else ''})"
    if device.type == "cpu" and _forced == "auto":
        return f"torch reference kernels ({cpu.why_not()})"
    if device.type == "cuda" and _forced == "auto":
        return f"torch reference kernels ({triton.why_not()})"
    return "torch reference kernels"


def record(function: Callable[[], Tensor], inputs: Sequence[Tensor], moving: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """`function()`, and a recording of the kernel calls that it made, or a text that says why there is none.

    The recording's `run(moving)` does them again on the same memory, without Python between them, and returns a new
    result. inputs: the tensors outside the function whose contents change between runs; moving: those
    at whose places others of the same shape, strides and dtype may stand, such as states. All else that the function reads
    must stay as it is.
    """
    device = inputs[0].device
    backend = _pick(device.type, _forced)
    if not hasattr(backend, "record"):
        return function(), f"{describe(device)} can't be recorded"
    return backend.record(function, inputs, moving)


def quantize(x: Tensor, inv: Tensor) -> Tensor:
    """Codes of `x [..., C]` for `inv` (0-d or `[C]`): int8 `[..., C]`."""
    return _op("quantize", x.device)(x, inv)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic codes: int8 `[..., C]` and scale float32 `[..., 1]`; `scale = absmax/127`, `inv = 127/max(absmax, 1e-10)`."""
    return _op("quantize_per_token", x.device)(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Float `x [..., K] @ weight[N, K].T + bias`, computed in `weight.dtype` (accumulated in float32)."""
    return _op("linear", x.device)(x, weight, bias)


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Exact int32 accumulators `[M, N]` of int8 codes `x [M, K]` and `weight [N, K]`; any K below 2**31 / 2**14."""
    return _op("int8_matmul", x.device)(x, weight)


def w8a8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    """Integer linear: `(float(acc) * weight_scale[n]) * x_scale[m] + bias[n]`, float32, or int8 codes when `inv` is given.

    x int8 `[..., K]`; x_scale float32, 0-d (per tensor) or `[..., 1]` (per token); weight int8 `[N, K]`;
    weight_scale float32 `[N]`; bias float32 `[N]`; inv 0-d or `[N]`.
    """
    return _op("w8a8_linear", x.device)(x, x_scale, weight, weight_scale, bias, inv)


def w8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, inv: Tensor | None = None
) -> Tensor:
    """Weight-only linear: float `x [..., K]` times int8 codes, then `* weight_scale[n] + bias[n]`; float32 or codes.

    Tolerance between backends: 1e-5 relative to the largest output.
    """
    return _op("w8_linear", x.device)(x, weight, weight_scale, bias, inv)


def pack_int4(codes: Tensor, group: int) -> Tensor:
    """int8 `[N, K]` in [-8, 7] to uint8 `[N, ceil(K / group) * group / 2]`.

    TypeError for another dtype, ValueError for codes out of range and groups other than 32, 64, 128.
    """
    return _op("pack_int4", codes.device)(codes, group)


def unpack_int4(packed: Tensor, inputs: int, group: int) -> Tensor:
    """The int8 `[N, inputs]` that were packed. ValueError when packed isn't that wide."""
    return _op("unpack_int4", packed.device)(packed, inputs, group)


def expand_int4(packed: Tensor, group_scale: Tensor, inputs: int) -> Tensor:
    """int8 `[N, inputs]` for integer products: `group_scale * q`, exact for int8 multipliers; for float16 scales rounded
    half to even and saturated. Scaled by `weight_scale[n]`, it is the weight."""
    return _op("expand_int4", packed.device)(packed, group_scale, inputs)


def w4a8_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    """Integer linear: `w8a8_linear` with the weight `expand_int4(packed, group_scale, K)`, bit for bit."""
    return _op("w4a8_linear", x.device)(x, x_scale, packed, group_scale, weight_scale, bias, inv)


def w4_linear(
    x: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    """Weight-only linear: `(x @ (group_scale * q).T) * weight_scale[n] + bias[n]`, where group_scale * q is exact in float32
    whatever group_scale's dtype; float32 or codes.

    x float `[..., K]`; weight_scale, bias float32 `[N]`; inv 0-d or `[N]`. Tolerance between backends: 1e-5 relative to the
    largest output.
    """
    return _op("w4_linear", x.device)(x, packed, group_scale, weight_scale, bias, inv)


def embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Rows of a table of V for ids `[...]`: `[..., D]`. Only the rows asked for are expanded.

    weight float `[V, D]`: rows as they are. int8 `[V, D]` with scale float32 `[V]`: float32 `code * scale`. uint8, packed
    int4, with scale, group_scale `[V, groups]` and width = D: float32 `(group_scale * q) * scale`. Any other combination is
    a TypeError.
    """
    return _op("embedding", ids.device)(ids, weight, scale, group_scale, width)


def rms_norm(x: Tensor, weight: Tensor, eps: float, inv: Tensor | None = None) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last axis, in float32; returned in `weight.dtype` or as codes."""
    return _op("rms_norm", x.device)(x, weight, eps, inv)


def rms_norm_per_token(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`quantize_per_token(rms_norm(x, weight.float(), eps))`."""
    return _op("rms_norm_per_token", x.device)(x, weight, eps)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    groups: int = 1,
    norm_before_gate: bool = False,
    *,
    z_scale: Tensor | None = None,
) -> Tensor:
    """Mamba2's norm with its gate (arXiv 2405.21060, section 7.1), in float32; returned in `weight.dtype`:

        norm(x * silu(z)) * weight           or, with norm_before_gate,  norm(x) * weight * silu(z)
        norm(v) = v * rsqrt(mean(v^2) + eps), the mean over each of `groups` equal runs of channels

    x `[..., I]` float; z float or int8 codes with z_scale (0-d or `[I]`); weight `[I]`; I a multiple of groups.
    Tolerance between backends: 1e-5 relative to the largest output.
    """
    return _op("gated_rms_norm", x.device)(x, z, weight, eps, groups, norm_before_gate, z_scale=z_scale)


def gate(x: Tensor, z: Tensor, *, z_scale: Tensor | None = None) -> Tensor:
    """`x * silu(z)` in float32. x `[..., C]` float; z float or int8 codes with z_scale (0-d or `[C]`).

    Tolerance between backends: 1e-6 relative to the largest output.
    """
    return _op("gate", x.device)(x, z, z_scale=z_scale)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution over tokens, then SiLU.

    x `[B, L, C]` and weight `[C, K]`, oldest tap first, are both float, or both int8 codes with x_scale (0-d or `[C]`)
    and weight_scale `[C]`; anything else is a TypeError. bias float `[C]`. Integers are accumulated exactly and
    dequantized as `(float(acc) * weight_scale) * x_scale`. state `[B, C, K-1]` in x's dtype, oldest first: read as the
    tokens before x and overwritten in place with the last K-1 tokens. mask bool `[B, L]`: a False token enters as 0 and
    leaves as 0.
    Any split of a sequence over calls gives the same integers. Returns `[B, L, C]` (float32 for integer inputs).
    """
    return _op("causal_conv1d", x.device)(
        x, weight, bias, state=state, mask=mask, x_scale=x_scale, weight_scale=weight_scale, inv=inv
    )


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    *,
    state: Tensor | None = None,
    state_scale: Tensor | None = None,
    mask: Tensor | None = None,
    u_scale: Tensor | None = None,
    z_scale: Tensor | None = None,
) -> Tensor:
    """Mamba1's selective scan with its gate (arXiv 2312.00752, eq. 2a-2b, Algorithm 2), in float32:

        dt_t = softplus(dt_t + dt_bias)                          (identity above 20)
        h_t  = exp(dt_t * A) * h_{t-1} + dt_t * B_t * u_t        [I, N]
        y_t  = (sum_n h_t[n] * C_t[n] + D * u_t) * silu(z_t)     [I]

    u, z `[B, L, I]`, float or int8 codes with u_scale / z_scale (0-d or `[I]`); dt `[B, L, I]`; A `[I, N]` (negative);
    B, C `[B, L, N]`; D, dt_bias `[I]`. state `[B, I, N]`, state_scale `[B, I]`: see above. mask bool `[B, L]`: a False token
    has u = 0 and dt = 0. Returns float32 `[B, L, I]`. Tolerance between backends and, with a float32 state, splits of the
    sequence over calls: 1e-5 relative to the largest output.
    """
    return _op("selective_scan", u.device)(
        u,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        state=state,
        state_scale=state_scale,
        mask=mask,
        u_scale=u_scale,
        z_scale=z_scale,
    )


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    state: Tensor | None = None,
    state_scale: Tensor | None = None,
    mask: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 256,
    x_scale: Tensor | None = None,
    B_scale: Tensor | None = None,
    C_scale: Tensor | None = None,
) -> Tensor:
    """Mamba2's scan (arXiv 2405.21060, section 6 and listing 1), without its gate, in float32:

        dt_t = clamp(softplus(dt_t + dt_bias), *dt_limit)               (softplus is the identity above 20)
        h_t  = exp(dt_t * A) * h_{t-1} + dt_t * x_t B_tᵀ                [H, P, N]
        y_t  = h_t C_t + D * x_t                                        [H, P]

    x `[B, L, H, P]`; dt `[B, L, H]`; A `[H]` (negative); B, C `[B, L, G, N]`, each shared by H/G successive heads;
    D `[H]` or `[H, P]`; dt_bias `[H]`; in any strides. All are float; x, B and C may be int8 codes with their scales, 0-d or
    `[H*P]`, `[G*N]` and `[G*N]`. state `[B, H, P, N]`, state_scale `[B, H, P]`: see above. mask bool `[B, L]`: a False token
    has x = 0 and dt = 0, whatever dt_limit. chunk_size: tokens that a backend may work on at once; it changes the speed, not
    the result. Returns float32 `[B, L, H, P]`. Tolerance between backends, chunk sizes and, with a float32 state, splits of
    the sequence over calls: 1e-5 relative to the largest output.
    """
    return _op("ssd_scan", x.device)(
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        state=state,
        state_scale=state_scale,
        mask=mask,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
        x_scale=x_scale,
        B_scale=B_scale,
        C_scale=C_scale,
    )


def hadamard(x: Tensor, outer: Tensor | None, blocks: int = 1, inv: Tensor | None = None) -> Tensor:
    """`x Hᵀ` over the last axis, `H = outer ⊗ H_{2^k}` (outer's index is the slow one), divided by sqrt of its order.

    x float `[..., n]`; outer float32 `[m, m]` of +-1, or None for m = 1; `blocks` > 1 means `I_blocks ⊗ H` instead, each
    block of n / blocks entries normalised by itself. Float32 inside; returned in x's dtype, or as codes when `inv` is given.
    """
    return _op("hadamard", x.device)(x, outer, blocks, inv)


def hadamard_per_token(x: Tensor, outer: Tensor | None, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """`quantize_per_token(hadamard(x.float(), outer, blocks))`."""
    return _op("hadamard_per_token", x.device)(x, outer, blocks)
