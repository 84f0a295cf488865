"""Mamba1's selective scan."""

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
from quamba_kernels.cpu.library import ScanArgs, call, empty, pointer, threads, tokens
from quamba_kernels.reference.state import load_state, store_state

MAX_STATE = 256


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
    check("u", u, FLOATS_OR_INT8, -1, -1, -1)
    batch, length, channels = u.shape
    check("A", A, FLOATS, channels, -1)
    states = A.shape[1]
    check("dt", dt, FLOATS, batch, length, channels)
    check("B", B, FLOATS, batch, length, states)
    check("C", C, FLOATS, batch, length, states)
    check("z", z, FLOATS_OR_INT8, batch, length, channels)
    check_state(state, state_scale, batch, channels, states)
    if mask is not None:
        check("mask", mask, BOOL, batch, length)
        mask = mask.contiguous()
    u_scale, u_scale_stride = code_scale("u", u, u_scale, channels)
    z_scale, z_scale_stride = code_scale("z", z, z_scale, channels)
    D, dt_bias = float_vector("D", D, channels), float_vector("dt_bias", dt_bias, channels)
    if not 1 <= states <= MAX_STATE or needs_grad(u, dt, A, B, C, D, z, dt_bias, u_scale, z_scale):
        return reference.selective_scan(
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
    y = empty(batch, length, channels)
    if y.numel() == 0:
        return y
    args = ScanArgs(u_scale_stride=u_scale_stride, z_scale_stride=z_scale_stride, threads=threads())
    args.batch, args.length, args.channels, args.states = batch, length, channels, states
    args.u_is_int8, args.z_is_int8 = u.dtype == torch.int8, z.dtype == torch.int8
    u, dt, A, B, C, z = tokens(u), tokens(dt), A.float().contiguous(), tokens(B), tokens(C), tokens(z)
    work = None if state is None else load_state(state, state_scale).contiguous()
    args.u, args.u_batch_stride, args.u_token_stride = pointer(u), u.stride(0), u.stride(1)
    args.z, args.z_batch_stride, args.z_token_stride = pointer(z), z.stride(0), z.stride(1)
    args.dt, args.dt_batch_stride, args.dt_token_stride = pointer(dt), dt.stride(0), dt.stride(1)
    args.B, args.B_batch_stride, args.B_token_stride = pointer(B), B.stride(0), B.stride(1)
    args.C, args.C_batch_stride, args.C_token_stride = pointer(C), C.stride(0), C.stride(1)
    args.A, args.D, args.dt_bias, args.y = pointer(A), pointer(D), pointer(dt_bias), pointer(y)
    args.u_scale, args.z_scale = pointer(u_scale), pointer(z_scale)
    args.state, args.mask = pointer(work), pointer(mask)
    call("selective_scan", args)
    if state is not None and work is not None and work.data_ptr() != state.data_ptr():
        store_state(work, state, state_scale)
    return y
