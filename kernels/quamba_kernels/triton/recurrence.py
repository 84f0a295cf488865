"""Mamba1's selective scan: token by token in registers, over one stretch of the sequence or over many at once. One token alone
is `steps`'.

A stretch that doesn't know the state before it runs from zero; what it makes of a state h is then known too, because
the recurrence is linear: exp(A * sum of dt) * h + the end from zero. So with few sequences each is cut into stretches:
1. all run from zero and keep only their ends; 2. the states at the cuts follow one from the other; 3. all run again from
their true starts and write y.
"""

import torch
import triton
import triton.language as tl
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
from quamba_kernels.triton.common import (
    FUSED,
    cdiv,
    launch,
    load_state,
    power_of_two,
    processors,
    silu,
    softplus,
    store_state,
    write_back,
)
from quamba_kernels.triton.steps import scan_step

MAX_STATE = 256
TILE = 1024  # state entries of a program
SHORTEST = 64  # tokens of a stretch


@triton.jit
def _scan(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    mask,
    u_scale,
    z_scale,
    start,
    end,
    scale,
    total,
    y,
    length,
    channels,
    states,
    stretch,
    u_batch,
    u_token,
    z_batch,
    z_token,
    dt_batch,
    dt_token,
    B_batch,
    B_token,
    C_batch,
    C_token,
    U_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    I: tl.constexpr,
    N: tl.constexpr,
):
    """One stretch of one sequence, I channels with all their states in N columns.

    start, end: [B, stretches, channels, states], they may be the same; no start: zeros. scale: theirs when they are codes, one
    for each row. total [B, stretches, channels]: the sum of dt. y: None when only the end matters.
    """
    batch, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i, n = tl.program_id(2) * I + tl.arange(0, I), tl.arange(0, N)
    inside, n_inside = i < channels, n < states
    row = (batch * parts + part) * channels + i
    a = load_state(A, None, i.to(tl.int64), n, inside, n_inside, states)
    bias = tl.load(dt_bias + i, mask=inside, other=0.0)
    skip = tl.load(D + i, mask=inside, other=0.0)
    if u_scale is not None:
        us = tl.load(u_scale + i * U_STRIDE, mask=inside, other=0.0)
    if z_scale is not None:
        zs = tl.load(z_scale + i * Z_STRIDE, mask=inside, other=0.0)
    h = load_state(start, scale, row, n, inside, n_inside, states)
    elapsed = tl.zeros([I], tl.float32)
    first = part * stretch
    for token in range(first, tl.minimum(first + stretch, length)):
        t = tl.cast(token, tl.int64)
        d = softplus(tl.load(dt + batch * dt_batch + t * dt_token + i, mask=inside, other=0.0).to(tl.float32) + bias)
        v = tl.load(u + batch * u_batch + t * u_token + i, mask=inside, other=0).to(tl.float32)
        if u_scale is not None:
            v = v * us
        if mask is not None:
            keep = tl.load(mask + batch * length + t).to(tl.float32)
            d = d * keep
            v = v * keep
        b = tl.load(B + batch * B_batch + t * B_token + n, mask=n_inside, other=0.0).to(tl.float32)
        h = tl.exp(d[:, None] * a) * h + (d * v)[:, None] * b[None, :]
        elapsed += d
        if y is not None:
            c = tl.load(C + batch * C_batch + t * C_token + n, mask=n_inside, other=0.0).to(tl.float32)
            g = tl.load(z + batch * z_batch + t * z_token + i, mask=inside, other=0).to(tl.float32)
            if z_scale is not None:
                g = g * zs
            read = (tl.sum(h * c[None, :], axis=1) + skip * v) * silu(g)
            tl.store(y + (batch * length + t) * channels + i, read, mask=inside)
    if end is not None:
        tl.debug_barrier()  # start may be the same memory
        store_state(h, end, scale, row, n, inside, n_inside, states)
    if total is not None:
        tl.store(total + row, elapsed, mask=inside)


