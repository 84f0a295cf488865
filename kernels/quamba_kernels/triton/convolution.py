"""Causal convolution with SiLU and optional requantization; in a recorded token (see `fusion`) with the product after it."""

import torch
import triton
import triton.language as tl
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
from quamba_kernels.triton.common import EXACT, cdiv, last_to_arrive, launch, power_of_two, silu, to_codes
from quamba_kernels.triton.matmul import finish, low, times_group

MAX_TAPS = 64


@triton.jit
def _conv(
    x,
    weight,
    bias,
    state,
    mask,
    x_scale,
    weight_scale,
    inv,
    out,
    length,
    channels,
    length_tiles,
    x_batch,
    x_token,
    s_batch,
    s_channel,
    s_tap,
    X_SCALE_STRIDE: tl.constexpr,
    INV_STRIDE: tl.constexpr,
    SUM: tl.constexpr,
    TAPS: tl.constexpr,
    PAST: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
):
    """A tile of T >= TAPS - 1 tokens and C channels, out [B, length, channels]. Only the first tile of a sequence reads the
    state, and it alone writes it. PAST is TAPS - 1 rounded up to a power of two; SUM int32 or float32."""
    batch = (tl.program_id(0) // length_tiles).to(tl.int64)
    tile = tl.program_id(0) % length_tiles
    t = tile * T + tl.arange(0, T)
    c = tl.program_id(1) * C + tl.arange(0, C)
    c_inside = c < channels
    xs = x + batch * x_batch + c[None, :]
    acc = tl.zeros([T, C], SUM)
    for k in tl.static_range(TAPS):
        at = t + (k - (TAPS - 1))
        there = (at >= 0) & (at < length)
        if mask is not None:
            there = there & (tl.load(mask + batch * length + at, mask=there, other=0) != 0)
        token = xs + at.to(tl.int64)[:, None] * x_token
        v = tl.load(token, mask=there[:, None] & c_inside[None, :], other=0).to(SUM)
        if state is not None:
            past = state + batch * s_batch + c[None, :] * s_channel + (at + (TAPS - 1))[:, None] * s_tap
            v += tl.load(past, mask=(at < 0)[:, None] & c_inside[None, :], other=0).to(SUM)
        acc += v * tl.load(weight + c * TAPS + k, mask=c_inside, other=0).to(SUM)[None, :]

    y = acc.to(tl.float32)
    if weight_scale is not None:
        y = y * tl.load(weight_scale + c, mask=c_inside, other=0.0)[None, :]
        y = y * tl.load(x_scale + c * X_SCALE_STRIDE, mask=c_inside, other=0.0)[None, :]
    if bias is not None:
        y = y + tl.load(bias + c, mask=c_inside, other=0.0)[None, :]
    y = silu(y)
    if mask is not None:
        y = tl.where((tl.load(mask + batch * length + t, mask=t < length, other=0) != 0)[:, None], y, 0.0)
    if inv is not None:
        codes = to_codes(y, tl.load(inv + c * INV_STRIDE, mask=c_inside, other=0.0)[None, :])
    else:
        codes = y.to(out.dtype.element_ty)
    to = out + (batch * length + t)[:, None] * channels + c[None, :]
    tl.store(to, codes, mask=(t < length)[:, None] & c_inside[None, :])

    if state is not None:  # noqa: SIM102 (known when compiling, unlike the tile)
        if tile == 0:
            place = tl.arange(0, PAST)
            came = (
                length - (TAPS - 1) + place
            )  # the token that comes to stand here; below 0 it stands in the state already
            known = (came >= 0) & (place < TAPS - 1)
            if mask is not None:
                known = known & (tl.load(mask + batch * length + came, mask=known, other=0) != 0)
            read = xs + came.to(tl.int64)[:, None] * x_token
            new = tl.load(read, mask=known[:, None] & c_inside[None, :], other=0)
            base = state + batch * s_batch + c[None, :] * s_channel
            stays = (came < 0) & (place < TAPS - 1)
            old = tl.load(base + (came + (TAPS - 1))[:, None] * s_tap, mask=stays[:, None] & c_inside[None, :], other=0)
            tl.debug_barrier()  # every thread has read the old state
            moved = tl.where((came < 0)[:, None], old, new)
            tl.store(base + place[:, None] * s_tap, moved, mask=(place < TAPS - 1)[:, None] & c_inside[None, :])


@triton.jit
def conv_token(
    x,
    weight,
    bias,
    state,
    x_scale,
    weight_scale,
    inv,
    out,
    batch,
    c,
    inside,
    channels,
    x_batch,
    s_batch,
    s_channel,
    s_tap,
    X_SCALE_STRIDE: tl.constexpr,
    INV_STRIDE: tl.constexpr,
    SUM: tl.constexpr,
    TAPS: tl.constexpr,
):
    """The convolution of one token, TAPS > 1: for rows `batch` and channels c, both vectors, what is written to out
    [B, channels], 0 where it isn't inside. The state moves on."""
    known = c < channels
    base = state + batch[:, None] * s_batch + c[None, :] * s_channel
    acc = tl.zeros(inside.shape, SUM)
    for k in tl.static_range(TAPS):
        if k < TAPS - 1:
            v = tl.load(base + k * s_tap, mask=inside, other=0)
        else:
            v = tl.load(x + batch[:, None] * x_batch + c[None, :], mask=inside, other=0)
        acc += v.to(SUM) * tl.load(weight + c * TAPS + k, mask=known, other=0).to(SUM)[None, :]
        tl.debug_barrier()  # every thread has read what is overwritten now
        if k > 0:
            tl.store(base + (k - 1) * s_tap, v, mask=inside)
    y = acc.to(tl.float32)
    if weight_scale is not None:
        y = y * tl.load(weight_scale + c, mask=known, other=0.0)[None, :]
        y = y * tl.load(x_scale + c * X_SCALE_STRIDE, mask=known, other=0.0)[None, :]
    if bias is not None:
        y = y + tl.load(bias + c, mask=known, other=0.0)[None, :]
    y = silu(y)
    if inv is not None:
        v = to_codes(y, tl.load(inv + c * INV_STRIDE, mask=known, other=0.0)[None, :])
    else:
        v = tl.where(inside, y, 0.0).to(out.dtype.element_ty)
    tl.store(out + batch[:, None] * channels + c[None, :], v, mask=inside)
    return v


@triton.jit
def conv_product(
    x,
    conv_weight,
    conv_bias,
    state,
    conv_x_scale,
    conv_scale,
    conv_inv,
    conved,
    weight,
    group_scale,
    x_scale,
    weight_scale,
    bias,
    inv,
    out,
    parts,
    arrived,
    rows,
    channels,
    outputs,
    columns,
    x_batch,
    s_batch,
    s_channel,
    s_tap,
    w_stride,
    groups,
    CONV_X_SCALE_STRIDE: tl.constexpr,
    CONV_INV_STRIDE: tl.constexpr,
    CONV_SUM: tl.constexpr,
    TAPS: tl.constexpr,
    X_SCALE_STRIDE: tl.constexpr,
    INV_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    T: tl.constexpr,
    SUM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The convolution of one token, conved [rows, channels], times weight [outputs, columns].T: each program takes BM rows and
    BK columns of the weight with their channels; the last of some rows to arrive adds all parts [programs, rows, outputs].
    For the other arguments see `matmul`."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_inside = (m < rows)[:, None]
    column = tl.program_id(1) * BK + tl.arange(0, BK)
    column_inside = column < columns
    HALF: tl.constexpr = GROUP // 2
    c = column if GROUP == 0 else column // HALF * GROUP + column % HALF
    a = conv_token(
        x,
        conv_weight,
        conv_bias,
        state,
        conv_x_scale,
        conv_scale,
        conv_inv,
        conved,
        m,
        c,
        m_inside & (column_inside & (c < channels))[None, :],
        channels,
        x_batch,
        s_batch,
        s_channel,
        s_tap,
        CONV_X_SCALE_STRIDE,
        CONV_INV_STRIDE,
        CONV_SUM,
        TAPS,
    ).to(T)
    if GROUP > 0:
        c += HALF
        b = conv_token(
            x,
            conv_weight,
            conv_bias,
            state,
            conv_x_scale,
            conv_scale,
            conv_inv,
            conved,
            m,
            c,
            m_inside & (column_inside & (c < channels))[None, :],
            channels,
            x_batch,
            s_batch,
            s_channel,
            s_tap,
            CONV_X_SCALE_STRIDE,
            CONV_INV_STRIDE,
            CONV_SUM,
            TAPS,
        ).to(T)
    part = tl.cast(rows, tl.int64) * outputs
    for start in range(0, outputs, BN):
        n = start + tl.arange(0, BN)
        inside = (n < outputs)[None, :] & column_inside[:, None]
        row = n.to(tl.int64)[None, :]
        w = tl.load(weight + row * w_stride + column[:, None], mask=inside, other=0)
        if GROUP == 0:
            acc = tl.dot(a, w.to(T), input_precision="ieee", out_dtype=SUM)
        else:
            g = tl.load(group_scale + row * groups + (column // HALF)[:, None], mask=inside, other=0)
            acc = tl.dot(a, times_group(low(w), g, T), input_precision="ieee", out_dtype=SUM)
            acc = tl.dot(b, times_group(w >> 4, g, T), acc, input_precision="ieee", out_dtype=SUM)
        at = m[:, None] * outputs + n[None, :]
        tl.store(parts + tl.program_id(1) * part + at, acc, mask=m_inside & (n < outputs)[None, :])
    if last_to_arrive(arrived + tl.program_id(0), tl.num_programs(1)):
        for start in range(0, outputs, BN):
            n = start + tl.arange(0, BN)
            inside, at = m_inside & (n < outputs)[None, :], m[:, None] * outputs + n[None, :]
            acc = tl.zeros([BM, BN], SUM)
            for split in range(tl.num_programs(1)):
                acc += tl.load(parts + split * part + at, mask=inside, other=0, cache_modifier=".cg")
            finish(
                acc,
                m,
                n,
                rows,
                outputs,
                outputs,
                x_scale,
                weight_scale,
                bias,
                inv,
                out,
                None,
                X_SCALE_STRIDE,
                INV_STRIDE,
            )


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
    device = x.device
    check("x", x, FLOATS_OR_INT8, -1, -1, -1, device=device)
    (batch, length, channels), dtype = x.shape, x.dtype
    integer = dtype == torch.int8
    check("weight", weight, INT8 if integer else FLOATS, channels, -1, device=device)
    taps = weight.shape[1]
    if state is not None:
        check("state", state, (dtype,), batch, channels, taps - 1, device=device)
    if mask is not None:
        check("mask", mask, BOOL, batch, length, device=device)
    if integer != (x_scale is not None) or integer != (weight_scale is not None):
        raise ValueError("x_scale and weight_scale: both belong to int8 codes, neither to floats")
    if taps < 1:
        raise ValueError("weight: no taps")
    x_scale_stride = inv_stride = 0
    if x_scale is not None and weight_scale is not None:
        x_scale, x_scale_stride = vector("x_scale", x_scale, channels, device)
        check("weight_scale", weight_scale, FLOAT32, channels, device=device)
        weight_scale = weight_scale.contiguous()
    if bias is not None:
        bias = float_vector("bias", bias, channels, device)
    if inv is not None:
        inv, inv_stride = vector("inv", inv, channels, device)
    if taps > MAX_TAPS or needs_grad(x, weight, bias, x_scale, weight_scale, inv):
        return reference.causal_conv1d(
            x, weight, bias, state=state, mask=mask, x_scale=x_scale, weight_scale=weight_scale, inv=inv
        )
    kind = torch.int8 if inv is not None else torch.float32 if integer else dtype
    out = torch.empty(batch, length, channels, dtype=kind, device=device)
    if out.numel() == 0:
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    if taps == 1:
        state = None
    if mask is not None:
        mask = mask.contiguous().view(torch.int8)
    T, C = power_of_two(max(taps - 1, min(length, 32))), min(power_of_two(channels), 128)
    tiles = cdiv(length, T)
    sizes = (length, channels, tiles, x.stride(0), x.stride(1), *(state.stride() if state is not None else (0, 0, 0)))
    shape = (x_scale_stride, inv_stride, tl.int32 if integer else tl.float32, taps, power_of_two(taps - 1), T, C)
    tensors = (weight.contiguous(), bias, state, mask, x_scale, weight_scale, inv, out)
    launch(_conv, (batch * tiles, cdiv(channels, C)), x, *tensors, *sizes, *shape, **EXACT)
    return out
