"""Mamba2's scan: a tile of tokens at a time as products (arXiv 2405.21060, section 6), or few tokens one by one. One token
alone is `steps`'.

A program has one head, or some of its channels, with all their states, and goes through one stretch of the sequence:
the whole of it or, when that makes too few programs for the device, one of several. Then, as in `recurrence`: 1. every
stretch makes a state from zero, and the total of its log decays; 2. the states at the cuts follow one from the other;
3. every stretch reads out y from its true start and its own tokens.
"""

import math

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
    product_precision,
    softplus,
    store_state,
    write_back,
)
from quamba_kernels.triton.steps import ssd_step

MAX_STATE = 256
FEW_TOKENS = 8  # from here on they are worth products
MOST_MULTIPLIED = 128  # states: the registers hold no products with more
TILE = 2048  # entries of B in a tile of tokens, half of the state entries of its program: more registers would spill
SMALL_TILE = 2048  # state entries of a program that multiplies no matrices
SHORTEST = 128  # tokens of a stretch


@triton.jit
def _load(t, scale, at, channel, inside, STRIDE: tl.constexpr):
    """float32 [T, C] of floats, or of codes with their scale; `at` [T] is where each token starts."""
    v = tl.load(t + at[:, None] + channel[None, :], mask=inside, other=0).to(tl.float32)
    if scale is not None:
        v = v * tl.load(scale + channel * STRIDE)[None, :]
    return v