@triton.jit
def _carry(ends, total, A, state, scale, channels, states, stretches, I: tl.constexpr, N: tl.constexpr):
    """Turn the ends of stretches that ran from zero into their starts, in place, and the state into the end of them all."""
    batch = tl.program_id(0).to(tl.int64)
    i, n = tl.program_id(1) * I + tl.arange(0, I), tl.arange(0, N)
    inside, n_inside = i < channels, n < states
    a = load_state(A, None, i.to(tl.int64), n, inside, n_inside, states)
    h = load_state(state, scale, batch * channels + i, n, inside, n_inside, states)
    for part in range(stretches):
        row = (batch * stretches + part) * channels + i
        added = load_state(ends, None, row, n, inside, n_inside, states)
        elapsed = tl.load(total + row, mask=inside, other=0.0)
        tl.debug_barrier()  # what follows overwrites what was read
        store_state(h, ends, None, row, n, inside, n_inside, states)
        h = tl.exp(elapsed[:, None] * a) * h + added
    if state is not None:
        tl.debug_barrier()
        store_state(h, state, scale, batch * channels + i, n, inside, n_inside, states)


def stretches(length: int, programs: int, device: torch.device) -> int:
    """Into how many stretches to cut each sequence, when uncut they make so many programs: four for each processor."""
    return max(1, min(length // SHORTEST, 4 * processors(device) // programs))


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
    device = u.device
    check("u", u, FLOATS_OR_INT8, -1, -1, -1, device=device)
    batch, length, channels = u.shape
    check("A", A, FLOATS, channels, -1, device=device)
    states = A.shape[1]
    check("dt", dt, FLOATS, batch, length, channels, device=device)
    check("B", B, FLOATS, batch, length, states, device=device)
    check("C", C, FLOATS, batch, length, states, device=device)
    check("z", z, FLOATS_OR_INT8, batch, length, channels, device=device)
    check_state(state, state_scale, batch, channels, states, device=device)
    if mask is not None:
        check("mask", mask, BOOL, batch, length, device=device)
        mask = mask.contiguous()
    u_scale, u_stride = code_scale("u", u, u_scale, channels, device)
    z_scale, z_stride = code_scale("z", z, z_scale, channels, device)
    D, dt_bias = float_vector("D", D, channels, device), float_vector("dt_bias", dt_bias, channels, device)
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
    y = torch.empty(batch, length, channels, dtype=torch.float32, device=device)
    if y.numel() == 0:
        return y
    u, dt, B, C, z = (t if t.stride(-1) == 1 else t.contiguous() for t in (u, dt, B, C, z))
    A = A.float().contiguous()
    mask = None if mask is None else mask.view(torch.int8)
    work, scale = (None if t is None else t.contiguous() for t in (state, state_scale))
    if length == 1 and mask is None:
        scan_step(u, dt, A, B, C, D, z, dt_bias, work, scale, u_scale, z_scale, y, (u_stride, z_stride))
        write_back(work, state)
        write_back(scale, state_scale)
        return y
    N = power_of_two(states)
    I = min(power_of_two(channels), max(1, TILE // N))
    tiles = cdiv(channels, I)
    count = stretches(length, batch * tiles, device)
    stretch = cdiv(length, count)
    count = cdiv(length, stretch)
    inputs = (dt, A, B, C, D, z, dt_bias, mask, u_scale, z_scale)
    strides = [s for t in (u, z, dt, B, C) for s in t.stride()[:2]]
    shape = (length, channels, states, stretch, *strides, u_stride, z_stride, I, N)
    grid = (batch, count, tiles)
    if count == 1:
        launch(_scan, grid, u, *inputs, work, work, scale, None, y, *shape, **FUSED)
    else:
        cuts = torch.empty(batch, count, channels, states, dtype=torch.float32, device=device)
        total = torch.empty(batch, count, channels, dtype=torch.float32, device=device)
        launch(_scan, grid, u, *inputs, None, cuts, None, total, None, *shape, **FUSED)
        launch(_carry, (batch, tiles), cuts, total, A, work, scale, channels, states, count, I, N, **FUSED)
        launch(_scan, grid, u, *inputs, cuts, None, None, None, y, *shape, **FUSED)
    write_back(work, state)
    write_back(scale, state_scale)
    return y
