"""Mamba2's scan: the recurrence, which here beats the reference's products over chunks at every length."""

import math

import torch
from torch import Tensor

from quamba_kernels import reference
from quamba_kernels.checks import (
    BOOL,
    FLOATS,
    FLOATS_OR_INT8,
    check,
    check_state,
    code_scale,
    float_vector,
    needs_grad,
)
from quamba_kernels.cpu.library import SsdArgs, call, empty, pointer, threads, tokens
from quamba_kernels.cpu.scan import MAX_STATE
from quamba_kernels.reference.state import load_state, store_state


def _channels(name: str, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """x `[B, L, *, *]` as `[B, L, channels]`, its scale, and the stride of that."""
    flat = tokens(x.flatten(2))
    return flat, *code_scale(name, flat, scale, flat.shape[2])


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
    check("x", x, FLOATS_OR_INT8, -1, -1, -1, -1)
    batch, length, heads, width = x.shape
    check("B", B, FLOATS_OR_INT8, batch, length, -1, -1)
    groups, states = B.shape[2:]
    check("C", C, FLOATS_OR_INT8, batch, length, groups, states)
    check("dt", dt, FLOATS, batch, length, heads)
    check("D", D, FLOATS, *((heads, width) if D.dim() == 2 else (heads,)))
    if groups == 0 or heads % groups:
        raise ValueError(f"B: {groups} groups can't share {heads} heads")
    check_state(state, state_scale, batch, heads, width, states)
    if mask is not None:
        check("mask", mask, BOOL, batch, length)
        mask = mask.contiguous()
    A, dt_bias = float_vector("A", A, heads), float_vector("dt_bias", dt_bias, heads)
    tensors = (x, dt, A, B, C, D, dt_bias, x_scale, B_scale, C_scale)
    if not 1 <= states <= MAX_STATE or needs_grad(*tensors):
        return reference.ssd_scan(
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
    y = empty(batch, length, heads, width)
    if y.numel() == 0:
        return y
    args = SsdArgs(dt_min=dt_limit[0], dt_max=dt_limit[1], D_per_channel=D.dim() == 2, threads=threads())
    args.batch, args.length, args.heads, args.width = batch, length, heads, width
    args.groups, args.states = groups, states
    x, x_scale, args.x_scale_stride = _channels("x", x, x_scale)
    B, B_scale, args.B_scale_stride = _channels("B", B, B_scale)
    C, C_scale, args.C_scale_stride = _channels("C", C, C_scale)
    args.x_is_int8, args.B_is_int8, args.C_is_int8 = (t.dtype == torch.int8 for t in (x, B, C))
    dt, D = tokens(dt), D.float().contiguous()
    work = None if state is None else load_state(state, state_scale).contiguous()
    args.x, args.x_batch_stride, args.x_token_stride = pointer(x), x.stride(0), x.stride(1)
    args.B, args.B_batch_stride, args.B_token_stride = pointer(B), B.stride(0), B.stride(1)
    args.C, args.C_batch_stride, args.C_token_stride = pointer(C), C.stride(0), C.stride(1)
    args.dt, args.dt_batch_stride, args.dt_token_stride = pointer(dt), dt.stride(0), dt.stride(1)
    args.A, args.D, args.dt_bias, args.y = pointer(A), pointer(D), pointer(dt_bias), pointer(y)
    args.x_scale, args.B_scale, args.C_scale = pointer(x_scale), pointer(B_scale), pointer(C_scale)
    args.state, args.mask = pointer(work), pointer(mask)
    call("ssd_scan", args)
    if state is not None and work is not None and work.data_ptr() != state.data_ptr():
        store_state(work, state, state_scale)
    return y