@triton.jit
def _ssd(
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    mask,
    x_scale,
    B_scale,
    C_scale,
    start,
    end,
    scale,
    total,
    y,
    length,
    heads,
    width,
    states,
    stretch,
    shared,
    low,
    high,
    x_batch,
    x_token,
    dt_batch,
    dt_token,
    B_batch,
    B_token,
    C_batch,
    C_token,
    X_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    C_STRIDE: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """One stretch of one sequence, P channels of one head, T tokens at a time, states in N columns; `shared` heads have the
    same B and C.

    start, end: [B, stretches, heads, width, states], they may be the same; no start: zeros. scale: theirs when they are
    codes, one for each row. total [B, stretches, heads]: the sum of dt * A. y [B, length, heads, width]: None when only the
    end matters.
    """
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    p, n = tl.program_id(2) * P + tl.arange(0, P), tl.arange(0, N)
    p_inside, n_inside = p < width, n < states
    a, bias = tl.load(A + head), tl.load(dt_bias + head)
    if D_PER_CHANNEL:
        skip = tl.load(D + head * width + p, mask=p_inside, other=0.0)
    else:
        skip = tl.zeros([P], tl.float32) + tl.load(D + head)
    at = (batch * parts + part) * heads + head
    h = load_state(start, scale, at * width + p, n, p_inside, n_inside, states)
    elapsed = tl.zeros([1], tl.float32)
    # Channels and states beyond the last are read at 0, and masked.
    x_channel = tl.where(p_inside, head * width + p, 0)
    b_channel = tl.where(n_inside, head // shared * states + n, 0)
    i = tl.arange(0, T)
    first = part * stretch
    last = tl.minimum(first + stretch, length)
    for token in range(first, last, T):
        t = (token + i).to(tl.int64)
        inside = t < last
        keep = inside
        if mask is not None:
            keep = inside & (tl.load(mask + batch * length + t, mask=inside, other=0) != 0)
        d = softplus(tl.load(dt + batch * dt_batch + t * dt_token + head, mask=inside, other=0.0).to(tl.float32) + bias)
        d = tl.where(keep, tl.minimum(tl.maximum(d, low), high), 0.0)
        v = _load(x, x_scale, batch * x_batch + t * x_token, x_channel, keep[:, None] & p_inside[None, :], X_STRIDE)
        u = v * d[:, None]
        valid = inside[:, None] & n_inside[None, :]
        b = _load(B, B_scale, batch * B_batch + t * B_token, b_channel, valid, B_STRIDE)
        if y is not None:
            c = _load(C, C_scale, batch * C_batch + t * C_token, b_channel, valid, C_STRIDE)
        log_decay = d * a
        elapsed += tl.sum(log_decay, axis=0)
        if T == 1:
            h = tl.exp(log_decay)[:, None] * h + tl.trans(u) * b
            if y is not None:
                read = tl.sum(h * c, axis=1)[None, :]
        else:
            later = tl.where(i[:, None] > i[None, :], log_decay[:, None], 0.0)
            if y is not None:
                # 1. Inside the tile: decay[t, s] from s to t, summed without differences of large sums.
                decay = tl.where(i[:, None] >= i[None, :], tl.exp(tl.cumsum(later, axis=0)), 0.0)
                weights = tl.dot(c, tl.trans(b), input_precision=PRECISION) * decay
                read = tl.dot(weights, u, input_precision=PRECISION)
                # 2. From the state before it.
                from_start = tl.exp(tl.cumsum(log_decay, axis=0))
                read += tl.dot(c, tl.trans(h), input_precision=PRECISION) * from_start[:, None]
            # 3. The state after it.
            to_end = tl.exp(tl.sum(later, axis=0))
            added = tl.dot(tl.trans(u * to_end[:, None]), b, input_precision=PRECISION)
            h = tl.exp(tl.sum(log_decay, axis=0)) * h + added
        if y is not None:
            read += skip[None, :] * v
            to = y + ((batch * length + t[:, None]) * heads + head) * width + p[None, :]
            tl.store(to, read, mask=inside[:, None] & p_inside[None, :])
    if end is not None:
        tl.debug_barrier()  # start may be the same memory
        store_state(h, end, scale, at * width + p, n, p_inside, n_inside, states)
    if total is not None:
        tl.store(total + at + tl.arange(0, 1), elapsed)


@triton.jit
def _carry(ends, total, state, scale, heads, width, states, stretches, P: tl.constexpr, N: tl.constexpr):
    """Turn the ends of stretches that ran from zero into their starts, in place, and the state into the end of them all."""
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    p, n = tl.program_id(1) * P + tl.arange(0, P), tl.arange(0, N)
    p_inside, n_inside = p < width, n < states
    row = (batch * heads + head) * width + p
    h = load_state(state, scale, row, n, p_inside, n_inside, states)
    for part in range(stretches):
        at = (batch * stretches + part) * heads + head
        added = load_state(ends, None, at * width + p, n, p_inside, n_inside, states)
        decay = tl.exp(tl.load(total + at))
        tl.debug_barrier()  # what follows overwrites what was read
        store_state(h, ends, None, at * width + p, n, p_inside, n_inside, states)
        h = decay * h + added
    if state is not None:
        tl.debug_barrier()
        store_state(h, state, scale, row, n, p_inside, n_inside, states)


def stretches(length: int, programs: int, device: torch.device) -> int:
    """Into how many stretches to cut each sequence, when uncut they make so many programs: two for each processor."""
    return max(1, min(length // SHORTEST, 2 * processors(device) // programs))


def _channels(name: str, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """x `[B, L, *, *]` as `[B, L, channels]` with the last stride 1, its scale, and the stride of that."""
    flat = x.flatten(2)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    return flat, *code_scale(name, flat, scale, flat.shape[2], x.device)


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
    device = x.device
    check("x", x, FLOATS_OR_INT8, -1, -1, -1, -1, device=device)
    batch, length, heads, width = x.shape
    check("B", B, FLOATS_OR_INT8, batch, length, -1, -1, device=device)
    groups, states = B.shape[2:]
    check("C", C, FLOATS_OR_INT8, batch, length, groups, states, device=device)
    check("dt", dt, FLOATS, batch, length, heads, device=device)
    check("D", D, FLOATS, *((heads, width) if D.dim() == 2 else (heads,)), device=device)
    if groups == 0 or heads % groups:
        raise ValueError(f"B: {groups} groups can't share {heads} heads")
    check_state(state, state_scale, batch, heads, width, states, device=device)
    if mask is not None:
        check("mask", mask, BOOL, batch, length, device=device)
        mask = mask.contiguous()
    A, dt_bias = float_vector("A", A, heads, device), float_vector("dt_bias", dt_bias, heads, device)
    if not 1 <= states <= MAX_STATE or needs_grad(x, dt, A, B, C, D, dt_bias, x_scale, B_scale, C_scale):
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
    y = torch.empty(batch, length, heads, width, dtype=torch.float32, device=device)
    if y.numel() == 0:
        return y
    x, x_scale, x_stride = _channels("x", x, x_scale)
    B, B_scale, B_stride = _channels("B", B, B_scale)
    C, C_scale, C_stride = _channels("C", C, C_scale)
    dt = dt if dt.stride(-1) == 1 else dt.contiguous()
    mask = None if mask is None else mask.view(torch.int8)
    work, scale = (None if t is None else t.contiguous() for t in (state, state_scale))
    D = D.float().contiguous()
    if length == 1 and mask is None:
        scales, steps = (x_scale, B_scale, C_scale), (x_stride, B_stride, C_stride)
        ssd_step(x, dt, A, B, C, D, dt_bias, work, scale, *scales, y, states, groups, dt_limit, steps)
        write_back(work, state)
        write_back(scale, state_scale)
        return y
    N = power_of_two(states)
    if length <= FEW_TOKENS or N > MOST_MULTIPLIED:
        T, P = 1, min(power_of_two(width), SMALL_TILE // N)
    else:  # matrix products take no axis below 16
        N = max(16, N)
        T, P = (max(16, min(power_of_two(axis), 32, most // N)) for axis, most in ((length, TILE), (width, 2 * TILE)))
    tiles = cdiv(width, P)
    stretch = cdiv(cdiv(length, stretches(length, batch * heads * tiles, device)), T) * T
    count = cdiv(length, stretch)
    inputs = (dt, A, B, C, D, dt_bias, mask, x_scale, B_scale, C_scale)
    limits = (float(dt_limit[0]), float(dt_limit[1]))
    strides = [s for t in (x, dt, B, C) for s in t.stride()[:2]]
    constants = (x_stride, B_stride, C_stride, D.dim() == 2, product_precision(), T, P, N)
    shape = (length, heads, width, states, stretch, heads // groups, *limits, *strides, *constants)
    on_amd = product_precision() == "ieee"
    warps, stages = (4, 1) if on_amd or T == 1 else (8, 2)  # that spilled the fewest registers, as compiled
    grid, options = (batch * heads, count, tiles), {"num_warps": warps, "num_stages": stages, **FUSED}
    if count == 1:
        launch(_ssd, grid, x, *inputs, work, work, scale, None, y, *shape, **options)
    else:
        cuts = torch.empty(batch, count, heads, width, states, dtype=torch.float32, device=device)
        total = torch.empty(batch, count, heads, dtype=torch.float32, device=device)
        launch(_ssd, grid, x, *inputs, None, cuts, None, total, None, *shape, **options)
        rows = min(power_of_two(width), SMALL_TILE // N)
        carry = (heads, width, states, count, rows, N)
        launch(_carry, (batch * heads, cdiv(width, rows)), cuts, total, work, scale, *carry, **FUSED)
        launch(_ssd, grid, x, *inputs, cuts, None, None, None, y, *shape, **options)
    write_back(work, state)
    write_back(scale, state_scale)
    return y
