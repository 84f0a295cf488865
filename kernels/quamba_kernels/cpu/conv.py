"""Causal convolution with SiLU and optional requantization."""

import torch
from torch import Tensor

from quamba_kernels import reference
from quamba_kernels.checks import (
    BOOL,
    FLOAT32,
    FLOATS,
    FLOATS_OR_INT8,
    INT8,
    check,
    float_vector,
    needs_grad,
    vector,
)
from quamba_kernels.cpu.library import ConvArgs, call, empty, pointer, threads, tokens

MAX_TAPS = 64


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
    check("x", x, FLOATS_OR_INT8, -1, -1, -1)
    (batch, length, channels), dtype = x.shape, x.dtype
    integer = dtype == torch.int8
    check("weight", weight, INT8 if integer else FLOATS, channels, -1)
    taps = weight.shape[1]
    if state is not None:
        check("state", state, (dtype,), batch, channels, taps - 1)
    if mask is not None:
        check("mask", mask, BOOL, batch, length)
        mask = mask.contiguous()
    if integer != (x_scale is not None) or integer != (weight_scale is not None):
        raise ValueError("x_scale and weight_scale: both belong to int8 codes, neither to floats")
    if taps < 1:
        raise ValueError("weight: no taps")
    if taps > MAX_TAPS or needs_grad(x, weight, bias, x_scale, weight_scale, inv):
        return reference.causal_conv1d(
            x, weight, bias, state=state, mask=mask, x_scale=x_scale, weight_scale=weight_scale, inv=inv
        )

    args = ConvArgs(is_int8=integer, batch=batch, length=length, channels=channels, taps=taps, threads=threads())
    out = empty(batch, length, channels, dtype=torch.float32 if inv is None else torch.int8)
    if x_scale is not None and weight_scale is not None:
        x_scale, args.x_scale_stride = vector("x_scale", x_scale, channels)
        check("weight_scale", weight_scale, FLOAT32, channels)
        weight_scale = weight_scale.contiguous()
        args.x_scale, args.weight_scale = pointer(x_scale), pointer(weight_scale)
    if bias is not None:
        bias = float_vector("bias", bias, channels)
    if inv is None:
        args.y = pointer(out)
    else:
        inv, args.inv_stride = vector("inv", inv, channels)
        args.inv, args.codes = pointer(inv), pointer(out)
    if out.numel() > 0:
        x, weight = tokens(x), tokens(weight).contiguous()
        work = None if state is None else tokens(state).contiguous()
        args.x, args.x_batch_stride, args.x_token_stride = pointer(x), x.stride(0), x.stride(1)
        args.weight, args.bias, args.mask = pointer(weight), pointer(bias), pointer(mask)
        args.state = pointer(work) if taps > 1 else None
        call("causal_conv1d", args)
        if state is not None and work is not None and work.data_ptr() != state.data_ptr():
            state.copy_(work)
    return out if integer or inv is not None else out.to(dtype)
